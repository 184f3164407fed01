"""`fit` with damaged checkpoints, other data, values that are not finite, a second process, and a full disk."""

import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from tiny import Mlp

from jaxguide import training
from jaxguide._core.files import lock
from jaxguide.data import Images
from jaxguide.training import ModelConfig, RunConfig, TrainingConfig, checkpoints, loop, run_folder, step

pytestmark = [
  pytest.mark.usefixtures("only_new_objects"),
  # Orbax leaves files open when it fails.
  pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

# The largest kernels have 32,768 bytes each, which `small_files` needs.
MODEL = ModelConfig(Mlp, {"width": 512}, (4, 4, 1), 2)
HOW = TrainingConfig(steps=6, batch_size=3, save_every=2)
LOGS = RunConfig(log_every=2, sample_every=0)
PIXELS = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 1)).astype(np.uint8)
IMAGES = Images(PIXELS, np.arange(8, dtype=np.int32) % 2, 2, "mine")


@pytest.fixture(scope="module")
def compiled():
  return step.train_step(MODEL, HOW), step.init_state(MODEL, HOW)


def runs(compiled, patch):
  """Return ``fit(folder, stop=None, poison=None, value=inf)``, a training that shares one compiled step.

  The run is killed in step ``stop``. In step ``poison``, ``value`` is written to a parameter, after the loss of
  this step was computed.
  """
  compiled_step, first = compiled
  patch.setattr(loop, "init_state", lambda *args: jax.tree.map(jnp.copy, first))

  def fit(folder, stop=None, poison=None, value=jnp.inf, images=IMAGES, how=HOW, run=LOGS, **options):
    def faulty(state, *batch):
      number = int(state.step)
      if number == stop:
        raise KeyboardInterrupt
      state, metrics = compiled_step(state, *batch)
      if number == poison:
        kernel = state.params["params"]["Dense_2"]["kernel"]
        state.params["params"]["Dense_2"]["kernel"] = kernel.at[0, 0].set(value)
      return state, metrics

    patch.setattr(loop, "train_step", lambda *args: faulty)
    return training.fit(MODEL, how, images, folder, run=run, progress=False, **options)

  return fit


@pytest.fixture
def run(compiled, monkeypatch):
  return runs(compiled, monkeypatch)


@pytest.fixture(scope="module")
def trained_folders(compiled, tmp_path_factory):
  """The model of an uninterrupted run; and a folder with its folder `whole`, and `broken` of a run killed in step 5."""
  folder = tmp_path_factory.mktemp("trained")
  with pytest.MonkeyPatch.context() as patch:
    run = runs(compiled, patch)
    trained = run(folder / "whole")
    with pytest.raises(KeyboardInterrupt):
      run(folder / "broken", stop=5)
  return trained, folder


@pytest.fixture
def whole(trained_folders, tmp_path):
  """The model of an uninterrupted run, and a copy of its folder."""
  return trained_folders[0], shutil.copytree(trained_folders[1] / "whole", tmp_path / "whole")


@pytest.fixture
def broken(trained_folders, tmp_path):
  """A copy of the folder of a run that was killed in step 5, with the checkpoints of steps 2 and 4."""
  folder = shutil.copytree(trained_folders[1] / "broken", tmp_path / "broken")
  assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["2", "4"]
  return folder


def same_bits(ours, theirs):
  return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True))


def largest(folder):
  return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path, where=0.5):
  content = bytearray(path.read_bytes())
  content[int(where * len(content))] ^= 1
  path.write_bytes(content)


def cut(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# --- checkpoints ----------------------------------------------------------------------------------


def replace_an_array(step):
  """Replace an array of the state, which only a checksum detects."""
  import orbax.checkpoint as ocp

  with ocp.StandardCheckpointer() as checkpointer:
    state = checkpointer.restore(step / "state")
    state["opt_state"][1][0]["mu"]["params"]["Dense_2"]["bias"] += 1e-7
    checkpointer.save(step / "state", state, force=True)


@pytest.mark.parametrize(
  ("damage", "named"),
  [
    (replace_an_array, "mu/params/Dense_2/bias does not match its checksum"),
    (lambda step: cut(largest(step / "state")), "damaged"),
    (lambda step: largest(step / "state").unlink(), "damaged"),
    (lambda step: cut(step / "checksums" / "metadata"), "damaged"),
    (lambda step: shutil.rmtree(step / "checksums"), "damaged"),
  ],
  ids=["array", "cut", "missing", "checksums cut", "checksums missing"],
)
def test_training_continues_from_the_checkpoint_before_a_damaged_one(run, whole, broken, damage, named, capfd):
  damage(broken / "checkpoints" / "4")
  with pytest.warns(
    UserWarning, match=r"checkpoint of step 4 in .*broken/checkpoints is damaged .*from step 2"
  ) as warned:
    resumed = run(broken)
  assert named in str(warned[0].message)
  assert same_bits(resumed.params, whole[0].params)
  assert "Traceback" not in capfd.readouterr().err


def test_if_all_checkpoints_are_damaged_the_last_is_named(run, broken):
  for number in (2, 4):
    replace_an_array(broken / "checkpoints" / str(number))
  with pytest.raises(
    ValueError, match=r"step 4 in .* is damaged \(.*Dense_2/bias does not match.*there is no undamaged one: retrain"
  ):
    run(broken)
  assert (broken / "checkpoints" / "2").is_dir()


def test_a_checkpoint_with_the_name_of_another_step_is_damaged(run, whole, broken):
  shutil.rmtree(broken / "checkpoints" / "4")
  shutil.copytree(broken / "checkpoints" / "2", broken / "checkpoints" / "4")
  with pytest.warns(UserWarning, match="it contains the state of step 2"):
    assert same_bits(run(broken).params, whole[0].params)


@pytest.mark.slow
def test_damaged_checkpoints_change_nothing(run, whole, broken, tmp_path):
  rng = np.random.default_rng(0)
  for case in range(24):
    folder = shutil.copytree(broken, tmp_path / str(case))
    files = sorted(path for path in (folder / "checkpoints").rglob("*") if path.is_file())
    path = largest(folder / "checkpoints" / "4") if case % 2 else files[rng.integers(len(files))]
    [flip, flip, lambda path, _: cut(path), lambda path, _: path.unlink()][case % 4](path, rng.random())
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      assert same_bits(run(folder).params, whole[0].params)


# --- numbers that are not finite ------------------------------------------------------------------


@pytest.mark.parametrize("step", [3, 5])
def test_a_state_that_is_not_finite_is_not_saved(run, whole, tmp_path, step):
  message = rf"params/params/Dense_2/kernel is not finite after step {step}; the checkpoint of step {step - 1} is kept"
  with pytest.raises(FloatingPointError, match=message):
    run(tmp_path / "run", poison=step)
  assert not np.isinf(jax.tree.leaves(training.load(tmp_path / "run").params)[0]).any()
  assert not json.loads((tmp_path / "run" / "model" / "training.json").read_text()).get("finished")
  assert same_bits(run(tmp_path / "run").params, whole[0].params)


@pytest.mark.parametrize(("step", "message"), [(3, "at step 4; the checkpoint of step 4"), (5, "after step 5; the")])
def test_parameters_whose_loss_is_not_finite_are_not_saved(run, tmp_path, step, message):
  # These parameters are finite, but the loss of the next step is not.
  with pytest.raises(FloatingPointError, match=rf"the loss is not finite {message} .*Try a lower learning_rate"):
    run(tmp_path, poison=step, value=1e38)
  assert checkpoints.steps(tmp_path / "checkpoints")[-1] == 4
  assert not json.loads((tmp_path / "model" / "training.json").read_text()).get("finished")


@pytest.mark.slow
def test_one_step_with_a_huge_learning_rate(tmp_path):
  how = TrainingConfig(steps=1, batch_size=3, learning_rate=1e38)
  with pytest.raises(FloatingPointError, match=r"loss is not finite after step 0; there was no checkpoint yet.*lower"):
    training.fit(MODEL, how, IMAGES, tmp_path, progress=False)
  with pytest.raises(FileNotFoundError):
    training.load(tmp_path)


def test_a_failed_run_can_be_repeated_with_other_settings(run, tmp_path):
  with pytest.raises(FloatingPointError, match="there was no checkpoint yet"):
    run(tmp_path, poison=1, how=dataclasses.replace(HOW, learning_rate=10.0))
  run(tmp_path)
  assert json.loads((tmp_path / "training.json").read_text())["training"]["learning_rate"] == HOW.learning_rate


# --- the record -----------------------------------------------------------------------------------


def images(pixels=PIXELS, labels=IMAGES.labels, name="mine"):
  return Images(pixels, labels, 2, name)


@pytest.mark.parametrize("begun", ["whole", "broken"])
def test_other_data_are_noticed(run, request, begun):
  folder = request.getfixturevalue(begun)
  folder = folder[1] if begun == "whole" else folder
  before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))
  for other, named in (
    (images(PIXELS ^ 1), "data.fingerprint is"),
    (images(labels=1 - IMAGES.labels), "data.fingerprint is"),
    (images(PIXELS[:7], IMAGES.labels[:7]), "data.number is 8 there, and 7 here"),
    (images(name="yours"), "data.name is 'mine' there, and 'yours' here"),
  ):
    with pytest.raises(ValueError, match="with other settings: retrain it, or choose another folder") as error:
      run(folder, images=other)
    assert named in str(error.value)
  assert sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*") if path != folder) == before


def test_each_setting_that_differs_is_named(run, whole):
  with pytest.raises(ValueError, match=r"training\.ema_decay is 0.995 there, and 0.5 here") as error:
    run(whole[1], how=dataclasses.replace(HOW, seed=2**40, ema_decay=0.5))
  assert "training.seed is 0 there, and 1099511627776 here" in str(error.value)
  other = dataclasses.replace(MODEL, fields={**MODEL.fields, "dropout": 0.5}, prediction="eps")
  with pytest.raises(ValueError, match=r"model\.prediction is 'v' there, and 'eps' here") as error:
    training.fit(other, HOW, IMAGES, whole[1])
  assert "model.fields.dropout is 0.0 there, and 0.5 here" in str(error.value)


def test_explicit_defaults_equal_implicit_ones(whole):
  spelled = dataclasses.replace(
    MODEL, fields={**MODEL.fields, "dropout": 0.0, "dtype": jnp.float32, "null_class": True}
  )
  assert same_bits(training.fit(spelled, HOW, IMAGES, whole[1]).params, whole[0].params)


def test_records_of_older_versions_are_read(run, whole):
  path = whole[1] / "training.json"
  stored = json.loads(path.read_text())
  del stored["training"]["matmul_precision"], stored["model"]["low_res_shape"], stored["model"]["variance"]
  path.write_text(json.dumps(stored))
  assert same_bits(run(whole[1]).params, whole[0].params)
  flat = {"data": "mine", **stored["model"], **stored["training"]}
  path.write_text(json.dumps(flat, indent=2))
  assert same_bits(run(whole[1]).params, whole[0].params)
  with pytest.raises(ValueError, match=r"training\.seed is 0 there, and 1 here"):
    run(whole[1], how=dataclasses.replace(HOW, seed=1))
  with pytest.raises(ValueError, match=r"data\.name is 'mine' there, and 'yours' here"):
    run(whole[1], images=images(name="yours"))


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (
      "",
      r"training\.json is not a valid record of the model's training .*damaged.*retrain it, or choose another folder",
    ),
    ("[]", "is not a valid record"),
    ('{"version": 2}', "use a newer one"),
    ('{"version": 1}', r"model\.network is absent there"),
    ('{"version": 1, "model": [], "training": 5, "data": null}', "training is 5 there"),
    ("{}", "is not a valid record|absent there"),
    (None, r"no training\.json with the settings of its training: retrain it, or choose another folder"),
  ],
  ids=range(7),
)
def test_invalid_records(run, whole, content, message):
  for path in (whole[1] / "training.json", whole[1] / "model" / "training.json"):
    path.unlink() if content is None else path.write_text(content)
  with pytest.raises(ValueError, match=message):
    run(whole[1])
  assert training.load(whole[1]).config == MODEL


def test_a_model_that_was_saved_without_training_is_not_accepted(run, whole, broken, tmp_path):
  other = training.Model(MODEL, jax.tree.map(jnp.zeros_like, whole[0].params))
  training.save(tmp_path / "saved", other)
  with pytest.raises(ValueError, match=r"contains a model, but no training\.json"):
    run(tmp_path / "saved")
  for folder in (whole[1], broken):
    with pytest.raises(ValueError, match="contains a training run: choose another folder"):
      training.save(folder, other)
  assert same_bits(run(tmp_path / "saved", retrain=True).params, whole[0].params)
  assert same_bits(training.load(tmp_path / "saved").params, whole[0].params)


def test_a_model_of_an_older_version_is_loaded_and_stays_until_its_retraining_is_complete(run, whole):
  folder = whole[1]
  for name in ("params", "checksums.json", "config.json"):
    (folder / "model" / name).rename(folder / name)
  for name in ("model", "checkpoints"):
    shutil.rmtree(folder / name)
  assert same_bits(training.load(folder).params, whole[0].params)
  assert same_bits(run(folder).params, whole[0].params)
  assert (folder / "config.json").exists()
  with pytest.raises(ValueError, match=r"training\.steps is 6 there, and 8 here"):
    run(folder, how=dataclasses.replace(HOW, steps=8))
  how = dataclasses.replace(HOW, seed=7)
  with pytest.raises(KeyboardInterrupt):
    run(folder, retrain=True, how=how, stop=3)
  assert same_bits(training.load(folder).params, whole[0].params)
  again = run(folder, how=how)
  assert same_bits(training.load(folder).params, again.params)
  assert not same_bits(again.params, whole[0].params)
  assert not (folder / "config.json").exists()


def test_a_model_stays_until_its_retraining_is_complete(run, whole):
  folder, how = whole[1], dataclasses.replace(HOW, seed=7)
  with pytest.raises(FloatingPointError):
    run(folder, retrain=True, how=how, poison=3)
  assert same_bits(training.load(folder).params, whole[0].params)
  with pytest.raises(KeyboardInterrupt):
    run(folder, retrain=True, how=how, stop=3)
  assert same_bits(run(folder).params, whole[0].params)
  again = run(folder, how=how)  # The retraining continues.
  assert not same_bits(again.params, whole[0].params)
  assert same_bits(run(folder, how=how).params, again.params)
  assert same_bits(training.load(folder).params, again.params)
  assert not (folder / "retraining").exists()


@pytest.mark.parametrize("change", range(3))
def test_a_run_that_is_killed_while_it_replaces_a_model(run, whole, monkeypatch, change):
  folder, how = whole[1], dataclasses.replace(HOW, seed=7)
  rename, rmtree, changes = Path.rename, shutil.rmtree, []

  def or_die(call):
    def changed(path, *args, **options):
      if Path(path).name in ("model", "model.new", "model.old"):
        if len(changes) == change:
          raise KeyboardInterrupt
        changes.append(Path(path).name)
      return call(path, *args, **options)

    return changed

  with monkeypatch.context() as patch:
    patch.setattr(Path, "rename", or_die(rename))
    patch.setattr(shutil, "rmtree", or_die(rmtree))
    with pytest.raises(KeyboardInterrupt):
      run(folder, retrain=True, how=how)
  assert changes == ["model", "model.new", "model.old"][:change]
  # One of the two models is there at any moment.
  assert same_bits(training.load(folder).params, whole[0].params) == (change < 2)
  again = run(folder, how=how)
  assert not same_bits(again.params, whole[0].params)
  assert same_bits(training.load(folder).params, again.params)
  assert not [path for path in folder.iterdir() if path.name.startswith("model.")]


def test_checkpoints_are_removed_before_their_record(broken, monkeypatch):
  removed = []
  monkeypatch.setattr(
    shutil, "rmtree", lambda path, **_: removed.append((path.name, (broken / "training.json").exists()))
  )
  run_folder.clear(broken)
  assert removed[0] == ("checkpoints", True)
  assert not (broken / "training.json").exists()


# --- another run, and a full disk -----------------------------------------------------------------


def test_a_folder_in_use(run, whole):
  folder = whole[1]
  with lock(folder / ".lock", folder):
    for use in (lambda: run(folder), lambda: run(folder, retrain=True), lambda: training.save(folder, whole[0])):
      with pytest.raises(OSError, match=rf"whole is in use by process {os.getpid()} on .*: wait until it has ended"):
        use()
  assert same_bits(training.load(folder).params, whole[0].params)
  assert same_bits(run(folder).params, whole[0].params)
  assert not (folder / ".lock").exists()


def test_incomplete_files_of_a_killed_run_are_removed(run, whole, broken):
  (broken / ".0123.part").touch()
  shutil.copytree(broken / "checkpoints" / "4", broken / "checkpoints" / "6.orbax-checkpoint-tmp")
  shutil.copytree(broken / "checkpoints" / "4" / "state", broken / "model.new" / "params.orbax-checkpoint-tmp")
  assert same_bits(run(broken).params, whole[0].params)
  parts = ["checkpoints", "config.toml", "index.html", "metrics.jsonl", "model", "training.json"]
  assert sorted(path.name for path in broken.iterdir()) == parts
  assert sorted(path.name for path in (broken / "checkpoints").iterdir()) == ["4", "6"]


@pytest.mark.slow
def test_two_runs_at_once_and_a_kill(tmp_path):
  code = f"""
import numpy as np
from jaxguide import training
from jaxguide.data import Images
from jaxguide.training import ModelConfig, TrainingConfig
images = Images(np.zeros((8, 4, 4, 1), np.uint8), np.zeros(8, np.int32), 2, "zeros")
training.fit({MODEL!r}, TrainingConfig(steps=10**6, batch_size=3), images, {str(tmp_path)!r}, progress=False)
"""
  environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
  first = subprocess.Popen([sys.executable, "-c", code], env=environment)
  try:
    while not (tmp_path / "training.json").exists():
      assert first.poll() is None
      time.sleep(0.1)
    second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert second.returncode == 1
    assert second.stderr.strip().splitlines()[-1].startswith(f"OSError: {tmp_path} is in use by process {first.pid} on")
  finally:
    first.send_signal(signal.SIGKILL)
    first.wait()
  training.fit(MODEL, TrainingConfig(steps=1, batch_size=3), IMAGES, tmp_path, retrain=True, progress=False)


@pytest.fixture
def small_files():
  """Inside ``with small_files():`` no file can grow beyond 20,000 bytes, as on a full disk.

  A single kernel has more, and a page of a run has less. Orbax shares the arrays out among one file or several, as its
  threads happen to run, so that only the size of a single array is sure.
  """

  class Limit:
    def __enter__(self):
      self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
      resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, self.before[1]))

    def __exit__(self, *_):
      resource.setrlimit(resource.RLIMIT_FSIZE, self.before)

  return Limit


def test_a_full_disk_gives_one_error_and_nothing_is_lost(run, whole, broken, small_files, capfd):
  with (
    small_files(),
    pytest.raises(OSError, match=r"cannot write .*broken/checkpoints/6: File too large; free some space") as error,
  ):
    run(broken)
  assert "\n" not in str(error.value)
  assert sorted(path.name for path in (broken / "checkpoints").iterdir()) == ["2", "4"]
  assert "Traceback" not in capfd.readouterr().err
  assert same_bits(run(broken).params, whole[0].params)


def test_a_full_disk_while_the_model_is_written(run, whole, broken, small_files, monkeypatch):
  before = training.load(broken)
  with monkeypatch.context() as patch:
    patch.setattr(checkpoints.Checkpoints, "save", lambda *args: None)
    with small_files(), pytest.raises(OSError, match=r"cannot write .*model.new/params: File too large; free some"):
      run(broken)
  assert same_bits(training.load(broken).params, before.params)
  assert not (broken / "model.new").exists()
  assert same_bits(run(broken).params, whole[0].params)


def test_too_little_disk_space_is_noticed_before_writing(run, whole, broken, monkeypatch, capfd):
  with monkeypatch.context() as patch:
    patch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10**6))
    with pytest.raises(
      OSError, match=r"checkpoints/6: No space left on device, it needs [\d,]+ bytes and 1,000,000 are"
    ):
      run(broken)
  assert capfd.readouterr().err == ""
  assert same_bits(run(broken).params, whole[0].params)


# --- arguments and numbers ------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ({"data": PIXELS}, r"data must be a dataset, got ndarray: make one .*Images\(images, labels, num_classes"),
    ({"data": (PIXELS, IMAGES.labels)}, "data must be a dataset, got tuple"),
    ({"run": {"keep": 3}}, "run must be a RunConfig, got dict"),
    ({"callback": 3}, "callback must be a function of step, state and metrics, got int"),
    ({"model": HOW, "training": MODEL}, "model must be a ModelConfig, got TrainingConfig"),
    ({"training": None}, "training must be a TrainingConfig, got NoneType"),
    ({"model": "unet"}, "model must be a ModelConfig, got str"),
  ],
  ids=range(7),
)
def test_arguments_of_wrong_types(tmp_path, monkeypatch, given, message):
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
  arguments = {"model": MODEL, "training": HOW, "data": IMAGES, "folder": tmp_path / "folder", **given}
  with pytest.raises(TypeError, match=message):
    training.fit(**arguments)
  assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("precision", ["default", "high", "highest"])
def test_products_have_the_configured_precision(compiled, precision):
  how = dataclasses.replace(HOW, matmul_precision=precision)
  with jax.default_matmul_precision("bfloat16"):  # This outer setting has no effect.
    program = jax.make_jaxpr(step.train_step(MODEL, how))(compiled[1], PIXELS[:3], IMAGES.labels[:3])
  precisions = re.findall(r"precision=(.*)", str(program))
  name = f"Precision.{precision.upper()}"
  assert {*precisions} == {f"({name}, {name})"}


def test_a_run_depends_on_the_whole_seed_and_not_on_jaxs_defaults(monkeypatch):
  monkeypatch.setattr(step, "init_params", lambda config, key: {"w": jax.random.normal(key, (4,))})
  goal = step.Objective(
    draw=lambda key, x0, labels: jax.random.normal(key, (len(x0), 4)),
    errors=lambda params, batch, key: (batch @ params["w"], {}),
    sigmas=lambda batch: batch[:, 0],
  )
  monkeypatch.setattr(step, "objective", lambda *_: goal)

  def result(seed):
    how = dataclasses.replace(HOW, seed=seed)
    state, metrics = step.train_step(MODEL, how)(step.init_state(MODEL, how), PIXELS[:3], IMAGES.labels[:3])
    return *state.params["w"].tolist(), float(metrics["loss"])

  zero, large = result(0), result(2**32)
  assert not {*zero} & {*large}
  with jax.default_prng_impl("rbg"):
    assert result(0) == zero
