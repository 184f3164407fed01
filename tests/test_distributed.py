"""Many devices: meshes, the same samples and the same training on each of them, and what is communicated."""

import functools
import re
import signal
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import several
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tiny import Classify, Mlp

import jaxguide as jg
from jaxguide import sampling, scaling
from jaxguide.data import Images, stream
from jaxguide.distributed import MeshConfig, placement, processes
from jaxguide.distributed.placing import for_batches, split_axis
from jaxguide.distributed.rows import take_rows
from jaxguide.models import arrays
from jaxguide.models.model import init_params
from jaxguide.sampling.split import split_of
from jaxguide.training import Interrupted, ModelConfig, RunConfig, TrainingConfig, fit, journal
from jaxguide.training.signals import LAG
from jaxguide.training.step import init_state, train_step

MESHES = ["data=4", "fsdp=4", "data=2,fsdp=2"]
MOVES = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


def moves(compiled):
  """The kinds of collectives in a program."""
  return {*re.findall(rf"\b({MOVES})(?:-start)?\(", compiled.as_text())}


def numbers(shape):
  """How many numbers an array of the shape "3,4" has."""
  return int(np.prod([int(size) for size in shape.split(",")]))


# --- meshes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("text", "sizes"),
  [
    ("data=-1", (8, 1, 1)),
    ("fsdp=-1", (1, 8, 1)),
    ("fsdp=8", (1, 8, 1)),
    ("fsdp=4", (2, 4, 1)),
    ("data=2,fsdp=4", (2, 4, 1)),
    ("data=2,fsdp=-1,tensor=2", (2, 2, 2)),
  ],
)
def test_the_text_of_a_mesh(text, sizes):
  config = MeshConfig.parse(text)
  assert config.sizes(8) == sizes
  assert MeshConfig.parse(str(config)).sizes(8) == sizes


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("fsdp=3", "the mesh data=-1,fsdp=3 needs a multiple of 3 devices, and there are 8"),
    ("data=2,fsdp=2", "the mesh data=2,fsdp=2 needs 4 devices, and there are 8"),
    ("fsdp=0", "fsdp must be"),
    ("fsdp=-1,data=-1", "only one axis of a mesh can be -1"),
    ("model=2", "has no option 'model'; it has data, fsdp, tensor"),
    ("fsdp", "a mesh is written data=2,fsdp=4, got 'fsdp'"),
    ("fsdp=2,data", "'data' is not option=value"),
    ("", "a mesh is written data=2,fsdp=4, got ''"),
  ],
)
def test_meshes_that_are_refused(text, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    MeshConfig.parse(text).sizes(8)


def test_what_can_stand_for_devices():
  devices = jax.devices()
  assert placement(devices[:2]).devices == devices[:2]
  assert placement(MeshConfig(fsdp=2)).fsdp == 2
  assert dict(placement().mesh.shape) == {"data": 4, "fsdp": 1, "tensor": 1}
  assert {*placement().mesh.axis_types} == {AxisType.Auto}
  for wrong, kind in (([], ValueError), (2 * devices, ValueError), (8, TypeError), (["cpu"], TypeError)):
    with pytest.raises(kind, match="devices must"):
      placement(wrong)


def test_an_array_is_split_along_its_largest_axis_that_divides():
  assert [split_axis(shape, 4) for shape in [(3, 3, 64, 128), (66, 128, 7), (128, 128), (4096,), (1, 63, 65)]] == [
    3, 1, 1, 0, None
  ]  # fmt: skip
  assert split_axis((4092,), 4) is None
  assert split_axis((4096,), 1) is None


def test_a_batch_that_does_not_divide():
  assert len(for_batches(6).devices) == 1
  with pytest.raises(ValueError, match=r"a batch of 6 cannot be divided over the 4 parts of the mesh .*such as 8"):
    for_batches(6, "fsdp=4")


def test_rows_of_each_process_and_copies():
  place = placement("data=2,fsdp=2")
  assert place.local_rows(8).tolist() == list(range(8))
  rows = place.rows(np.arange(8.0))
  assert {shard.data.shape for shard in rows.addressable_shards} == {(2,)}
  assert place.copies(np.arange(8.0)).sharding.is_fully_replicated


# --- sampling -------------------------------------------------------------------------------------

SHAPE = (4, 4, 1)
RNG = np.random.default_rng(0)
WIDTH = 128


def network(params, x, t, label):
  hidden = jnp.tanh(x.reshape(len(x), -1) @ params["in"] + params["labels"][label] + jnp.cos(t)[:, None])
  return (jnp.tanh(hidden @ params["middle"]) @ params["out"]).reshape(x.shape)


def logits(params, x, t):
  return jnp.tanh(x.reshape(len(x), -1) @ params["in"] + jnp.cos(t)[:, None]) @ params["labels"][:3].T


def random_params():
  rng = np.random.default_rng(0)
  shapes = {"in": (16, WIDTH), "labels": (4, WIDTH), "middle": (WIDTH, WIDTH), "out": (WIDTH, 16)}
  return {name: (rng.normal(size=shape) / 8).astype(np.float32) for name, shape in shapes.items()}


def guided(name):
  """A guidance of each kind: of two predictions, of a gradient, and one that remembers."""
  params, how = random_params(), scaling.v(jg.schedules.Cosine())
  guidance = {
    "two predictions": jg.classifier_free(3, 2.0),
    "gradient": jg.chain(jg.unconditional(3), jg.classifier(jg.ClassifierLogProb(params, logits, how), 2.0)),
    "memory": jg.classifier_free(3, 2.0, jg.projected(0.3, 1.0, -0.5)),
  }[name]
  return guidance(jg.NetworkDenoiser(params, network, how))


KINDS = ["two predictions", "gradient", "memory"]
LABELS = np.arange(11) % 3
SOLVER = jg.DDIM(1.0)


def draw(name, devices, **options):
  return jg.sample_batch(
    guided(name), jax.random.key(0), LABELS, shape=SHAPE, sigmas=jg.karras(4), solver=SOLVER, devices=devices, **options
  )


@pytest.mark.parametrize("name", KINDS)
def test_samples_are_the_same_on_every_mesh(name):
  wanted = draw(name, jax.devices()[:1])
  # What splits the samples alone does not know the guidance: other numbers of devices are for one of them.
  others = (jax.devices()[:2], None, MeshConfig(fsdp=2), MeshConfig(data=2, tensor=2)) if name == KINDS[0] else ()
  for devices in (*MESHES, *others):
    np.testing.assert_allclose(draw(name, devices), wanted, atol=1e-5, err_msg=str(devices))
  np.testing.assert_allclose(draw(name, "fsdp=4", batch_size=4), wanted, atol=1e-5)


def program(devices, name="two predictions"):
  return sampling.lower_batch(
    guided(name), LABELS[:8], num=8, shape=SHAPE, sigmas=jg.karras(4), solver=SOLVER, devices=devices
  ).compile()


@pytest.mark.parametrize("name", KINDS)
def test_sampling_with_copied_parameters_communicates_nothing(name):
  assert moves(program("data=4", name)) == set()


def test_sampling_with_split_parameters_gathers_them_in_the_loop_and_nothing_else():
  compiled = program("fsdp=4")
  assert moves(compiled) == {"all-gather"}
  text = compiled.as_text()
  entry = text[text.index("\nENTRY ") :]
  assert "all-gather(" not in entry.split("\n}")[0]
  sizes = {numbers(shape) for shape in re.findall(r"f32\[([\d,]+)\]\S* all-gather\(", text)}
  split = {leaf.size for leaf in jax.tree.leaves(random_params()) if split_axis(leaf.shape, 4) is not None}
  assert sizes == split == {WIDTH * WIDTH}


def test_parameters_that_are_split_already_stay_so():
  mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "fsdp"))
  denoise = guided("two predictions")
  mine = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
  placed = jax.tree.map(lambda leaf: jax.device_put(leaf, mine) if np.ndim(leaf) == 2 else leaf, denoise)
  split = split_of(placed, placement(mesh))
  assert sorted(map(str, split.specs)).count(str(PartitionSpec(None, "fsdp"))) == 4
  got = jg.sample_batch(
    placed, jax.random.key(0), LABELS, shape=SHAPE, sigmas=jg.karras(4), solver=SOLVER, devices=mesh
  )
  np.testing.assert_allclose(got, draw("two predictions", jax.devices()[:1]), atol=1e-5)


def test_a_sample_that_is_not_finite_is_named_on_a_mesh():
  denoise = jax.tree_util.Partial(lambda bad, x, sigma, y: jnp.where(y == bad, jnp.nan, x), jnp.asarray(2))
  for devices in MESHES:
    with pytest.raises(FloatingPointError, match="sample 2 first at step 0 of 4"):
      jg.sample_batch(
        denoise, jax.random.key(0), np.arange(8), shape=(2,), sigmas=jg.karras(4), solver=jg.Euler(), devices=devices
      )


# --- particles ------------------------------------------------------------------------------------


def test_rows_move_between_devices():
  rows = RNG.integers(0, 12, 12)
  tree = {"a": RNG.normal(size=(12, 3)).astype(np.float32), "b": np.arange(12, dtype=np.int32)}
  for devices in MESHES:
    place = placement(devices)
    got = jax.jit(functools.partial(take_rows, place=place))(place.rows(tree), rows)
    chex.assert_trees_all_close(jax.device_get(got), jax.tree.map(lambda leaf: leaf[rows], tree), rtol=1e-6)


def particles(devices, key, num=64):
  target = jg.tempered(jg.ring(4).denoiser, 4, 3.0)
  return jg.sample_product(
    target, key, num, (2,), jg.karras(12), jg.DDPM(), cond=1, threshold=0.9, devices=devices
  )  # fmt: skip


def test_particles_are_the_same_on_every_mesh_and_pass_from_neighbour_to_neighbour():
  key = jax.random.key(0)
  wanted, population = jax.jit(functools.partial(particles, None))(key)
  assert population.resampled[:-1].any()
  for devices in MESHES:
    compiled = jax.jit(functools.partial(particles, devices)).lower(key).compile()
    got, other = compiled(key)
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    np.testing.assert_array_equal(other.resampled, population.resampled)
    assert {shard.data.shape for shard in got.addressable_shards} == {(16, 2)}
    # The particles go from neighbour to neighbour. Only the weights are gathered, one number for each particle.
    assert moves(compiled) <= {"collective-permute", "all-gather"}
    gathered = re.findall(r"f32\[([\d,]+)\]\S* all-gather\(", compiled.as_text())
    assert all(numbers(shape) <= 64 for shape in gathered)
    permuted = re.findall(r"f32\[([\d,]+)\]\S* collective-permute\(", compiled.as_text())
    assert permuted
    assert all(shape.split(",")[0] == "16" for shape in permuted)


def test_particles_on_a_mesh_with_explicit_axes():
  mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "fsdp"), axis_types=(AxisType.Explicit,) * 2)
  key = jax.random.key(0)
  got, wanted = (jax.jit(functools.partial(particles, devices, num=8))(key)[0] for devices in (mesh, "data=2,fsdp=2"))
  np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_particles_that_cannot_be_divided():
  with pytest.raises(ValueError, match=r"63 particles cannot be divided over 4 devices: .* such as 64"):
    particles("data=4", jax.random.key(0), 63)


# --- training -------------------------------------------------------------------------------------

HOW = {"batch_size": 8, "save_every": 4, "warmup": 2, "ema": ("power:std=0.05", "constant"), "accumulation": 2}


def model(double=True):
  """A network with dropout, in double precision if asked for, and its initial parameters."""
  dtype = "float64" if double else "float32"
  config = ModelConfig(Mlp(width=4 * WIDTH, num_classes=3, dropout=0.2, dtype=dtype), {}, SHAPE, 3)
  return config, jax.tree.map(lambda leaf: np.asarray(leaf, dtype), init_params(config, jax.random.key(0)))


def images():
  rng = np.random.default_rng(0)
  return Images(rng.integers(0, 256, (40, *SHAPE)).astype(np.uint8), np.arange(40) % 3, 3, "forty")


def steps_of(mesh, number, double):
  """The step, the final state and the losses of some steps on a mesh."""
  how, place, (config, params) = TrainingConfig(steps=number, **HOW), placement(mesh), model(double)
  step, state, losses = train_step(config, how, place), place.shards(init_state(config, how, params)), []
  for number_before, batch in zip(range(number), stream(images(), 8, 0), strict=False):
    rows = place.rows((batch.examples, batch.labels))
    if number_before == 0:
      step = step.lower(state, *rows).compile()
    state, metrics = step(state, *rows)
    losses.append(float(metrics["loss"]))
  return step, state, losses


def largest_difference(got, wanted):
  got, wanted = (jax.device_get((state.params, state.means, state.opt_state)) for state in (got, wanted))
  return max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(np.subtract(a, b)).max(), got, wanted)))


def fifty_steps(meshes):
  """The largest difference in the state after fifty steps in double precision, of each mesh to one device."""
  jax.config.update("jax_enable_x64", True)
  wanted = steps_of(jax.devices()[:1], 50, True)[1]
  assert jax.tree.leaves(wanted.params)[0].dtype == np.float64
  devices = [jax.devices()[:2], jax.devices()[:4], *meshes]
  return {str(mesh): float(largest_difference(steps_of(mesh, 50, True)[1], wanted)) for mesh in devices}


@pytest.mark.slow
def test_fifty_steps_are_the_same_on_every_mesh():
  (found,) = several.run("test_distributed:fifty_steps", 1, 8, True, meshes=["data=8", "fsdp=8", "data=2,fsdp=4"])
  assert len(found) == 5
  assert max(found.values()) < 1e-9, found


def test_losses_in_single_precision_and_what_a_step_communicates():
  _, _, wanted = steps_of(jax.devices()[:1], 8, False)
  for mesh in MESHES:
    compiled, state, losses = steps_of(mesh, 8, False)
    np.testing.assert_allclose(losses, wanted, rtol=1e-4)
    # Parameters and figures are gathered, and gradients summed. No activations move.
    assert moves(compiled) <= {"all-gather", "all-reduce", "reduce-scatter"}
    kernel = state.params["params"]["Dense_2"]["kernel"]
    parts = {"data=4": 1, "fsdp=4": 4, "data=2,fsdp=2": 2}[mesh]
    for leaf in (kernel, *(leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == kernel.shape)):
      assert leaf.addressable_shards[0].data.size * parts == leaf.size
    for mean in state.means:
      assert mean["params"]["Dense_2"]["kernel"].sharding == kernel.sharding


def trained(folder, mesh=None, double=True, steps=12, stop_at=None, **options):
  """Train, and return the losses of the steps and the final parameters, or the step at which a signal stopped it."""
  jax.config.update("jax_enable_x64", double)
  (config, params), losses = model(double), []

  def note(step, state, metrics):
    losses.append(float(metrics["loss"]))
    if step == stop_at and processes.is_first():
      signal.raise_signal(signal.SIGTERM)

  run = RunConfig(log_every=2, sample_every=4, sample_steps=2, mesh=mesh)
  how = TrainingConfig(steps=steps, **HOW, **options)
  try:
    done = fit(config, how, images(), folder, run=run, init=params, callback=note, progress=False)
  except Interrupted as stop:
    return {"stopped": stop.step, "losses": losses}
  return {"losses": losses, "params": {name: leaf.tolist() for name, leaf in arrays.leaves(done.params).items()}}


def assert_same_run(got, wanted, first=0, atol=1e-9):
  np.testing.assert_allclose(got["losses"], wanted["losses"][first:], atol=atol)
  assert got["params"].keys() == wanted["params"].keys()
  for name, values in wanted["params"].items():
    np.testing.assert_allclose(got["params"][name], values, atol=atol, rtol=0, err_msg=name)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
  """A run on one device, in a process of its own."""
  return several.run("test_distributed:trained", 1, exact=True, folder=str(tmp_path_factory.mktemp("run") / "one"))[0]


@pytest.mark.slow
def test_a_run_goes_on_with_other_devices_and_processes(unbroken, tmp_path):
  """Stopped by a signal to one of two processes, continued by one with four devices and then by one with one."""
  folder = str(tmp_path / "run")
  stopped = several.run("test_distributed:trained", 2, 4, True, folder=folder, mesh="fsdp=8", stop_at=1)
  assert {one["stopped"] for one in stopped} == {1 + LAG}
  np.testing.assert_allclose(stopped[0]["losses"], unbroken["losses"][: 1 + LAG], atol=1e-9)
  assert (tmp_path / "run" / "samples" / "00000004.png").exists()
  meshed = {"mesh": "data=2,fsdp=2", "stop_at": 1 + LAG + 1}
  more = several.run("test_distributed:trained", 1, 4, True, folder=folder, **meshed)[0]
  assert more["stopped"] == 1 + LAG + 1
  last = several.run("test_distributed:trained", 1, 1, True, folder=folder)[0]
  assert_same_run(last, unbroken, first=1 + LAG + 1)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=8", "data=2,fsdp=4"])
def test_two_processes_with_four_devices_each(unbroken, tmp_path, mesh):
  for found in several.run("test_distributed:trained", 2, 4, True, folder=str(tmp_path / "run"), mesh=mesh):
    assert_same_run(found, unbroken)
  assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 6


def classified(folder, mesh=None):
  """Train a classifier whose model is the best one on held-out data; return its figures and its parameters."""
  config = ModelConfig(Classify(out_channels=3), {}, SHAPE, 3)
  run = RunConfig(mesh=mesh, held_out_every=1, patience=3)
  how = TrainingConfig(steps=3, batch_size=8, save_every=2)
  done = fit(config, how, images(), folder, run=run, held_out=images(), progress=False)
  figures = [line["held_out"]["mean_nll"] for line in journal.read(Path(folder, "metrics.jsonl"))]
  return {"nll": figures, "params": {name: leaf.tolist() for name, leaf in arrays.leaves(done.params).items()}}


@pytest.mark.slow
def test_two_processes_finish_with_the_best_classifier(tmp_path):
  wanted = classified(tmp_path / "one")
  for found in several.run("test_distributed:classified", 2, 2, folder=str(tmp_path / "two"), mesh="data=4"):
    np.testing.assert_allclose(found["nll"], wanted["nll"], rtol=1e-3)
    for name, values in wanted["params"].items():
      np.testing.assert_allclose(found["params"][name], values, atol=1e-3, err_msg=name)
  # The training is finished: nothing is left to do for one process.
  assert classified(tmp_path / "two", "data=4")["params"] == found["params"]


def sampled(meshes):
  """Samples of each guidance on each mesh, in each process."""
  return {f"{name} on {mesh}": draw(name, mesh).astype(float).tolist() for name in KINDS for mesh in meshes}


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(1, 8), (2, 4)])
def test_samples_of_eight_devices(processes, devices):
  for found in several.run("test_distributed:sampled", processes, devices, meshes=["data=8", "data=2,fsdp=4"]):
    assert len(found) == 6
    for name, samples in found.items():
      wanted = draw(name.partition(" on ")[0], jax.devices()[:1])
      np.testing.assert_allclose(samples, wanted, atol=1e-5, err_msg=name)


# --- checksums of arrays that no process has --------------------------------------------------------


def test_a_sum_detects_any_change_of_a_word_and_does_not_depend_on_the_mesh():
  for dtype in (np.float32, jnp.bfloat16, np.int32, np.uint8, bool):
    array = (RNG.normal(size=(64, 128)) * 9 > 0 if dtype is bool else RNG.normal(size=(64, 128)) * 9).astype(dtype)
    sums = {arrays.sum32(place(array)) for mesh in MESHES for place in (placement(mesh).rows, placement(mesh).shards)}
    assert sums == {arrays.sum32(array)}
    changed = array.copy()
    changed.view(np.uint8)[5, 7] ^= 1
    assert arrays.sum32(changed) not in sums
    assert arrays.sum32(array[::-1].copy()) not in sums
  words = np.arange(6, dtype=np.uint32).reshape(2, 3)
  assert int(arrays.sum32(words), 16) == sum((2 * i + 1) * i for i in range(6))
