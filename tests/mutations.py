"""What the tests notice: the package is broken on purpose, in one place at a time, and the tests are run.

Run ``python tests/mutations.py``. Each row of `MUTATIONS` is a fault that a person could make and that leaves the
program running: a sign, an index that is one off, a factor in the wrong place, a forgotten clip. The tree is copied, so
that nothing is changed in it; the table says which test was the first to fail. The exit status is 1 if fewer faults
than `LEAST` are caught (with ``--only``: any of those), and 2 if a row no longer fits the code.
"""

import argparse
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

LEAST = 38
LIMIT = 1200  # seconds that the tests of one fault may take

LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "venv")


class Mutation(NamedTuple):
  """A fault: ``new`` in place of ``old``, which occurs once in a file of the package, and the tests that should fail.

  The tests are pytest's arguments: files in ``tests/``, and where these take long what ``-k`` selects of them.
  """

  name: str
  file: str
  old: str
  new: str
  tests: str


MUTATIONS = [
  # --- schedules and scales ---
  Mutation(
    "the cosine schedule forgets the offset at its start",
    "schedules/noise.py",
    "jnp.sin(now - start) * jnp.sin(now + start)",
    "jnp.square(jnp.sin(now))",
    "test_schedules.py",
  ),
  Mutation(
    "respaced steps round half up",
    "schedules/tables.py",
    "first + round(position)",
    "first + int(position + 0.5)",
    "test_schedules.py -k respaced",
  ),
  Mutation(
    "trailing steps are one step late",
    "schedules/grids.py",
    "(total / count)).astype(int) - 1",
    "(total / count)).astype(int)",
    "test_kdiffusion.py -k spacing",
  ),
  Mutation(
    "a linear scale rises with the noise",
    "guidance/scales.py",
    "1 + 2 * (1 - _time(schedule, sigma))",
    "1 + 2 * _time(schedule, sigma)",
    "test_scales.py",
  ),
  # --- networks as denoisers ---
  Mutation(
    "v is predicted with the other sign",
    "denoisers/scaling.py",
    "Coefficients(alpha**2, -alpha * sigma, alpha",
    "Coefficients(alpha**2, alpha * sigma, alpha",
    "test_scaling.py",
  ),
  Mutation(
    "a network is given x unscaled",
    "denoisers/network.py",
    "(c_in * wide).astype(x.dtype)",
    "x.astype(x.dtype)",
    "test_denoisers.py -k network",
  ),
  # --- guidance ---
  Mutation(
    "the null prediction is taken for the conditional one",
    "guidance/mixing.py",
    "null, conditional = both(x, sigma, cond)",
    "conditional, null = both(x, sigma, cond)",
    "test_guidance.py -k classifier_free",
  ),
  Mutation(
    "an interval is closed at its lower end and open at its upper",
    "guidance/algebra.py",
    "(sigma > low) & (sigma <= high)",
    "(sigma >= low) & (sigma < high)",
    "test_guidance.py test_combine.py -k interval",
  ),
  Mutation(
    "backward guidance steps downhill",
    "guidance/gradients.py",
    "x0 + step_size * climb(x0, sigma, cond)",
    "x0 - step_size * climb(x0, sigma, cond)",
    "test_gradients.py -k backward",
  ),
  Mutation(
    "dynamic thresholding forgets to clip",
    "guidance/clipping.py",
    "jnp.clip(x0, -s, s) * (bound / s)",
    "x0 * (bound / s)",
    "test_gradients.py -k threshold",
  ),
  Mutation(
    "the rescaled rule exchanges phi and 1 - phi",
    "guidance/combine.py",
    "(phi * factor + (1 - phi)) * guided",
    "((1 - phi) * factor + phi) * guided",
    "test_combine.py",
  ),
  Mutation(
    "momentum starts from the sample and not from nothing",
    "guidance/state.py",
    "jnp.zeros_like(x) if self.value is None",
    "x if self.value is None",
    "test_guidance.py -k momentum",
  ),
  # --- solvers ---
  Mutation(
    "ancestral noise grows with the square of eta",
    "schedules/posterior.py",
    "return down, eta * posterior_std",
    "return down, eta**2 * posterior_std",
    "test_solvers.py -k 'ddim or ancestral'",
  ),
  Mutation(
    "DDIM adds noise without stepping below it",
    "solvers/ddim.py",
    "State(move(x, x0, sigma, down) + up * draw(key, x), x0)",
    "State(move(x, x0, sigma, sigma_next) + up * draw(key, x), x0)",
    "test_solvers.py -k ddim",
  ),
  Mutation(
    "the mean shift is scaled the wrong way from level to level",
    "solvers/ddpm.py",
    "jnp.sqrt((1 + sigma**2) / (1 + sigma_next**2))",
    "jnp.sqrt((1 + sigma_next**2) / (1 + sigma**2))",
    "test_guided_diffusion.py -k trajectories",
  ),
  Mutation(
    "churn adds too little noise for the level that it claims",
    "solvers/edm.py",
    "gamma * (2 + gamma)",
    "gamma * (1 + gamma)",
    "test_edm.py -k sampler",
  ),
  Mutation(
    "Heun's method takes the second slope alone",
    "solvers/heun.py",
    "(slope + slope_next) / 2",
    "slope_next",
    "test_solvers.py -k heun",
  ),
  Mutation(
    "DPM-Solver++(2M) turns the ratio of its steps round",
    "solvers/multistep.py",
    "h / (2 * h_last)",
    "h_last / (2 * h)",
    "test_solvers.py -k 2m",
  ),
  Mutation(
    "DPM-Solver++(2S) SDE draws the same noise for both halves of a step",
    "solvers/twice.py",
    "draw(jax.random.fold_in(key, 1), x)",
    "draw(key, x)",
    "test_solvers.py -k noise",
  ),
  # --- sampling, and what is computed of a walk ---
  Mutation(
    "every step draws the same noise",
    "sampling/loop.py",
    "sigma_next, jax.random.fold_in(step_key, i))",
    "sigma_next, step_key)",
    "test_sampling.py -k noise",
  ),
  Mutation(
    "samples start from noise of level 1",
    "sampling/loop.py",
    "noise = sigmas[0] * jax.random.normal(",
    "noise = 1.0 * jax.random.normal(",
    "test_sampling.py -k start",
  ),
  Mutation(
    "particles keep their weights when they are drawn anew",
    "sampling/products.py",
    "log_weights = jnp.where(too_low, 0, log_weights)",
    "log_weights = jnp.where(too_low, log_weights, log_weights)",
    "test_smc.py -k 'loop or gaussian'",
  ),
  Mutation(
    "the learned variance is read upside down",
    "schedules/posterior.py",
    "log_small + (1 + learned) / 2",
    "log_small + (1 - learned) / 2",
    "test_guided_diffusion.py -k 'steps or trajectories'",
  ),
  # --- losses ---
  Mutation(
    "conditions are kept as often as they should be dropped",
    "denoisers/losses.py",
    "jax.random.bernoulli(key, p_uncond,",
    "jax.random.bernoulli(key, 1 - p_uncond,",
    "test_losses.py -k dropped",
  ),
  Mutation(
    "the divergence of two normals is measured by the wrong variance",
    "denoisers/variational.py",
    "jnp.square(mean - other_mean) * jnp.exp(-other_log_variance)",
    "jnp.square(mean - other_mean) * jnp.exp(-log_variance)",
    "test_guided_diffusion.py -k 'losses or bits'",
  ),
  # --- networks ---
  Mutation(
    "the shift takes the place of the scale in a residual block",
    "nn/normalisation.py",
    "factor = (1 + scale_shift[0])",
    "factor = (1 + scale_shift[1])",
    "test_nn.py -k 'group_norm or published'",
  ),
  Mutation(
    "the gradient of group normalisation leaves out that the deviation depends on the input",
    "nn/normalisation.py",
    "(cotangent * slope) - first - normed * second)",
    "(cotangent * slope) - first)",
    "test_nn.py -k group_norm",
  ),
  Mutation(
    "on a GPU queries take the place of keys",
    "nn/layers.py",
    "kernels = split_heads(kernel, self.heads, self.new_order)",
    "kernels = split_heads(kernel, self.heads, self.new_order)[::-1]",
    "test_nn.py -k forms_for_a_gpu",
  ),
  Mutation(
    "a parameter that is used in float32 is converted to half precision before a walk",
    "sampling/casts.py",
    "(kind,) = kinds if len(kinds) == 1 else (None,)",
    "kind = next(iter(kinds - {None}), None)",
    "test_casts.py",
  ),
  Mutation(
    "the UNet's skip connections come first and not last",
    "nn/adm/unet.py",
    "((h, skips.pop()), emb, train)",
    "((skips.pop(), h), emb, train)",
    "test_nn.py -k published",
  ),
  Mutation(
    "the classifier's spatial pool takes the largest pixel and not the mean",
    "nn/adm/classifier.py",
    "output.astype(x.dtype).mean((1, 2))",
    "output.astype(x.dtype).max((1, 2))",
    "test_nn.py -k 'pool or published'",
  ),
  Mutation(
    "a kernel is turned round along one side only",
    "nn/convolution.py",
    "kernel[::-1, ::-1]",
    "kernel[::-1]",
    "test_nn.py -k convolve",
  ),
  Mutation(
    "the blur of smoothed attention is narrower than its width",
    "nn/perturbation.py",
    "np.exp(-0.5 * np.square(offsets / width))",
    "np.exp(-np.square(offsets / width))",
    "test_perturbations.py -k attention",
  ),
  # --- data and training ---
  Mutation(
    "a resumed training starts its epoch at the wrong image",
    "data/batches.py",
    "parts[start * number :]",
    "parts[start:]",
    "test_data_sources.py -k number_of_threads",
  ),
  Mutation(
    "the running mean of the parameters is mostly the newest",
    "training/ema.py",
    "return 1 - jnp.minimum(decay, (1 + step)",
    "return jnp.minimum(decay, (1 + step)",
    "test_training.py -k running_mean",
  ),
  Mutation(
    "the power function's mean has an exponent that is one too small",
    "training/ema.py",
    "(float(std_to_exponent(std)) + 1)",
    "float(std_to_exponent(std))",
    "test_ema.py",
  ),
  Mutation(
    "a label stands for none where the network has no null class",
    "models/model.py",
    "return self.config.null_cond",
    "return self.config.num_classes",
    "test_training.py -k null",
  ),
  Mutation(
    "the learning rate falls with time and not with its square root",
    "training/rates.py",
    "jnp.sqrt(jnp.maximum(step / decay_start, 1))",
    "jnp.maximum(step / decay_start, 1)",
    "test_ema.py -k rate",
  ),
  # --- published networks ---
  Mutation(
    "a network whose time is 1 at the data is given the time of the noise",
    "denoisers/scaling.py",
    "keep, sigma * keep, keep, time_scale * keep",
    "keep, sigma * keep, keep, time_scale * sigma * keep",
    "test_transformers.py",
  ),
  Mutation(
    "the gate of SwiGLU is the other half",
    "nn/dit/layers.py",
    "nn.silu(gate) * x",
    "nn.silu(x) * gate",
    "test_transformers.py",
  ),
  Mutation(
    "channels leaves the other channels unconditional",
    "guidance/combine.py",
    "x0[..., n:]], -1)",
    "x0_base[..., n:]], -1)",
    "test_combine.py test_transformers.py",
  ),
  Mutation(
    "EDM2's concatenation forgets the number of channels",
    "nn/edm2/layers.py",
    "total / math.sqrt(na) * (1 - t) * a",
    "total / math.sqrt(nb) * (1 - t) * a",
    "test_edm_networks.py",
  ),
  Mutation(
    "multistep sampling of consistency models adds the noise of the whole level",
    "solvers/consistency.py",
    "jnp.square(sigma_next) - jnp.square(jnp.asarray(self.sigma_min, sigma_next.dtype))",
    "jnp.square(sigma_next) + 0 * jnp.square(jnp.asarray(self.sigma_min, sigma_next.dtype))",
    "test_consistency.py",
  ),
  Mutation(
    "the autoencoder's downsampling pads both sides",
    "nn/vae/blocks.py",
    "stride=2, padding=(0, 1)",
    "stride=2, padding=(1, 0)",
    "test_autoencoder.py",
  ),
  Mutation(
    "latents are shifted after they are scaled",
    "denoisers/autoencoders.py",
    "return (mean - shift) * scale, ",
    "return mean * scale - shift, ",
    "test_autoencoder.py",
  ),
  Mutation(
    "an Equinox network keeps its dropout",
    "denoisers/frameworks/equinox.py",
    "value=not train)",
    "value=train)",
    "test_frameworks.py",
  ),
  # --- evaluation, weights from elsewhere, the command line, checks, files ---
  Mutation(
    "the Fréchet distance takes the covariances' product once",
    "evaluation/metrics/frechet.py",
    "b.trace - 2 * cross",
    "b.trace - cross",
    "test_evaluation.py",
  ),
  Mutation(
    "imported kernels have height and width exchanged",
    "models/importers/layouts.py",
    "len(ours) - 2, *range(len(ours) - 2))",
    "len(ours) - 2, *reversed(range(len(ours) - 2)))",
    "test_interop.py -k 'gives_its_numbers or identity'",
  ),
  Mutation(
    "an unfinished run counts the samples of its last batch alone",
    "generate/unfinished.py",
    "self._count(self.done + num)",
    "self._count(num)",
    "test_cli.py -k killed",
  ),
  Mutation(
    "a label that is one too large passes the check",
    "_core/checks/arguments.py",
    "leaf >= num_classes + null",
    "leaf > num_classes + null",
    "test_denoisers.py test_mixtures.py -k label",
  ),
  Mutation(
    "a failed write leaves its part behind",
    "_core/files.py",
    "part.unlink(missing_ok=True)",
    "part.exists()",
    "test_data.py test_statistics.py -k 'whole or failed or atomic'",
  ),
]


class Outcome(NamedTuple):
  """What became of a fault: ``caught``, ``missed`` or ``error``; how long it took; and what was said."""

  verdict: str
  seconds: float
  said: str


def stale(tree: Path, mutations: list[Mutation]) -> list[str]:
  """Say which rows do not fit the code: their text has to occur once in their file."""
  found = []
  for mutation in mutations:
    path = tree / "jaxguide" / mutation.file
    count = path.read_text().count(mutation.old) if path.is_file() else 0
    if count != 1:
      found.append(f"{mutation.name!r} is stale: {mutation.old!r} occurs {count} times in {mutation.file}, not once")
  return found


def run_tests(tree: Path, tests: str, slow: bool) -> Outcome:
  """Run the tests of a fault in a tree, up to the first that fails."""
  words = re.findall(r"'[^']*'|\S+", tests)
  arguments = [f"tests/{word}" if word.endswith(".py") else word.strip("'") for word in words]
  command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--tb=no", *arguments]
  start = time.perf_counter()
  try:
    done = subprocess.run(
      [*command, "-m", "" if slow else "not slow"],
      cwd=tree,
      env={**os.environ, "PYTHONPATH": str(tree), "COLUMNS": "300"},
      capture_output=True,
      text=True,
      timeout=LIMIT,
      check=False,
    )
  except subprocess.TimeoutExpired:
    return Outcome("error", time.perf_counter() - start, f"not finished after {LIMIT} s")
  seconds = time.perf_counter() - start
  failed = re.findall(r"^(?:FAILED|ERROR) tests/(.*?)(?: - .*)?$", done.stdout, re.MULTILINE)
  if done.returncode == 0:
    return Outcome("missed", seconds, (done.stdout.strip().splitlines() or [""])[-1])
  if done.returncode == 1 and failed and "::" in failed[0]:
    return Outcome("caught", seconds, failed[0])
  # Tests that cannot be collected, or none: the fault was not put to the test.
  last = (done.stdout + done.stderr).strip().splitlines()[-1:]
  return Outcome("error", seconds, f"pytest's status {done.returncode}: {''.join(last)}")


def attempt(tree: Path, mutation: Mutation, slow: bool) -> Outcome:
  """Break a tree, run the tests, and mend it."""
  path = tree / "jaxguide" / mutation.file
  whole = path.read_text()
  path.write_text(whole.replace(mutation.old, mutation.new))
  try:
    return run_tests(tree, mutation.tests, slow)
  finally:
    path.write_text(whole)


def main() -> int:
  """Run the command."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
  parser.add_argument("--list", action="store_true", help="list the faults and the tests that should notice")
  parser.add_argument("--only", action="append", metavar="NAME", help="only faults with this in their name or file")
  parser.add_argument("--check", action="store_true", help="run the same tests on the unbroken tree: all should pass")
  parser.add_argument("--slow", action="store_true", help="run tests that are marked slow, too")
  parser.add_argument("--jobs", type=int, default=1, help="faults that are tried at a time (1)")
  parser.add_argument("--tree", type=Path, default=Path(__file__).parents[1], help="another tree of the project")
  options = parser.parse_args()

  chosen = [
    mutation
    for mutation in MUTATIONS
    if not options.only or any(text in mutation.name or text in mutation.file for text in options.only)
  ]
  if not chosen:
    parser.error(f"no fault is called {' or '.join(options.only)}: --list names them")
  if options.list:
    for mutation in chosen:
      print(f"{mutation.name}\n  {mutation.file}: {mutation.old} -> {mutation.new}\n  {mutation.tests}")
    return 0
  if wrong := stale(options.tree, chosen):
    print("\n".join(wrong), file=sys.stderr)
    return 2

  width = max(len(mutation.name) for mutation in chosen)
  begun = time.perf_counter()
  with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
    trees: queue.Queue[Path] = queue.Queue()
    for number in range(min(options.jobs, len(chosen))):
      trees.put(shutil.copytree(options.tree, Path(folder, str(number)), ignore=LEFT_OUT))

    def tried(mutation: Mutation) -> Outcome:
      tree = trees.get()
      try:
        if options.check:
          return run_tests(tree, mutation.tests, options.slow)
        return attempt(tree, mutation, options.slow)
      finally:
        trees.put(tree)

    verdicts = []
    with ThreadPoolExecutor(trees.qsize()) as pool:
      for mutation, outcome in zip(chosen, pool.map(tried, chosen), strict=True):
        verdict = {"missed": "passes", "caught": "fails"}.get(outcome.verdict) if options.check else None
        verdicts.append(verdict or outcome.verdict)
        print(f"{mutation.name:{width}}  {verdicts[-1]:6}  {outcome.seconds:5.0f} s  {outcome.said}", flush=True)

  good = verdicts.count("passes" if options.check else "caught")
  least = len(chosen) if options.check or options.only else LEAST
  said = "pass unbroken" if options.check else "are caught"
  print(f"{good} of {len(chosen)} {said}, at least {least} should be; {time.perf_counter() - begun:.0f} s")
  return 0 if good >= least else 1


if __name__ == "__main__":
  sys.exit(main())
