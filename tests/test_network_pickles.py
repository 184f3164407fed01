"""EDM's published pickles, read as data: networks in them, and hostile files, of which nothing is run."""

import dataclasses
import io
import os
import pickle
import re
import struct
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import published_pickles
import pytest
from safetensors.numpy import load_file, save_file
from test_torch_files import named, old, plain, several, stored, tensor

from jaxguide import models
from jaxguide.generate import Settings
from jaxguide.generate.plan import plan
from jaxguide.models import importers
from jaxguide.models.importers import edm, edm2, layouts, network_pickles, state_dicts

DATA = Path(__file__).parent / "data" / "networks"
FILE = DATA / "edm2_tiny.pkl"


def test_a_published_pickle_is_imported_with_the_settings_that_it_states(tmp_path):
  weights, _, config = published_pickles.tiny()
  found = state_dicts.read(FILE)
  assert found.keys() == weights.keys()
  for name, array in weights.items():
    np.testing.assert_array_equal(found[name], array, err_msg=name)
  imported = importers.import_model(FILE, tmp_path / "model")
  assert str(imported).startswith("EDM2UNet") and "float16, cast to float32" in str(imported)  # noqa: PT018
  model = models.load(tmp_path / "model")
  for name in ("channels_per_head", "attn_balance", "resample_filter", "num_blocks", "attn_resolutions"):
    assert getattr(model.config.module, name) == getattr(config.module, name)
  assert (model.config.sigma_data, model.config.num_classes, model.config.encoder) == (0.4, 5, "latents")
  wanted = layouts.to_params(weights, edm2.layout(config), "EDM2UNet")["params"]["out_conv"]["kernel"]
  np.testing.assert_array_equal(model.params["params"]["out_conv"]["kernel"], wanted)
  assert not (Path.cwd() / "hostile").exists()


def test_what_the_user_says_stands_above_what_a_pickle_states(tmp_path):
  importers.import_model(FILE, tmp_path / "model", attn_balance=0.1)
  assert models.load(tmp_path / "model").config.module.attn_balance == 0.1


def test_the_files_of_two_snapshots_become_another_mean(tmp_path):
  """EDM2's snapshots at two widths are combined as those of a training here are."""
  from jaxguide.training import ema

  params = []
  for number in (1.0, 3.0):
    weights = {name: np.asarray(array * number) for name, array in published_pickles.tiny()[0].items()}
    save_file(weights, tmp_path / f"{number}.safetensors")
    importers.import_model(tmp_path / f"{number}.safetensors", tmp_path / f"{number}", channels_per_head=8)
    params.append(models.load(tmp_path / f"{number}").params)
  coefficients = ema.posthoc_coefficients(ema.Profiles([100, 100], [0.05, 0.1]), ema.Profiles([100], [0.07]))[:, 0]
  mean = ema.weighted_sum(params, coefficients)["params"]["out_conv"]["kernel"]
  wanted = (coefficients @ [1.0, 3.0]) * np.asarray(params[0]["params"]["out_conv"]["kernel"], np.float64)
  np.testing.assert_allclose(mean, wanted, rtol=1e-2, atol=1e-3)


def test_a_pickle_is_not_written(tmp_path):
  importers.import_model(FILE, tmp_path / "model")
  with pytest.raises(ValueError, match=r"not written: choose a \.safetensors file"):
    importers.export_model(tmp_path / "model", tmp_path / "out.pkl")


@pytest.mark.torch
@pytest.mark.parametrize("name", ["edmnet_s1_ddpmpp", "edmnet_s2_ncsnpp", "edmnet_s3_adm", "edm2net_s1"])
def test_networks_that_pytorch_pickled(name, tmp_path):
  pytest.importorskip("torch")
  weights = load_file(DATA / f"{name}.safetensors")
  network = "Precond" if name == "edm2net_s1" else "EDMPrecond"
  kwargs = {"channels_per_head": 16} if network == "Precond" else {"dropout": 0.3, "model_type": "SongUNet"}
  published_pickles.write(tmp_path / "snapshot.pkl", weights, network, kwargs, sigma_data=0.7, img_resolution=8)
  found = state_dicts.read(tmp_path / "snapshot.pkl")
  assert found.keys() == weights.keys()
  for key, array in weights.items():
    np.testing.assert_array_equal(found[key], array, err_msg=key)
  importers.import_model(tmp_path / "snapshot.pkl", tmp_path / "model")
  model = models.load(tmp_path / "model")
  assert model.config.sigma_data == 0.7
  assert model.config.module.dropout == kwargs.get("dropout", 0)


def test_the_other_preconditionings():
  """VP and VE have scalings of this package, table 1 of arXiv:2206.00364; iDDPM is refused."""
  shapes = {name: tensor for name, tensor in state_dicts.read(DATA / "edmnet_s1_ddpmpp.safetensors").items()}
  sigma = np.array([0.1, 3.0, 50.0])
  vp = edm.infer(shapes, **edm.stated("VPPrecond", {"beta_d": 19.9, "beta_min": 0.1, "M": 1000, "dropout": 0.2}))
  time = (np.sqrt(0.1**2 + 2 * 19.9 * np.log(1 + sigma**2)) - 0.1) / 19.9
  one = np.ones(3)
  np.testing.assert_allclose(
    np.stack(vp.scaling(jnp.asarray(sigma, jnp.float32))),
    [one, -sigma, 1 / np.sqrt(1 + sigma**2), 999 * time],
    rtol=1e-4,
  )
  assert vp.fields["dropout"] == 0.2
  ve = edm.infer(shapes, **edm.stated("VEPrecond", {"sigma_data": 0.5}))
  np.testing.assert_allclose(
    np.stack(ve.scaling(jnp.asarray(sigma, jnp.float32))), [one, sigma, one, np.log(sigma / 2)], rtol=1e-4
  )
  with pytest.raises(ValueError, match="it holds a iDDPMPrecond; of EDM's preconditioning EDMPrecond"):
    edm.stated("iDDPMPrecond", {})
  with pytest.raises(ValueError, match="another process"):
    edm.stated("VPPrecond", {"beta_d": 10.0})


# --- hostile files, byte by byte ---------------------------------------------------------------------------

PERSISTENT = named("torch_utils.persistence", "_reconstruct_persistent_obj")


def listed(items):
  """A dictionary of pickled values by name."""
  return b"}(" + b"".join(plain(name) + value for name, value in items.items()) + b"u"


def module(name="Precond", parameters=None, modules=None, **state):
  """A persistent object."""
  inner = {"_parameters": listed(parameters or {}), "_modules": listed(modules or {}), **state}
  parts = {
    "type": plain("class"),
    "version": plain(6),
    "module_src": plain("raise SystemExit"),
    "class_name": plain(name),
  }
  return PERSISTENT + listed({**parts, "state": listed(inner)}) + b"\x85R"


def in_bytes(content):
  """A storage as it is pickled outside PyTorch's own files."""
  return named("torch.storage", "_load_from_bytes") + plain_bytes(content) + b"\x85R"


def plain_bytes(content):
  return b"B" + struct.pack("<I", len(content)) + content


def weight(array, numel=None):
  storage = in_bytes(old(stored(array, "0", numel), {"0": array}))
  return tensor(storage, array.shape, [1])


ARRAY = np.arange(6, dtype=np.float32)


STORAGE = in_bytes(old(stored(ARRAY, "0"), {"0": ARRAY}))


def file(value):
  return b"\x80\x02" + value + b"."


def test_what_the_hostile_files_are_made_of_is_read(tmp_path):
  inner = module("MPConv", {"weight": weight(ARRAY)})
  path = tmp_path / "network.pkl"
  path.write_bytes(file(listed({"ema": module(modules={"out_conv": inner}, sigma_data=plain(0.5))})))
  found = network_pickles.read(path)
  assert (found.name, found.arguments) == ("Precond", {"sigma_data": 0.5})
  np.testing.assert_array_equal(found.tensors["out_conv.weight"].read(), ARRAY)


def reduced(module, name, *arguments):
  return named(module, name) + several(*(plain(each) for each in arguments)) + b"R"


def shared_modules(depth):
  """Modules that each hold the next twice: 2**depth of them, in a small file."""
  value = module("Last")
  for _ in range(depth):
    value = module(modules={"a": value + b"q\x01", "b": b"h\x01"})
  return listed({"ema": value})


HOSTILE = {
  "system": lambda touch: reduced("os", "system", touch),
  "posix": lambda touch: reduced("posix", "system", touch),
  "eval": lambda touch: reduced("builtins", "eval", f"__import__('os').system({touch!r})"),
  "exec": lambda touch: reduced("builtins", "exec", f"__import__('os').system({touch!r})"),
  "old_eval": lambda touch: reduced("__builtin__", "eval", f"__import__('os').system({touch!r})"),
  "getattr": lambda touch: reduced("builtins", "getattr", touch, "upper"),
  "within": lambda touch: listed({"ema": module(parameters={"weight": reduced("os", "system", touch)})}),
  "in_state": lambda touch: listed({"ema": module(hook=reduced("subprocess", "check_output", touch))}),
  "beside": lambda touch: listed({"ema": module(parameters={"w": weight(ARRAY)}), "x": reduced("os", "system", touch)}),
  "dotted": lambda touch: reduced("training.networks", "os.system", touch),
  "in_bytes": lambda touch: in_bytes(old(reduced("os", "system", touch), {})),
  "reconstructor": lambda touch: (
    named("copyreg", "_reconstructor") + several(named("os", "system"), plain(None), plain(touch)) + b"R"
  ),
  "new_object": lambda touch: named("os", "system") + plain((touch,)) + b"\x81",
  "load_by_name": lambda touch: plain(("os", "system", touch)) + b"Q",
  "extension": lambda touch: b"\x82\x01" + plain((touch,)) + b"R",
  "set_maker": lambda touch: PERSISTENT + plain({"_function": touch}) + b"b",
  "set_maker_slots": lambda touch: PERSISTENT + plain((None, {"_function": touch})) + b"b",
  "set_class": lambda touch: named("training.networks", "UNet") + plain({"__setstate__": touch}) + b"b",
  "set_class_slots": lambda touch: named("collections", "OrderedDict") + plain((None, {"keys": touch})) + b"b",
  "no_description": lambda touch: PERSISTENT + plain(touch) + b"\x85R",
  "wrong_description": lambda touch: PERSISTENT + plain({"type": "function", "class_name": touch}) + b"\x85R",
  "no_state": lambda touch: listed({"ema": PERSISTENT + plain({"type": "class", "class_name": "UNet"}) + b"\x85R"}),
  "state_of_itself": lambda touch: listed({"ema": named("training.networks", "UNet") + b")\x81q\x01h\x01b"}),
  "no_network": lambda touch: plain({"ema": {"weight": 1}}),
  "no_tensor": lambda touch: listed({"ema": module(parameters={"weight": plain(touch)})}),
  "no_module": lambda touch: listed({"ema": module(modules={"layer": plain(touch)})}),
  "module_of_itself": lambda touch: listed(
    {"ema": named("training.networks", "UNet") + b")\x81q\x01}" + plain("_modules") + b"}X\x01\0\0\0ah\x01ssb"}
  ),
  "many_modules": lambda touch: shared_modules(40),
  "long_names": lambda touch: listed({"ema": module(modules={"a" * 2000: module()})}),
  "huge_storage": lambda touch: listed({"ema": module(parameters={"w": weight(ARRAY, 2**50)})}),
  "huge_tensor": lambda touch: listed(
    {"ema": module(parameters={"w": tensor(in_bytes(old(stored(ARRAY, "0"), {"0": ARRAY})), (2**20,) * 2, (0, 0))})}
  ),
  "huge_bytes": lambda touch: b"\x8e" + struct.pack("<Q", 2**50) + b"abc",
  "huge_text": lambda touch: b"\x8d" + struct.pack("<Q", 2**50) + b"abc",
  "huge_index": lambda touch: b"Nr" + struct.pack("<I", 2**31),
  "huge_frame": lambda touch: b"\x95" + struct.pack("<Q", 2**50) + b"N",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_runs_nothing_and_takes_no_memory(name, tmp_path):
  path, marker = tmp_path / "hostile.pkl", tmp_path / "marker"
  path.write_bytes(file(HOSTILE[name](f"touch {marker}")))
  tracemalloc.start()
  try:
    with pytest.raises(ValueError, match=re.escape(str(path))):
      state_dicts.read(path)
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert peak < 60e6
  assert not marker.exists()


def test_arrays_of_numpy_are_not_made(tmp_path):
  """An array of any claimed size beside the network takes no memory, since it is not needed."""
  array = reduced("numpy.core.multiarray", "_reconstruct", 0, (2**40,), b"b")
  whole = named("numpy", "ndarray") + plain(((2**40,),)) + b"R"
  path = tmp_path / "arrays.pkl"
  network = module(parameters={"w": weight(ARRAY)})
  path.write_bytes(file(listed({"stats": array, "more": whole, "ema": network})))
  assert list(state_dicts.read(path)) == ["w"]


@pytest.mark.parametrize("length", [0, 1, 10, 1000, 60_000, 122_000])
def test_a_torn_pickle_is_refused(length, tmp_path):
  path = tmp_path / "torn.pkl"
  path.write_bytes(FILE.read_bytes()[:length])
  with pytest.raises(ValueError, match=re.escape(str(path))):
    state_dicts.read(path)


def test_damaged_pickles_are_refused_or_read(tmp_path):
  """Bytes that changed never lead to another error than ValueError, and nothing is run."""
  content, rng = FILE.read_bytes(), np.random.default_rng(0)
  for _ in range(40):
    changed = bytearray(content)
    for at in rng.integers(0, 4000 if rng.random() < 0.7 else len(content), 3):
      changed[at] = rng.integers(256)
    path = tmp_path / "damaged.pkl"
    path.write_bytes(bytes(changed))
    try:
      for value in state_dicts.read(path).values():
        np.asarray(value)
    except ValueError:
      pass


def test_a_pickle_of_plain_code_needs_no_marker(tmp_path):
  """What Python itself pickles of an object that runs a command is refused."""

  class Evil:
    def __reduce__(self):
      return os.system, (f"touch {tmp_path / 'marker'}",)

  for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
    buffer = io.BytesIO()
    pickle.dump({"ema": [Evil()]}, buffer, protocol)
    path = tmp_path / "evil.pkl"
    path.write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match=r"code or objects besides a network.*no code was run"):
      state_dicts.read(path)
    assert not (tmp_path / "marker").exists()


def test_edm2_is_guided_by_an_unconditional_network(tmp_path):
  """``jaxguide sample`` with autoguidance by a network without labels, on latents, is the formula."""
  strong, weak = tmp_path / "strong", tmp_path / "weak"
  importers.import_model(FILE, strong)
  weights = {name: value for name, value in load_float(published_pickles.tiny()[0]).items() if "emb_label" not in name}
  save_file(weights, tmp_path / "weak.safetensors")
  importers.import_model(tmp_path / "weak.safetensors", weak, channels_per_head=8, sigma_data=0.4)
  guidance = f"autoguidance:weak={weak},scale=1.4"
  settings = Settings(str(strong), guidance=guidance, num=2, solver="heun", grid="karras", steps=2, labels=[0, 3])
  settings = dataclasses.replace(settings, clip=False)

  def load(folder):  # As if the latents were pictures, which need no autoencoder.
    model = models.load(folder)
    return dataclasses.replace(model, config=dataclasses.replace(model.config, encoder="pixels"))

  made = plan(settings, load)
  x, sigma, label = jnp.ones((8, 8, 4)), jnp.asarray(2.0), jnp.asarray(3)
  good = np.asarray(jax.jit(models.load(strong).denoiser)(x, sigma, label))
  bad = np.asarray(jax.jit(models.load(weak).denoiser)(x, sigma, None))
  np.testing.assert_allclose(jax.jit(made.denoiser)(x, sigma, label), bad + 1.4 * (good - bad), rtol=1e-4, atol=1e-4)
  assert made.image_shape == (8, 8, 4)


def load_float(weights):
  return {name: np.asarray(value, np.float32) for name, value in weights.items()}
