"""What the two passes of classifier-free guidance could share: the part of a network before the label enters.

It follows the label through the traced network. The rest that depends on the image or its time is the same in both
passes. Counted are the operations of convolutions and products, and the bytes of the activations that these and
reductions read and write. Nothing is computed. The share is of both passes: a half of what is the same is saved.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal, jaxprs_in_params

from benchmarks import networks, timing
from jaxguide import models
from jaxguide.models.importers.openai import PRESETS
from jaxguide.training.edm_presets import NAMED as EDM
from jaxguide.training.transformer_presets import NAMED as TRANSFORMERS

OF_DATA, OF_LABEL = 1, 2


@dataclasses.dataclass
class Counted:
  """Operations and bytes of all that depends on the data, and of that part of it which does not depend on the label."""

  operations: int = 0
  same_operations: int = 0
  bytes: int = 0
  same_bytes: int = 0


def follow(jaxpr: Any, marks: Sequence[int], counted: Counted, times: int = 1) -> list[int]:
  """Walk through a jaxpr. Return the marks of its outputs, and add to what is counted.

  Args:
    jaxpr: an open jaxpr.
    marks: of its inputs: `OF_DATA` plus `OF_LABEL`, or 0.
    counted: what is counted.
    times: how often it runs.
  """
  known = dict(zip(jaxpr.invars, marks, strict=True))

  def mark(atom):
    return 0 if isinstance(atom, Literal) else known.get(atom, 0)

  for equation in jaxpr.eqns:
    got = [mark(atom) for atom in equation.invars]
    own = 0
    for each in got:
      own |= each
    out, found = [own] * len(equation.outvars), False
    for inner in jaxprs_in_params(equation.params):
      if len(inner.invars) == len(got):  # Functions that are called, and the bodies of scans.
        out = follow(inner, got, counted, times * equation.params.get("length", 1))[: len(out)]
        found = True
        break
    if not found and own & OF_DATA:
      _count(equation, got, own, counted, times)
    known.update(zip(equation.outvars, out, strict=False))
  return [mark(atom) for atom in jaxpr.outvars]


def _count(equation: Any, got: Sequence[int], own: int, counted: Counted, times: int) -> None:
  name, (left, *others) = equation.primitive.name, [atom.aval for atom in equation.invars]
  result = equation.outvars[0].aval
  operations = 0
  if name == "dot_general":
    (contracted, _), _ = equation.params["dimension_numbers"]
    operations = 2 * result.size * math.prod(left.shape[axis] for axis in contracted)
  elif name == "conv_general_dilated":
    features = equation.params["dimension_numbers"].rhs_spec[0]
    operations = 2 * result.size * others[0].size // others[0].shape[features]
  elif name == "jaxguide_convolve":  # The library's own convolution, whose kernel has its features last.
    operations = 2 * result.size * others[0].size // others[0].shape[-1]
  elif not name.startswith("reduce"):
    return
  arrays = [atom.aval for atom, each in zip(equation.invars, got, strict=True) if each & OF_DATA] + [result]
  moved = sum(array.size * np.dtype(array.dtype).itemsize for array in arrays)
  counted.operations += times * operations
  counted.bytes += times * moved
  if not own & OF_LABEL:
    counted.same_operations += times * operations
    counted.same_bytes += times * moved


def shared(config: Any) -> Counted:
  """Count for one image."""
  model = networks.abstract_model(config, "float32")
  x = jax.ShapeDtypeStruct((1, *config.image_shape), jnp.float32)
  args = model.params, x, jax.ShapeDtypeStruct((1,), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
  traced = jax.make_jaxpr(config.module.apply)(*args)
  marks = [0] * len(jax.tree.leaves(model.params)) + [OF_DATA, OF_DATA, OF_DATA | OF_LABEL]
  counted = Counted()
  follow(traced.jaxpr, marks, counted)
  return counted


def main() -> None:
  """Print the table."""
  latents = (32, 32, 4)
  configs = {
    "ADM-64": PRESETS["64x64_diffusion"],
    "ADM-256": PRESETS["256x256_diffusion"],
    "DiT-XL/2": TRANSFORMERS["DiT-XL/2"].model_config(latents, 1000),
    "EDM2-XS": EDM["edm2-img512-xs"].model_config((64, 64, 4), 1000),
    "the animals": models.load("animals").config,
  }
  rows = []
  for name, config in configs.items():
    counted = shared(config)
    rows.append(
      {
        "network": name,
        "operations of a pass": f"{counted.operations / 1e9:.3g} G",
        "the same in both": f"{counted.same_operations / 1e9:.2g} G",
        "saved operations": f"{counted.same_operations / counted.operations / 2:.2%}",
        "saved bytes": f"{counted.same_bytes / counted.bytes / 2:.2%}",
      }
    )
  timing.report("shared", {"what both passes could share": rows})
