"""How often sampling compiles: ten scales, four labels and three grids of one length, for each of three solvers.

It should be once for each solver, since all but the solver are arguments of the program.
"""

import contextlib
import logging
from collections.abc import Iterator

import jax
import numpy as np

import jaxguide as jg
from benchmarks import networks, timing
from jaxguide.evaluation import demo

STEPS = 8
GRIDS = {"karras": jg.karras, "uniform in log-SNR": jg.log_snr_uniform, "cosine-time": jg.schedules.cosine_time}
SOLVERS = {"DDIM": jg.DDIM, "DPM++ 2M": jg.DPMpp2M, "Heun": jg.Heun}


@contextlib.contextmanager
def counted(of: str) -> Iterator[list[str]]:
  """Collect what JAX says of the compilations of a function that it is given the name of."""
  said: list[str] = []

  class Listen(logging.Handler):
    def emit(self, record):
      message = record.getMessage()
      if message.startswith("Finished XLA compilation") and of in message:
        said.append(message)

  logger, listen = logging.getLogger("jax"), Listen()
  logger.addHandler(listen)
  propagate, logger.propagate = logger.propagate, False
  others = [handler for handler in logger.handlers if handler is not listen]
  for handler in others:
    logger.removeHandler(handler)
  try:
    with jax.log_compiles():
      yield said
  finally:
    logger.removeHandler(listen)
    for handler in others:
      logger.addHandler(handler)
    logger.propagate = propagate


def main() -> None:
  """Print the table."""
  model = networks.random_model(demo.DIGITS.denoiser)
  rows = []
  for name, solver in SOLVERS.items():
    with counted("_sample_many") as said:
      calls = 0
      for grid in GRIDS.values():
        for scale in np.linspace(0, 9, 10):
          guided = jg.classifier_free(model.null_cond, float(scale))(model.denoiser)
          for label in range(4):
            jg.sample_batch(
              guided,
              jax.random.key(label),
              label,
              num=2,
              shape=demo.DIGITS.denoiser.image_shape,
              sigmas=grid(STEPS),
              solver=solver(),
            )
            calls += 1
    rows.append({"solver": name, "calls": calls, "compilations": len(said)})
  timing.report("compilations", {"compilations of the sampling program": rows})
