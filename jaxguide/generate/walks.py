"""Solvers and grids by name, with options: ``edm-stochastic:churn=40``, ``karras:rho=5``."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxguide import schedules, solvers
from jaxguide._core import checks, specs
from jaxguide._core.specs import choose, options_of
from jaxguide._core.typing import Array, Solver


def _edm_stochastic(
  *, churn: float = 0.0, s_min: float = 0.0, s_max: float = float("inf"), s_noise: float = 1.0, alpha: float = 1.0
) -> None:
  """EDM's stochastic sampler; churn is S_churn, the total noise that its steps add."""


GRIDS: dict[str, Callable[..., Array]] = {"respaced": schedules.respaced, **schedules.GRIDS}
"""The grids of `jaxguide.schedules`, and the steps of a model's own discrete process."""

FROM_GUIDANCE = ("log_prob", "scale", "every")
"""Fields of `jaxguide.DDPM` that come from the guidance and are no options."""

OF_MODEL = "the model's"
"""The default of an option that follows from the configuration of the model."""


@dataclasses.dataclass(frozen=True)
class SolverSpec:
  """A solver that was named with options.

  Args:
    name: a name of `jaxguide.solvers.SOLVERS`.
    options: the values of its options.
  """

  name: str
  options: Mapping[str, Any]

  @classmethod
  def parse(cls, text: str) -> "SolverSpec":
    """Read ``NAME`` or ``NAME:option=value,...``.

    Raises:
      ValueError: for an unknown name, naming the nearest; an option that it does not have; or a value that is out of
        range or of another type.

    >>> SolverSpec.parse("ddim:eta=0.5").build(10)
    DDIM(eta=0.5)
    """
    spec = specs.parse(text)
    solver = checks.lookup("solver", spec.name, solvers.SOLVERS)
    solver_spec = cls(spec.name, choose(spec, _options(spec.name, solver)))
    solver_spec.build(1)
    return solver_spec

  def complete(self) -> dict[str, Any]:
    """Give the values of all options, also of those that were left out. Some defaults are `OF_MODEL`.

    >>> SolverSpec.parse("ddim").complete(), SolverSpec.parse("ddpm:variance=large").complete()
    ({'eta': 0.0}, {'variance': 'large', 'gradient_at': 'x'})
    """
    return _complete(_options(self.name, solvers.SOLVERS[self.name]), self.options)

  def build(self, num_steps: int, **defaults: Any) -> Solver:
    """Build the solver.

    Args:
      num_steps: number of steps that it will take.
      **defaults: values of further fields, where the options have none.
    """
    if self.name == "edm-stochastic":
      options = dict(self.options)
      churn = checks.in_range("churn", options.pop("churn", 0.0), 0)
      return solvers.EDMStochastic.from_churn(churn, num_steps, **options)
    return solvers.solver(self.name, **{**defaults, **self.options})


def ddim_eta(solver: Solver) -> Any:
  """Give eta of a DDIM-type step (0 deterministic, 1 DDPM); None for other solvers.

  >>> ddim_eta(solvers.DDPM()), ddim_eta(solvers.Heun())
  (1.0, None)
  """
  if isinstance(solver, solvers.DDIM | solvers.EulerAncestral):
    return solver.eta
  return {solvers.Euler: 0.0, solvers.DDPM: 1.0}.get(type(solver))


@dataclasses.dataclass(frozen=True)
class GridSpec:
  """A grid of noise levels that was named with options.

  Args:
    name: a name of `GRIDS`.
    options: the values of its options.
  """

  name: str
  options: Mapping[str, Any]

  @classmethod
  def parse(cls, text: str) -> "GridSpec":
    """Read ``NAME`` or ``NAME:option=value,...``.

    Raises:
      ValueError: for an unknown name, naming the nearest; an option that it does not have; or a value of another type.

    >>> GridSpec.parse("karras:rho=5")
    GridSpec(name='karras', options={'rho': 5.0})
    """
    spec = specs.parse(text)
    grid = checks.lookup("grid", spec.name, GRIDS)
    return cls(spec.name, choose(spec, options_of(grid, "steps", "table")))

  def complete(self) -> dict[str, Any]:
    """Give the values of all options, also of those that were left out."""
    return _complete(options_of(GRIDS[self.name], "steps", "table"), self.options)

  def levels(self, steps: int | str, schedule: schedules.NoiseSchedule) -> Array:
    """Make the grid.

    Args:
      steps: number of steps. For ``respaced`` also a text, as `jaxguide.schedules.spaced_timesteps` reads it.
      schedule: the model's noise schedule, whose steps ``respaced`` visits.

    Raises:
      ValueError: for a value that is out of range, or for ``respaced`` of a schedule in continuous time.
    """
    number = int(steps) if str(steps).isdecimal() else None
    if self.name == "respaced":
      if not isinstance(schedule, schedules.Table):
        raise ValueError(
          f"grid 'respaced' is for models of a discrete process; choose from {', '.join(schedules.GRIDS)}"
        )
      return schedules.respaced(schedule, steps if number is None else number, **self.options)
    if number is None:
      raise ValueError(f"grid {self.name!r} takes a number of steps, got {steps!r}")
    return GRIDS[self.name](number, **self.options)


def check_levels(sigmas: Array, low_name: str, low: float, high_name: str, high: float) -> None:
  """Check that the walk has a level in a range. Otherwise what is asked for at those levels would never happen.

  Args:
    sigmas: (steps + 1,) the levels of the walk, the last of them 0.
    low_name: the name of ``low``, for the error.
    low: the least level.
    high_name: the name of ``high``, for the error.
    high: the largest level.

  Raises:
    ValueError: if no level lies in the range.
  """
  levels = np.asarray(sigmas, np.float64)[:-1]
  if not ((levels >= low) & (levels <= high)).any():
    raise ValueError(
      f"no level of the grid lies between {low_name} {low:g} and {high_name} {high:g}: they go from "
      f"{levels.max():g} to {levels.min():g}"
    )


# From such a level on, one step of Heun's method to a level this many times smaller has an error as large.
LARGEST_LEVEL, LARGEST_STEP = 1e5, 1e4


def check_walk(solver: Solver, sigmas: Array) -> None:
  """Check that a solver suits the levels of a walk.

  Args:
    solver: the solver.
    sigmas: (steps + 1,) the levels of the walk, the last of them 0.

  Raises:
    ValueError: if Heun's method begins at a level that stands for pure noise, since its correction is multiplied by the
      step; or if EDM's stochastic sampler adds its noise at none of the levels.
  """
  levels = np.asarray(sigmas, np.float64)[:-1]
  if isinstance(solver, solvers.Heun | solvers.EDMStochastic):
    far = (levels[:-1] > LARGEST_LEVEL) & (levels[:-1] > LARGEST_STEP * levels[1:])
    if far.any():
      at = int(np.argmax(far))
      raise ValueError(
        f"Heun's method cannot step from level {levels[at]:g} to {levels[at + 1]:g}, since its correction is "
        "multiplied by the step: choose another solver, such as euler, or a grid with a smaller first level"
      )
  if isinstance(solver, solvers.EDMStochastic) and np.any(np.asarray(solver.gamma) > 0):
    check_levels(sigmas, "s_min", solver.s_min, "s_max", solver.s_max)


def _complete(known: Mapping[str, inspect.Parameter], given: Mapping[str, Any]) -> dict[str, Any]:
  return {**{name: option.default for name, option in known.items()}, **given}


def _options(name: str, solver: type) -> dict[str, inspect.Parameter]:
  if name == "edm-stochastic":
    return options_of(_edm_stochastic)
  options = options_of(solver, *FROM_GUIDANCE)
  if name == "ddpm":  # Its default is no fixed one: OpenAI's networks have learned the variance, others are small.
    options["variance"] = options["variance"].replace(default=OF_MODEL)
  return options


def help_rows() -> dict[str, list[specs.HelpRow]]:
  """Give the names of solvers and grids with their options, for the help."""
  return {
    "--solver": [specs.help_row(name, solver, _options(name, solver)) for name, solver in solvers.SOLVERS.items()],
    "--grid": [specs.help_row(name, grid, options_of(grid, "steps", "table")) for name, grid in GRIDS.items()],
  }
