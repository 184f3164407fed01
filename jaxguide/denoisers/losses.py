r"""Losses of the denoiser, with random dropping of the condition, and of the classifier of noisy examples.

The losses take a batch of clean examples and draw a noise level for each. They call the network on the whole batch,
without ``vmap``. The noise levels are stratified over the batch: the distribution is divided into ``n`` parts of equal
probability, and each of the ``n`` examples has a level from another part. This reduces the variance of the loss and
does not change its expectation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxguide._core import checks
from jaxguide._core.promotion import same_type, shard_like
from jaxguide._core.typing import Array, ArrayLike, Float, Int, Key, PyTree
from jaxguide.denoisers.scaling import Scaling, coefficients
from jaxguide.schedules import NoiseLevels


def stratified_uniform(key: Key, num: int) -> Float[Array, " num"]:
  """Draw ``num`` uniform numbers in (0, 1), one from each of ``num`` equal parts of the interval, in random order.

  >>> u = stratified_uniform(jax.random.key(0), 4)
  >>> sorted((u * 4).astype(int).tolist())
  [0, 1, 2, 3]
  """
  order, within = jax.random.split(key)
  within = jax.random.uniform(within, (num,))
  u = (jax.random.permutation(order, num).astype(within.dtype) + within) / num
  # Rounding can give 0 or 1, where a quantile can be infinite.
  tiny = jnp.finfo(u.dtype).eps
  return jnp.clip(u, tiny, 1 - tiny)


def clean(x0: ArrayLike) -> Float[Array, " n *shape"]:
  """Return a batch of clean examples as an array, after a check of its type and shape.

  Raises:
    TypeError: if the examples are not floats, for example the pixels of uint8 images.
    ValueError: if there is no batch axis or no example.

  >>> clean(np.zeros((2, 8, 8, 1), np.uint8))
  Traceback (most recent call last):
  ...
  TypeError: x0 must be floats, as images in [-1, 1] are, got uint8: give jaxguide.data.from_uint8(images)
  """
  x0 = jnp.asarray(x0)
  if not jnp.issubdtype(x0.dtype, jnp.floating):
    remedy = ": give jaxguide.data.from_uint8(images)" if x0.dtype == np.uint8 else ""
    raise TypeError(f"x0 must be floats, as images in [-1, 1] are, got {x0.dtype}{remedy}")
  if not x0.ndim or not x0.shape[0]:
    raise ValueError(f"x0 must be a batch of at least one example, (n, *shape), got shape {x0.shape}")
  return x0


def add_noise(
  key: Key, x0: Float[Array, " n *shape"], noise_levels: NoiseLevels
) -> tuple[Float[Array, " n *shape"], Float[Array, " n"]]:
  """Draw a noise level for each example and add noise of this level: ``x = x0 + sigma eps``.

  Args:
    key: a random key.
    x0: (n, *shape) clean examples.
    noise_levels: the distribution of the levels, such as a schedule (uniform in time, or in log-SNR) or
      `jaxguide.schedules.LogNormal`.

  Returns:
    ``x`` (n, *shape) and ``sigma`` (n,).

  Raises:
    TypeError: if ``x0`` is not floats, or if ``noise_levels`` is not a distribution of levels.
  """
  x0 = clean(x0)
  checks.schedule(noise_levels, "quantile")
  level_key, noise_key = jax.random.split(key)
  sigma = noise_levels.quantile(stratified_uniform(level_key, x0.shape[0])).astype(x0.dtype)
  return x0 + wide(sigma, x0) * jax.random.normal(noise_key, x0.shape, x0.dtype), sigma


def drop_cond(key: Key, cond: PyTree, null_cond: PyTree, p_uncond: ArrayLike) -> PyTree:
  """Replace each row of ``cond`` by ``null_cond`` with probability ``p_uncond``.

  Args:
    key: a random key.
    cond: a pytree whose leaves have shape (n, ...).
    null_cond: one condition, with the same structure.
    p_uncond: in [0, 1]; the paper finds 0.1 and 0.2 best.

  Raises:
    ValueError: if ``p_uncond`` is outside [0, 1], if it is above 0 and ``cond`` or ``null_cond`` is None, or if no type
      can hold both a label and the null label.

  >>> drop_cond(jax.random.key(0), jnp.array([3, 1, 4]), 10, 1.0).tolist()
  [10, 10, 10]
  """
  p_uncond = checks.in_range("p_uncond", p_uncond, 0, 1)
  if checks.is_concrete(p_uncond) and p_uncond == 0:
    return cond
  if cond is None or null_cond is None:
    raise ValueError("p_uncond above 0 needs cond and null_cond, the condition that replaces it: give both")
  cond = jax.tree.map(jnp.asarray, cond)
  leaves = jax.tree.leaves(cond)
  if len({jnp.shape(leaf)[:1] for leaf in leaves}) != 1 or not leaves[0].ndim:
    raise ValueError(
      "each leaf of cond must be an array with one row for each example, got shapes "
      f"{[jnp.shape(leaf) for leaf in leaves[:8]]}: convert a list of labels to one array, np.array(labels)"
    )
  drop = jax.random.bernoulli(key, p_uncond, (leaves[0].shape[0],))

  def replace(y, null):
    null, y = same_type(null, y)
    return jnp.where(shard_like(wide(drop, y), y), null, y)

  return jax.tree.map(replace, cond, null_cond)


class Noisy(NamedTuple):
  """A batch of noisy examples, on which the losses evaluate a network. Every leaf has one row for each example."""

  x0: Float[Array, " n *shape"]
  """Clean examples."""

  x: Float[Array, " n *shape"]
  """``x0 + sigma eps``."""

  sigma: Float[Array, " n"]
  """Noise levels."""

  cond: PyTree
  """Conditions, some of them replaced by the null condition; None if there are none."""


def noisy(
  key: Key,
  x0: Float[Array, " n *shape"],
  cond: PyTree = None,
  *,
  noise_levels: NoiseLevels,
  null_cond: PyTree = None,
  p_uncond: ArrayLike = 0.0,
) -> Noisy:
  """Draw everything random of `denoising_loss`: the dropped conditions, the noise levels and the noise.

  The result can be divided into parts, whose gradients are then accumulated: the mean of `denoising_errors` over all
  parts equals the loss of the whole batch.

  Args:
    key: a random key.
    x0: (n, *shape) clean examples.
    cond: a pytree whose leaves have shape (n, ...), or None.
    noise_levels: the distribution of the noise levels.
    null_cond: the condition that replaces a dropped one; needed if ``p_uncond`` is above 0.
    p_uncond: probability of dropping the condition, in [0, 1].

  Raises:
    TypeError: if ``x0`` is not floats, or if ``noise_levels`` is not a distribution of levels.
    ValueError: if ``p_uncond`` is outside [0, 1], or if it is above 0 and ``cond`` or ``null_cond`` is None.
  """
  x0 = clean(x0)
  drop_key, noise_key = jax.random.split(key)
  cond = drop_cond(drop_key, cond, null_cond, p_uncond)
  return Noisy(x0, *add_noise(noise_key, x0, noise_levels), cond)


def denoising_errors(
  params: PyTree,
  apply: Callable[..., Any],
  batch: Noisy,
  *,
  scaling: Scaling,
  weight: Callable[[Array], Any] | None = None,
) -> Float[Array, " n"]:
  """The error of each example of a noisy batch; `denoising_loss` is their mean.

  Args:
    params: the network's parameters.
    apply: ``apply(params, x, c_noise, cond) -> F``, on a batch.
    batch: noisy examples, from `noisy`.
    scaling: the network's parameterization, from `jaxguide.scaling`.
    weight: ``sigma -> w``, the weight of ``|x0 - D|²``; see `denoising_loss`.

  Returns:
    (n,): for each example the mean over its elements.

  Raises:
    ValueError: if the output's shape is not that of ``x0``.
  """
  x0, x, sigma, cond = batch
  c_skip, c_out, c_in, c_noise = coefficients(scaling, sigma)
  output = apply(params, wide(c_in, x) * x, c_noise, cond)
  if output.shape != x0.shape:
    raise ValueError(
      f"the network gave shape {output.shape} for examples of shape {x0.shape}; for a network with a learned variance, "
      "use jaxguide.variational.variational_loss"
    )
  error = jnp.square(output.astype(x.dtype) - (x0 - wide(c_skip, x) * x) / wide(c_out, x))
  if weight is not None:
    error *= wide(weight(sigma) * c_out**2, x)
  return per_example(error)


def per_example(error: Float[Array, " n *shape"]) -> Float[Array, " n"]:
  """Return the mean of each example over its elements."""
  return error.mean(axis=tuple(range(1, error.ndim)))


def denoising_loss(
  params: PyTree,
  apply: Callable[..., Any],
  key: Key,
  x0: Float[Array, " n *shape"],
  cond: PyTree = None,
  *,
  scaling: Scaling,
  noise_levels: NoiseLevels,
  null_cond: PyTree = None,
  p_uncond: ArrayLike = 0.0,
  weight: Callable[[Array], Any] | None = None,
) -> Float[Array, ""]:
  r"""The loss that trains a conditional and an unconditional denoiser in one network.

  Ho & Salimans (2021, arXiv:2207.12598), Algorithm 1: drop the condition with probability ``p_uncond``, draw a
  log-SNR, add noise to the example, regress. With ``scaling.eps`` and ``schedules.LogSNRCosine`` it is exactly the
  paper's loss.

  .. math:: E\,\| F_\theta(c_{in} x, c_{noise}, y) - (x_0 - c_{skip} x) / c_{out} \|^2

  Args:
    params: the network's parameters; the loss is differentiable in them.
    apply: ``apply(params, x, c_noise, cond) -> F``, on a batch. If the network has dropout, let ``apply`` close over
      its key.
    key: a random key for the dropped conditions, the noise levels and the noise.
    x0: (n, *shape) clean examples.
    cond: a pytree whose leaves have shape (n, ...), or None.
    scaling: the network's parameterization, from `jaxguide.scaling`.
    noise_levels: the distribution of the noise levels.
    null_cond: the condition that replaces a dropped one; needed if ``p_uncond`` is above 0.
    p_uncond: probability of dropping the condition, in [0, 1].
    weight: ``sigma -> w``, the weight of ``|x0 - D|²``, from `jaxguide.scaling`. The default is ``1 / c_out²``, which
      gives the unweighted squared error of the network's output.

  Returns:
    A scalar: the mean over the examples and their elements.

  Raises:
    TypeError: if ``x0`` is not floats, or if ``scaling`` or ``noise_levels`` is of a wrong kind.
    ValueError: if ``p_uncond`` is outside [0, 1], if it is above 0 and ``cond`` or ``null_cond`` is None, or if the
      output's shape is not that of ``x0``.

  >>> from jaxguide import scaling, schedules
  >>> apply = lambda params, x, c_noise, cond: params * x
  >>> loss = denoising_loss(
  ...   jnp.asarray(0.0), apply, jax.random.key(0), jnp.zeros((64, 8, 8, 1)),
  ...   scaling=scaling.eps(schedules.Cosine()), noise_levels=schedules.LogSNRCosine(),
  ... )
  >>> bool(abs(loss - 1) < 0.1)  # the network predicts 0, so the loss is the variance of the noise
  True
  """
  batch = noisy(key, x0, cond, noise_levels=noise_levels, null_cond=null_cond, p_uncond=p_uncond)
  return denoising_errors(params, apply, batch, scaling=scaling, weight=weight).mean()


def classifier_loss(
  params: PyTree,
  apply: Callable[..., Any],
  key: Key,
  x0: Float[Array, " n *shape"],
  labels: Int[Array, " n"],
  *,
  scaling: Scaling,
  noise_levels: NoiseLevels,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """The loss of a classifier of noisy examples (Dhariwal & Nichol 2021, arXiv:2105.05233, section 4.3).

  Args:
    params: the classifier's parameters; the loss is differentiable in them.
    apply: ``apply(params, x, c_noise) -> logits (n, classes)``, on a batch.
    key: a random key.
    x0: (n, *shape) clean examples.
    labels: (n,) whole numbers.
    scaling: gives the classifier's inputs ``c_in x`` and ``c_noise``; usually that of the denoiser.
    noise_levels: the distribution of the noise levels; usually that of the denoiser.

  Returns:
    The mean cross-entropy in nats, and the accuracy in [0, 1] over the drawn levels.

  Raises:
    TypeError: if ``x0`` is not floats, or if ``scaling`` or ``noise_levels`` is of a wrong kind.
    ValueError: if ``labels`` is not one whole number for each example.
  """
  x0 = clean(x0)
  batch = Noisy(x0, *add_noise(key, x0, noise_levels), jnp.asarray(labels))
  errors, correct = classifier_errors(params, apply, batch, scaling=scaling)
  return errors.mean(), correct.mean()


def classifier_errors(
  params: PyTree, apply: Callable[..., Any], batch: Noisy, *, scaling: Scaling, label_smoothing: float = 0.0
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
  """The cross-entropy of each example of a noisy batch, and whether its class was predicted.

  Args:
    params: the classifier's parameters.
    apply: ``apply(params, x, c_noise) -> logits (n, classes)``, on a batch.
    batch: noisy examples, whose conditions are the labels.
    scaling: gives the classifier's inputs ``c_in x`` and ``c_noise``.
    label_smoothing: the share of the target that is spread evenly over all classes (Szegedy et al. 2016,
      arXiv:1512.00567, section 7), in [0, 1).

  Returns:
    (n,) cross-entropies in nats, and (n,) 1.0 where the class is right and 0.0 elsewhere.

  Raises:
    ValueError: if the labels are not one whole number for each example.
  """
  _, x, sigma, labels = batch
  if labels.shape != sigma.shape or not jnp.issubdtype(labels.dtype, jnp.integer):
    raise ValueError(
      f"labels must be whole numbers, one for each of the {len(sigma)} examples, got {labels.dtype} of shape "
      f"{labels.shape}"
    )
  _, _, c_in, c_noise = coefficients(scaling, sigma)
  logits = apply(params, wide(c_in, x) * x, c_noise)
  log_probs = jax.nn.log_softmax(logits)
  errors = -jnp.take_along_axis(log_probs, labels[:, None], axis=1)[:, 0]
  if label_smoothing:
    errors = (1 - label_smoothing) * errors - label_smoothing * log_probs.mean(1)
  return errors, (logits.argmax(1) == labels).astype(errors.dtype)


def wide(per_example: Array, like: Array) -> Array:
  """Append axes of length 1 to ``per_example`` (n,), so that it broadcasts against ``like`` (n, ...)."""
  return per_example.reshape(-1, *[1] * (like.ndim - 1))


def uncertainty_loss(
  params: PyTree,
  apply: Callable[..., Any],
  key: Key,
  x0: Float[Array, " n *shape"],
  cond: PyTree = None,
  *,
  scaling: Scaling,
  noise_levels: NoiseLevels,
  weight: Callable[[Array], Any],
) -> Float[Array, ""]:
  r"""The loss of a denoiser with a learned uncertainty at each noise level (Karras et al. 2024, arXiv:2312.02696).

  .. math:: E\Big[ \frac{\lambda(\sigma)}{e^{u(\sigma)}} \| D - x_0 \|^2 + u(\sigma) \Big]
    \qquad \text{(eq. 14, per element)}

  For the optimal ``u``, ``e^u`` is the mean of ``λ |D - x0|²`` at its noise level, so all levels have the same weight
  in the loss.

  Args:
    params: the network's parameters; the loss is differentiable in them.
    apply: ``apply(params, x, c_noise, cond) -> (F, u)``, on a batch. ``F`` is as in `denoising_loss`; ``u`` (n,)
      depends on ``c_noise`` only.
    key: a random key for the noise levels and the noise.
    x0: (n, *shape) clean examples.
    cond: a pytree whose leaves have shape (n, ...), or None; `drop_cond` drops conditions at random.
    scaling: the network's parameterization, from `jaxguide.scaling`.
    noise_levels: the distribution of the noise levels. EDM2 uses ``LogNormal(-0.4, 1.0)``.
    weight: ``sigma -> λ``. EDM2 uses `jaxguide.scaling.edm_weight`.

  Returns:
    A scalar: the mean over the examples and their elements.

  Raises:
    TypeError: if ``x0`` is not floats, or if ``scaling`` or ``noise_levels`` is of a wrong kind.
    ValueError: if the shape of ``F`` is not that of ``x0``, or if the shape of ``u`` is not (n,).
  """
  x0 = clean(x0)
  batch = Noisy(x0, *add_noise(key, x0, noise_levels), cond)
  return uncertainty_errors(params, apply, batch, scaling=scaling, weight=weight).mean()


def uncertainty_errors(
  params: PyTree, apply: Callable[..., Any], batch: Noisy, *, scaling: Scaling, weight: Callable[[Array], Any]
) -> Float[Array, " n"]:
  """The error of each example of a noisy batch with a learned uncertainty; `uncertainty_loss` is their mean.

  Args:
    params: the network's parameters.
    apply: ``apply(params, x, c_noise, cond) -> (F, u)``, as in `uncertainty_loss`.
    batch: noisy examples, from `noisy`.
    scaling: the network's parameterization, from `jaxguide.scaling`.
    weight: ``sigma -> λ``.

  Returns:
    (n,): for each example the mean over its elements, plus ``u``.

  Raises:
    ValueError: if the shape of ``F`` is not that of ``x0``, or if the shape of ``u`` is not (n,).
  """
  x0, x, sigma, cond = batch
  c_skip, c_out, c_in, c_noise = coefficients(scaling, sigma)
  output, u = apply(params, wide(c_in, x) * x, c_noise, cond)
  if output.shape != x0.shape or u.shape != sigma.shape:
    raise ValueError(
      f"the network gave shapes {output.shape} and {u.shape} for examples of shape {x0.shape}; "
      f"expected {x0.shape} and {sigma.shape}"
    )
  error = jnp.square(wide(c_skip, x) * x + wide(c_out, x) * output.astype(x.dtype) - x0)
  return per_example(wide(weight(sigma) * jnp.exp(-u), x) * error) + u


def alignment(
  projected: Sequence[Float[Array, "n t _"]], features: Sequence[Float[ArrayLike, "n t _"]]
) -> Float[Array, " n"]:
  r"""REPA's loss: projected tokens shall point where an image encoder's features do (arXiv:2410.06940, eq. 8).

  .. math:: -\frac{1}{T} \sum_t \frac{\langle z_t, y_t\rangle}{\|z_t\| \|y_t\|}

  It is added to the loss of the velocity with a factor of 0.5 in the paper. The features are of the clean image.

  Args:
    projected: for each image encoder, the (n, tokens, z_dim) projected tokens, as
      ``jaxguide.RepaSiT(...).apply(params, x, t, y, features=True)[1]`` gives them.
    features: for each image encoder, its (n, tokens, z_dim) features.

  Returns:
    (n,) the mean over tokens and image encoders, from -1 to 1.

  Raises:
    ValueError: unless there are features of the same shape for each of ``projected``, at least one.

  >>> z = jnp.array([[[1.0, 0.0], [0.0, 2.0]]])
  >>> alignment([z], [3 * z]).tolist()
  [-1.0]
  """
  if not projected or [jnp.shape(z) for z in projected] != [jnp.shape(y) for y in features]:
    raise ValueError(
      "projected and features need an array for each image encoder, of the same shape; got "
      f"{[jnp.shape(z) for z in projected]} and {[jnp.shape(y) for y in features]}"
    )

  def cosine(z: Array, y: ArrayLike) -> Array:
    z, y = z.astype(jnp.float32), jnp.asarray(y, jnp.float32)
    lengths = jnp.linalg.norm(z, axis=-1) * jnp.linalg.norm(y, axis=-1)
    return (jnp.sum(z * y, -1) / jnp.maximum(lengths, 1e-12)).mean(1)

  return -sum(map(cosine, projected, features), jnp.zeros(())) / len(projected)
