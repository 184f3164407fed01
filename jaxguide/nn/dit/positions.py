"""Where a token is in its image: tables that are added to tokens, and tables that queries and keys are turned by."""

import functools

import jax.numpy as jnp
import numpy as np

from jaxguide._core.typing import Array, Float


def sincos(height: int, width: int, features: int) -> np.ndarray:
  """Return the sine and cosine table of DiT (Peebles & Xie 2023, arXiv:2212.09748), which ViT-MAE has too.

  The first half of the features is of the column and the second half of the row, as in the published code. Each half is
  the sines and then the cosines of the position times ``1e4**(-k / K)``, for ``k`` from 0 to ``K - 1``, with ``K`` a
  quarter of the features.

  Args:
    height: rows of tokens.
    width: columns of tokens.
    features: numbers of one token, a multiple of 4.

  Returns:
    (height * width, features) float32.

  Raises:
    ValueError: if ``features`` is no multiple of 4.

  >>> sincos(1, 2, 4).round(2).tolist()
  [[0.0, 1.0, 0.0, 1.0], [0.8399999737739563, 0.5400000214576721, 0.0, 1.0]]
  """
  if features % 4:
    raise ValueError(f"a table of positions needs a hidden_size that is a multiple of 4, got {features}")
  frequencies = 1e4 ** -(np.arange(features // 4) / (features // 4))
  rows, columns = np.divmod(np.arange(height * width), width)
  angles = [position[:, None] * frequencies for position in (columns, rows)]
  return np.concatenate([wave(each) for each in angles for wave in (np.sin, np.cos)], 1).astype(np.float32)


@functools.lru_cache(maxsize=16)
def rotary_angles(height: int, width: int, head_channels: int) -> np.ndarray:
  """Return the angles of LightningDiT's rotary positions (arXiv:2501.01423; RoPE, arXiv:2104.09864).

  The first half of a head's channels turns by the row, the second half by the column. Channels ``2k`` and ``2k + 1`` of
  a half turn together, by the position times ``1e4**(-2k / d)`` with ``d`` the half's channels.

  Args:
    height: rows of tokens.
    width: columns of tokens.
    head_channels: channels of one head, a multiple of 4.

  Returns:
    (height * width, head_channels) float64, in radians.

  Raises:
    ValueError: if ``head_channels`` is no multiple of 4.

  >>> rotary_angles(1, 2, 4).tolist()
  [[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]
  """
  if head_channels % 4:
    raise ValueError(f"rotary positions need heads whose channels are a multiple of 4, got {head_channels}")
  half = head_channels // 2
  frequencies = np.repeat(1e4 ** -(np.arange(0, half, 2) / half), 2)
  rows, columns = np.divmod(np.arange(height * width), width)
  return np.concatenate([rows[:, None] * frequencies, columns[:, None] * frequencies], 1)


def rotate(x: Float[Array, "n t heads c"], cosines: Float[Array, "t c"], sines: Float[Array, "t c"]):
  """Turn each pair of channels, ``2k`` and ``2k + 1``, by its angle.

  >>> rotate(jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2), jnp.zeros((1, 2)), jnp.ones((1, 2))).ravel().tolist()
  [0.0, 1.0]
  """
  pairs = x.reshape(*x.shape[:-1], -1, 2)
  turned = jnp.stack([-pairs[..., 1], pairs[..., 0]], -1).reshape(x.shape)
  return (x * cosines[None, :, None] + turned * sines[None, :, None]).astype(x.dtype)
