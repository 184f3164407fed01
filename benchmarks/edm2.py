"""Forward pass and input gradient of EDM2-XS on latents of 64x64x4, against PyTorch.

The peer is the network of the paper (Karras et al. 2024, arXiv:2312.02696, appendix B) in plain PyTorch with the same
weights, eager and compiled. Its outputs are held against ours first. It normalises its kernels in each pass, as the
published network and ours do; in the last row it has normalised them once, before.
``python -m benchmarks edm2 [BATCH]``.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import networks, peers, timing
from benchmarks.unet import PASSES, our_passes, their_passes
from jaxguide.models.importers import edm2, layouts
from jaxguide.training import Model, ModelConfig
from jaxguide.training.edm_presets import NAMED

CONFIG: ModelConfig = NAMED["edm2-img512-xs"].model_config((64, 64, 4), 1000)


def torch_network(model: Model, once: bool = False) -> Any:
  """Make the network in plain PyTorch, with the weights of ours; None without PyTorch.

  Its kernels are normalised in each pass, or here if ``once``.
  """
  torch = peers.find("torch")
  if torch is None:
    return None
  from torch.nn import functional

  module: Any = model.config.module
  state = layouts.to_state_dict(model.params, edm2.layout(model.config), "the network")
  widths = [int(module.model_channels * factor) for factor in module.channel_mult]
  sides = [model.config.image_shape[0] >> level for level in range(len(widths))]

  def to_sum(a, b, t):
    return (a + t * (b - a)) / math.hypot(1 - t, t)

  def unit(x, axes):
    length = torch.linalg.vector_norm(x, dim=axes, keepdim=True)
    return x / (1e-4 + length * math.sqrt(length.numel() / x.numel()))

  def magnitude_preserving(weight):
    return unit(weight, tuple(range(1, weight.ndim))) / math.sqrt(math.prod(weight.shape[1:]))

  def silu(x):
    return functional.silu(x) / 0.596

  class Peer(torch.nn.Module):
    def __init__(self):
      super().__init__()
      for name, value in state.items():
        tensor = torch.from_numpy(np.array(value)).float()
        if once and name.endswith(".weight"):
          tensor = magnitude_preserving(tensor)
        self.register_buffer(name.replace(".", "_"), tensor)

    def conv(self, x, name):
      weight = getattr(self, f"{name}_weight")
      if not once:
        weight = magnitude_preserving(weight)
      if weight.ndim == 2:
        return x @ weight.T
      return functional.conv2d(x, weight, padding=weight.shape[-1] // 2)

    def waves(self, t, name):
      angles = torch.outer(t, getattr(self, f"{name}_freqs")) + getattr(self, f"{name}_phases")
      return math.sqrt(2) * torch.cos(angles)

    def block(self, x, vector, name, features, encoder, attends, resample=None):
      if resample == "down":
        x = functional.avg_pool2d(x, 2)
      elif resample == "up":
        x = functional.interpolate(x, scale_factor=2)
      if x.shape[1] != features and encoder:
        x = self.conv(x, f"{name}_conv_skip")
      if encoder:
        x = unit(x, 1)
      h = self.conv(silu(x), f"{name}_conv_res0")
      factor = self.conv(vector, f"{name}_emb_linear") * getattr(self, f"{name}_emb_gain") + 1
      h = self.conv(silu(h * factor[:, :, None, None]), f"{name}_conv_res1")
      if x.shape[1] != features:
        x = self.conv(x, f"{name}_conv_skip")
      x = to_sum(x, h, module.res_balance)
      if attends:
        n, c, height, width = x.shape
        qkv = self.conv(x, f"{name}_attn_qkv").reshape(n, c // module.channels_per_head, -1, 3, height * width)
        q, k, v = unit(qkv, 2).transpose(2, 4).unbind(3)
        out = functional.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(x.shape)
        x = to_sum(x, self.conv(out, f"{name}_attn_proj"), module.attn_balance)
      return x.clip(-module.clip_act, module.clip_act)

    def forward(self, x, t, y):
      vector = self.conv(self.waves(t, "unet_emb_fourier"), "unet_emb_noise")
      labels = functional.one_hot(y.long(), model.config.num_classes).float() * math.sqrt(model.config.num_classes)
      vector = silu(to_sum(vector, self.conv(labels, "unet_emb_label"), module.label_balance))
      h = self.conv(torch.cat([x, torch.ones_like(x[:, :1])], 1), f"unet_enc_{sides[0]}x{sides[0]}_conv")
      skips = [h]
      for level, features in enumerate(widths):
        name, attends = f"unet_enc_{sides[level]}x{sides[level]}", sides[level] in module.attn_resolutions
        if level:
          h = self.block(h, vector, f"{name}_down", h.shape[1], True, False, "down")
          skips.append(h)
        for i in range(module.num_blocks):
          h = self.block(h, vector, f"{name}_block{i}", features, True, attends)
          skips.append(h)
      for level in reversed(range(len(widths))):
        name, attends = f"unet_dec_{sides[level]}x{sides[level]}", sides[level] in module.attn_resolutions
        if level == len(widths) - 1:
          h = self.block(h, vector, f"{name}_in0", h.shape[1], False, True)
          h = self.block(h, vector, f"{name}_in1", h.shape[1], False, False)
        else:
          h = self.block(h, vector, f"{name}_up", h.shape[1], False, False, "up")
        for i in range(module.num_blocks + 1):
          other, t = skips.pop(), module.concat_balance
          total = math.sqrt((h.shape[1] + other.shape[1]) / ((1 - t) ** 2 + t**2))
          parts = (total / math.sqrt(h.shape[1]) * (1 - t) * h, total / math.sqrt(other.shape[1]) * t * other)
          h = self.block(torch.cat(parts, 1), vector, f"{name}_block{i}", widths[level], False, attends)
      return self.conv(h, "unet_out_conv") * self.unet_out_gain

  return Peer().to(peers.device())


def main(batch: str = "2" if networks.ON_CPU else "32") -> None:
  """Measure both passes."""
  torch, number, rounds = peers.find("torch"), int(batch), 5 if networks.ON_CPU else 15
  model = networks.random_model(CONFIG)
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal((number, *CONFIG.image_shape)), jnp.float32)
  t, y = jnp.linspace(-1.0, 0.5, number), jnp.arange(number) % 1000
  out = jax.jit(model.config.module.apply)(model.params, x, t, y)
  cotangent = jnp.asarray(rng.standard_normal(out.shape), jnp.float32)
  runs = {
    what: {"jaxguide": functools.partial(jax.jit(run), model.params, cotangent, x, t, y)}
    for what, run in our_passes(model).items()
  }
  facts = []
  if (network := torch_network(model)) is not None:
    args = peers.tensors((cotangent, x, t, y))
    with torch.no_grad():
      differs = np.abs(peers.array(network(*args[1:])) - np.asarray(out)).max()
    facts.append(f"The outputs differ by {differs / np.abs(out).max():.1e} of the largest.")
    candidates = {
      "PyTorch, eager": network,
      "PyTorch, compiled": torch.compile(network),
      "PyTorch, compiled, kernels normalised once": torch.compile(torch_network(model, once=True)),
    }
    for kind, each in candidates.items():
      for what, run in their_passes(each, *args).items():
        runs[what][kind] = run
  rows = []
  for what in PASSES:
    rows += [{"pass": what, **row} for row in timing.summary(timing.measure(runs[what], rounds), "jaxguide")]
  timing.report("edm2", {f"EDM2-XS, batch {number}": rows}, facts)
