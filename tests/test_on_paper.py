"""What is said about many chips: the rule against programs, published figures against the networks, and arithmetic."""

import jax
import pytest
from tiny import Mlp

from benchmarks import on_paper, scaling
from jaxguide.distributed import placement
from jaxguide.distributed.collectives import collectives, totals
from jaxguide.models.model import shapes
from jaxguide.training import ModelConfig
from jaxguide.training.describe import describe
from jaxguide.training.presets import preset

ADM, DIT, EDM2 = on_paper.NETWORKS
H100, TPU = on_paper.CHIPS
COUNTED = [(name, row) for name in ("scaling-cpu", "scaling-v5p") for row in scaling.compared(name)]


def test_the_rule_by_hand():
  # 100 bytes of parameters, 80 of them split. Over 4: 3/4 of a gather, twice 3/4 of what is all-reduced.
  assert scaling.sent(4, 1, 100, 80) == {"parameters": 0, "gradient": 150}
  assert scaling.sent(1, 4, 100, 80) == {"parameters": 120, "gradient": 60 + 30}
  assert scaling.sent(1, 4, 100, 80, gathers=1, scatter=False) == {"parameters": 60, "gradient": 120 + 30}
  # Parts of 40 bytes are all-reduced over data, the other 20 bytes over all four.
  assert scaling.sent(2, 2, 100, 80) == {"parameters": 80, "gradient": 40 + 40 + 30}
  assert scaling.sent(1, 1, 100, 80) == {"parameters": 0, "gradient": 0}


@pytest.mark.parametrize(("name", "row"), COUNTED, ids=[f"{name}-{row['axes']}-{row['type']}" for name, row in COUNTED])
def test_the_rule_is_what_compiled_programs_contain(name, row):
  for what in ("gathered", "reduced"):
    if row["type"] == "float32":  # For a TPU some arrays are padded before they are reduced.
      within = 0.01 if name == "scaling-cpu" else 0.05
      assert row[what] == pytest.approx(row[f"{what}, rule"], rel=within, abs=2**10)
    else:  # Some arrays stay in float32.
      assert 0.99 * row[f"{what}, rule"] <= row[what] <= 1.25 * row[f"{what}, rule"]
  # In float32 a TPU's programs gather twice what was cast to half of the bytes.
  assert row["gathers"] in ((0,) if row["mesh"] == "data" else (2,) if name == "scaling-cpu" else (1, 2))


def test_the_counted_meshes_are_all_there():
  meshes = {(row["devices"], row["mesh"]) for name, row in COUNTED if name == "scaling-cpu"}
  assert meshes == {(2, "data"), (2, "fsdp")} | {(n, mesh) for n in (4, 8) for mesh in ("data", "fsdp", "both")}


def test_a_device_holds_its_part():
  # A TPU pads the small arrays of this network, so that their parts are no smaller.
  rows = [row for name, row in COUNTED if name == "scaling-cpu"]
  whole = next(row["arguments"] for row in rows if row["mesh"] == "data")
  for row in rows:
    parts = {"data": 1, "fsdp": row["devices"], "both": row["devices"] // 2}[row["mesh"]]
    assert row["arguments"] < (1 / parts + 0.05) * whole


def test_sampling_communicates_only_where_parameters_are_split():
  tables = scaling.measured("scaling-cpu")["tables"]
  found = tables["collectives, sampling"]
  assert {row["mesh"] for row in found} == {"fsdp", "both"}
  split = next(row["split"] for row in tables["memory, sampling"] if row["mesh"] == "fsdp")
  for row in found:
    assert row["kind"] == "all-gather"
    assert row["in a loop"] == row["number"]
    assert row["result_bytes"] == scaling.STEPS * split


SMALL = ModelConfig(Mlp(width=256), {}, (8, 8, 1), 10)


@pytest.mark.parametrize("mesh", ["data=4", "fsdp=4"])
def test_a_step_compiled_now_contains_the_rule(mesh):
  place = placement(mesh)
  found = scaling.counted(SMALL, place, scaling.training_program(SMALL, place).compile())
  rules = [
    scaling.sent(4 // place.fsdp, place.fsdp, found["parameters"], found["split"], gathers=gathers, scatter=False)
    for gathers in (1, 2)
  ]
  kinds = found["collectives"]
  assert kinds["all-reduce"]["sent"] == pytest.approx(rules[0]["gradient"], rel=0.02)
  # Each of the parameters is gathered for the forward pass, and again for the backward pass where that needs it.
  least, most = (rule["parameters"] for rule in rules)
  assert 0.99 * least <= kinds["all-gather"]["sent"] <= 1.01 * most + 2**8


@pytest.mark.parametrize(("mesh", "times"), [("data=4", 0), ("fsdp=4", scaling.STEPS)])
def test_sampling_compiled_now_gathers_at_each_step(mesh, times):
  place = placement(mesh)
  program = scaling.sampling_program(SMALL, place).compile()
  found = collectives(program)
  assert all(one.in_loop for one in found)
  split = scaling.counted(SMALL, place, program)["split"]
  assert sum(total.result_bytes for total in totals(found).values()) == times * split
  assert {one.kind for one in found} == ({"all-gather"} if times else set())


# --- published figures ----------------------------------------------------------------------------


def test_dit_is_counted_in_multiply_adds():
  """Peebles & Xie 2022, Table 1: XL has 28 layers of 1,152 channels; a patch of 2 makes 256 tokens of 32x32 latents."""
  layers, width, tokens = 28, 1152, 256
  attention = 4 * width**2 * tokens + 2 * width * tokens**2
  mlp, modulation = 8 * width**2 * tokens, 6 * width**2
  ends = tokens * width * (4 * 4 + 4 * 8) + 2 * width**2
  assert 2 * (layers * (attention + mlp + modulation) + ends) == pytest.approx(DIT.forward, rel=1e-3)
  weights = layers * (12 * width**2 + modulation) + 1001 * width
  assert weights == pytest.approx(DIT.parameters, rel=0.01)


def test_edm2_is_counted_in_multiply_adds():
  """The layers of EDM2-XXL: 448 channels, multiplied by 1 to 4 at 64 to 8 pixels, three blocks at each."""
  sides, widths = (64, 32, 16, 8), [448 * level for level in (1, 2, 3, 4)]
  weights = products = 0

  def layer(inner, outer, kernel, side):
    nonlocal weights, products
    weights += inner * outer * kernel**2
    products += inner * outer * kernel**2 * side**2

  def block(inner, outer, side, first, attention):
    nonlocal products
    layer(first, outer, 3, side)
    layer(outer, outer, 3, side)
    layer(max(widths), outer, 1, 1)
    if inner != outer:
      layer(inner, outer, 1, side)
    if attention:
      layer(outer, 4 * outer, 1, side)
      products += 2 * outer * side**4

  layer(widths[0] + 1000, max(widths), 1, 1)
  layer(5, widths[0], 3, sides[0])
  now, skips = widths[0], [widths[0]]
  for level, (side, width) in enumerate(zip(sides, widths, strict=True)):
    if level:
      block(now, now, side, now, attention=False)
      skips.append(now)
    for _ in range(3):
      block(now, width, side, width, attention=side <= 16)
      now = width
      skips.append(now)
  for side, width in zip(sides[::-1], widths[::-1], strict=True):
    block(now, now, side, now, attention=side == 8)
    if side == 8:
      block(now, now, side, now, attention=False)
    for _ in range(4):
      inner = now + skips.pop()
      block(inner, width, side, inner, attention=side <= 16)
      now = width
  layer(now, 4, 3, sides[0])
  assert weights == pytest.approx(EDM2.parameters, rel=1e-3)
  assert products == pytest.approx(547e9, rel=1e-3)
  assert 2 * products == pytest.approx(EDM2.forward, rel=0.015)


def test_adm_has_the_parameters_of_its_preset():
  model = preset("unet", 256).model_config((256, 256, 3), 1000)
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes(model))) == ADM.parameters


@pytest.mark.slow
def test_adm_has_the_operations_of_describe():
  chosen = preset("unet", 256)
  model = chosen.model_config((256, 256, 3), 1000)
  found = describe(model, chosen.training_config(model, batch_size=1))
  assert found.operations == pytest.approx(3 * ADM.forward, rel=0.01)


# --- arithmetic -----------------------------------------------------------------------------------


def test_communication_by_hand():
  size = 2 * DIT.parameters
  one_node = 2 * 7 / 8 * size / 450e9 / 0.8
  assert on_paper.communication(DIT, H100, 8, "data") == pytest.approx(one_node)
  # Eight nodes: each card's eighth of the gradient goes over its own port of 50 GB/s as well.
  between = 2 * 7 / 8 * size / 8 / 50e9 / 0.8
  assert on_paper.communication(DIT, H100, 64, "data") == pytest.approx(one_node + between)
  assert on_paper.communication(DIT, H100, 64, "fsdp") == pytest.approx(1.5 * (one_node + between))
  assert on_paper.communication(DIT, H100, 64, "both") == pytest.approx(1.5 * one_node + between)
  assert on_paper.communication(DIT, TPU, 8, "both") == on_paper.communication(DIT, TPU, 8, "fsdp")


def test_computation_is_that_of_the_measured_step():
  row = on_paper.adm_256()
  assert on_paper.computation(ADM, H100, row["batch"]) == pytest.approx(row["ms a step"] / 1e3)
  # 2 * 118.6 GFLOP forward, three times that in a step, at 38% of 989.5 TFLOP/s.
  assert on_paper.computation(DIT, H100, 4) == pytest.approx(4 * 3 * 237.2e9 / (0.38 * 989.5e12))


def test_samples_by_hand():
  # 50,000 images of 250 evaluations, each two passes.
  hours = 50_000 * 250 * 2 * 237.2e9 / (0.38 * 459e12) / 3600
  assert on_paper.chip_hours(DIT, TPU, 250) == pytest.approx(hours)


def test_the_best_mesh_is_one_that_fits():
  large = EDM2._replace(parameters=10 * EDM2.parameters)
  assert on_paper.Step(EDM2, H100, 64).best == "data"
  assert on_paper.Step(large, H100, 64).best == "both"
  assert on_paper.Step(EDM2._replace(parameters=200 * EDM2.parameters), H100, 512).best == "fsdp"


def test_what_the_page_says():
  page = " ".join((scaling.MEASURED.parents[1] / "docs" / "scaling.md").read_text().split())
  steps = [
    on_paper.Step(network, chip, chips)
    for network in on_paper.NETWORKS
    for chip in on_paper.CHIPS
    for chips in on_paper.CHIP_NUMBERS
  ]
  assert "`data` is the best of the three in every row" in page
  assert {step.best for step in steps} == {"data"}
  for step in steps:
    assert step.communicates("both") <= 1.5001 * step.communicates("data")
  bound = {(step.network.name, step.chips, step.chip.name) for step in steps if step.efficiency(hidden=True) < 1}
  assert "DiT-XL/2 alone is bound by the network: on 64 and 512 H100s, and on 512 TPUs" in page
  assert bound == {("DiT-XL/2", 64, "H100 SXM"), ("DiT-XL/2", 512, "H100 SXM"), ("DiT-XL/2", 512, "TPU v5p")}
