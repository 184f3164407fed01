"""DiT, SiT, REPA's SiT and LightningDiT against recorded outputs of the published code."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxguide as jg
from jaxguide import models
from jaxguide.generate.guidances import GuidanceSpec
from jaxguide.generate.methods import Networks
from jaxguide.models import importers
from jaxguide.models.importers import convert
from jaxguide.models.importers.families import recognise

DATA = Path(__file__).parent / "data" / "networks"

# name: the largest difference allowed (5 times float32 against float64, or 2e-5 of the largest output), and the
# settings that names and shapes do not show.
CASES = {
  "dit_s1": (5.67e-5, {"heads": 4, "image_size": 8}),
  "sit_s1": (3.84e-5, {"family": "sit", "heads": 4}),
  "sit_s2": (5.36e-5, {"family": "sit", "heads": 3}),
  "repa_s1": (3.95e-5, {"heads": 4, "encoder_depth": 1}),
  "lightningdit_s1": (3.30e-5, {}),
  "lightningdit_s2": (4.81e-5, {}),
}


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
  """The model of a case, through the importer and a folder."""
  folder = tmp_path_factory.mktemp("models")

  @functools.cache
  def load(name):
    importers.import_model(DATA / f"{name}.safetensors", folder / name, **CASES[name][1])
    return models.load(folder / name)

  return load


def arrays(name):
  """The recorded arrays of a case, images as NHWC."""
  loaded = np.load(DATA / f"{name}.npz")
  return {key: np.moveaxis(loaded[key], -3, -1) if loaded[key].ndim >= 4 else loaded[key] for key in loaded.files}


quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(quick_jit, static_argnums=0)
def output_and_gradient(module, params, x, t, y, cotangent):
  out, back = jax.vjp(lambda x: module.apply(params, x, t, y), x)
  return out, back(cotangent)[0]


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradient(model_of, name):
  model, want, tolerance = model_of(name), arrays(name), CASES[name][0]
  t = jnp.asarray(want["t"], jnp.float32)
  out, gradient = output_and_gradient(model.config.module, model.params, want["x"], t, want["y"], want["cotangent"])
  np.testing.assert_allclose(out, want["out"], atol=tolerance, rtol=0)
  scale = np.abs(want["grad_x"]).max() / np.abs(want["out"]).max()
  np.testing.assert_allclose(gradient, want["grad_x"], atol=tolerance * max(scale, 1), rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_round_trip_is_exact(model_of, tmp_path, name):
  model = model_of(name)
  models.save(tmp_path / "model", model)
  family = "dit-diffusers" if name.startswith("dit") else None
  convert.export_model(tmp_path / "model", tmp_path / "out.safetensors", family)
  ours, theirs = load_file(tmp_path / "out.safetensors"), load_file(DATA / f"{name}.safetensors")
  assert ours.keys() == theirs.keys()
  assert all(np.array_equal(ours[key].view(np.uint32), theirs[key].view(np.uint32)) for key in theirs)


# --- trajectories ---------------------------------------------------------------------------------

STEPS = {"sit_s1": 10, "sit_s2": 10, "lightningdit_s1": 9, "lightningdit_s2": 9}
FIRST = 1e7  # In place of the infinite level at pure noise; the difference is below float32's.


def trajectory(guided, want, steps, shift=1.0):
  """The states of Euler's method, as (1 - t) noise + t x0, from the recorded noise."""
  sigmas = jg.schedules.flow(steps, shift, FIRST)
  start = (1 + sigmas[0]) * jnp.asarray(want["traj/z"], jnp.float32)

  @quick_jit
  def states(guided, start, label):
    def one(x, y):
      return jg.sample(guided, jax.random.key(0), x.shape, sigmas, jg.Euler(), y, lambda state: state.x, x)[1]

    return jnp.moveaxis(jax.vmap(one)(start, label), 1, 0)

  return states(guided, start, want["traj/y"]) / (1 + sigmas[1:])[:, None, None, None, None]


@pytest.mark.parametrize(("name", "scale"), [("sit_s1", 4), ("sit_s2", 1)])
def test_trajectories_of_sit(model_of, name, scale):
  model, want = model_of(name), arrays(name)
  path = want[f"traj/euler10_cfg{scale}"]
  guided = jg.classifier_free(int(want["traj/null"]), float(scale), jg.combine.channels(3))(model.denoiser)
  ours = trajectory(guided, want, 10)
  np.testing.assert_allclose(ours, path[1:], atol=1e-4 * np.abs(path).max(), rtol=0)


@pytest.mark.parametrize(
  ("name", "shift", "start"),
  [("lightningdit_s1", "0", "0"), ("lightningdit_s1", "0.3", "0.125"), ("lightningdit_s2", "0.3", "0")],
)
def test_trajectories_of_lightningdit(model_of, name, shift, start):
  """Their t -> S t / (1 + (S - 1) t), with t = 1 at the data, is a shift of 1 / S here, where t = 1 is the noise."""
  model, want = model_of(name), arrays(name)
  path = want[f"traj/euler_shift{shift}_start{start}"]
  guidance = jg.classifier_free(int(want["traj/null"]), 5.0, jg.combine.channels(3))
  if start != "0":
    guidance = jg.interval(guidance, t_lo=float(start), time=model.config.scaling)
  ours = trajectory(guidance(model.denoiser), want, 9, 1 / float(shift) if shift != "0" else 1.0)
  np.testing.assert_allclose(ours, path[1:], atol=1e-4 * np.abs(path).max(), rtol=0)


def test_the_direction_of_time_shows(model_of):
  """A flow whose time runs the other way gives another path: the trajectories would catch it."""
  model, want = model_of("sit_s1"), arrays("sit_s1")
  path = want["traj/euler10_cfg1"]
  for wrong in (jg.scaling.flow(1.0), jg.scaling.flow_to_data(1000.0)):
    ours = trajectory(jg.NetworkDenoiser(model.params, model.config.module.apply, wrong), want, 10)
    assert np.abs(ours - path[1:]).max() > 100 * 1e-4 * np.abs(path).max()


def test_repa_gives_the_velocity_towards_noise(model_of):
  """x0 from the recorded velocity: v = eps - x0 at x_t = (1 - t) x0 + t eps, so x0 = x_t - t v."""
  model, want = model_of("repa_s1"), arrays("repa_s1")
  x, t, v = want["x"][0], float(want["t"][0]), want["out"][0]
  sigma = jnp.asarray(t / (1 - t), jnp.float32)
  x0 = quick_jit(model.denoiser)((1 + sigma) * x, sigma, want["y"][0])
  np.testing.assert_allclose(x0, x - t * v, atol=2e-5 * np.abs(v).max())


def test_dit_gives_noise_and_learned_variance(model_of):
  """x0 from the recorded eps at step t of the linear table; the second half of the channels is the variance."""
  model, want = model_of("dit_s1"), arrays("dit_s1")
  step = int(want["t"][0])
  kept = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[step]
  sigma = np.sqrt((1 - kept) / kept)
  prediction = quick_jit(model.denoiser)(
    jnp.asarray(want["x"][0] / np.sqrt(kept)), jnp.asarray(sigma, jnp.float32), want["y"][0]
  )
  x0 = want["x"][0] / np.sqrt(kept) - sigma * want["out"][0, ..., :4]
  np.testing.assert_allclose(prediction.x0, x0, atol=1e-4 * np.abs(x0).max())
  np.testing.assert_allclose(prediction.variance, want["out"][0, ..., 4:], atol=1e-3)


# --- recognition and errors -----------------------------------------------------------------------


def weights(name):
  return load_file(DATA / f"{name}.safetensors")


def imported(tmp_path, tensors, suffix="safetensors", **given):
  save_file(tensors, tmp_path / f"file.{suffix}")
  return importers.import_model(tmp_path / f"file.{suffix}", tmp_path / "out", **given)


def test_families_are_recognised(model_of):
  found = {name: recognise(weights(name)).name for name in CASES if not name.startswith("sit")}
  assert found == {
    "dit_s1": "dit-diffusers",
    "repa_s1": "repa",
    "lightningdit_s1": "lightningdit",
    "lightningdit_s2": "lightningdit",
  }
  configs = {name: model_of(name).config for name in CASES}
  assert {name: config.prediction for name, config in configs.items()} == {
    "dit_s1": "eps",
    "sit_s1": "flow_to_data",
    "sit_s2": "flow_to_data",
    "repa_s1": "flow",
    "lightningdit_s1": "flow_to_data",
    "lightningdit_s2": "flow_to_data",
  }
  assert [configs[name].fields["learn_sigma"] for name in ("sit_s1", "sit_s2")] == [True, False]
  assert configs["repa_s1"].scaling(3.0).c_noise == 0.75
  assert configs["sit_s1"].scaling(3.0).c_noise == 0.25
  assert configs["lightningdit_s2"].fields["num_heads"] == 4
  assert configs["lightningdit_s2"].fields["mlp_ratio"] == 4.0


def test_perturbed_guidance_asks_for_the_blocks_of_a_transformer(model_of):
  networks = Networks(model_of("sit_s1"), None, lambda folder: None, jg.karras(2))
  with pytest.raises(ValueError, match=r"'middle_block_1'.* blocks_0, blocks_1; the default is .*: give blocks=NAME"):
    GuidanceSpec.parse("pag").build(networks, 2.0)


def test_the_user_is_asked_for_what_names_and_shapes_do_not_show(tmp_path):
  with pytest.raises(ValueError, match=r"--family dit \(DiT\); --family sit \(SiT\)"):
    imported(tmp_path, weights("sit_s1"), heads=4)
  with pytest.raises(ValueError, match="give --heads N"):
    imported(tmp_path, weights("sit_s1"), family="sit")
  with pytest.raises(ValueError, match="give --field image_size=VALUE"):
    imported(tmp_path, weights("dit_s1"), heads=4)
  with pytest.raises(ValueError, match=r"give --heads N \(.*\), --field image_size=VALUE"):
    imported(tmp_path, weights("dit_s1"))
  with pytest.raises(ValueError, match="SiT has no setting 'image_sise'; its settings are heads, image_size,"):
    imported(tmp_path, weights("sit_s1"), family="sit", heads=4, image_sise=8)
  with pytest.raises(ValueError, match="DiT of diffusers has no setting 'image_sise'"):
    imported(tmp_path, weights("dit_s1"), heads=4, image_sise=8)
  with pytest.raises(ValueError, match="image_size must be a whole number from 2 to 65536, got 'big'"):
    imported(tmp_path, weights("sit_s1"), family="sit", heads=4, image_size="big")
  with pytest.raises(ValueError, match=r"image_size must be a number or \[height, width\], got \[8\]"):
    imported(tmp_path, weights("sit_s1"), family="sit", heads=4, image_size=[8])
  with pytest.raises(ValueError, match="SiT has no setting 'encoder_depth'"):
    imported(tmp_path, weights("sit_s1"), family="sit", heads=4, encoder_depth=1)
  with pytest.raises(ValueError, match="heads is 2, but the weights show heads of 8 channels of 32"):
    imported(tmp_path, weights("lightningdit_s1"), heads=2)
  with pytest.raises(ValueError, match="of which the table of positions has 16"):
    imported(tmp_path, weights("sit_s1"), family="sit", heads=4, image_size=16)
  assert imported(tmp_path, weights("sit_s1"), family="sit", heads=4, image_size=[16, 4]).config.image_shape == (
    16,
    4,
    4,
  )


@pytest.mark.parametrize(
  ("name", "change", "message"),
  [
    ("sit_s1", lambda w: w.pop("blocks.1.attn.proj.bias"), "blocks.1.attn.proj.bias"),
    ("sit_s1", lambda w: w.update({"blocks.0.extra": w["pos_embed"]}), "unknown .blocks.0.extra"),
    ("sit_s1", lambda w: w.pop("final_layer.linear.weight"), "final_layer.linear.weight missing"),
    ("sit_s1", lambda w: w.update({"t_embedder.mlp.2.bias": w["pos_embed"]}), "t_embedder.mlp.2.bias has shape"),
    ("lightningdit_s1", lambda w: w.pop("feat_rope.freqs_sin"), "feat_rope.freqs_sin"),
    ("repa_s1", lambda w: w.pop("projectors.0.4.weight"), "projectors.0.4.weight missing"),
    ("dit_s1", lambda w: w.pop("transformer_blocks.1.attn1.to_k.weight"), "transformer_blocks.1.attn1.to_k.weight"),
    ("dit_s1", lambda w: w.update(extra=w["proj_out_1.bias"]), "unknown .extra"),
  ],
)
def test_half_a_file_is_refused_by_its_first_names(tmp_path, name, change, message):
  tensors = weights(name)
  change(tensors)
  given = {"heads": 4, "image_size": 8, **({"family": "sit"} if name == "sit_s1" else {})}
  with pytest.raises(ValueError, match=message):
    imported(tmp_path, tensors, **given)
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
  ("family", "name", "given"),
  [
    ("dit", "blocks.{}.attn.proj.bias", {"family": "dit", "heads": 4}),
    ("dit", "transformer_blocks.{}.norm1.emb.timestep_embedder.linear_1.bias", {"heads": 4, "image_size": 8}),
    ("repa", "projectors.{}.4.weight", {"heads": 4, "encoder_depth": 1}),
    ("adm", "input_blocks.{}.0.in_layers.2.weight", {"num_heads": 1}),
  ],
)
def test_a_number_beyond_all_blocks_is_refused_at_once(tmp_path, family, name, given):
  """A hostile name would take a list of as many blocks, and all memory."""
  tensors = {
    "dit": lambda: weights("dit_s1") if "transformer" in name else weights("sit_s1"),
    "repa": lambda: weights("repa_s1"),
    "adm": lambda: {name: np.ones((4, 4, 3, 3)[: 2 + 2 * name.startswith("in")], np.float32) for name in ADM},
  }[family]()
  tensors[name.format(10**15)] = np.ones((4, 4, 3, 3), np.float32)
  with pytest.raises(ValueError, match="the names are of 1,000,000,000,000,001 "):
    imported(tmp_path, tensors, **given)


ADM = ("time_embed.0.weight", "input_blocks.0.0.weight")


def test_embedders_that_are_the_same_become_one(tmp_path):
  """In published files of diffusers all blocks hold the same embedders; the export holds them in each again."""
  tensors = weights("dit_s1")
  for name in list(tensors):
    if name.startswith("transformer_blocks.1.norm1.emb."):
      tensors[name] = tensors[name.replace("blocks.1", "blocks.0")].copy()
  config = imported(tmp_path, tensors, heads=4, image_size=8).config
  assert not config.fields["embedder_per_block"]
  convert.export_model(tmp_path / "out", tmp_path / "again.safetensors", "dit-diffusers")
  again = load_file(tmp_path / "again.safetensors")
  assert again.keys() == tensors.keys()
  assert all(np.array_equal(again[name], tensors[name]) for name in tensors)
  lines = convert.export_model(tmp_path / "out", tmp_path / "meta.safetensors", "dit")
  assert load_file(tmp_path / "meta.safetensors").keys() - {"pos_embed"} > {"blocks.1.attn.qkv.weight"}
  assert any("export it by --family dit-diffusers" in line for line in lines)


def test_tables_that_a_file_leaves_out_are_computed(tmp_path, model_of):
  tensors = {f"module.{name}": tensor for name, tensor in weights("lightningdit_s1").items() if name != "pos_embed"}
  imported(tmp_path, tensors)
  ours = models.load(tmp_path / "out").params["params"]["pos_embed"]
  np.testing.assert_allclose(ours, model_of("lightningdit_s1").params["params"]["pos_embed"], atol=1e-6)


def test_a_file_without_projectors_is_repas_on_demand(tmp_path):
  tensors = {name: tensor for name, tensor in weights("repa_s1").items() if not name.startswith("projectors")}
  config = imported(tmp_path, tensors, family="repa", heads=4).config
  assert (config.prediction, config.time_scale, config.fields["z_dims"]) == ("flow", 1.0, ())


# --- guidance by intervals and perturbations ------------------------------------------------------


def test_intervals_in_time_and_steps_are_those_in_sigma():
  guidance, denoise = jg.classifier_free(0.0, 4.0), (lambda x, sigma, cond: x * cond / (1 + sigma))
  sigmas = jg.schedules.flow(8, sigma_max=1e4)
  x, label = jnp.ones((2, 2)), jnp.asarray(3.0)
  same = [
    jg.interval(guidance, 1.0, 5.0),  # Of the grid's levels 1e4, 7, 3, 5/3, 1, ... the third and the fourth.
    jg.interval(guidance, t_lo=1 / 6, t_hi=0.4999, time=jg.scaling.flow_to_data()),
    jg.interval(guidance, t_lo=0.5001, t_hi=5 / 6, time=jg.schedules.schedule("flow")),
    jg.interval(guidance, step_lo=2, step_hi=4, sigmas=sigmas),
  ]
  for guided in same:
    run = quick_jit(guided(denoise))
    changed = [float(run(x, sigma, label)[0, 0] / denoise(x, sigma, label)[0, 0]) for sigma in sigmas[:-1]]
    np.testing.assert_allclose(changed, [1, 1, 4, 4, 1, 1, 1, 1], rtol=1e-6)


def test_work_outside_an_interval_is_skipped():
  """The guided branch is in a `cond`, for each kind of bounds."""
  grid = jg.karras(4)
  for bounds in (
    {"sigma_lo": 1.0},
    {"t_lo": 0.5, "time": jg.scaling.flow_to_data()},
    {"step_hi": 2, "sigmas": grid},
  ):
    guided = jg.interval(jg.classifier_free(0, 4.0), **bounds)(lambda x, sigma, cond: x * cond)
    batch = jax.vmap(guided, (0, None, 0))
    jaxpr = jax.make_jaxpr(batch)(jnp.ones((3, 2)), jnp.asarray(1.0), jnp.ones(3))
    assert "cond" in {equation.primitive.name for equation in jaxpr.eqns}


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ({}, "got no bound"),
    ({"sigma_lo": 1.0, "t_hi": 1.0}, "got sigma_lo or sigma_hi and t_lo or t_hi"),
    ({"t_lo": 0.1}, "t_lo and t_hi need time"),
    ({"step_lo": 1}, "step_lo and step_hi need sigmas"),
    ({"sigma_lo": 1.0, "time": jg.scaling.flow_to_data()}, "t_lo and t_hi are not given, so leave out time"),
    ({"t_lo": 0.5, "t_hi": 0.4, "time": jg.scaling.flow_to_data()}, "t_lo must be at most t_hi"),
    ({"step_lo": 3, "step_hi": 3, "sigmas": jg.karras(4)}, "step_lo must be below step_hi"),
    ({"step_hi": 5, "sigmas": jg.karras(4)}, "step_hi"),
  ],
)
def test_bounds_of_an_interval_are_of_one_kind(given, message):
  with pytest.raises(ValueError, match=message):
    jg.interval(jg.classifier_free(0, 2.0), **given)


def test_guidances_by_name_have_channels_and_times(model_of):
  """The text of a guidance gives what the functions give."""
  model, sigmas = model_of("sit_s2"), jg.schedules.flow(4)
  given = Networks(model, None, lambda folder: model, sigmas)
  texts = {
    "cfg:scale=4,combine=channels,channels=2": jg.classifier_free(7, 4.0, jg.channels(2)),
    "cfg:combine=channels,of=projected,eta=0.5": jg.classifier_free(7, 2.0, jg.channels(3, jg.projected(0.5))),
    "cfg:t_lo=0.3": jg.interval(jg.classifier_free(7, 2.0), t_lo=0.3, time=model.config.scaling),
    "cfg:step_lo=1,step_hi=2": jg.interval(jg.classifier_free(7, 2.0), step_lo=1, step_hi=2, sigmas=sigmas),
  }
  for text, wanted in texts.items():
    found = GuidanceSpec.parse(text).build(given)
    assert jax.tree.structure(found) == jax.tree.structure(wanted), text
    leaves = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    assert all(np.array_equal(a, b) for a, b in leaves), text
  with pytest.raises(ValueError, match="no step lies between t_lo 2"):
    GuidanceSpec.parse("cfg:t_lo=2").build(given)
  with pytest.raises(ValueError, match="give one of the three"):
    GuidanceSpec.parse("cfg:t_lo=0.1,sigma_hi=2").build(given)


def test_channels_composes_with_rules_that_have_state():
  """The rule sees the first channels alone, and its momentum travels with them."""
  rng = np.random.default_rng(0)
  mean = jnp.asarray(rng.standard_normal((2, 3)), jnp.float32)

  def denoise(x, sigma, cond):
    return 0.3 * x + jnp.where(cond == 1, mean, 0)

  def alone(x, sigma, cond):
    return 0.3 * x + jnp.where(cond == 1, mean[:, :2], 0)

  rule, key, sigmas = jg.projected(0.2, 1.0, -0.5), jax.random.key(0), jg.karras(4)
  x = jnp.asarray(rng.standard_normal((2, 3)), jnp.float32)
  arguments = {"cond": jnp.asarray(1), "sigmas": sigmas, "solver": jg.Euler()}
  whole = jg.sample(jg.classifier_free(0, 3.0, jg.channels(2, rule))(denoise), key, (2, 3), x_init=x, **arguments)[0]
  part = jg.sample(jg.classifier_free(0, 3.0, rule)(alone), key, (2, 2), x_init=x[:, :2], **arguments)[0]
  rest = jg.sample(denoise, key, (2, 3), x_init=x, **arguments)[0]
  np.testing.assert_allclose(whole, jnp.concatenate([part, rest[:, 2:]], 1), rtol=1e-5, atol=1e-6)
  with pytest.raises(ValueError, match="guides the first 4 channels"):
    jg.channels(4)(x, x, 2.0, x, jnp.asarray(1.0))
