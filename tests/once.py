"""One compiled training step for all trainings with the same settings, where each call of `fit` compiles its own."""

import contextlib
import dataclasses

import jax
import pytest

from jaxguide.training import TrainingConfig, loop

_MADE = {}


@contextlib.contextmanager
def compiled():
  """Compile the step and the initial state of a configuration once, and not in each call of `fit`."""
  with pytest.MonkeyPatch.context() as patch:
    for name in ("train_step", "init_state"):
      patch.setattr(loop, name, _remembered(name, getattr(loop, name)))
    yield


def _remembered(name, make):
  def make_once(*args):
    of = name, *(repr(_of_a_step(arg)) for arg in args)
    if of not in _MADE:
      _MADE[of] = make(*args)
    # The buffers of a state are donated to the first step, so each call gets a copy.
    return jax.tree.map(lambda leaf: leaf.copy() if isinstance(leaf, jax.Array) else leaf, _MADE[of])

  return make_once


def _of_a_step(settings):
  """The settings without how often a run is saved, which no step knows."""
  return dataclasses.replace(settings, save_every=1) if isinstance(settings, TrainingConfig) else settings
