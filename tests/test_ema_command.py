"""Snapshots of running means, and ``jaxguide ema``, against means computed in NumPy by their definition."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from jaxguide import training
from jaxguide.cli import app
from jaxguide.models.model import shapes
from jaxguide.training import ema, snapshots

CONFIG = training.ModelConfig(
  "unet", {"model_channels": 4, "channel_mult": (1,), "num_res_blocks": 0, "num_head_channels": 4}, (4, 4, 1), 2
)
MEANS = ("constant", "power:std=0.05", "power:std=0.1")
STEPS, EVERY = 400, 25


def leaves(tree):
  from jaxguide.models import arrays

  return arrays.leaves(tree)


@pytest.fixture(scope="module")
def trajectory():
  """The parameters after each step of a toy training: a walk that drifts and trembles, (steps, ...) for each array."""
  rng = np.random.default_rng(0)
  return {
    name: np.cumsum(rng.normal(0.02, 0.1, (STEPS, *leaf.shape)), 0) + rng.normal(size=(STEPS, *leaf.shape))
    for name, leaf in leaves(shapes(CONFIG)["params"]).items()
  }


def mean(trajectory, std, step):
  """The mean of width ``std`` after ``step`` steps, as the sum over steps that defines it, in float64.

  The parameters after step k hold from k - 1 to k, so their weight is the integral of the profile over that time.
  """
  gamma = float(ema.std_to_exponent(std))
  ends = (np.arange(step + 1) / step) ** (gamma + 1)
  return {name: np.tensordot(np.diff(ends), values[:step], 1) for name, values in trajectory.items()}


def tree(flat):
  nested = {}
  for path, leaf in flat.items():
    *parents, last = path.split("/")
    place = nested
    for parent in parents:
      place = place.setdefault(parent, {})
    place[last] = leaf
  return {"params": nested, "uncertainty": {"kernel": np.ones(2)}}


@pytest.fixture(scope="module")
def run(trajectory, tmp_path_factory):
  """The folder of a run that kept snapshots."""
  folder = tmp_path_factory.mktemp("run")
  for step in range(EVERY, STEPS + 1, EVERY):
    means = [tree(mean(trajectory, std, step)) for std in (0.2, 0.05, 0.1)]
    snapshots.write(folder / snapshots.FOLDER, step, MEANS, means)
  record = {"version": 1, "model": json.loads(json.dumps(CONFIG.__dict__))}
  (folder / "training.json").write_text(json.dumps(record))
  return folder


def command(*args):
  return CliRunner().invoke(app, ["ema", *map(str, args)], catch_exceptions=True)


def test_only_power_means_of_the_network_are_kept(run):
  found = snapshots.find(run / snapshots.FOLDER)
  assert [(s.step, s.std) for s in found] == [(k, std) for k in range(EVERY, STEPS + 1, EVERY) for std in (0.05, 0.1)]


def test_the_step_of_the_training_follows_the_definition(trajectory):
  """The means that the training keeps, and the definition that the tests use, are the same."""
  share = ema.newest_share("power:std=0.1", 0.0)
  values = trajectory["out_2/bias"]
  running = np.zeros(values.shape[1:])
  for step in range(60):
    running += float(share(step)) * (values[step] - running)
  np.testing.assert_allclose(running, mean(trajectory, 0.1, 60)["out_2/bias"], rtol=1e-4)


@pytest.mark.parametrize("std", [0.03, 0.075, 0.15])
@pytest.mark.parametrize("step", [300, 400])
def test_another_width_is_near_its_definition(run, trajectory, std, step):
  made = snapshots.reconstruct(run / snapshots.FOLDER, std, step, shapes(CONFIG))
  wanted, last = mean(trajectory, std, step), {name: values[step - 1] for name, values in trajectory.items()}
  kept = mean(trajectory, 0.05, step)
  got = leaves(made.params["params"])

  def distance(a):
    return np.sqrt(sum(np.square(a[name] - wanted[name]).sum() for name in wanted))

  assert made.step == step
  assert distance(got) < 0.1 * distance(kept) < 0.1 * distance(last)


def test_a_width_that_was_kept_is_that_mean(run, trajectory):
  made = snapshots.reconstruct(run / snapshots.FOLDER, 0.1, None, shapes(CONFIG))
  assert (made.step, made.error) == (STEPS, 0.0)
  wanted = mean(trajectory, 0.1, STEPS)
  for name, leaf in leaves(made.params["params"]).items():
    np.testing.assert_allclose(leaf, wanted[name], rtol=1e-5, atol=1e-6)


def test_the_command_writes_a_model(run, tmp_path):
  result = command(run, "--std", 0.08, "--out", tmp_path / "model")
  assert result.exit_code == 0, result.exception
  assert f"width 0.08 at step {STEPS}" in result.stdout
  model = training.load(tmp_path / "model")
  assert model.config == CONFIG
  again = command(run, "--std", 0.08, "--out", tmp_path / "model")
  assert "contains a model already" in str(again.exception)
  assert command(run, "--std", 0.09, "--out", tmp_path / "model", "--overwrite").exit_code == 0


def test_what_cannot_be_made_is_refused(run, tmp_path):
  out = ("--out", tmp_path / "made")
  assert "std must be above 0" in str(command(run, "--std", 0.5, *out).exception)
  assert "choose a width nearer to 0.05 and 0.1" in str(command(run, "--std", 0.005, *out).exception)
  too_few = str(command(run, "--std", 0.2, "--step", 2 * EVERY, *out).exception)
  assert "the 4 snapshots up to step 50 give a mean of width 0.2 with an error of" in too_few
  assert "step must be from 25 to 400" in str(command(run, "--std", 0.08, "--step", 7, *out).exception)
  assert "there is no training in" in str(command(tmp_path, "--std", 0.08, *out).exception)
  (tmp_path / "training.json").write_text((run / "training.json").read_text())
  assert "there are no snapshots in" in str(command(tmp_path, "--std", 0.08, *out).exception)
  assert not (tmp_path / "made").exists()
  for own in (run, run / "model"):
    refused = str(command(run, "--std", 0.08, "--out", own, "--overwrite").exception)
    assert "belongs to the training, which goes on from it: choose another folder" in refused


@pytest.fixture
def copied(run, tmp_path):
  folder = tmp_path / "snapshots"
  folder.mkdir()
  for snapshot in snapshots.find(run / snapshots.FOLDER):
    (folder / snapshot.path.name).write_bytes(snapshot.path.read_bytes())
  return folder


@pytest.mark.parametrize(
  ("damage", "reason"),
  [
    (lambda content: content[:-100], "is damaged"),
    (lambda content: content[:-3] + b"\x01\x02\x03", "does not match its checksum"),
    (lambda content: b"", "is damaged"),
  ],
)
def test_a_damaged_snapshot_is_named(copied, damage, reason):
  victim = snapshots.find(copied)[5]
  victim.path.write_bytes(damage(victim.path.read_bytes()))
  with pytest.raises(ValueError, match=reason) as raised:
    snapshots.reconstruct(copied, 0.08, None, shapes(CONFIG))
  assert victim.path.name in str(raised.value)
  victim.path.unlink()  # The remedy that the message gives.
  snapshots.reconstruct(copied, 0.08, None, shapes(CONFIG))


def test_a_snapshot_under_another_name_is_refused(copied):
  first, *_, last = snapshots.find(copied)
  first.path.replace(last.path)
  with pytest.raises(ValueError, match="it contains the mean of step 25 and width"):
    snapshots.reconstruct(copied, 0.08, None, shapes(CONFIG))


def test_snapshots_of_another_network_are_refused(copied):
  wider = training.ModelConfig("unet", {**CONFIG.fields, "model_channels": 8}, (4, 4, 1), 2)
  with pytest.raises(ValueError, match="parameters of another network"):
    snapshots.reconstruct(copied, 0.08, None, shapes(wider))


def test_snapshots_of_steps_that_are_taken_again_go(copied):
  snapshots.remove_after(copied, 200)
  assert {snapshot.step for snapshot in snapshots.find(copied)} == set(range(EVERY, 201, EVERY))
  assert snapshots.find(copied / "missing") == []
