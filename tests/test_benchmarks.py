import inspect
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxguide as jg
from benchmarks import choosing, convolution, gpu, memory, pictures, products, roofline, startup, tasks, timing
from jaxguide.nn.convolution import convolve

ROOT = Path(__file__).parent.parent
NO_BENCHMARKS = {"__init__", "__main__", "canvas", "gallery", "networks", "peers", "timing"}


def test_the_entry_lists_every_benchmark():
  made = subprocess.run([sys.executable, "-m", "benchmarks"], cwd=ROOT, capture_output=True, text=True, check=True)
  listed = {line.split()[0] for line in made.stdout.splitlines()[1:]}
  assert listed == {path.stem for path in ROOT.glob("benchmarks/*.py")} - NO_BENCHMARKS


def test_an_unknown_benchmark_is_one_sentence_that_names_the_nearest():
  made = subprocess.run(
    [sys.executable, "-m", "benchmarks", "samplin"], cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert made.returncode == 1
  assert "sampling" in made.stderr
  assert "Traceback" not in made.stderr


def test_every_figure_has_a_command_and_a_page():
  files = {path.stem for path in pictures.FOLDER.glob("*")}
  of_tasks = re.findall(r'FIGURES / "([\w-]+)\.png"', inspect.getsource(tasks))
  assert files == {*pictures.FIGURES, *of_tasks}
  pages = "".join(page.read_text() for page in ROOT.glob("docs/*.md"))
  assert not [name for name in files if f"](figures/{name}.png)" not in pages]
  assert sum(path.stat().st_size for path in pictures.FOLDER.glob("*")) < 2e6


def test_an_unknown_figure_is_named():
  with pytest.raises(ValueError, match="saturation"):
    pictures.main("saturations")


@pytest.mark.slow
def test_programs_of_sampling_are_lowered():
  """They call what `sample_batch` compiles, which is not public."""
  assert "stablehlo" in memory.sampling_program(2, 1, 8).as_text()
  assert "stablehlo" in startup.sampling_program("64x64", 2, 1).as_text()


def test_help_lists_the_benchmarks():
  listed = subprocess.run(
    [sys.executable, "-m", "benchmarks", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
  )

  assert "  unet" in listed.stdout


def test_ratios_are_those_of_the_rounds():
  # One round was slow for both: their ratio does not see it, that of the medians would.
  seconds = {"ours": [1.0, 10.0, 1.0, 4.0], "theirs": [2.0, 20.0, 2.0, 8.0]}
  ours, theirs = timing.summary(seconds, "ours")
  assert (ours["/ ours"], theirs["/ ours"]) == (1.0, 2.0)
  assert (ours["ms"], theirs["ms"]) == (2500.0, 5000.0)


def test_measuring_takes_turns():
  turns = []
  seconds = timing.measure({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, rounds=2)
  assert turns == ["a", "b"] * 3
  assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_a_report_is_printed_and_written(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(timing, "RESULTS", tmp_path / "results")
  timing.report("some", {"title": [{"run": "a", "ms": 1234.5}, {"run": "b", "share": 0.12345}]}, ["a fact"])
  printed = capsys.readouterr().out
  assert "| run | ms | share |\n| --- | --- | --- |\n| a | 1234 |  |\n| b |  | 0.123 |" in printed
  written = json.loads((tmp_path / "results" / "some.json").read_text())
  assert written["tables"]["title"][0] == {"run": "a", "ms": 1234.5}
  assert written["facts"] == ["a fact"]
  assert written["versions"]["jax"]


PROGRAM = """
%body (p: (bf16[4,8])) -> (bf16[4,8]) {
  %x = bf16[4,8]{1,0} parameter(0)
  %w = bf16[8,8]{1,0} parameter(1)
  %dot.1 = (bf16[4,8]{1,0}, s8[4096]{0}) custom-call(%x, %w), custom_call_target="__cublas$lt$matmul"
  %got = bf16[4,8]{1,0} get-tuple-element(%dot.1), index=0
  %fusion.1 = f32[4,8]{1,0} fusion(%got, %x), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/while/body/add"}
  ROOT %called = f32[4]{0} call(%fusion.1), to_apply=%graph
}

%graph (q: f32[4,8]) -> f32[4] {
  %q = f32[4,8]{1,0} parameter(0)
  ROOT %reduce_fusion = f32[4]{0} fusion(%q), kind=kInput, calls=%fused.1
}

ENTRY %main (a: bf16[8,8]) -> f32[4] {
  %a = f32[8,8]{1,0} parameter(0)
  %hoisted = bf16[8,8]{1,0} fusion(%a), kind=kLoop, calls=%fused.2, metadata={op_name="jit(f)/while/body/convert"}
  ROOT %loop = f32[4]{0} while(%hoisted), condition=%condition, body=%body
}
"""


def test_bytes_of_a_program_are_those_of_its_kernels():
  sizes = {row["kind"]: row["GB"] * 1e9 for row in roofline.traffic(PROGRAM)}
  x, w, out, sums = 2 * 4 * 8, 2 * 8 * 8, 4 * 4 * 8, 4 * 4
  wanted = {"matrix products": 2 * x + w, "elementwise": 2 * x + out, "sums and elementwise": out + sums}
  assert sizes == pytest.approx({**wanted, "all": sum(wanted.values()), "the least": 2 * x + w})
  once = {row["kind"]: row["GB"] * 1e9 for row in roofline.traffic(PROGRAM, once=True)}
  assert once == pytest.approx({"elementwise": 4 * 8 * 8 + w, "all": 4 * 8 * 8 + w, "the least": 0})


def test_a_report_of_a_gpu_puts_the_cases_together(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(timing, "RESULTS", tmp_path / "results")
  folder = tmp_path / "gpu"
  folder.mkdir()
  found = [
    {"case": "ceilings", "facts": {"TFLOP/s": 800.0}},
    {"case": "ADM-64", "ms a step": 40.0, "TFLOP/s": 400.0, "batch": 64, "facts": {"GB moved": 50.0}},
    {"case": "ADM-64/PyTorch", "ms a step": 80.0, "TFLOP/s": 200.0, "batch": 64, "facts": {}},
    {"case": "training", "error": "RuntimeError: out of memory", "facts": {}},
  ]
  for number, data in enumerate(found):
    (folder / f"{number}.json").write_text(json.dumps(data))
  gpu.main("report", str(folder))
  printed = capsys.readouterr().out
  assert "| ADM-64 | 64 | 40 | 400 | 50% | 1 |" in printed
  assert "| ADM-64/PyTorch | 64 | 80 | 200 | 25% | 2 |" in printed
  assert "training failed: RuntimeError: out of memory" in printed


def test_the_script_for_a_gpu_is_sound_and_names_cases_that_there_are():
  script = ROOT / "benchmarks" / "on_gpu.sh"
  subprocess.run(["bash", "-n", script], check=True)
  with pytest.raises(ValueError, match="ADM-64"):
    gpu.main("ADM-63")


def test_a_benchmark_describes_itself_and_its_arguments():
  run = [sys.executable, "-m", "benchmarks", "growth", "--help"]
  printed = subprocess.run(run, cwd=ROOT, check=True, capture_output=True, text=True).stdout
  assert printed.startswith("How the cost of sampling grows")
  assert "guidance, devices), or all" in printed


def test_the_walks_of_choosing_are_those_of_sample_batch():
  """They have a loop of their own, so that a solver is compiled once for every number of steps."""
  ring, cond = jg.ring(4), np.arange(5) % 4
  guided, solver, sigmas = jg.classifier_free(4, 2.0)(ring.denoiser), jg.DPMpp2MSDE(), jg.karras(6)
  made = types.SimpleNamespace(
    labels=cond, cond=cond, settings=types.SimpleNamespace(seed=0), sigmas=sigmas, solver=solver, denoiser=guided,
    image_shape=(2,),
  )  # fmt: skip
  x, _ = choosing.walked(made, per_batch=3)
  same = jg.sample_batch(guided, jax.random.key(0), cond, shape=(2,), sigmas=sigmas, solver=solver)
  np.testing.assert_allclose(x, same, rtol=1e-4, atol=1e-5)


def test_the_distances_of_choosing_are_per_pixel_with_their_interval():
  exact = np.zeros((2, 2, 2, 1))
  x = np.stack([np.full((2, 2, 1), 0.3), np.full((2, 2, 1), 0.4), np.full((2, 2, 1), 9.0)])  # the third is not compared
  found = choosing.distance(x, exact)
  assert found["distance"] == pytest.approx(np.sqrt((0.09 + 0.16) / 2), rel=1e-3)
  assert (found["distance_low"], found["distance_high"]) == pytest.approx((0.3, 0.4))


@pytest.mark.parametrize(("stride", "padding"), [(1, None), (2, None), (2, (0, 1))])
def test_what_convolutions_are_compared_with_can_take_their_place(stride, padding):
  assert [*inspect.signature(convolution.derived).parameters] == [*inspect.signature(convolve).parameters]
  rng = np.random.default_rng(0)
  x, kernel = (jax.numpy.asarray(rng.standard_normal(shape, np.float32)) for shape in ((2, 8, 8, 3), (3, 3, 3, 4)))
  ours = convolve(x, kernel, stride, padding)
  np.testing.assert_allclose(convolution.derived(x, kernel, stride, padding), ours, atol=1e-5)


def test_products_of_a_convolution_have_its_operations():
  shapes = convolution.as_products(np.zeros((2, 8, 8, 3)), np.zeros((2, 8, 8, 5)))
  for first, second in shapes.values():
    assert first[1] == second[0]
    assert first[0] * first[1] * second[1] == 2 * 8 * 8 * 9 * 3 * 5


def test_products_of_all_gradients_are_found():
  """Of a convolution: itself, its gradient for the kernel, and for the image; each with its operations."""
  x, kernel = np.zeros((2, 8, 8, 3), np.float32), np.zeros((3, 3, 3, 5), np.float32)
  gradient = jax.grad(lambda x, kernel: (convolve(x, kernel, 2) ** 2).sum(), (0, 1))
  found = dict(products.products(jax.make_jaxpr(gradient)(x, kernel).jaxpr))
  assert sorted(kind for kind, *_ in found) == ["convolution", "convolution", "weight gradient"]
  rates = {kind: products.operations({product: 1}) for product in found for kind in product[:1]}
  assert rates["weight gradient"] == 2 * (2 * 4 * 4 * 5) * 9 * 3
