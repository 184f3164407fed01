"""The export of a sampler: what ``jaxguide export-sampler`` does.

A sampler is one program: weights, labels, a scale, a seed and the numbers of the samples go in, pictures come out. It
is traced for each platform by itself, and not once for all: the networks choose other forms of their operations on a
CPU than on a GPU or a TPU, and these choices are made while they are traced. So on each platform the program is that of
``jaxguide sample`` there.

The file is a zip archive, which ``numpy.load`` reads: ``header.json`` says what the program is and takes,
``programs/PLATFORM`` is a program as `jax.export` serialises it, and ``weights/NAME.npy`` is an array. The weights are
arguments of the program and no constants in it. `jaxguide.generate.sampler.Sampler` reads the file, and a few lines do
without jaxguide.
"""

import contextlib
import dataclasses
import functools
import json
import os
import re
import threading
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxguide
from jaxguide import models
from jaxguide._core import checks
from jaxguide._core.files import PathLike, check_writable, replacing
from jaxguide._core.pixels import HALF, HIGH, LOW
from jaxguide._core.typing import PyTree
from jaxguide.generate import latents
from jaxguide.generate.plan import Load, Plan, chosen_of, classifier_folder, plan, scales_of
from jaxguide.generate.sampler import FORMAT, VERSION
from jaxguide.generate.settings import Settings
from jaxguide.sampling.keys import keys_of
from jaxguide.sampling.loop import sample

BACKENDS = {"cpu": "cpu", "cuda": "gpu", "rocm": "gpu", "tpu": "tpu"}
"""The platforms, with JAX's name of the backend that a program is traced for."""

DEFAULT_PLATFORMS = ("cpu", "cuda", "tpu")

NOT_EXPORTED = ("base_samples", "init", "init_level", "labels", "num", "seed", "batch_size", "cudnn_attention")
"""The settings that are arguments of the program, or that it does not have."""

PROBES = 2.25, 3.75
"""Two scales. The leaf of a guided denoiser that follows them is its scale."""

_lock = threading.Lock()


def export_sampler(
  out: PathLike,
  settings: Settings,
  *,
  platforms: Sequence[str] = DEFAULT_PLATFORMS,
  batch: int | None = None,
  weights: PathLike | None = None,
  load: Load = models.load,
) -> dict[str, Any]:
  """Write the program that draws the samples of some settings, for use without jaxguide.

  Args:
    out: the file.
    settings: the settings of `jaxguide.generate.run`. The labels, the number of samples, the seed and the scale are
      arguments of the program instead; the scale of the settings is its default.
    platforms: the platforms that it is for: ``cpu``, ``cuda``, ``rocm``, ``tpu``.
    batch: the number of samples of a call; None for a program that takes any number.
    weights: a file for the weights, ``.npz``; None to put them into ``out``.
    load: loads the model of a folder.

  Returns:
    The header of the file.

  Raises:
    ValueError: for an unknown platform, a setting that a program cannot have, or a network that needs a fixed batch.
    OSError: if a file cannot be written.
    FileNotFoundError: if there is no model.
  """
  platforms = list(dict.fromkeys(platforms))
  for platform in platforms:
    checks.lookup("platform", platform, BACKENDS)
  if not platforms:
    raise ValueError(f"platforms must be one or more of {', '.join(BACKENDS)}, got none")
  batch = None if batch is None else checks.at_least("batch", batch, 1)
  check_writable(out)
  if weights is not None:
    if Path(weights).suffix != ".npz":
      raise ValueError(f"weights must be a file that ends in .npz, got {weights}")
    check_writable(weights)
  sampler = _sampler(settings, load)
  programs = {platform: _exported(sampler, platform, batch) for platform in platforms}
  header = _header(sampler, programs, batch, inside=weights is None)
  if weights is not None:
    _write(weights, {}, sampler.weights, "")
  contents = {"header.json": json.dumps(header, indent=1).encode()}
  contents |= {f"programs/{platform}": bytes(program.serialize()) for platform, program in programs.items()}
  _write(out, contents, sampler.weights if weights is None else {}, "weights/")
  return header


class _Sampler(NamedTuple):
  """A sampler before it is traced.

  Args:
    settings: its settings.
    plan: the plan, of which the scale is a probe.
    scale: the default of the scale; None if it has none.
    classes: the number of classes; None if it takes no labels.
    names: the name of the array that is each leaf of all that the program is made of; None for the scale.
    structure: the structure of these leaves.
    weights: the arrays by name.
  """

  settings: Settings
  plan: Plan
  scale: float | None
  classes: int | None
  names: Sequence[str | None]
  structure: Any
  weights: Mapping[str, Any]


def _sampler(settings: Settings, load: Load) -> _Sampler:
  """Load the networks, and find the leaf that is the scale."""
  for name in NOT_EXPORTED:
    default = next(field.default for field in dataclasses.fields(Settings) if field.name == name)
    if name not in ("num", "seed", "batch_size", "labels") and getattr(settings, name) != default:
      raise ValueError(f"an exported sampler has no {name}: leave it out")
  load = _kept(load)
  model = load(settings.model)
  if model.config.low_res_shape is not None:
    raise ValueError(f"the model in {settings.model} is one of super-resolution, which cannot be exported yet")
  fields = {field.name for field in dataclasses.fields(model.config.module)}
  # Attention by cuDNN would bind the program to this machine's card.
  fused = False if "cudnn_attention" in fields else None
  settings = dataclasses.replace(settings, labels=None, cudnn_attention=fused)
  scale, (first, second) = _probed(settings, load)
  trees = [_tree(each) for each in (first, second)]
  (paths, structure), others = jax.tree_util.tree_flatten_with_path(trees[0]), jax.tree.leaves(trees[1])
  names: list[str | None] = []
  arrays: dict[int, str] = {}
  weights: dict[str, Any] = {}
  for (path, leaf), other in zip(paths, others, strict=True):
    if leaf is not other and not np.array_equal(leaf, other):
      if np.ndim(leaf) or (float(leaf), float(other)) != PROBES:
        raise ValueError("the scale of this guidance cannot be an argument of a program: choose another profile")
      names.append(None)
      continue
    if id(leaf) not in arrays or np.ndim(leaf) == 0:
      arrays[id(leaf)] = _unused(jax.tree_util.keystr(path, simple=True, separator="/"), weights)
      weights[arrays[id(leaf)]] = leaf
    names.append(arrays[id(leaf)])
  network, classifier = first.record["network"], first.record["classifier_network"]
  classes = network["num_classes"]
  if classes is None and classifier is not None:
    classes = classifier["num_classes"]
  return _Sampler(settings, first, scale, classes, names, structure, weights)


def _kept(load: Load) -> Load:
  """Load each model once."""
  found: dict[str, Any] = {}

  def kept(folder: PathLike) -> Any:
    name = os.fspath(folder)
    if name not in found:
      found[name] = load(folder)
    return found[name]

  return kept


def _probed(settings: Settings, load: Load) -> tuple[float | None, Sequence[Plan]]:
  """Return the scale, None if there is none, and the plans with two others in its place."""
  chosen = chosen_of(settings, load(settings.model))
  classifier = load(classifier_folder(settings)) if any(spec.method.gradient for spec in chosen) else None
  scale = next((each for each in scales_of(settings, chosen, classifier) if each is not None), None)
  if scale is None:
    made = plan(settings, load)
    return None, (made, made)
  texts = [spec.text for spec in chosen]
  at = next(index for index, spec in enumerate(chosen) if spec.takes_scale)
  name, _, options = texts[at].partition(":")
  kept = [option for option in options.split(",") if option and not option.startswith("scale=")]
  texts[at] = f"{name}:{','.join(kept)}" if kept else name
  return float(scale), [
    plan(dataclasses.replace(settings, guidance=tuple(texts), scale=probe), load) for probe in PROBES
  ]


def _tree(made: Plan) -> PyTree:
  """Return all that a sampler is made of."""
  vae, tile = made.settings.vae, made.settings.vae_tile
  return made.denoiser, made.sigmas, made.solver, None if vae is None else latents.Vae.load(vae, tile).autoencoder


def _unused(path: str, names: Mapping[str, Any]) -> str:
  """Return a name for an array, of letters that a file's name can have."""
  plain = re.sub(r"[^A-Za-z0-9_.]+", "/", path).strip("/.") or "array"
  name, number = plain, 1
  while name in names:
    number += 1
    name = f"{plain}_{number}"
  return name


def _program(sampler: _Sampler, weights: Mapping[str, Any], seed: Any, index: Any, **given: Any) -> dict[str, Any]:
  """Draw samples; this is what is traced. The numbers are those of `jaxguide.sampling.batches`."""
  leaves = [given["scale"] if name is None else weights[name] for name in sampler.names]
  denoiser, sigmas, solver, autoencoder = jax.tree.unflatten(sampler.structure, leaves)
  label = given.get("label")

  def draw(key: Any, label: Any) -> Any:
    return sample(denoiser, key, sampler.plan.image_shape, sigmas, solver, label)[0]

  x = jax.vmap(draw)(keys_of(jax.random.wrap_key_data(seed, impl="threefry2x32"), index), label)
  ok = jnp.isfinite(x).all((1, 2, 3))
  if label is not None:
    ok &= (label >= 0) & (label < sampler.classes)
  if autoencoder is not None:
    x = autoencoder.decode(x.astype(jnp.float32))
    ok &= jnp.isfinite(x).all((1, 2, 3))
  pixels = jnp.rint((jnp.clip(x.astype(jnp.float32), LOW, HIGH) + 1) * HALF)
  return {"images": jnp.where(ok[:, None, None, None], pixels, 0).astype(jnp.uint8), "ok": ok}


def _exported(sampler: _Sampler, platform: str, batch: int | None) -> Any:
  """Trace the program for a platform."""
  weights = jax.eval_shape(lambda: dict(sampler.weights))
  try:
    with _traced_for(BACKENDS[platform]), jax.default_matmul_precision(sampler.settings.matmul_precision):
      rows = jax.export.symbolic_shape("batch", constraints=["batch >= 1"])[0] if batch is None else batch
      shapes = {"seed": jax.ShapeDtypeStruct((2,), jnp.uint32), "index": jax.ShapeDtypeStruct((rows,), jnp.uint32)}
      if sampler.classes is not None:
        shapes["label"] = jax.ShapeDtypeStruct((rows,), jnp.int32)
      if sampler.scale is not None:
        # As a number of Python: it takes the type of what it is multiplied with.
        shapes["scale"] = jax.ShapeDtypeStruct((), jnp.float32, weak_type=True)
      function = jax.jit(functools.partial(_program, sampler))
      return jax.export.export(function, platforms=[platform])(weights, **shapes)
  except (jax.errors.JAXTypeError, jax.core.InconclusiveDimensionOperation, TypeError, ValueError) as error:
    if batch is not None:
      raise
    raise ValueError(
      f"the program cannot be made for any number of samples ({str(error).splitlines()[0]}): give a batch (--batch 16)"
    ) from error


@contextlib.contextmanager
def _traced_for(backend: str) -> Iterator[None]:
  """Within the block, let networks be traced as for a backend that may not be here.

  They ask `jax.default_backend` while they are traced, and JAX keeps traces of their parts, whatever the answer was.
  Programs then do not say where their operations come from: the paths of this machine are nobody's business.
  """
  with _lock:
    kept, limit = jax.default_backend, jax.config.values["jax_traceback_in_locations_limit"]
    jax.clear_caches()
    jax.default_backend = lambda: backend
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
      yield
    finally:
      jax.config.update("jax_traceback_in_locations_limit", limit)
      jax.default_backend = kept
      jax.clear_caches()


def _header(sampler: _Sampler, programs: Mapping[str, Any], batch: int | None, inside: bool) -> dict[str, Any]:
  """Describe the file."""
  settings, rows = sampler.plan.settings, "batch" if batch is None else batch
  arguments: dict[str, Any] = {
    "weights": "a dictionary of the arrays that `weights` lists",
    "seed": {"shape": [2], "dtype": "uint32", "what": "divmod(seed, 2**32) of a seed from 0 to 2**64 - 1"},
    "index": {"shape": [rows], "dtype": "uint32", "what": "the numbers of the samples, such as 0, 1, 2"},
  }
  if sampler.classes is not None:
    arguments["label"] = {"shape": [rows], "dtype": "int32", "least": 0, "largest": sampler.classes - 1}
    arguments["label"]["names"] = sampler.plan.class_names
  if sampler.scale is not None:
    arguments["scale"] = {"shape": [], "dtype": "float32", "default": sampler.scale}
  kept = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
  kept |= {"scale": sampler.scale}
  return {
    "format": FORMAT,
    "version": VERSION,
    "jaxguide": jaxguide.__version__,
    "jax": jax.__version__,
    "batch": batch,
    "platforms": {
      name: {"calling_convention": program.calling_convention_version} for name, program in programs.items()
    },
    "arguments": arguments,
    "results": {
      "images": {"shape": [rows, *sampler.plan.file_shape], "dtype": "uint8"},
      "ok": {"shape": [rows], "dtype": "bool", "what": "false where a sample is not finite or a label is no class"},
    },
    "settings": {name: value for name, value in kept.items() if name not in NOT_EXPORTED},
    "weights_inside": inside,
    "weights": {
      name: {"shape": list(shape.shape), "dtype": shape.dtype.name}
      for name, shape in jax.eval_shape(lambda: dict(sampler.weights)).items()
    },
  }


def _write(path: PathLike, contents: Mapping[str, bytes], weights: Mapping[str, Any], folder: str) -> None:
  """Write a zip archive of files and of arrays. Types that NumPy's files lack are stored as whole numbers."""
  with replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
    for name, content in contents.items():
      archive.writestr(name, content)
    for name, leaf in weights.items():
      array = np.asarray(leaf, jax.dtypes.canonicalize_dtype(np.asarray(leaf).dtype))
      array = array.view(f"u{array.itemsize}") if array.dtype.kind == "V" else array
      with archive.open(f"{folder}{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array(member, np.asarray(array, order="C"), allow_pickle=False)
