"""Checks of what a caller hands in, made before the work starts.

They look at values where there are values: inside ``jit`` an argument is a tracer, whose value is not known yet, and
passes. Each error says what was wrong, what was expected and what to do.
"""

from jaxguide._core.checks.arguments import LARGEST, cond, labels, scale, schedule, shape, sigmas, solver
from jaxguide._core.checks.fields import field, lookup, options
from jaxguide._core.checks.numbers import (
  above,
  as_float,
  at_least,
  finite,
  flag,
  in_range,
  is_concrete,
  number,
  rising,
  single,
  whole,
  written,
)

__all__ = [
  "LARGEST",
  "above",
  "as_float",
  "at_least",
  "cond",
  "field",
  "finite",
  "flag",
  "in_range",
  "is_concrete",
  "labels",
  "lookup",
  "number",
  "options",
  "rising",
  "scale",
  "schedule",
  "shape",
  "sigmas",
  "single",
  "solver",
  "whole",
  "written",
]
