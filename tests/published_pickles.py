"""Pickles as EDM and EDM2 publish their networks, written with PyTorch: `python tests/published_pickles.py` writes one.

The classes here stand for those of NVIDIA's ``torch_utils.persistence``: an object of a decorated class is pickled as
the text of its module, the name of its class and its state.
"""

import copy
import pickle
import sys
import types
from pathlib import Path


def persistence():
  """Return the modules ``torch_utils.persistence`` and ``dnnlib.util``, whose names the pickles have."""
  made, utils, parent = (types.ModuleType(name) for name in ("torch_utils.persistence", "dnnlib.util", "torch_utils"))

  def _reconstruct_persistent_obj(meta):
    raise AssertionError("the source code of a pickle must not be run")

  class EasyDict(dict):
    """A dictionary whose values are attributes too."""

  for module, thing in ((made, _reconstruct_persistent_obj), (utils, EasyDict)):
    thing.__module__, thing.__qualname__ = module.__name__, thing.__name__
    setattr(module, thing.__name__, thing)
  dnnlib = types.ModuleType("dnnlib")
  dnnlib.util, dnnlib.EasyDict, parent.persistence = utils, EasyDict, made
  return {"torch_utils": parent, "torch_utils.persistence": made, "dnnlib": dnnlib, "dnnlib.util": utils}


def network(weights, name, kwargs, **attributes):
  """Return a network whose modules are persistent objects and plain ones of PyTorch, with given weights.

  Args:
    weights: arrays by name.
    name: the name of the network's class.
    kwargs: the arguments that it was made with.
    **attributes: further attributes of the network.
  """
  import torch

  class Persistent(torch.nn.Module):
    """A module of a decorated class."""

    def __reduce__(self):
      description = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": self.class_name}
      state = {key: value for key, value in self.__dict__.items() if key != "class_name"}
      reconstruct = sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj
      return reconstruct, ({**description, "state": state},), None

  def persistent(class_name):
    made = Persistent()
    made.class_name, made._init_args, made._init_kwargs = class_name, (), {}
    return made

  buffers = ("resample_filter", "freqs", "phases")
  top = persistent(name)
  top._init_kwargs = copy.deepcopy(kwargs)
  for key, value in attributes.items():
    setattr(top, key, value)
  for full, array in weights.items():
    *modules, last = full.split(".")
    module = top
    for part in modules:
      if part not in module._modules:
        inner = torch.nn.ModuleDict() if part in ("enc", "dec") else persistent(part)
        module._modules[part] = inner
      module = module._modules[part]
    tensor = torch.from_numpy(array.copy())
    if last in buffers:
      module.register_buffer(last, tensor)
    else:
      module.register_parameter(last, torch.nn.Parameter(tensor, requires_grad=False))
  return top.eval()


SOURCE = "import os\nos.system('touch hostile')\nraise SystemExit('the source code of a pickle must not be run')\n"


def write(path, weights, name, kwargs, **attributes):
  """Write a pickle with a network, and what stands beside it in the published files."""
  import numpy as np

  modules = persistence()
  sys.modules.update(modules)
  try:
    easy = sys.modules["dnnlib.util"].EasyDict
    content = easy(
      dataset_kwargs=easy(path="data.zip", resolution=8, use_labels=True),
      encoder=np.float32(0.5) * np.ones(4, np.float32),
      loss_fn=network({}, "EDMLoss", {}, P_mean=-1.2, scale=np.float64(0.5)),
      ema=network(weights, name, kwargs, **attributes),
    )
    with Path(path).open("wb") as file:
      pickle.dump(content, file)
  finally:
    for module in modules:
      del sys.modules[module]


def tiny():
  """Return the weights of the committed pickle, of a tiny EDM2 network in float16, and the arguments of its class."""
  import numpy as np

  from jaxguide.models import ModelConfig
  from jaxguide.models.importers import edm2

  fields = {"model_channels": 8, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,)}
  own = {"channels_per_head": 8, "logvar_channels": 8, "attn_balance": 0.4, "resample_filter": (1, 3, 3, 1)}
  config = ModelConfig("edm2_unet", {**fields, **own}, (8, 8, 4), 5, "edm", sigma_data=0.4)
  rng = np.random.default_rng(0)
  weights = {name: rng.standard_normal(entry.shape) for name, entry in edm2.layout(config).items()}
  weights = {name: np.asarray(array, np.float16) for name, array in weights.items()}
  given = {"img_resolution": 8, "img_channels": 4, "label_dim": 5, "use_fp16": True, "sigma_data": 0.4, **fields, **own}
  return weights, {key: list(value) if isinstance(value, tuple) else value for key, value in given.items()}, config


if __name__ == "__main__":
  weights, kwargs, _ = tiny()
  attributes = {key: kwargs[key] for key in ("img_resolution", "img_channels", "label_dim", "use_fp16", "sigma_data")}
  write(Path(__file__).parent / "data" / "networks" / "edm2_tiny.pkl", weights, "Precond", kwargs, **attributes)
