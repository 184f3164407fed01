"""The figures of benchmarks/pictures.py that show the animals of the package."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

import jaxguide as jg
from benchmarks.canvas import Made, Row, sheet
from jaxguide import data, evaluation, models
from jaxguide.solvers.base import Conditioned

ANIMALS, STEPS, COUNT, HIGH = "animals", 20, 10, 8.0


@functools.cache
def loaded() -> Any:
  """Load the denoiser of the animals."""
  return models.load(ANIMALS)


@functools.cache
def judge() -> Any:
  """Fit the judge to the training images."""
  train = data.load(ANIMALS, "train")
  return evaluation.Judge.fit(train.images, train.labels)


def once(function: Any) -> Any:
  """Compile a denoiser or a log-probability once, for every guidance that calls it."""
  return Partial(_call, function)


@jax.jit
def _call(function, *arguments):
  return function(*arguments)


def draw(guidance: Any, labels: Any = None, steps: int = STEPS, solver: Any = None) -> np.ndarray:
  """Sample the animals, the classes in turn, or the conditions that are given.

  These are the samples of `jaxguide.sample_batch`. The steps run one by one, so that only the network is compiled.
  """
  guided, solver = guidance(once(loaded().denoiser)), solver or jg.DPMpp2M()
  labels, sigmas = jnp.arange(COUNT) % 10 if labels is None else jnp.asarray(labels), jg.karras(steps)
  keys = jg.sample_keys(jax.random.key(0), len(labels))
  x = sigmas[0] * jax.vmap(lambda key: jax.random.normal(jax.random.split(key)[0], (28, 28, 1)))(keys)
  state = jax.vmap(solver.init)(x)
  for level, following in itertools.pairwise(sigmas):

    def step(state, label, level=level, following=following):
      return solver.step(Conditioned(guided, label), state, level, following, None)

    state = jax.vmap(step)(state, labels)
  return np.asarray(state.x)


def cfg(scale: Any, bound: float = 1.0, combine: Any = jg.combine.linear) -> Any:
  """Guide classifier-free, then clip; an infinite bound does not clip."""
  return jg.chain(jg.classifier_free(loaded().null_cond, scale, combine), jg.clip_x0(min(bound, 1e6)))


def between(scale: float, low: float, high: float) -> Any:
  """Give a scale that acts as `jaxguide.interval` does: 1 outside of the levels."""
  return lambda sigma: jnp.where((sigma > low) & (sigma <= high), scale, 1.0)


def facts(name: str, x: np.ndarray, labels: Any = None) -> Row:
  """Measure samples: how many the judge takes for what was asked for, and what share of the pixels is out of range."""
  labels = np.arange(len(x)) % 10 if labels is None else labels
  named = int((judge().predict(data.to_uint8(x)) == labels).sum())
  row = {"samples": name, "judged right": f"{named} of {len(x)}"}
  row |= {
    "below -1.2 or above 1.2": f"{(np.abs(x) > 1.2).mean():.1%}",
    "grey, -0.8 to 0.8": f"{(np.abs(x) < 0.8).mean():.1%}",
  }
  return row | {"standard deviation": f"{x.std((1, 2, 3)).mean():.2f}"}


def spread(x: np.ndarray) -> float:
  """Give the mean distance of two samples."""
  flat = x.reshape(len(x), -1)
  return float(np.linalg.norm(flat[:, None] - flat, axis=-1).sum() / (len(x) * (len(x) - 1)))


def clean_classifier() -> Made:
  """Guidance by a classifier that saw noisy images, and by one that saw clean images alone."""
  train, test = data.load(ANIMALS, "train"), data.load(ANIMALS, "test")
  noisy, clean = once(models.load("animals-classifier").log_prob), once(trained_on_clean(train))
  x, labels = jnp.asarray(data.from_uint8(test.images[::4])), jnp.asarray(test.labels[::4])
  noise, rows = jax.random.normal(jax.random.key(1), x.shape), []
  for sigma in (0.0, 0.25, 0.5, 1.0, 2.0, 4.0):
    row: Row = {"σ": sigma}
    for name, log_prob in (("noisy", noisy), ("clean", clean)):
      right = named(log_prob, x + sigma * noise, max(sigma, 0.002)) == labels
      row[f"accuracy of the {name} classifier"] = float(right.mean())
    rows.append(row)
  classes = jnp.arange(COUNT) % 10
  samples = {"no guidance": draw(cfg(0.0))}
  for name, log_prob in (("noisy", noisy), ("clean", clean)):
    guidance = jg.chain(jg.unconditional(loaded().null_cond), jg.clip_x0(), jg.classifier(log_prob, 4.0))
    samples[f"{name} classifier"] = draw(guidance)
  for name, images in samples.items():
    belief = jnp.exp(jax.vmap(clean, (0, None, 0))(jnp.asarray(images), jnp.asarray(0.0), classes)).mean()
    rows.append(facts(name, images) | {"what the clean classifier believes": float(belief)})
  return sheet({"scale 4": samples}, train.class_names), rows


@jax.jit
def named(log_prob: Any, x: Any, sigma: Any) -> Any:
  """Name the class of each noisy image."""
  scores = jax.vmap(jax.vmap(log_prob, (None, None, 0)), (0, None, None))(x, jnp.asarray(sigma), jnp.arange(10))
  return scores.argmax(1)


def trained_on_clean(train: Any) -> Any:
  """Train a small convolutional network on clean images, and give its log-probability at any noise level."""
  import optax
  from flax import linen as nn

  module = nn.Sequential([
    nn.Conv(16, (5, 5), 2), nn.relu, nn.Conv(32, (3, 3), 2), nn.relu, lambda x: x.reshape(-1, 7 * 7 * 32), nn.Dense(10)
  ])  # fmt: skip
  images, labels = jnp.asarray(data.from_uint8(train.images)), jnp.asarray(train.labels)
  params = module.init(jax.random.key(0), images[:1])
  optimizer = optax.adam(1e-3)

  @jax.jit
  def step(params, state, at):
    def loss(params):
      logits = module.apply(params, images[at])
      return optax.softmax_cross_entropy_with_integer_labels(logits, labels[at]).mean()

    updates, state = optimizer.update(jax.grad(loss)(params), state)
    return optax.apply_updates(params, updates), state

  state, rng = optimizer.init(params), np.random.default_rng(0)
  for _ in range(8):
    for at in rng.permutation(len(labels))[: len(labels) // 100 * 100].reshape(-1, 100):
      params, state = step(params, state, at)
  return Partial(_of_clean, Partial(module.apply), params)


def _of_clean(apply, params, x, sigma, cond):
  return jax.nn.log_softmax(apply(params, (x / jnp.sqrt(1 + sigma**2))[None])[0])[cond]


def two_answers() -> Made:
  """Two answers of one network to the same noisy image, with a label and without, and what they are combined to."""
  names, null, sigma, scale = loaded().config.class_names, loaded().null_cond, jnp.asarray(3.0), 4.0
  x = sigma * jax.random.normal(jax.random.key(4), (28, 28, 1)) - 0.6
  labels = jnp.append(jnp.arange(10), null)
  answers = np.asarray(jax.jit(jax.vmap(loaded().denoiser, (None, None, 0)))(x, sigma, labels))
  with_label, without = answers[:-1], np.repeat(answers[-1:], 10, 0)
  rows = {"D(x, ∅)": without, "D(x, y)": with_label, "D(x, y) - D(x, ∅)": with_label - without}
  rows[f"guided, γ = {scale:g}"] = without + scale * (with_label - without)
  return sheet({f"one noisy image, σ = {float(sigma):g}": rows}, names), []


def scales() -> Made:
  """The animals at six scales."""
  samples = {f"scale {scale:g}": draw(cfg(scale)) for scale in (0.0, 0.5, 1.0, 2.0, 4.0, HIGH)}
  return sheet({"": samples}, loaded().config.class_names), [facts(name, x) for name, x in samples.items()]


def saturation() -> Made:
  """High scales, and what keeps x0 in its range."""
  panels, rows = {}, []
  thresholds = jg.dynamic_threshold(0.995)
  for scale in (10.0, 20.0):
    free = jg.classifier_free(loaded().null_cond, scale)
    guidances = {
      "as it is": cfg(scale, np.inf),
      "clip": cfg(scale),
      "dynamic-threshold": jg.chain(free, thresholds),
      "rescaled, φ = 0.7": cfg(scale, combine=jg.combine.rescaled(0.7)),
      "APG, r = 5": cfg(scale, combine=jg.combine.projected(0.0, 5.0)),
    }
    samples = {name: draw(guidance) for name, guidance in guidances.items()}
    panels[f"scale {scale:g}"] = samples
    rows += [facts(f"scale {scale:g}, {name}", x) for name, x in samples.items()]
  return sheet(panels, loaded().config.class_names, 2.0), rows


def diversity() -> Made:
  """One class at three scales, and with guidance between two levels only."""
  label = loaded().config.class_names.index("giraffe")
  labels, high = np.full(COUNT, label), 10.0
  guidances = {f"scale {scale:g}": cfg(scale) for scale in (1.0, 4.0, high)}
  guidances[f"scale {high:g}, σ 0.3 to 3"] = cfg(between(high, 0.3, 3.0))
  samples = {name: draw(guidance, labels) for name, guidance in guidances.items()}
  rows = [facts(name, x, labels) | {"mean distance of two": spread(x)} for name, x in samples.items()]
  return sheet({"": samples}, []), rows


def steps() -> Made:
  """A high scale with few and many steps."""
  counts = (6, 10, STEPS, 50)
  samples = {f"{count} steps": draw(cfg(HIGH), steps=count) for count in counts}
  title = f"scale {HIGH:g}, DPM-Solver++(2M)"
  rows = [facts(name, x) for name, x in samples.items()]
  last = samples[f"{counts[-1]} steps"]
  for row, x in zip(rows, samples.values(), strict=True):
    row["distance from the last"] = float(np.sqrt(np.mean((x - last) ** 2)))
  return sheet({title: samples}, loaded().config.class_names), rows


def rules() -> Made:
  """One scale, by several rules."""
  grid = jg.karras(STEPS)
  guidances = {
    "linear": cfg(HIGH),
    "interval, 0.3 to 3": cfg(between(HIGH, 0.3, 3.0)),
    "powered-cosine": cfg(jg.scales.powered_cosine(HIGH, jg.schedules.Cosine(), 4.0)),
    "tangential": cfg(HIGH, combine=jg.combine.tangential),
    "frequencies 1/0.5": cfg(HIGH, combine=jg.combine.frequency_decoupled(1.0, 0.5)),
    "zero-star": cfg(HIGH, combine=jg.combine.zero_star()),
  }
  samples = {name: draw(guidance) for name, guidance in guidances.items()}
  samples["CFG++, λ = 0.8"] = draw(cfg(jg.scales.cfg_pp(0.8, grid)), solver=jg.Euler())
  return sheet({f"scale {HIGH:g}": samples}, loaded().config.class_names), [facts(*item) for item in samples.items()]


def perturbed() -> Made:
  """Away from a perturbed network, with no label and no second model."""
  null = np.full(COUNT, loaded().null_cond)
  samples = {"none": draw(cfg(1.0), null)}
  for name, kind, blocks in (
    ("pag, s = 3", "identity", ["middle_block_1"]),
    ("seg, s = 3", "smooth", ["middle_block_1"]),
    ("slg, s = 3", "skip", ["middle_block_1"]),
  ):
    poor = jg.perturbed(loaded().denoiser, jg.Perturbation(kind, blocks))
    samples[name] = draw(jg.chain(jg.autoguidance(poor, 4.0), jg.clip_x0()), null)
  rows = [
    {"samples": name, "distance from none": float(np.sqrt(np.mean((x - samples["none"]) ** 2)))}
    for name, x in samples.items()
  ]
  return sheet({"without a label": samples}, []), rows


def conditions() -> Made:
  """Two labels at once, one label without another, and a half of a picture given."""
  names, null = loaded().config.class_names, loaded().null_cond
  pair = np.tile([names.index("horse"), names.index("giraffe")], (COUNT, 1))

  def composed(one, other):
    return draw(jg.chain(jg.compose(null, jnp.array([one, other])), jg.clip_x0()), pair)

  samples = {
    "horse 3": composed(3.0, 0.0),
    "horse 3, giraffe -2": composed(3.0, -2.0),
    "horse 2, giraffe 2": composed(2.0, 2.0),
    "giraffe 3": composed(0.0, 3.0),
  }
  whole = draw(cfg(3.0))
  mask = jnp.broadcast_to(jnp.arange(28)[:, None, None] < 14, (28, 28, 1)).astype(jnp.float32)
  seen = whole * np.asarray(mask)
  measured = jg.measurement(Partial(jnp.multiply, mask), 0.05, lambda sigma: sigma / jnp.sqrt(1 + sigma**2))
  guidance = jg.chain(jg.unconditional(null), jg.reconstruction(measured, 1.0), jg.clip_x0())
  filled = draw(guidance, seen)
  samples |= {"a picture": whole, "what is given": seen, "reconstruction": filled}
  error = np.sqrt((((filled - whole) * np.asarray(mask)) ** 2).sum() / (COUNT * 14 * 28))
  return sheet({"": samples}, []), [{"samples": "reconstruction", "error where it is given": float(error)}]
