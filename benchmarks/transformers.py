"""Forward pass and input gradient of DiT-S/2, SiT-S/2 and LightningDiT-S/1, against PyTorch and diffusers.

The peers are the published networks written as plain PyTorch, with the same weights, eager and compiled, whose outputs
are held against ours first; and for DiT also diffusers' DiTTransformer2DModel. All take turns.
``python -m benchmarks transformers [NAME ...]`` measures all, or those that are named.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import networks, peers, timing
from benchmarks.unet import PASSES, our_passes, their_passes
from jaxguide import checks
from jaxguide.models.importers import dit, layouts
from jaxguide.training import Model, ModelConfig
from jaxguide.training.transformer_presets import NAMED, SIZES

_LIGHTNING = {
  **NAMED["LightningDiT-XL/1"].model,
  "fields": {**NAMED["LightningDiT-XL/1"].model["fields"], **SIZES["S"]},
}

CASES = {
  "DiT-S/2": NAMED["DiT-S/2"].model_config((32, 32, 4), 1000),
  "SiT-S/2": NAMED["SiT-S/2"].model_config((32, 32, 4), 1000),
  "LightningDiT-S/1": ModelConfig(image_shape=(16, 16, 32), num_classes=1000, **_LIGHTNING),
}


def torch_network(model: Model) -> Any:
  """Make the published network in plain PyTorch, with the weights of ours; None without PyTorch."""
  torch = peers.find("torch")
  if torch is None:
    return None
  from torch.nn import functional

  module: Any = model.config.module
  state = layouts.to_state_dict(model.params, dit.layout(model.config), "the network")
  rms, heads, patch = getattr(module, "use_rmsnorm", False), module.num_heads, module.patch_size

  class Peer(torch.nn.Module):
    def __init__(self):
      super().__init__()
      for name, value in state.items():
        self.register_buffer(name.replace(".", "_"), torch.from_numpy(np.array(value)))

    def linear(self, x, name):
      return functional.linear(x, getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias"))

    def norm(self, x, name):
      if rms:
        return functional.rms_norm(x, x.shape[-1:], getattr(self, f"{name}_weight"), 1e-6)
      return functional.layer_norm(x, x.shape[-1:], eps=1e-6)

    def turn(self, x):
      turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
      return x * self.feat_rope_freqs_cos + turned * self.feat_rope_freqs_sin

    def forward(self, x, t, y):
      h = functional.conv2d(x, self.x_embedder_proj_weight, self.x_embedder_proj_bias, stride=patch)
      n, c, rows, columns = h.shape
      h = h.flatten(2).transpose(1, 2) + self.pos_embed
      frequencies = torch.exp(-math.log(1e4) / 128 * torch.arange(128, device=x.device))
      angles = t[:, None] * frequencies
      waves = torch.cat([torch.cos(angles), torch.sin(angles)], 1).to(x.dtype)
      vector = self.linear(functional.silu(self.linear(waves, "t_embedder_mlp_0")), "t_embedder_mlp_2")
      vector = functional.silu(vector + self.y_embedder_embedding_table_weight[y])
      for i in range(module.depth):
        b = f"blocks_{i}"
        parts = self.linear(vector, f"{b}_adaLN_modulation_1")[:, None].chunk(6, -1)
        z = self.norm(h, f"{b}_norm1") * (1 + parts[1]) + parts[0]
        qkv = self.linear(z, f"{b}_attn_qkv").reshape(n, -1, 3, heads, c // heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if getattr(module, "use_rope", False):
          q, k = self.turn(q), self.turn(k)
        z = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, -1, c)
        h = h + parts[2] * self.linear(z, f"{b}_attn_proj")
        z = self.norm(h, f"{b}_norm2") * (1 + parts[4]) + parts[3]
        if getattr(module, "use_swiglu", False):
          gate, z = self.linear(z, f"{b}_mlp_w12").chunk(2, -1)
          z = self.linear(functional.silu(gate) * z, f"{b}_mlp_w3")
        else:
          z = self.linear(functional.gelu(self.linear(z, f"{b}_mlp_fc1"), approximate="tanh"), f"{b}_mlp_fc2")
        h = h + parts[5] * z
      shift, scale = self.linear(vector, "final_layer_adaLN_modulation_1")[:, None].chunk(2, -1)
      h = self.linear(self.norm(h, "final_layer_norm_final") * (1 + scale) + shift, "final_layer_linear")
      h = h.reshape(n, rows, columns, patch, patch, -1)
      out = torch.einsum("nhwpqc->nchpwq", h).reshape(n, -1, rows * patch, columns * patch)
      return out if module.learned_variance else out[:, : x.shape[1]]

  return Peer().to(peers.device())


def diffusers_network(config: ModelConfig) -> Any:
  """Make diffusers' DiT of the same sizes, with its own weights; None without diffusers."""
  if config.network != "dit" or peers.find("diffusers") is None:
    return None
  from diffusers import DiTTransformer2DModel

  module: Any = config.module
  network = DiTTransformer2DModel(
    num_attention_heads=module.num_heads,
    attention_head_dim=module.hidden_size // module.num_heads,
    in_channels=config.image_shape[2],
    out_channels=2 * config.image_shape[2],
    num_layers=module.depth,
    sample_size=config.image_shape[0],
    patch_size=module.patch_size,
    num_embeds_ada_norm=config.num_classes,
  )
  return network.eval().to(peers.device())


def case(name: str, batch: int, rounds: int, facts: list[str]) -> list[dict[str, Any]]:
  """Measure one network."""
  torch, config = peers.find("torch"), CASES[name]
  model = networks.random_model(config)
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal((batch, *config.image_shape)), jnp.float32)
  t, y = jnp.linspace(0.1, 0.9, batch), jnp.arange(batch) % 1000
  out = jax.jit(model.config.module.apply)(model.params, x, t, y)
  cotangent = jnp.asarray(rng.standard_normal(out.shape), jnp.float32)
  runs = {
    what: {"jaxguide": functools.partial(jax.jit(run), model.params, cotangent, x, t, y)}
    for what, run in our_passes(model).items()
  }
  if (network := torch_network(model)) is not None:
    args = peers.tensors((cotangent, x, t, y))
    with torch.no_grad():
      differs = np.abs(peers.array(network(*args[1:])) - np.asarray(out)).max()
    facts.append(f"{name}: the outputs differ by {differs / np.abs(out).max():.1e} of the largest.")
    candidates = {"plain PyTorch, eager": network, "plain PyTorch, compiled": torch.compile(network)}
    if (other := diffusers_network(config)) is not None:
      candidates |= {"diffusers, eager": other, "diffusers, compiled": torch.compile(other)}
    for kind, each in candidates.items():
      for what, run in their_passes(each, *args).items():
        runs[what][kind] = run
  rows = []
  for what in PASSES:
    rows += [{"pass": what, **row} for row in timing.summary(timing.measure(runs[what], rounds), "jaxguide")]
  return rows


def main(*names: str) -> None:
  """Measure the networks that are named, or all."""
  facts: list[str] = []
  for name in names:
    checks.lookup("network", name, CASES)
  batch, rounds = (8, 7) if networks.ON_CPU else (64, 15)
  tables = {f"{name}, batch {batch}": case(name, batch, rounds, facts) for name in names or CASES}
  timing.report("transformers", tables, facts)
