"""The figures of docs/guidance.md, on a mixture in the plane and on the animals of the package, with their numbers.

`python -m benchmarks pictures` draws all of them into docs/figures and prints the numbers of the page;
`python -m benchmarks pictures NAME ...` draws those that are named. The figures are the same each time. Samples at the
same place of a figure have the same noise. The mixture has an exact denoiser; the animals need `pip install
'.[animals]'` for the judge, an SVM on pixels that guides nothing.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxguide as jg
from benchmarks import gallery, timing
from benchmarks.canvas import (
  BINS,
  CENTRES,
  EDGES,
  FRAME,
  Made,
  arrows,
  canvas,
  histogram,
  lattice,
  on_plane,
  planes,
  save,
  show,
)
from jaxguide import checks

FOLDER = Path(__file__).parents[1] / "docs" / "figures"

# The plane: class 0 lies to the left and to the right, class 1 above and below, and they overlap.
MEANS, VARIANCES = np.array([[-1.0, 0.0], [1.0, 0.3], [0.0, 0.8], [0.2, -0.9]]), np.array([0.2, 0.25, 0.15, 0.3])
LABEL, NULL, NUM = 0, 2, 50_000
FINE = (120, 0.02, 40.0)


@functools.cache
def mixture() -> jg.GaussianMixture:
  """Make the mixture."""
  with jax.ensure_compile_time_eval():  # The first caller may be inside a program.
    return jg.gaussian_mixture(MEANS, VARIANCES, [0, 0, 1, 1], np.array([0.3, 0.2, 0.3, 0.2]))


def density(scale: float, sigma: float = 0.0) -> np.ndarray:
  """Give the mass of p(x; sigma) p(y|x; sigma)^scale in each bin."""
  mass = np.exp(on_plane(lambda x, sigma: mixture().tempered_log_density(x, sigma, LABEL, scale), sigma))
  return mass / mass.sum()


def total_variation(mass: np.ndarray, wanted: np.ndarray) -> float:
  """Give the total variation distance in bins three times as wide; what lies outside of the picture counts as well."""
  difference = (mass - wanted).reshape(BINS // 3, 3, BINS // 3, 3).sum((1, 3))
  return float(0.5 * (np.abs(difference).sum() + 1 - mass.sum()))


@functools.partial(jax.jit, static_argnums=1)
def walks(guided: Any, num: int, sigmas: Any, solver: Any) -> tuple[Any, Any]:
  """Sample the plane. Return the samples, and their places at each step."""

  def one(key):
    return jg.sample(guided, key, (2,), sigmas, solver, LABEL, lambda state: state.x)

  return jax.vmap(one)(jg.sample_keys(jax.random.key(0), num))


def drawn(guided: Any, num: int = NUM) -> np.ndarray:
  """Sample the plane with small steps and noise."""
  return np.asarray(walks(guided, num, jg.karras(*FINE), jg.DPMpp2MSDE(eta=2.0))[0])


def guided(scale: Any) -> Any:
  """Guide the mixture classifier-free."""
  return jg.classifier_free(NULL, scale)(mixture().denoiser)


def noise_levels() -> Made:
  """What the denoiser says at four noise levels, and walks down to the data."""
  ring = jg.ring(5, 1.5, 0.15)
  figure, panels = canvas(2, 4, (10.4, 5.8))
  for panel, sigma in zip(panels[0], (2.0, 1.0, 0.5, 0.25), strict=True):
    panel.set(**FRAME)
    show(panel, on_plane(lambda x, sigma: jnp.exp(ring.log_density(x, sigma)), sigma), f"σ = {sigma:g}")
    arrows(panel, lambda x, sigma: ring.denoise(x, sigma) - x, sigma)
  grid = panels[1, 0].get_gridspec()
  for panel in panels[1]:
    panel.remove()
  wide, sigmas = figure.add_subplot(grid[1, :]), jg.karras(*FINE)
  paths = np.asarray(walks(jg.classifier_free(5, 0.0)(ring.denoiser), 80, sigmas, jg.Euler())[1])[:, :-1, 1]
  levels = np.asarray(sigmas[1:-1])
  wide.plot(levels, paths.T, color="tab:blue", alpha=0.5, linewidth=0.8)
  wide.plot(np.full(len(paths), levels[-1]), paths[:, -1], "k.", markersize=4, clip_on=False)
  wide.set(xscale="log", xlim=(4, levels[-1]), ylim=(-4, 4), ylabel="second coordinate")
  wide.set(xlabel="noise level σ, from much to little", title="80 walks along the score")
  wide.set_xticks((4, 2, 1, 0.5, 0.25, 0.1, 0.05), ("4", "2", "1", "0.5", "0.25", "0.1", "0.05"))
  wide.minorticks_off()
  return figure, []


def classifier() -> Made:
  """Bayes' rule for scores at one level, and the classifier's gradient at three levels."""
  figure, panels = planes(2, 3)
  level, model = 0.5, mixture()

  def score(label):
    return lambda x, sigma: model.denoiser(x, sigma, label) - x

  def gradient(x, sigma):
    return sigma**2 * jax.grad(model.class_log_prob)(x, sigma, LABEL)

  show(panels[0, 0], density(0.0, level), "∇ log p(x)")
  show(
    panels[0, 1],
    on_plane(lambda x, sigma: jnp.exp(model.class_log_prob(x, sigma, LABEL)), level),
    "+  ∇ log p(y | x)",
    1.0,
    "PuBu",
  )
  show(panels[0, 2], density(1.0, level), "=  ∇ log p(x | y)")
  for panel, field in zip(panels[0], (score(NULL), gradient, score(LABEL)), strict=True):
    arrows(panel, field, level)
  rows = []
  for panel, sigma in zip(panels[1], (2.0, 0.5, 0.1), strict=True):
    probability = on_plane(lambda x, sigma: jnp.exp(model.class_log_prob(x, sigma, LABEL)), sigma)
    show(panel, probability, f"p(y | x) at σ = {sigma:g}", 1.0, "PuBu")
    arrows(panel, lambda x, sigma: gradient(x, sigma) / sigma, sigma, most=0.7)
    rows.append({"σ": sigma, "least p(y|x)": float(probability.min()), "largest": float(probability.max())})
  return figure, rows


def plane() -> Made:
  """The density p(x) p(y|x)^scale, and what guidance samples."""
  figure, panels = planes(2, 4)
  rows = []
  for (above, below), scale in zip(panels.T, (0.0, 1.0, 2.0, 4.0), strict=True):
    wanted, samples = density(scale), drawn(guided(scale))
    show(above, wanted, f"γ = {scale:g}", wanted.max())
    show(below, histogram(samples), "", wanted.max())
    asked = np.exp(jax.vmap(mixture().class_log_prob, (0, None, None))(samples, 0.0, LABEL)).mean()
    rows.append({"γ": scale, "mean p(y|x) of guidance's samples": float(asked)})
    rows[-1] |= {"their standard deviation, left half": float(samples[samples[:, 0] < 0].std(0).mean())}
  panels[0, 0].set_ylabel("p(x) p(y | x)$^γ$")
  panels[1, 0].set_ylabel("samples of guidance")
  return figure, rows


def gap() -> Made:
  """How far guidance is from p(x) p(y|x)^scale, and `sample_product`, which samples it."""
  figure, panels = canvas(1, 2, (9.6, 3.4))
  rows = []
  for panel, scale in zip(panels[0], (2.0, 4.0), strict=True):
    wanted = density(scale)
    chance = np.random.default_rng(0).choice(np.asarray(lattice(CENTRES)), NUM, p=wanted.ravel())
    target = jg.tempered(mixture().denoiser, NULL, scale)
    corrected = jax.jit(
      lambda target: jg.sample_product(
        target, jax.random.key(0), NUM, (2,), jg.karras(*FINE), jg.DPMpp2MSDE(eta=2.0), LABEL
      )[0]
    )(target)
    masses = {"guidance": histogram(drawn(guided(scale))), "sample_product": histogram(corrected)}
    panel.fill_between(CENTRES, wanted.sum(0) / (EDGES[1] - EDGES[0]), color="0.85", label="p(x) p(y | x)$^γ$")
    for (name, mass), style in zip(masses.items(), ("C3--", "C0-"), strict=True):
      distance = total_variation(mass, wanted)
      panel.plot(CENTRES, mass.sum(0) / (EDGES[1] - EDGES[0]), style, label=f"{name}, TV {distance:.2f}")
      rows.append({"γ": scale, "samples": name, "total variation": distance})
    rows.append({"γ": scale, "samples": "independent", "total variation": total_variation(histogram(chance), wanted)})
    panel.set(title=f"γ = {scale:g}", xlabel="first coordinate", ylabel="density", ylim=(0, None))
    panel.legend(fontsize=8)
  return figure, rows


def levels() -> Made:
  """Guidance at some noise levels only, on the plane."""
  figure, panels = planes(1, 4)
  scale, at = 6.0, 0.7
  free, rows = jg.classifier_free(NULL, scale), []
  guidances = {
    "no guidance": jg.classifier_free(NULL, 1.0),
    "at all levels": free,
    f"above σ = {at:g} only": jg.interval(free, at),
    f"below σ = {at:g} only": jg.interval(free, 0.0, at),
  }
  for panel, (name, guidance) in zip(panels[0], guidances.items(), strict=True):
    x = drawn(guidance(mixture().denoiser), 20_000)
    panel.contour(CENTRES, CENTRES, density(1.0), colors="0.6", linewidths=0.7)
    panel.plot(*x[:1000].T, ".", markersize=2)
    panel.set_title(name)
    asked = np.exp(jax.vmap(mixture().class_log_prob, (0, None, None))(x, 0.0, LABEL)).mean()
    halves = [x[x[:, 0] < 0], x[x[:, 0] >= 0]]
    inside = np.sqrt(sum(len(half) * half.var(0).mean() for half in halves) / len(x))
    rows.append({"guided": name, "mean p(y|x)": float(asked), "spread within a half": float(inside)})
    rows[-1] |= {"left": f"{len(halves[0]) / len(x):.0%}"}
  return figure, rows


def weak() -> Made:
  """Autoguidance and classifier-free guidance of a model that is too wide, on the plane."""
  angle = 2 * np.pi * (np.arange(8) + 0.5) / 8
  means = 1.8 * np.stack([np.cos(angle), np.sin(angle)], 1)
  truth, good, poor = (jg.gaussian_mixture(means, std**2, np.arange(8) // 4) for std in (0.1, 0.2, 0.35))
  scale, figure_rows = 3.0, []
  models_of = {
    "the data": truth.denoiser,
    "the model": good.denoiser,
    "the weak model": poor.denoiser,
    "autoguidance, γ = 3": jg.autoguidance(poor.denoiser, scale)(good.denoiser),
    "classifier-free, γ = 3": jg.classifier_free(NULL, scale)(good.denoiser),
  }
  figure, panels = planes(1, 5)
  for panel, (name, denoiser) in zip(panels[0], models_of.items(), strict=True):
    x = drawn(denoiser, 8000)
    panel.plot(*x[:1500].T, ".", markersize=2)
    panel.plot(*means[:4].T, "k+", markersize=6)
    panel.set_title(name)
    distance = np.linalg.norm(x[:, None] - means[:4], axis=-1)
    nearest, place = distance.min(1), distance.argmin(1)
    row = {"samples": name, "root mean square distance from the nearest mode": float(np.sqrt((nearest**2).mean() / 2))}
    figure_rows.append(row | {"in the outer modes": f"{np.isin(place, (0, 3)).mean():.0%}"})
  return figure, figure_rows


FIGURES: dict[str, Callable[[], Made]] = {
  "noise-levels": noise_levels,
  "classifier": classifier,
  "clean-classifier": gallery.clean_classifier,
  "two-answers": gallery.two_answers,
  "scales": gallery.scales,
  "plane": plane,
  "gap": gap,
  "saturation": gallery.saturation,
  "diversity": gallery.diversity,
  "levels": levels,
  "steps": gallery.steps,
  "rules": gallery.rules,
  "weak": weak,
  "perturbed": gallery.perturbed,
  "conditions": gallery.conditions,
}


def main(*names: str) -> None:
  """Draw the figures that are named, or all.

  Raises:
    ValueError: for a name that is no figure's.
  """
  tables = {}
  for name in names or FIGURES:
    figure, rows = checks.lookup("figure", name, FIGURES)()
    size = save(figure, FOLDER / f"{name}.png")
    tables[name] = rows
    print(f"{name}: {size / 1e3:.0f} kB", *rows, sep="\n", flush=True)
  timing.report("pictures", {name: rows for name, rows in tables.items() if rows})
