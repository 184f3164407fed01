"""The settings of a run of sampling."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxguide._core import checks, keys
from jaxguide._core.specs import parse
from jaxguide.generate import methods
from jaxguide.training.config import MATMUL_PRECISIONS

DTYPES = ("float32", "bfloat16")

JOINS = ("chain", "parallel")

MAX_NUM = 10**8
"""The most samples of a file."""


@dataclasses.dataclass(frozen=True)
class Settings:
  """All that samples depend on.

  What has a name may have options: ``NAME:option=value,option=value``. `jaxguide.generate.overview` tells them all.

  Args:
    model: folder of a denoiser.
    classifier: folder of a classifier; for guidance that asks one, the one beside the model if left out.
    base_samples: an ``.npz`` of low-resolution samples, for a model of super-resolution, which are taken in turn; their
      labels, where the model has classes, are those of the file.
    init: an ``.npz`` of images to start from, taken in turn, whose labels are not looked at; each sample adds its own
      noise to its image (image to image).
    init_level: the standard deviation sigma of that noise. The walk begins at the grid's nearest level, and what lies
      above it is not visited. Without an init_level the walk begins in the middle of the grid's steps.
    labels: classes to take in turn; all of them if left out.
    num: number of samples, at most `MAX_NUM`.
    guidance: names with options, the first innermost; or ``none`` alone. Guidance by classifiers alone is of the
      unconditional network, where the model can be one. If left out, ``classifier`` where there is one, else
      ``cfg`` where the model knows a null class, else ``none``. A model of super-resolution takes ``none`` alone.
    join: how several guidances are put together, ``chain`` or ``parallel``; see `jaxguide.chain`, `jaxguide.parallel`.
    scale: of the first guidance that takes one, if its options have none: the power in ``p(x) p(y|x)^scale``. If left
      out, what is recommended for the classifier, or what is usual for the guidance.
    solver: a name from `jaxguide.solvers`, with options. With ``ddpm`` a classifier shifts the mean (Dhariwal &
      Nichol's Algorithm 1), with any other it bends the score (their Algorithm 2).
    steps: steps of the solver; with the grid ``respaced`` also a text, as `jaxguide.schedules.spaced_timesteps` has it.
    grid: ``respaced`` (steps of the model's own discrete process) or a name from `jaxguide.schedules`, with options; if
      left out, ``respaced`` where the model has one, else ``karras``.
    dtype: what the networks compute in, ``float32`` or ``bfloat16``.
    matmul_precision: of products, as ``jax.default_matmul_precision`` names it. On a GPU float32 is TF32 there unless
      it is ``highest``: 6.6e-4 from float64's result against 1.1e-6 on an H100.
    cudnn_attention: whether they attend by cuDNN's fused kernel on a GPU; see `jaxguide.UNet`.
    clip: whether x0 is kept in [-1, 1]: what guidance made of it, or before a ``classifier`` changes it. Where
      ``guidance`` says itself where it is clipped, nothing else is.
    seed: sample ``i`` depends on the seed, ``i`` and its label alone. Up to 2**64 - 1; every digit counts.
    batch_size: samples at a time.
  """

  model: str
  classifier: str | None = None
  base_samples: str | None = None
  init: str | None = None
  init_level: float | None = None
  labels: Sequence[int] | None = None
  num: int = 16
  guidance: str | Sequence[str] | None = None
  join: str = "chain"
  scale: float | int | None = None
  solver: str = "ddim"
  steps: int | str = 50
  grid: str | None = None
  dtype: str = "float32"
  matmul_precision: str = "default"
  cudnn_attention: bool = False
  clip: bool = True
  seed: int = 0
  batch_size: int = 256

  def __post_init__(self):
    if checks.at_least("num", self.num, 1) > MAX_NUM:
      raise ValueError(f"num must be at most {MAX_NUM}, the most samples of a file, got {self.num}")
    plain: dict[str, Any] = {
      "num": int(self.num),
      "batch_size": checks.at_least("batch_size", self.batch_size, 1),
      "seed": keys.check_seed("seed", self.seed),
      "cudnn_attention": checks.flag("cudnn_attention", self.cudnn_attention),
      "clip": checks.flag("clip", self.clip),
    }
    if not isinstance(self.steps, str):
      plain["steps"] = checks.at_least("steps", self.steps, 1)
    if self.labels is not None:
      if isinstance(self.labels, str) or not np.iterable(self.labels) or not len(self.labels):
        raise ValueError("labels must be at least one class; leave them out to take all in turn")
      plain["labels"] = tuple(checks.whole("label", label, -(2**63), 2**63 - 1) for label in self.labels)
    if self.scale is not None:
      plain["scale"] = checks.finite("scale", checks.number("scale", self.scale))
    if self.init_level is not None:
      if self.init is None:
        raise ValueError("init_level is the noise that is added to init: give both, or leave it out")
      plain["init_level"] = checks.above("init_level", checks.number("init_level", self.init_level), 0)
    if isinstance(self.guidance, str):
      plain["guidance"] = (self.guidance,)
    for name in ("model", "classifier", "base_samples", "init"):
      value = getattr(self, name)
      if isinstance(value, os.PathLike):
        plain[name] = os.fspath(value)
      elif not isinstance(value, str) and (value is not None or name == "model"):
        raise TypeError(f"{name} must be a path, got {value!r}")
    for name in ("solver", "grid"):
      value = getattr(self, name)
      if not isinstance(value, str) and (value is not None or name == "solver"):
        raise TypeError(
          f"{name} must be a name with its options, such as 'ddim:eta=0.5' or 'karras:rho=5', got {value!r}"
        )
    for name, value in plain.items():
      object.__setattr__(self, name, value)
    if self.guidance is not None:
      if not isinstance(self.guidance, Sequence) or not all(isinstance(text, str) for text in self.guidance):
        raise TypeError(f"guidance must be names with their options, such as 'cfg:scale=2', got {self.guidance!r}")
      names = [parse(text).name for text in self.guidance]
      if any(text != "none" for text, name in zip(self.guidance, names, strict=True) if name == "none"):
        raise ValueError("guidance 'none' takes no options: leave them out")
      for name in names:
        checks.lookup("guidance", name, {**methods.METHODS, "none": None})
      if not names or ("none" in names and len(names) > 1):
        raise ValueError(f"guidance must be none alone, or one or more others; got {', '.join(names) or 'nothing'}")
      object.__setattr__(self, "guidance", tuple(self.guidance))
    methods.solver(self.solver, 1)
    checks.lookup("way to join", self.join, dict.fromkeys(JOINS))
    checks.lookup("dtype", self.dtype, dict.fromkeys(DTYPES))
    checks.lookup("matmul_precision", self.matmul_precision, dict.fromkeys(MATMUL_PRECISIONS))
    if self.cudnn_attention and self.dtype == "float32":
      raise ValueError("cudnn_attention is for half precision: give dtype bfloat16 with it, or leave it out")
