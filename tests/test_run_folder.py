"""A run's folder: metrics, pictures, the page, the model while it trains, checkpoints, signals, and other settings."""

import dataclasses
import itertools
import json
import logging
import os
import re
import shutil
import signal
import threading
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import once
import pytest
from tiny import Classify, Mlp

from jaxguide import models, training
from jaxguide.data import Images
from jaxguide.models import folders
from jaxguide.training import (
  Interrupted,
  ModelConfig,
  RunConfig,
  TrainingConfig,
  checkpoints,
  held_out,
  journal,
  loop,
  page,
  signals,
  writers,
)

MODEL = ModelConfig(Mlp, {}, (4, 4, 1), 2, class_names=("top", "bottom"))
CLASSIFIER = ModelConfig(Classify, {}, (4, 4, 1), 2)
# Three examples run on one of the four devices, for which a step compiles in half the time.
HOW = TrainingConfig(steps=12, batch_size=3, save_every=4)
LOGS = RunConfig(log_every=3, sample_every=0)
LABELS = np.arange(40, dtype=np.int32) % 2
PIXELS = np.random.default_rng(0).integers(0, 60, (40, 4, 4, 1)).astype(np.uint8)
PIXELS[LABELS == 0, :2] += 180
PIXELS[LABELS == 1, 2:] += 180
DATA = Images(PIXELS, LABELS, 2, "halves")


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
  """Compile the step and the initial state of a configuration once for all tests, and not in each call of `fit`."""
  with once.compiled():
    yield


def fit(folder, how=HOW, run=LOGS, model=MODEL, data=DATA, **options):
  return training.fit(model, how, data, folder, run=run, progress=False, **options)


def same_bits(ours, theirs):
  return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True))


SEEN = []  # The steps of the uninterrupted run and their metrics.


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """The model of an uninterrupted run, and its folder. Tests that change the folder copy it first."""
  folder = tmp_path_factory.mktemp("whole") / "run"
  return fit(folder, callback=lambda step, state, metrics: SEEN.append((step, jax.device_get(metrics)))), folder


def stop_at(number, call):
  """A callback that calls a function after a step."""

  def callback(step, state, metrics):
    if step == number:
      call()

  return callback


# --- what the folder holds ------------------------------------------------------------------------


def test_a_line_of_metrics_per_interval(whole):
  lines = [json.loads(line) for line in (whole[1] / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == [3, 4, 6, 8, 9, 12]  # Each multiple of 3, and each checkpoint.
  for line in lines:
    assert line["loss"] > 0
    assert line["gradient_norm"] > 0
    assert line["images_per_second"] > 0
    assert line["memory"] > 2**20
    assert line["skipped"] == 0
    levels = line["loss_by_noise_level"]
    assert len(levels["loss"]) == len(levels["sigma"]) - 1 >= 8
  assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)


def test_the_metrics_are_those_of_the_steps(whole):
  assert [step for step, _ in SEEN] == list(range(1, 13))
  line = json.loads((whole[1] / "metrics.jsonl").read_text().splitlines()[0])
  figures = [metrics for _, metrics in SEEN[:3]]
  np.testing.assert_allclose(line["loss"], np.mean([metrics["loss"] for metrics in figures]), rtol=1e-5)
  np.testing.assert_allclose(line["rate"], figures[-1]["rate"], rtol=1e-5)
  losses, sigmas = (np.concatenate([metrics[name] for metrics in figures]) for name in ("losses", "sigmas"))
  levels = line["loss_by_noise_level"]
  for low, high, loss in zip(levels["sigma"][1:-2], levels["sigma"][2:-1], levels["loss"][1:-1], strict=True):
    members = losses[(sigmas >= low) & (sigmas < high)]
    assert (loss is None) == (len(members) == 0)
    if len(members):
      np.testing.assert_allclose(loss, members.mean(), rtol=1e-4)


def test_metrics_are_fetched_once_per_interval(tmp_path, monkeypatch):
  fetches, steps = [], []
  fetch = jax.device_get

  def counted(tree):
    if isinstance(tree, list):
      fetches.append((len(tree), len(steps)))
    return fetch(tree)

  monkeypatch.setattr(journal.jax, "device_get", counted)
  how = dataclasses.replace(HOW, save_every=100)
  fit(tmp_path / "run", how, RunConfig(log_every=5, sample_every=0), callback=lambda *_: steps.append(1))
  # The figures of an interval are fetched when the first step of the next one has been started.
  assert fetches == [(5, 6), (5, 11), (2, 12)]


def test_lines_of_a_killed_process_are_removed(whole, tmp_path):
  folder = tmp_path / "run"
  with pytest.raises(RuntimeError, match="killed"):
    fit(folder, callback=stop_at(11, lambda: (_ for _ in ()).throw(RuntimeError("killed"))))
  lines = (folder / "metrics.jsonl").read_text()
  assert json.loads(lines.splitlines()[-1])["step"] == 9
  (folder / "metrics.jsonl").write_text(lines + '{"step": 10, "lo')
  assert same_bits(fit(folder).params, whole[0].params)
  steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
  assert steps == [3, 4, 6, 8, 9, 12]
  figures = [
    [json.loads(line)["loss"] for line in (path / "metrics.jsonl").read_text().splitlines() if '"step": 12' in line]
    for path in (folder, whole[1])
  ]
  assert figures[0] == figures[1]


def test_the_newest_mean_can_be_loaded_while_the_run_goes_on(tmp_path):
  loaded = {}

  def callback(step, state, metrics):
    if step in (6, 11):
      record = tmp_path / "run" / "model" / "training.json"
      for _ in range(1200):  # It is written in the background.
        if record.exists() and json.loads(record.read_text())["step"] == {6: 4, 11: 8}[step]:
          break
        time.sleep(0.05)
      loaded[step] = models.load(tmp_path / "run")

  model = fit(tmp_path / "run", callback=callback)
  assert not same_bits(loaded[6].params, loaded[11].params)
  assert not same_bits(loaded[11].params, model.params)
  assert same_bits(models.load(tmp_path / "run").params, model.params)
  assert same_bits(models.load(tmp_path / "run" / "model").params, model.params)


def test_a_model_that_is_replaced_again_and_again_can_be_loaded_at_any_time(whole, tmp_path):
  folder = shutil.copytree(whole[1], tmp_path / "run")
  numbers = jax.device_get(whole[0].params)
  others = [models.Model(MODEL, jax.tree.map(lambda leaf, i=i: leaf + np.float32(i), numbers)) for i in range(2)]
  ends, errors = threading.Event(), []

  def replace():
    try:
      for i in range(10**6):
        if ends.is_set():
          return
        folders.publish(folder, others[i % 2], {"step": i})
        time.sleep(0.02)
    except BaseException as error:
      errors.append(error)

  thread = threading.Thread(target=replace)
  thread.start()
  try:
    for _ in range(15):
      loaded = models.load(folder)
      assert any(same_bits(loaded.params, other.params) for other in (whole[0], *others))
  finally:
    ends.set()
    thread.join()
  assert errors == []


def test_a_model_that_is_replaced_while_it_is_read_is_read_again(whole, tmp_path, monkeypatch):
  folder = shutil.copytree(whole[1], tmp_path / "run")
  other = models.Model(MODEL, jax.tree.map(lambda leaf: leaf + 1, whole[0].params))
  read, reads = folders._read_checksums, []

  def replaced(*args):
    checksums = read(*args)
    reads.append(1)
    if len(reads) == 1:  # The parameters are then not those of the checksums.
      folders.publish(folder, other, {})
    return checksums

  monkeypatch.setattr(folders, "_read_checksums", replaced)
  assert same_bits(models.load(folder).params, other.params)
  assert len(reads) == 2


def test_pictures_have_the_same_noise_each_time_and_the_page_shows_them(tmp_path, monkeypatch):
  keys = []
  draw = loop.grids.sampling.sample_batch

  def recorded(denoise, key, labels, **options):
    keys.append((jax.random.key_data(key).tolist(), labels.tolist()))
    return draw(denoise, key, labels, **options)

  monkeypatch.setattr(loop.grids.sampling, "sample_batch", recorded)
  run = RunConfig(log_every=3, sample_every=6, sample_steps=2, samples_per_class=2, sample_scales=(0.0, 2.0))
  fit(tmp_path / "run", run=run)
  assert len(keys) == 4
  assert len({str(key) for key in keys}) == 1
  assert keys[0][1] == [0, 0, 1, 1]
  pictures = sorted((tmp_path / "run" / "samples").iterdir())
  assert [path.name for path in pictures] == ["00000006.png", "00000012.png"]
  text = (tmp_path / "run" / "index.html").read_text()
  assert text.count("data:image/png;base64,") == 2
  assert "12 of 12 (100%)" in text
  assert text.count("<svg") >= 4
  assert not re.search(r"<script|<link|src=\"(?!data:)", text)
  assert 'http-equiv="refresh"' not in text  # The run is finished.


def test_a_curve_has_the_points_of_the_metrics():
  lines = [{"step": step, "loss": 1.0 / step} for step in (1, 10, 100)]
  (plot,) = page.plots(lines)
  points = re.findall(r"([\d.]+) ([\d.]+)", plot.curves[0].path)
  x, y = np.array(points, float).T
  # Steps are on a linear axis, losses on a logarithmic one that points upwards.
  np.testing.assert_allclose((x[1] - x[0]) / (x[2] - x[0]), 9 / 99, atol=1e-2)
  np.testing.assert_allclose((y[1] - y[0]) / (y[2] - y[0]), 0.5, atol=1e-2)
  assert y[0] < y[2]
  assert page.plots([{"step": 1, "loss": 1.0}]) == []


def test_tensorboard_reads_what_is_written(tmp_path):
  event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
  run = RunConfig(log_every=3, sample_every=12, sample_steps=2, writers="tensorboard")
  fit(tmp_path / "run", run=run)
  (path,) = (tmp_path / "run" / "tensorboard").iterdir()
  content, tags = path.read_bytes(), {}
  while content:  # TFRecord: the length, its checksum, the event and its checksum.
    length = int.from_bytes(content[:8], "little")
    event = event_pb2.Event.FromString(content[12 : 12 + length])
    for value in event.summary.value:
      tags.setdefault(value.tag, []).append(event.step)
    content = content[16 + length :]
  assert tags["loss"] == [3, 4, 6, 8, 9, 12]
  assert tags["samples"] == [12]


def test_a_writer_that_is_not_installed_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "wandb", None)
  with pytest.raises(ImportError, match=r"the writer 'wandb' needs wandb, .*: pip install 'jaxguide\[wandb\]'"):
    fit(tmp_path / "run", run=RunConfig(writers=["wandb"]))
  with pytest.raises(ValueError, match="unknown writer 'tensorbord': did you mean 'tensorboard'"):
    RunConfig(writers=["tensorbord"])


def test_a_writer_of_ones_own_is_an_entry(tmp_path, monkeypatch):
  calls = []

  class Mine:
    def __init__(self, folder, name):
      calls.append(("made", folder.name, name))

    def scalars(self, step, values):
      calls.append((step, values["loss"]))

    def image(self, step, name, array):
      calls.append((step, name, array.shape[-1]))

    def close(self):
      calls.append("closed")

  monkeypatch.setitem(writers.WRITERS, "mine", Mine)
  fit(tmp_path / "run", run=RunConfig(log_every=12, sample_every=12, sample_steps=2, writers=["mine"]))
  assert calls[0] == ("made", "run", "run")
  assert (12, "samples", 3) in calls
  assert calls[-1] == "closed"


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("log_every", 0),
    ("keep", 0),
    ("sample_scales", ()),
    ("sample_scales", [float("nan")]),
    ("patience", 0),
    ("samples_per_class", 0),
  ],
)
def test_a_bad_run_config(field, value):
  with pytest.raises(ValueError, match=field):
    RunConfig(**{field: value})


# --- checkpoints ----------------------------------------------------------------------------------


def test_the_newest_checkpoints_are_kept_and_every_mth(tmp_path):
  how = dataclasses.replace(HOW, save_every=1)
  fit(tmp_path / "run", how, RunConfig(log_every=3, sample_every=0, keep=3, keep_every=5))
  assert checkpoints.steps(tmp_path / "run" / "checkpoints") == [5, 10, 11, 12]


def test_the_loop_does_not_wait_for_a_checkpoint(tmp_path, monkeypatch):
  """While a checkpoint is written, steps are taken; the checkpoint holds the state of its own step."""
  order, written = [], threading.Event()
  commit = checkpoints.Checkpoints.wait

  def wait(self):
    if self._pending == 4 and not order:
      assert written.wait(30)  # The next save, after step 8, is the first to wait.
      order.append(steps[-1])
    commit(self)

  steps = []

  def callback(step, state, metrics):
    steps.append(step)
    if step == 8:
      written.set()

  monkeypatch.setattr(checkpoints.Checkpoints, "wait", wait)
  fit(tmp_path / "run", callback=callback)
  assert order == [8]


def test_a_failed_checkpoint_names_its_path_and_the_one_before_stays(tmp_path, monkeypatch):
  import orbax.checkpoint as ocp

  save = ocp.CheckpointManager.save

  def fail(self, step, **options):
    if step == 8:
      raise OSError(28, "No space left on device")
    return save(self, step, **options)

  with monkeypatch.context() as patch:
    patch.setattr(ocp.CheckpointManager, "save", fail)
    with pytest.raises(OSError, match=r"cannot write .*checkpoints/8: No space left on device; free some space"):
      fit(tmp_path / "run")
  assert checkpoints.steps(tmp_path / "run" / "checkpoints") == [4]


# --- signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_saves_and_the_same_call_goes_on(whole, tmp_path, number, status, capfd):
  before = signal.getsignal(number)
  with pytest.raises(Interrupted, match="stopped after step 7 and saved") as stop:
    fit(tmp_path / "run", callback=stop_at(7, lambda: signal.raise_signal(number)))
  assert (stop.value.status, stop.value.step) == (status, 7)
  assert isinstance(stop.value, KeyboardInterrupt)
  assert signal.getsignal(number) == before
  assert checkpoints.steps(tmp_path / "run" / "checkpoints")[-1] == 7
  assert models.exists(tmp_path / "run")
  assert "Traceback" not in capfd.readouterr().err
  taken = []
  again = fit(tmp_path / "run", callback=lambda step, *_: taken.append(step))
  assert taken[0] == 8
  assert same_bits(again.params, whole[0].params)


def test_a_second_ctrl_c_ends_at_once(whole, tmp_path, monkeypatch, capfd):
  wait = checkpoints.Checkpoints.wait

  def interrupted(self):
    signal.raise_signal(signal.SIGINT)
    wait(self)

  with monkeypatch.context() as patch:
    patch.setattr(checkpoints.Checkpoints, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt) as stop:
      fit(tmp_path / "run", callback=stop_at(6, lambda: signal.raise_signal(signal.SIGINT)))
  assert not isinstance(stop.value, Interrupted)
  assert "Traceback" not in capfd.readouterr().err
  assert same_bits(fit(tmp_path / "run").params, whole[0].params)


def test_a_checkpoint_that_was_not_written_to_the_end_is_said(whole, tmp_path, caplog):
  with pytest.raises(RuntimeError):
    fit(tmp_path / "run", callback=stop_at(7, lambda: (_ for _ in ()).throw(RuntimeError)))
  shutil.copytree(tmp_path / "run" / "checkpoints" / "4", tmp_path / "run" / "checkpoints" / "6.orbax-checkpoint-tmp")
  assert same_bits(fit(tmp_path / "run").params, whole[0].params)
  assert "the checkpoint of step 6 in" in caplog.text
  assert "was not written to the end" in caplog.text


def test_signals_are_those_of_the_program_after_the_training_and_in_other_threads(tmp_path):
  seen = []
  before = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
  try:
    fit(tmp_path / "run")
    signal.raise_signal(signal.SIGTERM)
    assert seen == [1]
    errors = []
    thread = threading.Thread(target=lambda: errors.append(fit(tmp_path / "thread")))
    thread.start()
    thread.join()
    assert len(errors) == 1  # The training ended without an error.
    with signals.stop_requests() as request:
      signal.raise_signal(signal.SIGTERM)
    assert request.number == signal.SIGTERM
    assert seen == [1]
  finally:
    signal.signal(signal.SIGTERM, before)


# --- other settings -------------------------------------------------------------------------------


def test_a_finished_run_is_extended(whole, tmp_path, caplog):
  folder = shutil.copytree(whole[1], tmp_path / "run")
  how = dataclasses.replace(HOW, steps=20, rate="constant", learning_rate=1e-3)
  taken = []
  with caplog.at_level(logging.WARNING, "jaxguide.training"):
    extended = fit(folder, how, callback=lambda step, *_: taken.append(step))
  assert taken == list(range(13, 21))
  assert not same_bits(extended.params, whole[0].params)
  assert "from step 12 on, training.steps is 20 instead of 12" in caplog.text
  history = json.loads((folder / "training.json").read_text())["history"]
  assert {"step": 12, "what": "training.steps", "from": 12, "to": 20} in history
  assert {"step": 12, "what": "training.learning_rate", "from": 2e-3, "to": 1e-3} in history
  assert 'rate = "constant"' in (folder / "config.toml").read_text()
  # The record is that of the new settings, and the changes stay in it.
  fit(folder, dataclasses.replace(how, steps=24))
  history = json.loads((folder / "training.json").read_text())["history"]
  assert [change["step"] for change in history if change["what"] == "training.steps"] == [12, 20]
  with pytest.raises(ValueError, match=r"training\.steps is 12, but the run in .* has taken 24 steps already"):
    fit(folder)


def test_a_finished_run_is_not_changed_without_further_steps(whole, tmp_path):
  folder = shutil.copytree(whole[1], tmp_path / "run")
  with pytest.raises(
    ValueError, match=r"taken all of its 12 steps with other settings: give more steps .*learning_rate"
  ):
    fit(folder, dataclasses.replace(HOW, learning_rate=1e-3))
  for change in ({"save_every": 3}, {"skip_nan": 5}):  # These would not have changed the model.
    assert same_bits(fit(folder, dataclasses.replace(HOW, **change)).params, whole[0].params)


@pytest.mark.parametrize(
  ("change", "named"),
  [
    ({"seed": 1}, r"training\.seed is 0 there, and 1 here"),
    ({"batch_size": 8}, r"training\.batch_size is 3 there, and 8 here"),
    ({"optimizer": "lion"}, r"training\.optimizer is 'adamw' there, and 'lion' here"),
    ({"ema": "power:std=0.1"}, r"training\.ema is 'constant' there, and 'power:std=0.1' here"),
    ({"weight": "eps"}, r"training\.weight is 'plain' there, and 'eps' here"),
  ],
)
def test_what_cannot_change_is_refused_by_name(whole, change, named):
  with pytest.raises(ValueError, match=named):
    fit(whole[1], dataclasses.replace(HOW, steps=20, **change))


def test_how_a_run_logs_and_saves_may_change_and_is_recorded(tmp_path, caplog):
  with pytest.raises(Interrupted):
    fit(tmp_path / "run", callback=stop_at(5, lambda: signal.raise_signal(signal.SIGINT)))
  fit(tmp_path / "run", run=dataclasses.replace(LOGS, keep=3))
  assert "from step 5 on, run.keep is 3 instead of 2" in caplog.text
  (change,) = json.loads((tmp_path / "run" / "training.json").read_text())["history"]
  assert change == {"step": 5, "what": "run.keep", "from": 2, "to": 3}
  assert "keep = 3" in (tmp_path / "run" / "config.toml").read_text()
  assert fit(tmp_path / "run") is not None  # A finished run is loaded, however it is asked to log.


def test_an_unfinished_run_goes_on_with_other_settings(tmp_path, caplog):
  with pytest.raises(Interrupted):
    fit(tmp_path / "run", callback=stop_at(5, lambda: signal.raise_signal(signal.SIGINT)))
  with pytest.raises(ValueError, match="has taken 5 steps already"):
    fit(tmp_path / "run", dataclasses.replace(HOW, steps=4))
  fit(tmp_path / "run", dataclasses.replace(HOW, steps=8, learning_rate=1e-4))
  assert "from step 5 on, training.learning_rate is 0.0001 instead of 0.002" in caplog.text


class Files(Images):
  """Images with the stamps of files, which tell whether the data have only grown."""

  @property
  def stamps(self):
    """A number for each image."""
    return self.images.reshape(len(self), -1).astype(np.uint64) @ np.arange(1, 17, dtype=np.uint64) ** 3


def test_data_may_grow_and_not_change(tmp_path, caplog):
  first, grown = (Files(PIXELS[:n], LABELS[:n], 2, "files") for n in (20, 24))
  with pytest.raises(Interrupted):
    fit(tmp_path / "run", data=first, callback=stop_at(5, lambda: signal.raise_signal(signal.SIGINT)))
  for other in (Files(PIXELS[1:24], LABELS[1:24], 2, "files"), Files(PIXELS[:16], LABELS[:16], 2, "files")):
    with pytest.raises(ValueError, match=r"data\.fingerprint is"):
      fit(tmp_path / "run", data=other)
  fit(tmp_path / "run", data=grown)
  assert "from step 5 on, data.number is 24 instead of 20" in caplog.text
  assert same_bits(fit(tmp_path / "run", data=grown).params, models.load(tmp_path / "run").params)
  with pytest.raises(ValueError, match=r"data\.fingerprint is"):
    fit(tmp_path / "run", data=first)


def test_a_run_begins_with_given_parameters(whole, tmp_path):
  how = dataclasses.replace(HOW, steps=3, learning_rate=1e-12, warmup=0)
  with pytest.raises(Interrupted):
    fit(tmp_path / "run", how, init=whole[0], callback=stop_at(1, lambda: signal.raise_signal(signal.SIGINT)))
  begun = models.load(tmp_path / "run")
  for ours, theirs in zip(jax.tree.leaves(begun.params), jax.tree.leaves(whole[0].params), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
  with pytest.raises(ValueError, match=r"init is '\w+' there, and None here"):
    fit(tmp_path / "run", how)
  fit(tmp_path / "run", how, init=whole[0].params)
  with pytest.raises(ValueError, match="do not fit"):
    fit(tmp_path / "other", init={"params": {"Dense_0": whole[0].params["params"]["Dense_0"]}})
  assert not (tmp_path / "other").exists()


# --- values that are not finite -------------------------------------------------------------------


def poisoned(rows, after=6):
  """A step whose loss of some examples is NaN at one step, as the lead's step reports it."""
  make = loop.train_step

  def of(*args):
    step = make(*args)

    def run(state, *batch):
      number = int(state.step)
      state, metrics = step(state, *batch)
      if number == after:
        losses = metrics["losses"].at[jnp.array(rows)].set(jnp.nan)
        metrics = {**metrics, "losses": losses, "loss": losses.mean()}
      return state, metrics

    return run

  return of


def test_a_loss_that_is_not_finite_names_the_files_and_their_noise_levels(tmp_path, monkeypatch):
  batches, levels = [], []
  stream = loop.datasets.stream

  def recorded(*args, **options):
    for batch in stream(*args, **options):
      batches.append(batch)
      yield batch

  monkeypatch.setattr(loop.datasets, "stream", recorded)
  monkeypatch.setattr(loop, "train_step", poisoned([0, 2]))
  with pytest.raises(
    FloatingPointError, match=r"the loss is not finite at step 6; the checkpoint of step 4 is"
  ) as error:
    fit(tmp_path / "run", callback=lambda step, state, metrics: levels.append(metrics["sigmas"]))
  wanted = [f"{DATA.example_name(int(batches[6].rows[i]))} (sigma {float(levels[6][i]):.3g})" for i in (0, 2)]
  assert f"The loss is not finite for {', '.join(wanted)}. Try a lower learning_rate" in str(error.value)
  assert checkpoints.steps(tmp_path / "run" / "checkpoints") == [4]


def test_more_steps_than_allowed_that_are_not_finite_end_the_run(tmp_path):
  # With this learning rate each loss after the warm-up is infinite: two steps are stepped over, the third ends the run.
  how = dataclasses.replace(HOW, skip_nan=2, steps=30, learning_rate=1e30, warmup=5, clip_norm=1e30)
  with pytest.raises(FloatingPointError, match=r"at step \d+, after 2 that were stepped over; the checkpoint of step"):
    fit(tmp_path / "run", how)


def test_a_step_that_is_stepped_over_is_logged(tmp_path, monkeypatch):
  monkeypatch.setattr(loop, "train_step", poisoned([0]))
  fit(tmp_path / "run", dataclasses.replace(HOW, skip_nan=1))
  lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert [line["skipped"] for line in lines] == [0, 0, 0, 1, 1, 1]
  assert all(np.isfinite(line["loss"]) for line in lines)


# --- held-out data --------------------------------------------------------------------------------


def test_a_classifier_is_evaluated_and_stops_early_with_the_best_model(tmp_path, caplog, monkeypatch):
  nll = iter([3.0, 2.0, 2.5, 2.1, 9.0, 9.0])
  evaluate = loop.HeldOut.evaluate

  def scripted(self, params, step, place):
    figures, _ = evaluate(self, params, step, place)
    self.best, self.best_step, self._since = self.before  # Undo what was noted.
    figures["mean_nll"] = next(nll)
    is_best = self._note(step, figures["mean_nll"])
    self.before = self.best, self.best_step, self._since
    return figures, is_best

  monkeypatch.setattr(loop.HeldOut, "before", (np.inf, 0, 0), raising=False)
  monkeypatch.setattr(loop.HeldOut, "evaluate", scripted)
  means = {}

  def callback(step, state, metrics):
    means[step] = jax.device_get(state.ema_params)

  run = RunConfig(log_every=3, held_out_every=2, patience=2)
  held_out = Images(PIXELS[:8], LABELS[:8], 2, "held out")
  how = dataclasses.replace(HOW, save_every=3)
  model = fit(tmp_path / "run", how, run, CLASSIFIER, held_out=held_out, callback=callback)
  assert max(means) == 8
  assert same_bits(model.params, means[4])
  assert same_bits(models.load(tmp_path / "run").params, means[4])
  assert "stopped after step 8 of 12" in caplog.text
  assert "the model is that of step 4" in caplog.text
  lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  evaluated = {line["step"]: line["held_out"] for line in lines if "held_out" in line}
  assert [*evaluated] == [2, 4, 6, 8]
  assert {"sigma", "accuracy", "nll", "calibration_error", "mean_nll"} <= {*evaluated[2]}
  # The training is finished: the same call loads the best model.
  assert same_bits(fit(tmp_path / "run", how, run, CLASSIFIER, held_out=held_out).params, means[4])


def test_early_stopping_goes_on_where_it_was(tmp_path, monkeypatch):
  calls = []

  def worse_each_time(*args, **options):
    calls.append(1)
    nll = np.full(2, float(len(calls)))
    return held_out.Levels(np.ones(2), np.ones(2), nll, np.ones(2), np.ones(2), 8)

  monkeypatch.setattr(held_out, "evaluate", worse_each_time)
  run = RunConfig(log_every=3, held_out_every=2, patience=3)
  options = {"run": run, "model": CLASSIFIER, "held_out": Images(PIXELS[:8], LABELS[:8], 2, "held out")}
  whole = fit(tmp_path / "whole", **options)
  assert len(calls) == 4
  calls.clear()
  with pytest.raises(Interrupted):
    fit(tmp_path / "run", **options, callback=stop_at(7, lambda: signal.raise_signal(signal.SIGTERM)))
  assert len(calls) == 3
  assert same_bits(fit(tmp_path / "run", **options).params, whole.params)
  assert len(calls) == 4  # The evaluations before the interruption count.


def test_held_out_data_are_for_classifiers(tmp_path):
  with pytest.raises(ValueError, match="held_out is for a classifier"):
    fit(tmp_path / "run", held_out=DATA)
  with pytest.raises(ValueError, match="patience counts evaluations on held-out data"):
    fit(tmp_path / "run", run=RunConfig(patience=2), model=CLASSIFIER)
  assert not os.listdir(tmp_path)


def test_data_that_vanish_lose_nothing(tmp_path, monkeypatch):
  """The state is saved when a batch cannot be read, and the same call goes on to the same weights; on all devices."""
  how, read = dataclasses.replace(HOW, save_every=100, batch_size=jax.device_count()), loop.datasets.stream

  def vanishing(*args, **options):
    yield from itertools.islice(read(*args, **options), 7)
    raise OSError("pictures/3.png cannot be read")

  with monkeypatch.context() as patch:
    patch.setattr(loop.datasets, "stream", vanishing)
    with pytest.raises(OSError, match=r"3\.png cannot be read; everything up to step 7 is saved in .*restore the data"):
      fit(tmp_path / "run", how)
  assert checkpoints.steps(tmp_path / "run" / "checkpoints") == [7]
  chex.assert_trees_all_equal(fit(tmp_path / "run", how).params, fit(tmp_path / "whole", how).params)
