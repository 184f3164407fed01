"""The training loop: a Python loop over one jitted step, which can be stopped or killed, and continued.

The state after step ``k`` depends on the configuration and the data alone, whether or not the run was interrupted:
batch ``k`` and the random key of step ``k`` are derived from the seed and ``k``.

`jaxguide.training.run_folder` describes what a run writes. A lock allows one process at a time to write to the folder.
"""

import contextlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxguide
from jaxguide import data as datasets
from jaxguide._core import checks, files, records
from jaxguide._core.bars import progress_bar
from jaxguide._core.devices import first
from jaxguide._core.files import PathLike
from jaxguide._core.typing import PyTree
from jaxguide.data.batches import Order
from jaxguide.distributed import processes
from jaxguide.distributed.placing import Placement, for_batches
from jaxguide.models import arrays, folders
from jaxguide.models.config import ModelConfig
from jaxguide.models.model import Model
from jaxguide.training import checkpoints, desk, grids, inputs, page, run_folder, snapshots, toml
from jaxguide.training.config import TrainingConfig
from jaxguide.training.early_stopping import HeldOut
from jaxguide.training.journal import Journal, NotFinite, Step
from jaxguide.training.run_config import RunConfig
from jaxguide.training.signals import Agreement, Interrupted, Request, stop_requests
from jaxguide.training.step import TrainState, init_state, state_shapes, train_step
from jaxguide.training.writers import Writers

Callback = Callable[[int, TrainState, Mapping[str, Any]], object]

LOG = logging.getLogger("jaxguide.training")

VERSIONS = {"the version of jaxguide": jaxguide.__version__, "the version of jax": jax.__version__}
"""What has to be the same in all processes, beside the record of the training."""

QUIET = RunConfig(sample_every=0)
"""A run without pictures, whose sampler would have to be compiled."""


def fit(
  model: ModelConfig,
  training: TrainingConfig,
  data: Any,
  folder: PathLike,
  *,
  run: RunConfig = QUIET,
  held_out: Any = None,
  init: Model | PyTree = None,
  callback: Callback | None = None,
  retrain: bool = False,
  progress: bool = True,
) -> Model:
  """Train a network, continue an interrupted training, or load the model if it is trained already.

  While it trains, ``jaxguide.models.load(folder)`` loads the newest running mean. SIGINT (Ctrl-C), SIGTERM and SIGUSR1
  end the training after the current step, with everything saved; a second SIGINT ends it at once. After a kill, the
  steps since the last checkpoint are lost. The same call continues the training, and its model is the same bit for
  bit, on the same devices.

  A run may be continued with other ``steps``, ``learning_rate``, ``rate``, ``warmup``, ``save_every``, ``skip_nan`` or
  ``remat``, and another ``run``. ``training.json`` records such a change. More ``steps`` extend a finished run.

  Args:
    model: the configuration of the network.
    training: the configuration of the training.
    data: the training data, a dataset such as `jaxguide.data.Images`.
    folder: the folder of the run; see `jaxguide.training.run_folder`.
    run: how the run logs, saves and draws. The default draws no samples.
    held_out: a dataset on which a classifier is evaluated while it trains.
    init: a model whose parameters the training begins with, or its parameters. By default they are random.
    callback: called after each step with the number of completed steps, the `TrainState` and the metrics, see
      `train_step`. All are arrays on the device: reading one waits for the device. The buffers of the state are
      donated to the next step, so copy what you keep.
    retrain: whether to start over. A model that is already in the folder stays until the new one is complete.
    progress: whether to show a progress bar with loss and speed.

  Returns:
    The trained model, whose parameters are the running mean; with ``run.patience`` the best one. ``folder`` contains
    the same model.

  Raises:
    TypeError: if an argument has a wrong type.
    ValueError: if the data do not fit the network; if the folder contains a model or checkpoints with other settings
      or other data, naming what differs; or if all checkpoints are damaged.
    OSError: if the folder cannot be written, or another process is training in it.
    FloatingPointError: if the loss, a parameter or the optimiser's state is not finite, naming the step and the
      examples. The last checkpoint before it is kept.
    Interrupted: a KeyboardInterrupt, if a signal ended the training.
  """
  return fit_with(
    None, model, training, data, folder, run, held_out, init, callback, retrain=retrain, progress=progress
  )


def fit_with(
  config: str | None,
  model: ModelConfig,
  training: TrainingConfig,
  data: Any,
  folder: PathLike,
  run: RunConfig,
  held_out: Any,
  init: Any,
  callback: Callback | None,
  *,
  begun: str | None = None,
  retrain: bool,
  progress: bool,
) -> Model:
  """Train like `fit`, and keep ``config`` as the run's ``config.toml``; None for what `fit` knows.

  ``begun`` is the checksum of the parameters that an earlier part of the run began with, in place of ``init``.
  """
  checks.flag("retrain", retrain)
  inputs.check_arguments(model, training, data, run, held_out, callback)
  params = inputs.initial_params(model, init)
  folder = Path(folder).absolute()
  record = run_folder.record(model, training, data, run, begun if params is None else inputs.checksum(params))
  place = for_batches(training.batch_size, run.mesh)
  processes.check_same({**records.flat(record), "the folder": str(folder), **VERSIONS})
  desk.settle()
  with contextlib.ExitStack() as stack:
    start = run_folder.begin(folder, record, retrain, data, stack)
    if start.trained:
      return folders.load(folder)
    trainer = Trainer(model, training, data, folder, run, record, start, place)
    trainer.begin(toml.of_fit(model, training, run, data) if config is None else config)
    return trainer.train(held_out, params, callback, progress)


class Trainer:
  """A training in its folder, whose lock is held.

  Args:
    model: the configuration of the network.
    training: the configuration of the training.
    data: the dataset.
    folder: the folder of the run.
    run: how the run logs, saves and draws.
    record: the record of the training.
    start: how the training begins.
    place: where arrays are placed.
  """

  def __init__(
    self,
    model: ModelConfig,
    training: TrainingConfig,
    data: Any,
    folder: Path,
    run: RunConfig,
    record: Mapping[str, Any],
    start: run_folder.Start,
    place: Placement,
  ):
    self.model, self.training, self.data, self.folder, self.run = model, training, data, folder, run
    self.record, self.start, self.place = record, start, place
    self.writes = processes.is_first()

  def begin(self, config: str) -> None:
    """Write configuration and record, unless the run is continued with other settings: then `train` writes them."""
    self.config = config
    if not self.start.changes:
      self._write_settings(self.start.history)

  def _write_settings(self, history: Any) -> None:
    if not self.writes:
      return
    run_folder.write(self.folder, self.record, history, self.start.keeps_model)
    files.write_atomically(self.folder / run_folder.CONFIG, self.config.encode())
    inputs.write_stamps(self.folder, self.data)

  def train(self, held_out: Any, params: PyTree, callback: Callback | None, progress: bool) -> Model:
    """Train from the last checkpoint to the end."""
    training, folder = self.training, self.folder
    shapes = state_shapes(self.model, training, params)
    shardings = self.place.shardings(shapes)
    template = jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )
    state = checkpoints.restore(
      folder / run_folder.CHECKPOINTS, template, lambda: self.place.shards(init_state(self.model, training, params))
    )
    self.first = self.saved_step = int(state.step)
    self._say_changes()
    if self.writes:
      snapshots.remove_after(folder / snapshots.FOLDER, self.first)
    self.step = train_step(self.model, training, self.place)
    name = f"training the {self.model.role.name}"
    with contextlib.ExitStack() as stack:
      request = stack.enter_context(stop_requests())
      self.saved = stack.enter_context(
        checkpoints.Checkpoints(folder / run_folder.CHECKPOINTS, self.run.keep, self.run.keep_every)
      )
      self.desk = stack.enter_context(desk.Desk())
      writers = tuple(self.run.writers) if self.writes else ()
      self.writers = stack.enter_context(contextlib.closing(Writers(writers, folder)))
      self.bar = stack.enter_context(
        progress_bar(training.steps, initial=self.first, title=name, unit="step", show=progress and self.writes)
      )
      self.journal = self._journal(int(state.skipped))
      processes.wait_for_all("the metrics are those of the last checkpoint")
      self.held_out = HeldOut.resume(self.model, training, self.run, held_out, folder / run_folder.METRICS)
      share = self.place.local_rows(training.batch_size) if self.place.spans_processes else None
      self.source = datasets.stream(self.data, training.batch_size, training.seed, self.first, share=share)
      self.order = Order(len(self.data), training.seed, training.batch_size)
      stack.callback(getattr(self.source, "close", lambda: None))
      try:
        state = self._steps(state, request, callback)
        return self._finish(state)
      except NotFinite as error:
        raise self._not_finite(error.problem, error.examples) from None
      except BaseException:
        if request.at_once:
          self.saved.abandon()
          self.desk.abandon()
        raise

  def _journal(self, skipped: int) -> Journal:
    def log(line: dict[str, Any]) -> None:
      shown = {name: line[name] for name in ("loss", "accuracy") if line.get(name) is not None}
      self.bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()}, refresh=False)
      self.bar.update(line["step"] - self.bar.n)
      self.writers.scalars(line["step"], _flat(line))

    return Journal(
      self.folder / run_folder.METRICS if self.writes else None,
      self.first,
      self.training.batch_size,
      example_name=self.data.example_name,
      skip=self.training.skip_nan,
      skipped=skipped,
      log=log,
    )

  def _steps(self, state: TrainState, request: Request, callback: Callback | None) -> TrainState:
    """Take the steps that are left, and return the state after the last one."""
    training = self.training
    self.done = self.first
    agreement = Agreement(self.place)
    for number in range(self.first, training.steps):
      stopping = agreement(request.number)
      if stopping is not None:
        self._stop(state, stopping)
      batch = self._next(state)
      if number == self.first:
        LOG.info("compiling the training step, once; this can take minutes")
      with self.journal.pause() if number == self.first else contextlib.nullcontext():
        state, metrics = self._step(state, batch)
      self.done = number + 1
      if callback is not None:
        callback(self.done, state, metrics)
      # Every process knows the rows of the whole batch.
      self.journal.add(Step(number, self.order[number] if self.place.spans_processes else batch.rows, metrics))
      if self._at_end_of_interval(state):
        break
    return state

  def _step(self, state: TrainState, batch: Any) -> tuple[TrainState, Mapping[str, Any]]:
    with processes.explained():
      return self.step(state, *self.place.own_rows((batch.examples, batch.labels), self.training.batch_size))

  def _next(self, state: TrainState) -> Any:
    """Return the next batch. If the data cannot be read any more, nothing of the training is lost."""
    try:
      return next(self.source)
    except (OSError, ValueError) as error:
      if not self.place.spans_processes:  # Else the other processes wait in the next step.
        self._keep(state)
      kept = f"everything up to step {self.saved_step if self.place.spans_processes else self.done} is saved in "
      kept = f"{kept}{self.folder}" if self.done else "there was no step yet"
      kind = OSError if isinstance(error, OSError) else ValueError
      raise kind(f"{error}; {kept}: restore the data, and start the training again to go on") from error

  def _at_end_of_interval(self, state: TrainState) -> bool:
    """Log, evaluate, draw and save what is due after a step. Return whether the training stops early."""
    done, last = self.done, self.done == self.training.steps
    evaluates = self.held_out is not None and (last or done % self.run.held_out_at(self.training.steps) == 0)
    draws = self._draws(done, last)
    saves = last or done % self.training.save_every == 0
    every = self.run.snapshots_at(self.training.steps, len(snapshots.widths(self.training.means)))
    keeps = every > 0 and (last or done % every == 0)
    if not (evaluates or draws or saves or keeps):
      if done % self.run.log_every == 0:
        self.journal.end_interval()
      return False
    # This also stops at a loss that is not finite, before anything is evaluated or saved.
    self.journal.flush((lambda: self._evaluate(state)) if evaluates else None)
    stops = self.held_out is not None and self.held_out.stops
    with self.journal.pause():
      if draws or (stops and self._draws(done, True)):
        self._draw(state)
      if keeps:
        self._snapshot(state)
      if saves or stops:
        self._save(state, last or stops)
    return stops

  def _draws(self, done: int, last: bool) -> bool:
    every = self.run.samples_at(self.training.steps)
    return every > 0 and grids.can_draw(self.model) and (last or done % every == 0)

  def _mean(self, state: TrainState) -> Model:
    """Return the model of a state, its running mean, in the host memory of the first process."""
    # Without parameters that were trained together with the network.
    return Model(self.model, {"params": processes.gathered(state.ema_params["params"], only_first=True)})

  def _save(self, state: TrainState, last: bool) -> None:
    """Save a checkpoint, and publish the model; after the last step the model is published later."""
    self.desk.finish()  # The best model so far is in its place before a checkpoint after it.
    # The losses are those of the parameters before each step, so the newest state is checked separately.
    path = arrays.not_finite(state)
    if path is not None:
      raise self._not_finite(f"{path} is not finite after step {self.done - 1}")
    self.saved.save(state, self.done)
    self.saved_step = self.done
    if not last:
      if self.held_out is None or not self.held_out.chooses:
        self._publish(self._mean(state))
      self._write_page()

  def _snapshot(self, state: TrainState) -> None:
    """Keep the power-function means, from which means of other widths are made."""
    means, folder, done = processes.gathered(state.means, only_first=True), self.folder / snapshots.FOLDER, self.done
    if self.writes:
      self.desk.submit(lambda: snapshots.write(folder, done, self.training.means, means))

  def _publish(self, model: Model, finished: bool = False) -> None:
    """Replace the model in the folder, unless an older one stays until the training is finished."""
    record = {**self.record, "step": self.done, **({"finished": True} if finished else {})}
    if self.writes and (finished or not self.start.keeps_model):
      self.desk.submit(lambda: folders.publish(self.folder, model, record))

  def _evaluate(self, state: TrainState) -> dict[str, Any]:
    """Evaluate on held-out data, publish the model if it is the best one, and return the figures."""
    assert self.held_out is not None  # The caller has checked it.
    figures, is_best = self.held_out.evaluate(state.ema_params, self.done, self.place)
    if self.held_out.chooses and is_best:
      self._publish(self._mean(state))
    if self.held_out.stops:
      LOG.warning(
        "stopped after step %d of %d: the negative log-likelihood on held-out data has not fallen in %d evaluations; "
        "the model is that of step %d",
        self.done,
        self.training.steps,
        self.run.patience,
        self.held_out.best_step,
      )
    return {"held_out": figures}

  def _draw(self, state: TrainState) -> None:
    path = self.folder / run_folder.SAMPLES / f"{self.done:08d}.png"
    try:
      at_once = self.training.batch_size // self.training.accumulation
      model = Model(self.model, {"params": state.ema_params["params"]})
      mesh = self.place.mesh
      picture = grids.draw(path, model, self.run, self.training.seed, self.done, at_once, mesh)
    except FloatingPointError as error:
      LOG.warning("there is no picture of samples after step %d: %s", self.done, error)
      return
    if picture is not None:
      self.writers.image(self.done, "samples", picture)
    self._write_page()

  def _write_page(self) -> None:
    if not self.writes:
      return
    facts = {"folder": str(self.folder), "network": self.model.network, "data": self.data.name}
    if self.held_out is not None and self.held_out.chooses and self.held_out.best_step:
      facts["model"] = f"that of step {self.held_out.best_step:,}, the best on held-out data"
    done, steps = self.done, self.training.steps
    self.desk.submit(lambda: page.write(self.folder, facts, done, steps))

  def _stop(self, state: TrainState, number: int) -> None:
    """Save everything, and end the training because of a signal."""
    self._keep(state)
    raise Interrupted(number, self.done, self.folder)

  def _keep(self, state: TrainState) -> None:
    """Save everything up to now."""
    self.journal.flush()
    if self.saved_step < self.done:
      self._save(state, last=False)
    self.saved.wait()
    self.desk.finish()

  def _finish(self, state: TrainState) -> Model:
    """Check the final parameters, and publish the model."""
    choice = self.held_out if self.held_out is not None and self.held_out.chooses else None
    model = self._mean(state) if choice is None else None
    # One more step, only to compute the loss of the final parameters.
    batch = next(self.source)
    _, metrics = self._step(state, batch)
    if not np.isfinite(metrics["loss"]):
      self.saved.remove(self.done)
      raise self._not_finite(f"the loss is not finite after step {self.done - 1}")
    self.saved.wait()
    self.desk.finish()
    if self.writes:
      # The best model was published when it was evaluated.
      model = folders.load(self.folder) if model is None else model
      self._publish(model, finished=True)
      self._write_page()
      self.desk.finish()
      if self.start.keeps_model:
        self.start = self.start._replace(keeps_model=False)
        run_folder.write(self.folder, self.record, self.start.history, False)
    processes.wait_for_all("the model is published")
    if model is None or not self.writes:
      return folders.load(self.folder)
    return Model(self.model, jax.device_put(model.params, first()))

  def _say_changes(self) -> None:
    """Record and say which settings are other than those of the steps so far."""
    if not self.start.changes:
      return
    changes = [
      {"step": self.first, "what": change.name, "from": change.stored, "to": change.requested}
      for change in self.start.changes
    ]
    self.start = self.start._replace(history=[*self.start.history, *changes])
    self._write_settings(self.start.history)
    for change in self.start.changes:
      if change.name in ("data.fingerprint", "data.saturation"):
        continue  # The number of examples says it.
      LOG.warning("from step %d on, %s is %r instead of %r", self.first, change.name, change.requested, change.stored)

  def _not_finite(self, problem: str, examples: str = "") -> FloatingPointError:
    """Return the error for a value that is not finite; it names the last checkpoint."""
    folder = self.folder / run_folder.CHECKPOINTS
    with contextlib.suppress(OSError):
      self.saved.wait()
    steps = checkpoints.steps(folder)
    last = f"the checkpoint of step {max(steps)} is kept in {folder}" if steps else "there was no checkpoint yet"
    named = f" {examples}." if examples else ""
    model, labels = self.model, ""
    if not steps and ":" in model.network and model.num_classes is not None:  # A network of one's own.
      null = "" if model.null_cond is None else f", and {model.num_classes} for no label"
      labels = f", and see that the network's embedding has the labels 0 to {model.num_classes - 1}{null}"
    return FloatingPointError(f"{problem}; {last}.{named} Try a lower learning_rate{labels}")


def _flat(line: Mapping[str, Any]) -> dict[str, float]:
  """Return the numbers of a line of metrics by name, without those that are missing."""
  return {name: float(value) for name, value in line.items() if isinstance(value, int | float) and name != "step"}
