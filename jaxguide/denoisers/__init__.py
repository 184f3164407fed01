r"""Denoisers and log-probabilities made from networks, and the losses that train the networks.

A *denoiser* is any function ``(x, sigma, cond) -> x0`` of one example ``x = x0 + sigma * eps``. It must be a pytree to
be an argument of a jitted function. The denoisers made here are pytrees, and any other function becomes one with
``jax.tree_util.Partial(function, params)``. The parameters are then leaves: new weights do not compile a new program,
and they are not constants of the program.
"""

from jaxguide.denoisers import losses, mixtures, scaling, variational
from jaxguide.denoisers.autoencoders import Autoencoder
from jaxguide.denoisers.conditions import check_cond, given
from jaxguide.denoisers.conversions import eps_to_x0, score_to_x0, v_to_x0, x0_to_eps, x0_to_score, x0_to_v
from jaxguide.denoisers.frameworks import from_equinox, from_haiku, from_nnx
from jaxguide.denoisers.linen import check_params, param_shapes
from jaxguide.denoisers.network import ClassifierLogProb, NetworkDenoiser, perturbed, split_variance

__all__ = [
  "Autoencoder",
  "ClassifierLogProb",
  "NetworkDenoiser",
  "check_cond",
  "check_params",
  "eps_to_x0",
  "from_equinox",
  "from_haiku",
  "from_nnx",
  "given",
  "losses",
  "mixtures",
  "param_shapes",
  "perturbed",
  "scaling",
  "score_to_x0",
  "split_variance",
  "v_to_x0",
  "variational",
  "x0_to_eps",
  "x0_to_score",
  "x0_to_v",
]
