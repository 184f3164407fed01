"""Methods that look back at earlier steps instead of evaluating more often."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import jax.numpy as jnp

from jaxguide._core import checks, struct
from jaxguide._core.typing import Example, Key, Leaf, Scalar
from jaxguide.solvers.base import MOST_ETA, MOST_S_NOISE, Denoise, MultistepState, diffuse, draw, move


class TwoStepState(NamedTuple):
  """A `MultistepState` that also remembers the evaluation before its last; levels are infinite where there was none."""

  x: Leaf
  x0: Leaf
  sigma: Leaf
  x0_before: Leaf
  sigma_before: Leaf


class UniPCState(NamedTuple):
  """A `TwoStepState` with what the corrector needs.

  ``base``, the sample by the polynomial's exact integral, what it expected of the next evaluation, and the weight of
  what that differs by.
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
  """Steps in ``lambda = -log sigma``, this and the two before; divided differences, and of how many evaluations."""

  h: Leaf
  h_last: Leaf
  h_before: Leaf
  slope: Leaf
  curve: Leaf
  known: Leaf


def no_past(x: Example) -> TwoStepState:
  """Start from ``x``, with no step behind."""
  never = jnp.asarray(jnp.inf, x.dtype)
  return TwoStepState(x, x, never, x, never)


def past_of(state: TwoStepState | UniPCState, x0: Example, sigma: Scalar, sigma_next: Scalar) -> Past:
  """Give the polynomial through the last evaluations, as many as there are; one in the last step."""
  one = (sigma_next > 0) & jnp.isfinite(state.sigma)
  two = one & jnp.isfinite(state.sigma_before)
  # Where there is no such step the numbers would be infinite, and so would their gradients.
  h = jnp.log(sigma / jnp.where(sigma_next > 0, sigma_next, sigma / 2))
  h_last = jnp.log(jnp.where(one, state.sigma, 2 * sigma) / sigma)
  h_before = jnp.log(jnp.where(two, state.sigma_before / jnp.where(two, state.sigma, 1), 2))
  slope = jnp.where(one, (x0 - state.x0) / h_last, 0)
  slope_last = (state.x0 - state.x0_before) / h_before
  curve = jnp.where(two, (slope - slope_last) / (h_last + h_before), 0)
  return Past(h, h_last, h_before, slope, curve, jnp.where(two, 3, jnp.where(one, 2, 1)))


def moments(h: Leaf) -> tuple[Leaf, Leaf, Leaf, Leaf]:
  r"""Give :math:`\int_0^h e^{-(h - s)} s^k ds` for k from 0 to 3."""
  zeroth = -jnp.expm1(-h)
  first = h - zeroth
  second = h**2 - 2 * first
  return zeroth, first, second, h**3 - 3 * second


@struct.dataclass
class DPMpp2M:
  r"""DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, Algorithm 2): second order at one evaluation a step.

  With ``h = log(sigma / sigma')`` and ``r = h_previous / h``,

  .. math::
    x' = \frac{\sigma'}{\sigma} x + (1 - e^{-h}) \Big(D + \frac{D - D_{previous}}{2 r}\Big)

  The first step and the last, where ``h`` is infinite, are of first order.
  """

  order: ClassVar[int] = 2
  evaluations: ClassVar[int] = 1
  stochastic: ClassVar[bool] = False

  def init(self, x: Example) -> MultistepState:
    """Start from ``x``, with no step behind."""
    return MultistepState(x, x, jnp.asarray(jnp.inf, x.dtype))

  def step(
    self, denoise: Denoise, state: MultistepState, sigma: Scalar, sigma_next: Scalar, key: Key
  ) -> MultistepState:
    """Take one step, with one evaluation."""
    del key
    x0 = denoise(state.x, sigma)
    inner = (sigma_next > 0) & jnp.isfinite(state.sigma)
    # Where a step is of first order the numbers below would be infinite, and so would their gradients.
    h = jnp.log(sigma / jnp.where(inner, sigma_next, sigma / 2))
    h_last = jnp.log(jnp.where(inner, state.sigma, 2 * sigma) / sigma)
    slope = jnp.where(inner, h / (2 * h_last), 0)
    return MultistepState(move(state.x, x0 + slope * (x0 - state.x0), sigma, sigma_next), x0, sigma)


@struct.dataclass
class DPMpp3M:
  r"""DPM-Solver++(3M) (Lu et al. 2022, arXiv:2211.01095): third order at one evaluation a step.

  The equation of the paper's exact solution (proposition 4.1), in ``lambda = -log sigma``,

  .. math::
    x' = \frac{\sigma'}{\sigma} x + \int_\lambda^{\lambda'} e^{-(\lambda' - t)} P(t) dt

  with the parabola ``P`` through the last three evaluations. The first step is of first order and the second of second,
  which costs little at the noise where sampling starts, as x0 hardly changes there; and so is the last of first order,
  where ``h`` is infinite.

  diffusers and k-diffusion give the parabola's curvature half its weight, which leaves second order; here it has all.
  """

  order: ClassVar[int] = 3
  evaluations: ClassVar[int] = 1
  stochastic: ClassVar[bool] = False

  def init(self, x: Example) -> TwoStepState:
    """Start from ``x``, with no step behind."""
    return no_past(x)

  def step(self, denoise: Denoise, state: TwoStepState, sigma: Scalar, sigma_next: Scalar, key: Key) -> TwoStepState:
    """Take one step, with one evaluation."""
    del key
    x0 = denoise(state.x, sigma)
    past = past_of(state, x0, sigma, sigma_next)
    _, first, second, _ = moments(past.h)
    bent = first * past.slope + (second + past.h_last * first) * past.curve
    return TwoStepState(move(state.x, x0, sigma, sigma_next) + bent, x0, sigma, state.x0, state.sigma)


@struct.dataclass
class DPMpp2MSDE:
  r"""SDE-DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, eq. 18; with ``eta`` as in k-diffusion).

  With ``h = log(sigma / sigma')`` and ``r = h_previous / h``,

  .. math::
    x' = \frac{\sigma'}{\sigma} e^{-\eta h} x + (1 - e^{-(1 + \eta) h}) \Big(D + \frac{D - D_{previous}}{2 r}\Big)
      + \sigma' \sqrt{1 - e^{-2 \eta h}}\, z

  The first step and the last are of first order. With ``eta = 0`` it is `DPMpp2M`; with noise the order is that of the
  variance of Gaussian data.

  Args:
    eta: how much noise; 0 none, 1 as the paper has it. At least 0.
    s_noise: factor on the noise that is added, at least 0.
    solver_type: ``midpoint``, or ``heun``, which has the exact integral of the slope instead of ``1 / 2``.

  Raises:
    ValueError: for an unknown type (naming the nearest), or numbers out of range.

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
    checks.written(self, "eta", checks.in_range, 0, MOST_ETA)
    checks.written(self, "s_noise", checks.in_range, 0, MOST_S_NOISE)
    checks.lookup("solver type", self.solver_type, dict.fromkeys(("midpoint", "heun")))

  def init(self, x: Example) -> TwoStepState:
    """Start from ``x``, with no step behind."""
    return no_past(x)

  def step(self, denoise: Denoise, state: TwoStepState, sigma: Scalar, sigma_next: Scalar, key: Key) -> TwoStepState:
    """Take one step, with one evaluation."""
    x0 = denoise(state.x, sigma)
    past = past_of(state, x0, sigma, sigma_next)
    rate = 1 + jnp.asarray(self.eta, x0.dtype)
    zeroth, first, _, _ = moments(rate * past.h)
    bent = (past.h * zeroth / 2 if self.solver_type == "midpoint" else first / rate) * past.slope
    x = diffuse(state.x, x0, sigma, sigma_next, self.eta, self.s_noise, draw(key, state.x))
    return TwoStepState(x + bent, x0, sigma, state.x0, state.sigma)


@struct.dataclass
class DPMpp3MSDE:
  r"""SDE-DPM-Solver++(3M): `DPMpp3M` with noise, in k-diffusion's form with ``eta``.

  .. math::
    x' = \frac{\sigma'}{\sigma} e^{-\eta h} x
      + (1 + \eta) \int_\lambda^{\lambda'} e^{-(1 + \eta) (\lambda' - t)} P(t) dt + \sigma' \sqrt{1 - e^{-2 \eta h}}\, z

  The order is that of the variance of Gaussian data; with ``eta = 0`` it is 3. k-diffusion and diffusers give the
  curvature of ``P`` half its weight; here it has all.

  Args:
    eta: how much noise; 0 none, 1 as Lu et al. (2022, arXiv:2211.01095, eq. 18) have it. At least 0.
    s_noise: factor on the noise that is added, at least 0.

  >>> DPMpp3MSDE(s_noise=1.003).eta
  1.0
  """

  eta: Leaf = 1.0
  s_noise: Leaf = 1.0
  order: ClassVar[int] = 2
  evaluations: ClassVar[int] = 1
  stochastic: ClassVar[bool] = True

  def __post_init__(self):
    checks.written(self, "eta", checks.in_range, 0, MOST_ETA)
    checks.written(self, "s_noise", checks.in_range, 0, MOST_S_NOISE)

  def init(self, x: Example) -> TwoStepState:
    """Start from ``x``, with no step behind."""
    return no_past(x)

  def step(self, denoise: Denoise, state: TwoStepState, sigma: Scalar, sigma_next: Scalar, key: Key) -> TwoStepState:
    """Take one step, with one evaluation."""
    x0 = denoise(state.x, sigma)
    past = past_of(state, x0, sigma, sigma_next)
    rate = 1 + jnp.asarray(self.eta, x0.dtype)
    _, first, second, _ = moments(rate * past.h)
    bent = first / rate * past.slope + (second / rate**2 + past.h_last * first / rate) * past.curve
    x = diffuse(state.x, x0, sigma, sigma_next, self.eta, self.s_noise, draw(key, state.x))
    return TwoStepState(x + bent, x0, sigma, state.x0, state.sigma)


@struct.dataclass
class UniPC:
  r"""UniPC (Zhao et al. 2023, arXiv:2302.04867, Algorithms 5 to 8, data prediction, ``B_2(h) = e^h - 1``).

  A predictor that looks back as `DPMpp2M` and `DPMpp3M` do, and a corrector: the evaluation that the next step takes
  anyway becomes one more point of the polynomial, and the step behind is taken again with it.

  .. math::
    x' = \frac{\sigma'}{\sigma} x^c + \int_\lambda^{\lambda'} e^{-(\lambda' - t)} P(t) dt

  ``x^c`` is the corrected sample, and ``P`` the polynomial through the last ``predictor`` evaluations; the corrector's
  goes through the new one as well. The paper's halves stand where a straight line would be integrated. The
  first step predicts with order 1, the second at most 2; and so does the last, where ``h`` is infinite, with order 1.

  Args:
    predictor: order of the predictor, 1 to 3; 2 is the paper's advice for guided sampling.

  Raises:
    ValueError: for another predictor.

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
    """One more than the predictor's, by the corrector."""
    return self.predictor + 1

  def init(self, x: Example) -> UniPCState:
    """Start from ``x``, with no step behind."""
    return UniPCState(*no_past(x), x, x, jnp.zeros((), x.dtype))

  def step(self, denoise: Denoise, state: UniPCState, sigma: Scalar, sigma_next: Scalar, key: Key) -> UniPCState:
    """Take one step, with one evaluation."""
    del key
    x0 = denoise(state.x, sigma)
    corrected = state.base + state.weight * (x0 - state.expected)
    past = past_of(state, x0, sigma, sigma_next)
    h, nodes = past.h, (past.h_last, past.h_last + past.h_before)
    zeroth, first, second, third = moments(h)
    # By the order of the prediction: the sample that is given out, the one by the exact integral of P, the integral of
    # the polynomial that is 1 at the new point and 0 at the others, and P at the new point.
    straight = move(corrected, x0, sigma, sigma_next)
    line, beyond = straight + first * past.slope, x0 + h * past.slope
    parabola = line + (second + nodes[0] * first) * past.curve
    further = (third + (nodes[0] + nodes[1]) * second + nodes[0] * nodes[1] * first) / (h + nodes[1])
    by_order = (
      (straight, straight, zeroth / 2, x0),
      (straight + zeroth / 2 * h * past.slope, line, (second + nodes[0] * first) / (h * (h + nodes[0])), beyond),
      (parabola, parabola, further / (h * (h + nodes[0])), beyond + h * (h + nodes[0]) * past.curve),
    )
    order = jnp.minimum(past.known, self.predictor)
    is_order = [order == 1, order == 2]
    x, base, weight, expected = (jnp.select(is_order, parts[:2], parts[2]) for parts in zip(*by_order, strict=True))
    return UniPCState(x, x0, sigma, state.x0, state.sigma, base, expected, weight)
