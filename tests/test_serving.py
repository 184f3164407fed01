"""Exported samplers: the program draws what ``jaxguide sample`` draws, also where there is JAX alone."""

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import Classify, Mlp

from jaxguide import generate, models
from jaxguide.generate import Sampler, Settings, export_sampler
from jaxguide.models import Model, ModelConfig
from jaxguide.models.model import init_params

flatbuffers = pytest.importorskip("flatbuffers")

SHAPE, CLASSES, STEPS = (4, 4, 1), 3, 3
SERVING = Path(__file__).parent.parent / "docs" / "serving.md"


def save(folder, config, seed=0):
  params = init_params(config, jax.random.key(seed))
  models.save(folder, Model(config, params))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("models")
  names = ["ant", "bee", "cow"]
  save(folder / "denoiser", ModelConfig(Mlp, {}, SHAPE, CLASSES, class_names=names))
  save(folder / "weak", ModelConfig(Mlp, {"width": 4}, SHAPE, CLASSES), 1)
  save(folder / "classifier", ModelConfig(Classify, {}, SHAPE, CLASSES, class_names=names), 2)
  save(folder / "unconditional", ModelConfig(Mlp, {}, SHAPE, None), 3)
  return folder


@pytest.fixture(scope="module")
def exported(folder, tmp_path_factory):
  """A sampler by classifier-free guidance, and its settings."""
  path, settings = tmp_path_factory.mktemp("exported") / "sampler.jaxexport", Settings(folder / "denoiser", steps=STEPS)
  export_sampler(path, settings, platforms=["cpu"])
  return path, settings


def drawn(settings, **changed):
  """What ``jaxguide sample`` draws."""
  settings = dataclasses.replace(settings, **changed)
  with tempfile.TemporaryDirectory() as name:
    generate.run(f"{name}/drawn.npz", settings, progress=False, devices=jax.devices()[:1])
    return np.load(f"{name}/drawn.npz")["arr_0"]


def test_one_program_serves_all_that_are_arguments(exported):
  path, settings = exported
  sampler = Sampler(path)
  # Each number of samples is compiled, here and there.
  for num, label, scale, seed in ((3, 1, 2.0, 0), (3, 2, -1.5, 2**63 + 5), (1, 0, 7, 1)):
    expected = drawn(settings, num=num, labels=[label], scale=scale, seed=seed)
    np.testing.assert_array_equal(sampler(num, label, scale=scale, seed=seed), expected)
  several = drawn(settings, num=6, labels=[2, 0], scale=3.0, batch_size=3)
  np.testing.assert_array_equal(sampler(label=[2, 0] * 3, scale=3.0), several)
  np.testing.assert_array_equal(sampler(label=[0, 2, 0], scale=3.0, first=3), several[3:])
  assert sampler(label=0).shape == (1, *SHAPE)  # at the scale that is the default
  np.testing.assert_array_equal(sampler(label=0), sampler(label=0, scale=2.0))


@pytest.mark.parametrize(
  "options",
  [
    {"guidance": "classifier", "solver": "ddpm"},
    {"guidance": ("cfg:scale=1.5,combine=rescaled,phi=0.5", "classifier:scale=3"), "solver": "dpmpp-2m"},
    {"guidance": "cfg:profile=cfg++", "matmul_precision": "highest"},
    {"guidance": "none", "solver": "euler-ancestral"},
    {"guidance": "cfg:t_lo=0.1,t_hi=0.9,combine=projected,momentum=-0.5", "dtype": "bfloat16"},
  ],
  ids=lambda options: str(options["guidance"]),
)
def test_guidance_and_solvers(folder, tmp_path, options):
  settings = Settings(folder / "denoiser", steps=STEPS, **options)
  header = export_sampler(tmp_path / "s", settings, platforms=["cpu"])
  sampler, expected = Sampler(tmp_path / "s"), drawn(settings, num=2, labels=[2, 1])
  np.testing.assert_array_equal(sampler(label=[2, 1]), expected)
  if options["guidance"] == "none":
    assert "scale" not in header["arguments"]
  else:
    first = drawn(rescaled(settings), num=2, labels=[2])
    np.testing.assert_array_equal(sampler(label=[2, 2], scale=0.5), first)


def rescaled(settings):
  """The settings with scale 0.5 for the first guidance."""
  text, *more = settings.guidance
  return dataclasses.replace(settings, guidance=(re.sub(r"scale=[0-9.]+,?", "", text).rstrip(":"), *more), scale=0.5)


def test_autoguidance_and_models_without_classes(folder, tmp_path):
  settings = Settings(folder / "denoiser", steps=STEPS, guidance=f"autoguidance:weak={folder / 'weak'}")
  export_sampler(tmp_path / "weak", settings, platforms=["cpu"])
  np.testing.assert_array_equal(Sampler(tmp_path / "weak")(2, 1), drawn(settings, num=2, labels=[1]))
  settings = Settings(folder / "unconditional", steps=STEPS)
  header = export_sampler(tmp_path / "none", settings, platforms=["cpu"])
  assert {*header["arguments"]} == {"weights", "seed", "index"}
  np.testing.assert_array_equal(Sampler(tmp_path / "none")(3), drawn(settings, num=3))


def test_an_autoencoder_is_a_part_of_the_program(folder, tmp_path):
  fields = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}
  save(folder / "vae", ModelConfig("autoencoder_kl", fields, (8, 8, 3), None), 4)
  save(folder / "latent", ModelConfig(Mlp, {}, (4, 4, 4), CLASSES, encoder="latents"), 5)
  settings = Settings(folder / "latent", vae=folder / "vae", steps=STEPS)
  header = export_sampler(tmp_path / "s", settings, platforms=["cpu"])
  assert header["results"]["images"]["shape"] == ["batch", 8, 8, 3]
  images = Sampler(tmp_path / "s")(2, 1)
  assert images.std() > 1
  # `sample` decodes in a program of its own: a pixel can be rounded the other way.
  np.testing.assert_allclose(images.astype(int), drawn(settings, num=2, labels=[1]), atol=1)


def test_weights_in_a_file_of_their_own_and_a_fixed_batch(folder, exported, tmp_path):
  settings = exported[1]
  header = export_sampler(tmp_path / "s", settings, platforms=["cpu"], batch=2, weights=tmp_path / "w.npz")
  assert header["batch"] == 2
  with zipfile.ZipFile(tmp_path / "s") as archive:
    assert {*archive.namelist()} == {"header.json", "programs/cpu"}
  sampler = Sampler(tmp_path / "s", tmp_path / "w.npz")
  np.testing.assert_array_equal(sampler(2, 1), drawn(settings, num=2, labels=[1]))
  with pytest.raises(ValueError, match="draws 2 samples at a time, and 3"):
    sampler(3, 1)
  with pytest.raises(ValueError, match="give the weights"):
    Sampler(tmp_path / "s")
  with pytest.raises(ValueError, match="leave out weights"):
    Sampler(exported[0], tmp_path / "w.npz")
  other = dict(np.load(tmp_path / "w.npz"))
  other.popitem()
  np.savez(tmp_path / "w.npz", **other)
  with pytest.raises(ValueError, match="it has no"):
    Sampler(tmp_path / "s", tmp_path / "w.npz")


def test_each_platform_has_the_program_of_its_own(folder, tmp_path):
  """A UNet takes other forms on a CPU; what was traced for one platform is not kept for another, nor for later."""
  fields = {"model_channels": 8, "channel_mult": (1,), "num_res_blocks": 1, "num_head_channels": 8}
  save(folder / "unet", ModelConfig("unet", fields, (4, 4, 1), CLASSES))
  settings = Settings(folder / "unet", steps=2)
  backend = jax.default_backend
  header = export_sampler(tmp_path / "s", settings)
  assert jax.default_backend is backend
  assert [*header["platforms"]] == ["cpu", "cuda", "tpu"]
  file = np.load(tmp_path / "s")
  text = {name: jax.export.deserialize(bytearray(file[f"programs/{name}"])).mlir_module() for name in ("cpu", "tpu")}
  # `jaxguide.nn.layers` repeats by a matrix product on a CPU alone.
  assert text["cpu"].count("dot_general") > text["tpu"].count("dot_general")
  export_sampler(tmp_path / "again", settings, platforms=["tpu", "cpu"])
  assert np.load(tmp_path / "again")["programs/cpu"] == file["programs/cpu"]
  assert str(Path(jax.__file__).parent) not in text["cpu"]
  np.testing.assert_array_equal(Sampler(tmp_path / "s")(2, 1), drawn(settings, num=2, labels=[1]))
  with pytest.raises(ValueError, match="has programs for cpu, cuda, tpu, not for rocm"):
    Sampler(tmp_path / "s", platform="rocm")


def test_bad_arguments(exported):
  sampler = Sampler(exported[0])
  for message, arguments in (
    ("needs label", {}),
    ("label", {"label": 3}),
    ("label", {"label": -1}),
    ("scale must be finite", {"label": 0, "scale": float("nan")}),
    ("seed", {"label": 0, "seed": -1}),
    ("first", {"label": 0, "first": 2**32}),
    ("one for each of 3", {"label": [1, 2], "num": 3}),
  ):
    with pytest.raises((ValueError, TypeError), match=message):
      sampler(**arguments)
  # Without the checks, as where there is JAX alone.
  given = {"seed": np.zeros(2, np.uint32), "index": np.arange(3, dtype=np.uint32), "scale": np.float32(2)}
  results = sampler._call(sampler._weights, label=np.array([0, 3, -1], np.int32), **given)
  assert results["ok"].tolist() == [True, False, False]
  assert not results["images"][1:].any()


def test_bad_settings(folder, tmp_path):
  settings = Settings(folder / "denoiser", steps=STEPS)
  with pytest.raises(ValueError, match="unknown platform 'gpu'"):
    export_sampler(tmp_path / "s", settings, platforms=["gpu"])
  with pytest.raises(ValueError, match="one or more of cpu"):
    export_sampler(tmp_path / "s", settings, platforms=[])
  with pytest.raises(ValueError, match=r"ends in \.npz"):
    export_sampler(tmp_path / "s", settings, weights=tmp_path / "w.safetensors")
  with pytest.raises(ValueError, match="no cudnn_attention"):
    export_sampler(tmp_path / "s", dataclasses.replace(settings, dtype="bfloat16", cudnn_attention=True))
  with pytest.raises(ValueError, match="batch must be"):
    export_sampler(tmp_path / "s", settings, batch=0)
  assert not (tmp_path / "s").exists()


def test_damaged_files(exported, tmp_path):
  path = exported[0]
  content = path.read_bytes()
  with pytest.raises(FileNotFoundError):
    Sampler(tmp_path / "none")
  for name, damaged in (
    ("empty", b""),
    ("torn", content[: len(content) // 2]),
    ("text", b"not an archive"),
    ("flipped", content[:-3000].replace(b"StableHLO", b"StableHLo", 1) + content[-3000:]),
  ):
    (tmp_path / name).write_bytes(damaged)
    with pytest.raises(ValueError, match=r"damaged|no archive"):
      Sampler(tmp_path / name)
  np.savez(tmp_path / "other.npz", a=np.zeros(3))
  with pytest.raises(ValueError, match="no exported sampler"):
    Sampler(tmp_path / "other.npz")
  for change, message in (
    ({"version": 2}, "version 2, and this jaxguide reads 1"),
    ({"format": "another"}, "format"),
    ({"weights": 3}, "its weights are 3"),
    ({"platforms": {"tpu": {}}}, "has programs for tpu, not for cpu"),
  ):
    rewrite(path, tmp_path / "changed", lambda header, change=change: {**header, **change})
    with pytest.raises(ValueError, match=message):
      Sampler(tmp_path / "changed")
  rewrite(path, tmp_path / "changed", lambda header: header, {"programs/cpu": b"no program"})
  with pytest.raises(ValueError, match="cannot read; it was written by jax"):
    Sampler(tmp_path / "changed")


def rewrite(path, to, change, others=None):
  """Copy an archive with another header."""
  with zipfile.ZipFile(path) as old, zipfile.ZipFile(to, "w") as new:
    for name in old.namelist():
      content = (others or {}).get(name, old.read(name))
      new.writestr(name, json.dumps(change(json.loads(content))) if name == "header.json" else content)


ALONE = """
import sys
sys.path.append("packages")
SNIPPET
np.savez("images.npz", images=images, ok=ok)
print(*sys.modules)
"""
PACKAGES = ["jax", "jaxlib", "numpy", "numpy.libs", "scipy", "scipy.libs", "ml_dtypes", "opt_einsum", "flatbuffers"]


def test_the_page_shows_how_to_call_it_with_jax_alone(exported, tmp_path):
  path, settings = exported
  (tmp_path / "sampler.jaxexport").write_bytes(path.read_bytes())
  snippet = re.search(r"```python\n(import json.*?)```", SERVING.read_text(), re.DOTALL).group(1)
  snippet = snippet.replace("[2, 2, 9]", "[2, 2, 1]")
  (tmp_path / "packages").mkdir()
  for folder in map(Path, sys.path):
    for name in PACKAGES:
      if (folder / name).is_dir() and folder.is_absolute() and not (tmp_path / "packages" / name).exists():
        (tmp_path / "packages" / name).symlink_to(folder / name)
  # -S leaves out all that is installed, -I what PYTHONPATH says.
  code = ALONE.replace("SNIPPET", snippet)
  done = subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True, cwd=tmp_path, stdout=-1, text=True)
  roots = {name.partition(".")[0] for name in done.stdout.split()}
  assert "jax" in roots
  assert not roots & {"jaxguide", "flax", "orbax", "optax", "chex", "jaxtyping", "safetensors"}
  found = np.load(tmp_path / "images.npz")
  assert found["ok"].all()
  expected = [drawn(settings, num=3, labels=[label], scale=3.0)[row] for row, label in enumerate((2, 2, 1))]
  np.testing.assert_array_equal(found["images"], expected)
