"""The networks of EDM and EDM2 in NumPy, written anew from the papers, on weights under their published names.

Images are NCHW, as there. Everything is computed in the type of the weights, float64 in the tests.
"""

import math

import numpy as np


def silu(x):
  return x / (1 + np.exp(-x))


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def conv(x, weight, pad):
  """Correlate (n, c, h, w) with (d, c, k, k)."""
  k = weight.shape[-1]
  x = np.pad(x, [(0, 0), (0, 0), (pad, pad), (pad, pad)])
  windows = np.lib.stride_tricks.sliding_window_view(x, (k, k), (2, 3))
  return np.einsum("nchwij,dcij->ndhw", windows, weight)


def filtered(x, taps, resample, pad=None):
  """Halve or double the sides: each channel is correlated with the outer product of the taps."""
  taps = np.asarray(taps, np.float64)
  kernel = np.outer(taps, taps) / taps.sum() ** 2
  pad = (len(taps) - 1) // 2 if pad is None else pad
  n, c, h, w = x.shape
  if resample == "down":
    x = np.pad(x, [(0, 0), (0, 0), (pad, pad), (pad, pad)])
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape, (2, 3))[:, :, ::2, ::2]
    return np.einsum("nchwij,ij->nchw", windows, kernel)
  k = len(taps)
  out = np.zeros((n, c, 2 * h - 2 + k, 2 * w - 2 + k))
  for i in range(h):
    for j in range(w):
      out[:, :, 2 * i : 2 * i + k, 2 * j : 2 * j + k] += 4 * x[:, :, i, j, None, None] * kernel
  return out[:, :, pad : out.shape[2] - pad, pad : out.shape[3] - pad]


class EDM:
  """SongUNet and DhariwalUNet."""

  def __init__(self, weights, adm, **config):
    self.w = {name.removeprefix("model."): np.asarray(value, np.float64) for name, value in weights.items()}
    self.adm, self.taps = adm, config.pop("resample_filter", [1, 1])
    self.config = config

  def linear(self, x, name):
    return x @ self.w[f"{name}.weight"].T + self.w.get(f"{name}.bias", 0)

  def conv(self, x, name):
    weight = self.w[f"{name}.weight"]
    return conv(x, weight, weight.shape[-1] // 2) + self.w[f"{name}.bias"][None, :, None, None]

  def norm(self, x, name):
    groups = min(32, x.shape[1] // 4)
    parts = x.reshape(len(x), groups, -1)
    eps = 1e-5 if self.adm else 1e-6
    parts = (parts - parts.mean(2, keepdims=True)) / np.sqrt(parts.var(2, keepdims=True) + eps)
    scale, bias = (self.w[f"{name}.{kind}"][None, :, None, None] for kind in ("weight", "bias"))
    return parts.reshape(x.shape) * scale + bias

  def block(self, x, emb, name, resample=None):
    resized = (lambda x: filtered(x, self.taps, resample)) if resample else lambda x: x
    scale = 1 if self.adm else math.sqrt(0.5)
    h = self.conv(resized(silu(self.norm(x, f"{name}.norm0"))), f"{name}.conv0")
    params = self.linear(emb, f"{name}.affine")[:, :, None, None]
    if self.adm:
      factor, shift = np.split(params, 2, axis=1)
      h = silu(self.norm(h, f"{name}.norm1") * (factor + 1) + shift)
    else:
      h = silu(self.norm(h + params, f"{name}.norm1"))
    h = self.conv(h, f"{name}.conv1")
    x = resized(x)
    if f"{name}.skip.weight" in self.w:
      x = self.conv(x, f"{name}.skip")
    x = (x + h) * scale
    if f"{name}.qkv.weight" not in self.w:
      return x
    n, c = x.shape[:2]
    heads = c // 64 if self.adm else 1
    qkv = self.conv(self.norm(x, f"{name}.norm2"), f"{name}.qkv")
    q, k, v = np.moveaxis(qkv.reshape(n, heads, c // heads, 3, -1), 3, 0)
    weights = softmax(np.einsum("nhcq,nhck->nhqk", q, k) / math.sqrt(c // heads))
    out = np.einsum("nhqk,nhck->nhcq", weights, v).reshape(x.shape)
    return (x + self.conv(out, f"{name}.proj")) * scale

  def embed(self, c_noise, labels):
    if "map_noise.freqs" in self.w:
      angles = np.outer(c_noise, 2 * np.pi * self.w["map_noise.freqs"])
    else:
      half = self.w["map_layer0.weight"].shape[1] // 2
      angles = np.outer(c_noise, 1e-4 ** (np.arange(half) / (half - (not self.adm))))
    parts = (np.cos(angles), np.sin(angles)) if self.adm else (np.sin(angles), np.cos(angles))
    emb = np.concatenate(parts, 1)
    if self.adm:
      emb = self.linear(silu(self.linear(emb, "map_layer0")), "map_layer1")
      return silu(emb + (self.linear(labels, "map_label") if labels is not None else 0))
    if labels is not None:
      emb = emb + self.linear(labels * math.sqrt(labels.shape[1]), "map_label")
    return silu(self.linear(silu(self.linear(emb, "map_layer0")), "map_layer1"))

  def __call__(self, x, c_noise, labels):
    emb, aux, levels, count = (
      self.embed(c_noise, labels),
      x,
      len(self.config["channel_mult"]),
      self.config["num_blocks"],
    )
    sides = [x.shape[2] >> level for level in range(levels)]
    skips = [self.conv(x, f"enc.{sides[0]}x{sides[0]}_conv")]
    for level, side in enumerate(sides):
      name = f"enc.{side}x{side}"
      if level:
        h = self.block(skips[-1], emb, f"{name}_down", "down")
        kind = self.config.get("encoder_type")
        if kind == "skip":
          aux = filtered(aux, self.taps, "down")
          h = h + self.conv(aux, f"{name}_aux_skip")
        if kind == "residual":
          pad = (len(self.taps) - 1) // 2
          aux = filtered(conv(aux, self.w[f"{name}_aux_residual.weight"], 1 + pad), self.taps, "down", pad=0)
          h = aux = (h + aux + self.w[f"{name}_aux_residual.bias"][None, :, None, None]) / math.sqrt(2)
        skips.append(h)
      for i in range(count):
        skips.append(self.block(skips[-1], emb, f"{name}_block{i}"))
    h, out = skips[-1], None
    for level, side in reversed(list(enumerate(sides))):
      name = f"dec.{side}x{side}"
      if level == levels - 1:
        h = self.block(self.block(h, emb, f"{name}_in0"), emb, f"{name}_in1")
      else:
        h = self.block(h, emb, f"{name}_up", "up")
      for i in range(count + 1):
        h = self.block(np.concatenate([h, skips.pop()], 1), emb, f"{name}_block{i}")
      if f"{name}_aux_conv.weight" in self.w:
        more = self.conv(silu(self.norm(h, f"{name}_aux_norm")), f"{name}_aux_conv")
        out = more if out is None else more + filtered(out, self.taps, "up")
    return self.conv(silu(self.norm(h, "out_norm")), "out_conv") if self.adm else out


class EDM2:
  """EDM2's network, with the published arguments of its class."""

  def __init__(self, weights, *, channel_mult, num_blocks, channels_per_head, resample_filter=(1, 1), **balances):
    self.w = {name.removeprefix("unet."): np.asarray(value, np.float64) for name, value in weights.items()}
    self.channel_mult, self.num_blocks, self.per_head = channel_mult, num_blocks, channels_per_head
    self.taps = resample_filter
    defaults = {"label_balance": 0.5, "concat_balance": 0.5, "res_balance": 0.3, "attn_balance": 0.3, "clip_act": 256}
    self.b = {**defaults, **balances}

  @staticmethod
  def unit(x, axes):
    norm = np.sqrt((x**2).sum(axes, keepdims=True))
    return x / (1e-4 + norm * math.sqrt(norm.size / x.size))

  def product(self, x, name, gain=1.0):
    w = self.w[f"{name}.weight"]
    w = self.unit(w, tuple(range(1, w.ndim))) * gain / math.sqrt(w[0].size)
    return x @ w.T if w.ndim == 2 else conv(x, w, w.shape[-1] // 2)

  @staticmethod
  def sum(a, b, t):
    return ((1 - t) * a + t * b) / math.sqrt((1 - t) ** 2 + t**2)

  @staticmethod
  def cat(a, b, t):
    na, nb = a.shape[1], b.shape[1]
    c = math.sqrt((na + nb) / ((1 - t) ** 2 + t**2))
    return np.concatenate([c / math.sqrt(na) * (1 - t) * a, c / math.sqrt(nb) * t * b], 1)

  def block(self, x, emb, name, resample=None):
    x = filtered(x, self.taps, resample) if resample else x
    encoder = name.startswith("enc")
    if encoder:
      x = self.product(x, f"{name}.conv_skip") if f"{name}.conv_skip.weight" in self.w else x
      x = self.unit(x, 1)
    y = self.product(silu(x) / 0.596, f"{name}.conv_res0")
    c = self.product(emb, f"{name}.emb_linear", self.w[f"{name}.emb_gain"]) + 1
    y = self.product(silu(y * c[:, :, None, None]) / 0.596, f"{name}.conv_res1")
    if not encoder and f"{name}.conv_skip.weight" in self.w:
      x = self.product(x, f"{name}.conv_skip")
    x = self.sum(x, y, self.b["res_balance"])
    if f"{name}.attn_qkv.weight" in self.w:
      n, channels, height, width = x.shape
      heads = channels // self.per_head
      qkv = self.product(x, f"{name}.attn_qkv").reshape(n, heads, -1, 3, height * width)
      q, k, v = np.moveaxis(self.unit(qkv, 2), 3, 0)
      weights = softmax(np.einsum("nhcq,nhck->nhqk", q, k) / math.sqrt(channels // heads))
      y = np.einsum("nhqk,nhck->nhcq", weights, v).reshape(x.shape)
      x = self.sum(x, self.product(y, f"{name}.attn_proj"), self.b["attn_balance"])
    clip = self.b["clip_act"]
    return x if clip is None else np.clip(x, -clip, clip)

  def fourier(self, c_noise, name):
    return math.sqrt(2) * np.cos(np.outer(c_noise, self.w[f"{name}.freqs"]) + self.w[f"{name}.phases"])

  def logvar(self, c_noise):
    return self.product(self.fourier(c_noise, "logvar_fourier"), "logvar_linear")[:, 0]

  def __call__(self, x, c_noise, labels):
    emb = self.product(self.fourier(c_noise, "emb_fourier"), "emb_noise")
    if labels is not None:
      scaled = labels * math.sqrt(labels.shape[1])
      emb = self.sum(emb, self.product(scaled, "emb_label"), self.b["label_balance"])
    emb = silu(emb) / 0.596
    sides = [x.shape[2] >> level for level in range(len(self.channel_mult))]
    x = np.concatenate([x, np.ones_like(x[:, :1])], 1)
    skips = [self.product(x, f"enc.{sides[0]}x{sides[0]}_conv")]
    for level, side in enumerate(sides):
      if level:
        skips.append(self.block(skips[-1], emb, f"enc.{side}x{side}_down", "down"))
      for i in range(self.num_blocks):
        skips.append(self.block(skips[-1], emb, f"enc.{side}x{side}_block{i}"))
    h = skips[-1]
    for side in reversed(sides):
      name = f"dec.{side}x{side}"
      if side == sides[-1]:
        h = self.block(self.block(h, emb, f"{name}_in0"), emb, f"{name}_in1")
      else:
        h = self.block(h, emb, f"{name}_up", "up")
      for i in range(self.num_blocks + 1):
        h = self.block(self.cat(h, skips.pop(), self.b["concat_balance"]), emb, f"{name}_block{i}")
    return self.product(h, "out_conv", self.w["out_gain"])
