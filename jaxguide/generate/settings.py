"""The settings of a run of sampling."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxguide._core import checks, keys, specs
from jaxguide._core.files import PathLike
from jaxguide.generate.guidances import GuidanceSpec
from jaxguide.generate.methods import METHODS
from jaxguide.generate.walks import GridSpec, SolverSpec
from jaxguide.training.config import MATMUL_PRECISIONS

DTYPES = ("float32", "bfloat16")

JOINS = ("chain", "parallel")

MAX_NUM = 10**8
"""The most samples of a file."""


def plain_steps(steps: Any) -> Any:
  """Return the number of steps that a text is, such as ``"25"``; another text, such as ``"ddim25"``, as it is.

  >>> plain_steps("25"), plain_steps("ddim25"), plain_steps(3)
  (25, 'ddim25', 3)
  """
  return int(steps) if isinstance(steps, str) and steps.isdecimal() else steps


def plain_record(record: dict[str, Any]) -> dict[str, Any]:
  """Return the record of a file with the number of its steps as a number. Older files may have it as a text.

  >>> plain_record({"settings": {"steps": "25"}})
  {'settings': {'steps': 25}}
  """
  settings = record.get("settings")
  if not isinstance(settings, dict) or "steps" not in settings:
    return record
  return {**record, "settings": {**settings, "steps": plain_steps(settings["steps"])}}


@dataclasses.dataclass(frozen=True)
class Settings:
  """Everything that samples depend on.

  A guidance, a solver or a grid is a name with options: ``NAME:option=value,option=value``. ``jaxguide methods``
  lists the names and their options.

  Args:
    model: Folder of the denoiser, or the name of one that comes with the package, such as animals.
    classifier: Folder of the classifier, or its name in the package. If left out, guidance that needs a classifier
      takes the folder ``classifier`` beside the model, or the one that belongs to the model of the package. A
      classifier that was trained on a range of noise levels guides at these levels alone.
    base_samples: An .npz of low-resolution samples, for a model of super-resolution. They are taken in turn, with the
      labels of the file where the model has classes.
    init: An .npz of images to start from, instead of noise (image to image); they are taken in turn. Files that
      ``jaxguide sample`` writes are such files. Labels in the file are ignored.
    init_level: Noise level sigma that is added to the images of init. Each sample draws its own noise, and the walk
      begins at the nearest level of the grid. A higher level keeps less of the images. If left out, the walk
      begins in the middle of the grid's steps.
    vae: Autoencoder of a model that makes latents: the folder of an imported one, or a published file. Then the samples
      are pictures.
    vae_tile: Side in pixels from which latents are decoded in tiles, which takes less memory and is approximate.
    labels: Classes to sample, taken in turn, by name or by number; all classes if left out. A text that is both a name
      and a number is the class of that name.
    num: Number of samples, at most 100,000,000.
    guidance: Guidances, such as cfg or classifier, the first innermost, or none alone, which keeps the labels (cfg with
      scale 0 is without them). If left out: classifier where a classifier is given, else cfg where the model has a null
      class, else none. If only classifiers guide, the model runs with its null label when it has one. A model of
      super-resolution takes none alone.
    join: How several guidances are combined: chain (each guides the result of the one before) or parallel (their
      changes are added).
    scale: Guidance scale, the power in p(x) p(y|x)^scale: 0 unconditional, 1 conditional, more is sharper and less
      diverse. It goes to the first guidance that takes a scale and has none in its options. For cfg the paper's w is
      scale - 1. A classifier guides the unconditional model; a model without a null class stays conditional, and its
      power is then 1 + scale. For backward it is the step size, for profile cfg++ the lambda. If left out: the
      classifier's recommended scale, or the default of the guidance (2 for cfg).
    solver: Solver, such as ddim, dpmpp-2m or unipc. With ddpm a classifier shifts the mean (Dhariwal & Nichol's
      Algorithm 1), with the others it changes the score (their Algorithm 2). A consistency model takes consistency
      alone.
    steps: Number of steps of the solver; for the grid respaced also a text, such as ddim25 or 10,10,10.
    grid: Grid of noise levels, such as karras. If left out: respaced (the steps of the model's own discrete process)
      where the model has one, consistency for a consistency model, else karras.
    dtype: Type that the networks compute in, float32 or bfloat16.
    matmul_precision: Precision of products, as jax.default_matmul_precision names it. On a GPU the default for
      float32 is TF32: on an H100 its results differ from those of float64 by 6.6e-4, and those of highest by 1.1e-6.
    cudnn_attention: Whether to use cuDNN's fused attention, on an NVIDIA GPU and in bfloat16; elsewhere no change. If
      left out: where it can be used.
    clip: Clip x0 to the valid range of the data: after the guidance, or before a classifier changes it. A guidance clip
      or dynamic-threshold takes its place.
    seed: Seed, from 0 to 2**64 - 1. Sample i depends on the seed, i and its label alone.
    batch_size: Number of samples drawn at a time.
  """

  model: PathLike = "runs/demo/denoiser"
  classifier: PathLike | None = None
  base_samples: PathLike | None = None
  init: PathLike | None = None
  init_level: float | None = None
  vae: PathLike | None = None
  vae_tile: int | None = None
  labels: Sequence[int | str] | None = None
  num: int = 16
  guidance: str | Sequence[str] | None = None
  join: str = "chain"
  scale: float | int | None = None
  solver: str = "ddim"
  steps: int | str = 50
  grid: str | None = None
  dtype: str = "float32"
  matmul_precision: str = "default"
  cudnn_attention: bool | None = None
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
      "clip": checks.flag("clip", self.clip),
    }
    is_number = not isinstance(self.steps, str) or self.steps.isdecimal()
    plain["steps"] = checks.at_least("steps", plain_steps(self.steps), 1) if is_number else self.steps
    if self.cudnn_attention is not None:
      plain["cudnn_attention"] = checks.flag("cudnn_attention", self.cudnn_attention)
    if self.labels is not None:
      if isinstance(self.labels, str) or not np.iterable(self.labels) or not len(self.labels):
        raise ValueError(f"labels must be a list of at least one class, got {self.labels!r}; leave it out to take all")
      plain["labels"] = tuple(
        label if isinstance(label, str) else checks.whole("label", label, -(2**63), 2**63 - 1) for label in self.labels
      )
    if self.scale is not None:
      plain["scale"] = checks.finite("scale", checks.number("scale", self.scale))
    if self.init_level is not None:
      if self.init is None:
        raise ValueError("init_level is the noise that is added to init: give both, or leave it out")
      plain["init_level"] = checks.above("init_level", checks.number("init_level", self.init_level), 0)
    if isinstance(self.guidance, str):
      plain["guidance"] = (self.guidance,)
    if self.vae_tile is not None:
      if self.vae is None:
        raise ValueError("vae_tile is how vae decodes: give both, or leave it out")
      plain["vae_tile"] = checks.at_least("vae_tile", self.vae_tile, 1)
    for name in ("model", "classifier", "base_samples", "init", "vae"):
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
      object.__setattr__(self, "guidance", tuple(self.guidance))
    self.guidance_specs, self.solver_spec, self.grid_spec  # noqa: B018  They are checked when they are read.
    checks.lookup("way to join", self.join, dict.fromkeys(JOINS))
    checks.lookup("dtype", self.dtype, dict.fromkeys(DTYPES))
    checks.lookup("matmul_precision", self.matmul_precision, dict.fromkeys(MATMUL_PRECISIONS))
    if self.cudnn_attention and self.dtype == "float32":
      raise ValueError("cudnn_attention is for half precision: give dtype bfloat16 with it, or leave it out")

  @functools.cached_property
  def guidance_specs(self) -> tuple[GuidanceSpec, ...] | None:
    """The guidances that are named; none for ``none``, and None where it is left to the networks."""
    if self.guidance is None:
      return None
    names = [specs.parse(text).name for text in self.guidance]
    if any(text != "none" for text, name in zip(self.guidance, names, strict=True) if name == "none"):
      raise ValueError("guidance 'none' takes no options: leave them out")
    if not names or ("none" in names and len(names) > 1):
      raise ValueError(f"guidance must be none alone, or one or more others; got {', '.join(names) or 'nothing'}")
    for name in names:
      checks.lookup("guidance", name, {**METHODS, "none": None})
    return () if names == ["none"] else tuple(map(GuidanceSpec.parse, self.guidance))

  @functools.cached_property
  def solver_spec(self) -> SolverSpec:
    """The solver that is named."""
    return SolverSpec.parse(self.solver)

  @functools.cached_property
  def grid_spec(self) -> GridSpec | None:
    """The grid that is named; None where it is left to the model."""
    return None if self.grid is None else GridSpec.parse(self.grid)
