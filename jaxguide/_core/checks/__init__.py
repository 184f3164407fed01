"""Checks of arguments, which run before the work starts.

They check concrete values. Inside ``jit`` an argument is a tracer without a value, and it passes the check. An error
message has the wrong value and the expected one, and often what to do instead.
"""

from jaxguide._core.checks.arguments import LARGEST, cond, labels, scale, schedule, shape, sigmas, solver
from jaxguide._core.checks.fields import field, lookup, options, plain
from jaxguide._core.checks.numbers import (
  above,
  as_float,
  at_least,
  finite,
  flag,
  in_range,
  is_concrete,
  number,
  number_field,
  rising,
  single,
  whole,
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
  "number_field",
  "options",
  "plain",
  "rising",
  "scale",
  "schedule",
  "shape",
  "sigmas",
  "single",
  "solver",
  "whole",
]
