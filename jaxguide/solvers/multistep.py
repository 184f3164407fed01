"""Multistep methods: they reuse the predictions of earlier steps, and evaluate the denoiser once a step."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import jax.numpy as jnp

from jaxguide._core import checks, struct
from jaxguide._core.typing import Example, Key, Leaf, Scalar
from jaxguide.solvers.base import MOST_ETA, MOST_S_NOISE, Denoise, MultistepState, diffuse, draw, move


class TwoStepState(NamedTuple):
  """A `MultistepState` with one more earlier prediction. The level of a prediction that does not exist is infinite."""

  x: Leaf
  x0: Leaf
  sigma: Leaf
  x0_before: Leaf
  sigma_before: Leaf


class UniPCState(NamedTuple):
  """A `TwoStepState` with the values that the corrector of the next step needs.

  ``base`` is the sample by the exact integral of the polynomial. ``expected`` is the polynomial's extrapolation of the
  next prediction. ``weight`` is the factor on the difference of the next prediction and ``expected``.
  """

  x: Leaf
  x0: Leaf
  sigma: Leaf
  x0_before: Leaf
  sigma_before: Leaf
  base: Leaf
  expected: Leaf
  weight: Leaf


class Past(NamedTuple):
  """The polynomial through the last predictions.

  ``h``, ``h_last`` and ``h_before`` are the lengths of this step and of the two before it, in ``lambda = -log sigma``.
  ``slope`` and ``curve`` are the first and second divided differences of the predictions, and ``known`` is the number
  of predictions that the polynomial goes through.
  """

  h: Leaf
  h_last: Leaf
  h_before: Leaf
  slope: Leaf
  curve: Leaf
  known: Leaf


def no_past(x: Example) -> TwoStepState:
  """Return the state before the first step, without earlier predictions."""
  infinite = jnp.asarray(jnp.inf, x.dtype)
  return TwoStepState(x, x, infinite, x, infinite)


def past_of(state: TwoStepState | UniPCState, x0: Example, sigma: Scalar, sigma_next: Scalar) -> Past:
  """Compute the polynomial through the last three predictions, or as many as there are. The last step uses only one."""
  has_last = (sigma_next > 0) & jnp.isfinite(state.sigma)
  has_before = has_last & jnp.isfinite(state.sigma_before)
  # For steps that do not exist, the lengths are replaced by finite numbers, so that the gradients are finite.
  h = jnp.log(sigma / jnp.where(sigma_next > 0, sigma_next, sigma / 2))
  h_last = jnp.log(jnp.where(has_last, state.sigma, 2 * sigma) / sigma)
  h_before = jnp.log(jnp.where(has_before, state.sigma_before / jnp.where(has_before, state.sigma, 1), 2))
  slope = jnp.where(has_last, (x0 - state.x0) / h_last, 0)
  slope_last = (state.x0 - state.x0_before) / h_before
  curve = jnp.where(has_before, (slope - slope_last) / (h_last + h_before), 0)
  return Past(h, h_last, h_before, slope, curve, jnp.where(has_before, 3, jnp.where(has_last, 2, 1)))


def moments(h: Leaf) -> tuple[Leaf, Leaf, Leaf, Leaf]:
  r"""Return :math:`\int_0^h e^{-(h - s)} s^k ds` for k from 0 to 3."""
  zeroth = -jnp.expm1(-h)
  first = h - zeroth
  second = h**2 - 2 * first
  return zeroth, first, second, h**3 - 3 * second


@struct.dataclass
class DPMpp2M:
  r"""DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, Algorithm 2): second order with one evaluation a step.

  With ``h = log(sigma / sigma')`` and ``r = h_previous / h``,

  .. math::
    x' = \frac{\sigma'}{\sigma} x + (1 - e^{-h}) \Big(D + \frac{D - D_{previous}}{2 r}\Big)

  The first step, and the last step, where ``h`` is infinite, are of first order.
  """

  order: ClassVar[int] = 2
  evaluations: ClassVar[int] = 1
  stochastic: ClassVar[bool] = False

  def init(self, x: Example) -> MultistepState:
    """Return the state before the first step."""
    return MultistepState(x, x, jnp.asarray(jnp.inf, x.dtype))

  def step(
    self, denoise: Denoise, state: MultistepState, sigma: Scalar, sigma_next: Scalar, key: Key
  ) -> MultistepState:
    """Take one step, with one evaluation."""
    del key
    x0 = denoise(state.x, sigma)
    second_order = (sigma_next > 0) & jnp.isfinite(state.sigma)
    # In first-order steps, h and h_last are replaced by finite numbers, so that the gradients are finite.
    h = jnp.log(sigma / jnp.where(second_order, sigma_next, sigma / 2))
    h_last = jnp.log(jnp.where(second_order, state.sigma, 2 * sigma) / sigma)
    weight = jnp.where(second_order, h / (2 * h_last), 0)
    return MultistepState(move(state.x, x0 + weight * (x0 - state.x0), sigma, sigma_next), x0, sigma)


@struct.dataclass
class DPMpp3M:
  r"""DPM-Solver++(3M) (Lu et al. 2022, arXiv:2211.01095): third order with one evaluation a step.

  It is the paper's exact solution (proposition 4.1), in ``lambda = -log sigma``,

  .. math::
    x' = \frac{\sigma'}{\sigma} x + \int_\lambda^{\lambda'} e^{-(\lambda' - t)} P(t) dt

  with the parabola ``P`` through the last three predictions. The first step is of first order, the second step of
  second order. This costs little accuracy, since x0 hardly changes at the large noise where sampling starts. The last
  step, where ``h`` is infinite, is of first order.

  diffusers and k-diffusion use half of the parabola's curvature, which makes the method second order. Here the whole
  curvature is used.
  """

  order: ClassVar[int] = 3
  evaluations: ClassVar[int] = 1
  stochastic: ClassVar[bool] = False

  def init(self, x: Example) -> TwoStepState:
    """Return the state before the first step."""
    return no_past(x)

  def step(self, denoise: Denoise, state: TwoStepState, sigma: Scalar, sigma_next: Scalar, key: Key) -> TwoStepState:
    """Take one step, with one evaluation."""
    del key
    x0 = denoise(state.x, sigma)
    past = past_of(state, x0, sigma, sigma_next)
    _, first, second, _ = moments(past.h)
    correction = first * past.slope + (second + past.h_last * first) * past.curve
    return TwoStepState(move(state.x, x0, sigma, sigma_next) + correction, x0, sigma, state.x0, state.sigma)


@struct.dataclass
class DPMpp2MSDE:
  r"""SDE-DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, eq. 18; with ``eta`` as in k-diffusion).

  With ``h = log(sigma / sigma')`` and ``r = h_previous / h``,

  .. math::
    x' = \frac{\sigma'}{\sigma} e^{-\eta h} x + (1 - e^{-(1 + \eta) h}) \Big(D + \frac{D - D_{previous}}{2 r}\Big)
      + \sigma' \sqrt{1 - e^{-2 \eta h}}\, z

  The first step and the last step are of first order. With ``eta = 0`` it is `DPMpp2M`. With noise, ``order`` is the
  order at which the variance converges for Gaussian data.

  Args:
    eta: amount of noise, at least 0: 0 is none, 1 is the paper's.
    s_noise: factor on the added noise, at least 0.
    solver_type: ``midpoint``, or ``heun``, which has the exact integral of the slope instead of ``1 / 2``.

  Raises:
    ValueError: for an unknown type (the message has the nearest name), or numbers out of range.

  >>> DPMpp2MSDE(eta=0.5).eta
  0.5
  """

  eta: Leaf = 1.0
  s_noise: Leaf = 1.0
  solver_type: str = struct.field(pytree_node=False, default="midpoint")
  order: ClassVar[int] = 2
  evaluations: ClassVar[int] = 1
  stochastic: ClassVar[bool] = True

  def __post_init__(self):
    checks.number_field(self, "eta", checks.in_range, 0, MOST_ETA)
    checks.number_field(self, "s_noise", checks.in_range, 0, MOST_S_NOISE)
    checks.lookup("solver type", self.solver_type, dict.fromkeys(("midpoint", "heun")))

  def init(self, x: Example) -> TwoStepState:
    """Return the state before the first step."""
    return no_past(x)

  def step(self, denoise: Denoise, state: TwoStepState, sigma: Scalar, sigma_next: Scalar, key: Key) -> TwoStepState:
    """Take one step, with one evaluation."""
    x0 = denoise(state.x, sigma)
    past = past_of(state, x0, sigma, sigma_next)
    rate = 1 + jnp.asarray(self.eta, x0.dtype)
    zeroth, first, _, _ = moments(rate * past.h)
    correction = (past.h * zeroth / 2 if self.solver_type == "midpoint" else first / rate) * past.slope
    x = diffuse(state.x, x0, sigma, sigma_next, self.eta, self.s_noise, draw(key, state.x))
    return TwoStepState(x + correction, x0, sigma, state.x0, state.sigma)


@struct.dataclass
class DPMpp3MSDE:
  r"""SDE-DPM-Solver++(3M): `DPMpp3M` with noise, in k-diffusion's form with ``eta``.

  .. math::
    x' = \frac{\sigma'}{\sigma} e^{-\eta h} x
      + (1 + \eta) \int_\lambda^{\lambda'} e^{-(1 + \eta) (\lambda' - t)} P(t) dt + \sigma' \sqrt{1 - e^{-2 \eta h}}\, z

  ``order`` is the order at which the variance converges for Gaussian data; with ``eta = 0`` it is 3. k-diffusion and
  diffusers use half of the curvature of ``P``. Here the whole curvature is used.

  Args:
    eta: amount of noise, at least 0: 0 is none, 1 is that of Lu et al. (2022, arXiv:2211.01095, eq. 18).
    s_noise: factor on the added noise, at least 0.

  >>> DPMpp3MSDE(s_noise=1.003).eta
  1.0
  """

  eta: Leaf = 1.0
  s_noise: Leaf = 1.0
  order: ClassVar[int] = 2
  evaluations: ClassVar[int] = 1
  stochastic: ClassVar[bool] = True

  def __post_init__(self):
    checks.number_field(self, "eta", checks.in_range, 0, MOST_ETA)
    checks.number_field(self, "s_noise", checks.in_range, 0, MOST_S_NOISE)

  def init(self, x: Example) -> TwoStepState:
    """Return the state before the first step."""
    return no_past(x)

  def step(self, denoise: Denoise, state: TwoStepState, sigma: Scalar, sigma_next: Scalar, key: Key) -> TwoStepState:
    """Take one step, with one evaluation."""
    x0 = denoise(state.x, sigma)
    past = past_of(state, x0, sigma, sigma_next)
    rate = 1 + jnp.asarray(self.eta, x0.dtype)
    _, first, second, _ = moments(rate * past.h)
    correction = first / rate * past.slope + (second / rate**2 + past.h_last * first / rate) * past.curve
    x = diffuse(state.x, x0, sigma, sigma_next, self.eta, self.s_noise, draw(key, state.x))
    return TwoStepState(x + correction, x0, sigma, state.x0, state.sigma)


@struct.dataclass
class UniPC:
  r"""UniPC (Zhao et al. 2023, arXiv:2302.04867, Algorithms 5 to 8, data prediction, ``B_2(h) = e^h - 1``).

  It has a predictor, a multistep method as `DPMpp2M` and `DPMpp3M` are, and a corrector. The corrector costs no
  evaluation: the prediction at the start of the next step is one more point of the polynomial, and the previous step is
  repeated with it.

  .. math::
    x' = \frac{\sigma'}{\sigma} x^c + \int_\lambda^{\lambda'} e^{-(\lambda' - t)} P(t) dt

  ``x^c`` is the corrected sample. ``P`` is the polynomial through the last ``predictor`` predictions; the corrector's
  polynomial goes through the new prediction as well. For a straight line, the paper's factor 1/2 replaces the exact
  integral. The predictor has order 1 in the first step, at most 2 in the second, and 1 in the last, where ``h`` is
  infinite.

  Args:
    predictor: order of the predictor, 1 to 3. The paper recommends 2 for guided sampling.

  Raises:
    ValueError: if ``predictor`` is not 1, 2 or 3.

  >>> UniPC().order, UniPC(predictor=3).order
  (3, 4)
  """

  predictor: int = struct.field(pytree_node=False, default=2)
  evaluations: ClassVar[int] = 1
  stochastic: ClassVar[bool] = False

  def __post_init__(self):
    if checks.at_least("predictor", self.predictor, 1) > 3:
      raise ValueError(f"predictor must be 1, 2 or 3, got {self.predictor}")

  @property
  def order(self) -> int:
    """The order of the whole method: the corrector adds one to the predictor's order."""
    return self.predictor + 1

  def init(self, x: Example) -> UniPCState:
    """Return the state before the first step."""
    return UniPCState(*no_past(x), x, x, jnp.zeros((), x.dtype))

  def step(self, denoise: Denoise, state: UniPCState, sigma: Scalar, sigma_next: Scalar, key: Key) -> UniPCState:
    """Take one step, with one evaluation."""
    del key
    x0 = denoise(state.x, sigma)
    corrected = state.base + state.weight * (x0 - state.expected)
    past = past_of(state, x0, sigma, sigma_next)
    h, nodes = past.h, (past.h_last, past.h_last + past.h_before)
    zeroth, first, second, third = moments(h)
    # For each order of the predictor: the new sample; the sample by the exact integral of P; the integral of the
    # polynomial that is 1 at the new point and 0 at the others; and P at the new point.
    constant = move(corrected, x0, sigma, sigma_next)
    line, line_at_next = constant + first * past.slope, x0 + h * past.slope
    parabola = line + (second + nodes[0] * first) * past.curve
    cubic_weight = (third + (nodes[0] + nodes[1]) * second + nodes[0] * nodes[1] * first) / (h + nodes[1])
    by_order = (
      (constant, constant, zeroth / 2, x0),
      (constant + zeroth / 2 * h * past.slope, line, (second + nodes[0] * first) / (h * (h + nodes[0])), line_at_next),
      (parabola, parabola, cubic_weight / (h * (h + nodes[0])), line_at_next + h * (h + nodes[0]) * past.curve),
    )
    order = jnp.minimum(past.known, self.predictor)
    is_order = [order == 1, order == 2]
    x, base, weight, expected = (jnp.select(is_order, values[:2], values[2]) for values in zip(*by_order, strict=True))
    return UniPCState(x, x0, sigma, state.x0, state.sigma, base, expected, weight)
