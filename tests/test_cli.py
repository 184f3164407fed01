import dataclasses
import functools
import itertools
import os
import pathlib
import shutil
import subprocess
import sys
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import readme
from jax.tree_util import Partial

import jaxguide
import jaxguide as jg
from jaxguide import cli, data, evaluation, generate, keys, schedules, solvers
from jaxguide.generate import methods, rules, unfinished
from jaxguide.generate.plan import plan
from jaxguide.models import folders as models
from jaxguide.models.model import init_params
from jaxguide.training import ModelConfig

# A block, attention and a block in the middle, and one block after them: no more, since all of it is compiled.
TINY = {"model_channels": 8, "channel_mult": (1,), "num_res_blocks": 0, "attention_resolutions": ()}
# What is sampled with these is one program: cfg by default, a micro-batch of 4, and 2 steps.
QUICK = ("--steps", 2, "--batch-size", 4)


def save(folder, config):
  """Write a model that knows nothing; of random parameters, since the last convolution starts at zero."""
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
  params = jax.tree.map(lambda leaf: (0.15 * rng.normal(size=leaf.shape)).astype(leaf.dtype), shapes)
  models.save(folder, models.Model(config, params))


read = functools.cache(models.load)  # For plans of networks that no test changes.


@functools.cache
def load(folder, **fields):
  """Read a model as the command does, which says what its network computes in."""
  model = models.load(folder)
  if not model.config.network.startswith("tiny:"):
    fields = {"dtype": "float32", "cudnn_attention": None, **fields}
  fields = {**model.config.fields, **fields}
  return dataclasses.replace(model, config=dataclasses.replace(model.config, fields=fields))


def assert_same(got, wanted):
  """Both are the same functions of the same numbers."""
  assert jax.tree.structure(got) == jax.tree.structure(wanted)
  chex.assert_trees_all_equal(got, wanted)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """Networks that know nothing, which is enough to sample. All but UNets compile fast; those have blocks to name."""
  folder = tmp_path_factory.mktemp("models")
  for name, network, fields in (
    ("denoiser", "tiny:Mlp", {}),
    ("unet", "unet", {**TINY, "num_head_channels": 8}),
    ("weak", "unet", {**TINY, "num_res_blocks": 1}),
    ("classifier", "tiny:Classify", {}),
    ("larger", "classifier", {**TINY, "pool": "adaptive"}),
  ):
    shape = (16, 16, 1) if name == "larger" else (8, 8, 1)
    save(folder / name, ModelConfig(network, fields, image_shape=shape, num_classes=10))
  return folder


@pytest.fixture
def run(folders, monkeypatch, capsys):
  """Run the command; give its exit status, what it printed, and its errors."""

  def run(*args):
    more = ["--no-progress"] if args[:1] == ("sample",) else []
    if more and "--model" not in args:
      more += ["--model", folders / "denoiser"]
    monkeypatch.setattr(sys, "argv", ["jaxguide", *map(str, (*args, *more))])
    try:
      cli.main()
      status = 0
    except SystemExit as exit:
      status = exit.code
    return status, *capsys.readouterr()

  return run


COUNTED = """
import collections, jax
from jaxguide import cli
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: counts.update([event]))
try:
  cli.main()
finally:
  print(*(counts[f"/jax/compilation_cache/{what}"] for what in ("compile_requests_use_cache", "cache_hits")))
"""


@pytest.mark.slow
def test_a_second_process_compiles_nothing(folders, tmp_path):
  environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}

  def draw(seed):
    """Draw a sample in a process of its own; give how many programs it asked for, and how many had been kept."""
    options = {"out": tmp_path / f"{seed}.png", "steps": 2, "num": 1, "model": folders / "denoiser", "seed": seed}
    made = subprocess.run(
      [sys.executable, "-c", COUNTED, "sample", *(f"--{name}={value}" for name, value in options.items())],
      env=environment | {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"},
      cwd=pathlib.Path(__file__).parent,  # Where the network of the model is.
      stdout=subprocess.PIPE,
      text=True,
      check=True,
    )
    return tuple(map(int, made.stdout.splitlines()[-1].split()))

  asked, found = draw(0)
  assert found < asked
  asked, found = draw(1)
  assert found == asked


def test_sample_writes_npz(run, tmp_path):
  out = tmp_path / "new" / "samples.npz"
  status, printed, errors = run("sample", "--out", out, "--label", 3, "--num", 5, *QUICK)
  assert (status, errors) == (0, "")
  assert str(out) in printed
  images, labels = data.load_npz(out)
  assert images.shape == (5, 8, 8, 1)
  assert labels.tolist() == [3] * 5
  assert len(np.unique(images, axis=0)) == 5

  def drawn(name, *args):
    assert run("sample", "--out", tmp_path / name, "--steps", 2, *args)[0] == 0
    return data.load_npz(tmp_path / name)

  # Sample i is a matter of seed, i and label, not of how many there are or how they are cut.
  np.testing.assert_array_equal(drawn("more.npz", "--label", 3, "--num", 7)[0][:5], images)
  small = ("--num", 5, "--batch-size", 4)
  assert (drawn("other.npz", "--label", 3, *small, "--seed", 1)[0] != images).any()
  # The labels that are written are those that were sampled by.
  mixed, labels = drawn("mixed.npz", "--label", 3, "--label", 7, *small)
  assert labels.tolist() == [3, 7, 3, 7, 3]
  seven = drawn("seven.npz", "--label", 7, *small)[0]
  assert (seven != images).any((1, 2, 3)).all()
  for i, label in enumerate(labels):
    np.testing.assert_array_equal(mixed[i], (images if label == 3 else seven)[i])


@pytest.mark.parametrize("guidance", ["none", "cfg", "classifier"])
def test_sample_takes_all_classes_in_turn(run, folders, tmp_path, guidance):
  planned = plan(generate.Settings(str(folders / "denoiser"), num=12, guidance=guidance))
  for labels in (planned.labels, planned.cond):
    assert labels.tolist() == [*range(10), 0, 1]
  if guidance == "cfg":
    assert run("sample", "--out", tmp_path / "s.npz", "--num", 12, *QUICK)[0] == 0
    assert data.load_npz(tmp_path / "s.npz")[1].tolist() == [*range(10), 0, 1]


@pytest.mark.parametrize(("labels", "num", "rows", "columns"), [([3], 16, 4, 4), ([3, 7], 24, 2, 12)])
def test_sample_draws_every_sample(run, tmp_path, labels, num, rows, columns):
  from PIL import Image

  asked = [part for label in labels for part in ("--label", label)]
  status, _, _ = run("sample", "--out", tmp_path / "s.png", *asked, "--num", num, *QUICK)
  assert status == 0
  picture = Image.open(tmp_path / "s.png")
  assert picture.format == "PNG"
  # Each is 48 pixels wide; margins and the text take less than one more.
  assert columns <= picture.size[0] // 48 < columns + 2
  assert rows <= picture.size[1] // 48 < rows + 2


def test_image_to_image(run, folders, tmp_path):
  start, out = tmp_path / "start.npz", tmp_path / "out.npz"
  images = np.random.default_rng(0).integers(60, 200, (2, 8, 8, 1)).astype(np.uint8)
  data.save_npz(start, images)
  given = ("--init", start, "--label", 3, "--num", 3, "--batch-size", 2, "--steps", 4, "--grid", "karras")

  def drawn(*args):
    assert run("sample", "--out", out, "--overwrite", *given, *args)[0] == 0
    return data.load_npz(out)[0].astype(float)

  # So little noise leaves the images, in turn, as they are, but for what the last step's network makes of them.
  near = drawn("--init-level", 0.002)
  levels = np.asarray(jg.karras(4))
  made = plan(
    generate.Settings(model=str(folders / "denoiser"), init=str(start), init_level=0.002, steps=4, grid="karras")
  )
  np.testing.assert_array_equal(made.sigmas, levels[-2:])
  assert np.abs(near - images[[0, 1, 0]]).max() <= 2
  # The sample is what the library draws from the same start.
  settings = generate.Settings(
    model=str(folders / "denoiser"), init=str(start), labels=[3], num=3, steps=4, grid="karras"
  )
  made = plan(settings)
  np.testing.assert_array_equal(made.sigmas, levels[2:])
  wanted = jg.sample_batch(
    made.denoiser, keys.seed_key(0), made.cond, shape=(8, 8, 1), sigmas=levels[2:], solver=made.solver,
    x_init=data.from_uint8(images[[0, 1, 0]]), add_noise=True,
  )  # fmt: skip
  assert np.abs(drawn() - data.to_uint8(wanted)).max() <= 1
  for args, message in (
    (("--init-level", 0), "init_level must be above 0"),
    (("--init-level", 1e4), "init_level must lie between the grid's least and first level, 0.002 and 80, got 10000"),
    (("--init-level", 1e-4), "init_level must lie between the grid's least and first level, 0.002 and 80, got 0.0001"),
    (("--init", tmp_path / "none.npz"), "there is no file"),
  ):
    status, _, errors = run("sample", "--out", tmp_path / "no.npz", *given, *args)
    assert status != 0
    assert message in errors
  assert "give both" in run("sample", "--out", out, "--init-level", 1)[2]
  data.save_npz(start, images[:, :4])
  assert "but the model makes (8, 8, 1)" in run("sample", "--out", tmp_path / "no.npz", *given)[2]


def test_every_option_reaches_the_settings(run, tmp_path, monkeypatch):
  asked = []
  monkeypatch.setattr(generate, "run", lambda out, settings, **options: asked.append((out, settings, options)))
  wanted = generate.Settings(
    model="elsewhere",
    classifier="judge",
    base_samples="low.npz",
    init="start.npz",
    init_level=2.5,
    labels=("3", "7"),
    num=5,
    guidance=("cfg:combine=rescaled", "classifier"),
    join="parallel",
    scale=1.5,
    solver="ddpm:variance=large",
    steps="ddim25",
    grid="respaced",
    dtype="bfloat16",
    matmul_precision="highest",
    cudnn_attention=True,
    clip=False,
    seed=9,
    batch_size=2,
    vae="autoencoder",
    vae_tile=64,
  )
  args = []
  for field in dataclasses.fields(wanted):
    value, option = getattr(wanted, field.name), "--" + field.name.replace("_", "-")
    assert value != field.default, field.name
    for each in value if isinstance(value, tuple) else (value,):
      match each:
        case bool():
          args.append(option if each else option.replace("--", "--no-", 1))
        case _:
          args += [option.removesuffix("s") if field.name == "labels" else option, each]
  command = ["jaxguide", "sample", "--out", tmp_path / "s.npz", "--no-progress", *args]
  monkeypatch.setattr(sys, "argv", list(map(str, command)))
  with pytest.raises(SystemExit) as exit:
    cli.main()
  assert exit.value.code in (0, None)
  ((out, settings, options),) = asked
  assert (out, settings) == (tmp_path / "s.npz", wanted)
  assert options["progress"] is False


def test_a_classifier_that_is_not_used_is_said(run, folders, tmp_path):
  options = ("--classifier", folders / "classifier", "--guidance", "cfg", "--num", 2, "--steps", 2)
  status, _, errors = run("sample", "--out", tmp_path / "s.npz", *options)
  assert status == 0
  assert "guidance 'cfg' does not use the classifier" in errors


@pytest.mark.parametrize(("args", "wanted"), [((), "default"), (("--matmul-precision", "highest"), "highest")])
def test_products_have_the_precision_that_is_asked_for(run, tmp_path, monkeypatch, args, wanted):
  seen = []

  def batches(denoiser, key, cond, *, num, shape, **options):
    seen.append(jax.config.jax_default_matmul_precision)
    yield jg.sampling.Share(0, num, np.arange(num), np.zeros((num, *shape), np.float32))

  monkeypatch.setattr(jg.sampling, "sample_shares", batches)
  assert run("sample", "--out", tmp_path / "s.npz", "--num", 2, *args)[0] == 0
  assert seen == [wanted]


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (["--label", 12], "label 12 is not one of the 10 classes, 0 to 9"),
    (["--label", 10], "label 10 is not one of the 10 classes"),  # the null label is no class to ask for
    (["--label", -1], "label -1 is not one of the 10 classes"),
    (["--scale", "nan"], "scale must be finite, got nan"),
    (["--scale", "inf"], "scale must be finite, got inf"),
    (["--steps", 0], "steps must be a whole number of at least 1, got 0"),
    (["--num", 0], "num must be a whole number of at least 1, got 0"),
    (["--batch-size", 0], "batch_size must be a whole number of at least 1"),
    (["--seed", -1], "seed must be a whole number from 0 to 18446744073709551615"),
    (["--solver", "dim"], "unknown solver 'dim': did you mean 'ddim'?"),
    (["--solver", "heun:eta=1"], "'heun' has no option 'eta'; it has none"),
    (["--solver", "ddim:eta=2"], "eta must be between 0 and 1, got 2.0"),
    (["--solver", "ddim:eta"], "'ddim:eta' must be written NAME:option=value,option=value; 'eta' is not option=value"),
    (["--solver", "ddim:eta=1,eta=0"], "has the option eta twice"),
    (["--solver", "ddim:eta=much"], "eta of 'ddim' must be a number, got 'much'"),
    (["--solver", "unipc:predictor=2.5"], "predictor of 'unipc' must be a whole number, got '2.5'"),
    (["--solver", "unipc:predictor=4"], "predictor must be 1, 2 or 3, got 4"),
    (["--solver", "ddpm:scale=2"], "'ddpm' has no option 'scale'; it has variance, gradient_at"),
    (["--guidance", "none", "--scale", 2], "guidance 'none' takes no scale"),
    (["--guidance", "cfg", "--classifier", "somewhere"], "there is no model in"),
    (["--classifier", "somewhere"], "there is no model in"),
    (["--solver", "ddim:variance=small"], "'ddim' has no option 'variance'; it has eta"),
    (["--solver", "ddpm:variance=big"], "unknown variance 'big'"),
    (["--solver", "ddpm:gradient_at=mean"], "gradient_at is for solver 'ddpm' with guidance 'classifier'"),
    (["--label", 4294967299], "label 4294967299 is not one of the 10 classes"),
    (["--steps", "²"], "grid 'karras' takes a number of steps, got '²'"),
    (["--solver", "ddpm:variance=learned_range"], "has learned no variance: choose small or large"),
    (["--grid", "iddpm"], "unknown grid 'iddpm'"),
    (["--solver", "ddim:churn=10"], "'ddim' has no option 'churn'"),
    (["--solver", "edm-stochastic:churn=-1"], "churn must be at least 0"),
    (["--steps", "ddim25"], "grid 'karras' takes a number of steps, got 'ddim25'"),
    (["--grid", "respaced"], "grid 'respaced' is for models of a discrete process"),
    (["--guidance", "cgf"], "unknown guidance 'cgf': did you mean 'cfg'?"),
    (["--guidance", "cfg", "--guidance", "none"], "guidance must be none alone, or one or more others; got cfg, none"),
    (["--guidance", "cfg:scale=2", "--scale", 3], "scale is given twice, as 3 and in 'cfg:scale=2'"),
    (["--guidance", "cfg:phi=0.5"], "'cfg' has no option 'phi'; it has scale, profile, combine, sigma_lo"),
    (["--guidance", "cfg:combine=rescald"], "unknown combine rule 'rescald': did you mean 'rescaled'?"),
    (["--guidance", "cfg:combine=rescaled,phi=2"], "phi must be between 0 and 1"),
    (["--guidance", "cfg:profile=sine"], "unknown scale profile 'sine'"),
    (["--guidance", "cfg:profile=raised-cosine,power=2"], "'cfg' has no option 'power'"),
    (["--guidance", "cfg:sigma_lo=3,sigma_hi=2"], "sigma_lo must be below sigma_hi"),
    (["--guidance", "classifier:combine=linear"], "'classifier' has no option 'combine'"),
    (["--guidance", "clip", "--scale", 2], "guidance 'clip' takes no scale"),
    (["--guidance", "autoguidance"], "'autoguidance' needs its option weak: autoguidance:weak=..."),
    (["--guidance", "autoguidance:weak=nowhere"], "there is no model in"),
    (["--guidance", "compose:labels=3/12,scales=1/1"], "label 12 is not one of the 10 classes"),
    (
      ["--guidance", "compose:labels=3/x,scales=1/1"],
      "the classes of the model have no names: give label as a number, got 'x'",
    ),
    (
      ["--guidance", "compose:labels=3,scales=1/1"],
      "compose needs one scale for each label, got 2 scales and 1 labels",
    ),
    (["--guidance", "cfg", "--guidance", "clip", "--join", "serial"], "unknown way to join 'serial'"),
    (["--guidance", "none", "--join", "parallel"], "there is no guidance in the denoiser to join"),
    (["--guidance", "cfg:profile=cfg++", "--solver", "heun"], "profile 'cfg++' is for solvers euler, ddim"),
    (["--guidance", "compose:labels=1,scales=nan"], "scales must be finite"),
    (["--guidance", "reconstruction:level=inf"], "level must be finite"),
    (["--guidance", "classifier", "--guidance", "classifier", "--solver", "ddpm"], "by one classifier"),
    (["--guidance", "classifier:ratio=1", "--solver", "ddpm"], "leave out ratio, or choose another solver"),
    (["--guidance", "classifier:every=0"], "every must be a whole number of at least 1, got 0"),
    (["--guidance", "classifier:every=-2", "--solver", "ddpm"], "every must be a whole number of at least 1, got -2"),
    (["--guidance", "classifier:every=1.5"], "every of 'classifier' must be a whole number, got '1.5'"),
    (["--guidance", "cfg:every=2"], "'cfg' has no option 'every'"),
    (["--solver", "ddpm:every=2"], "'ddpm' has no option 'every'; it has variance, gradient_at"),
    (["--grid", "kras"], "unknown grid 'kras': did you mean 'karras'?"),
    (["--grid", "karras:rho=0"], "rho must be at least 1"),
    (["--grid", "karras:sigma_min=0"], "sigma_min must be above 0"),
    (["--grid", "karras:sigma_max=0.001"], "sigma_min must be above 0 and below sigma_max"),
    (["--scale", "much"], "'--scale'"),
    (["--scael", 2], "--scael"),
  ],
  ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence_and_status_2(run, tmp_path, args, message):
  status, printed, errors = run("sample", "--out", tmp_path / "s.npz", *args)
  assert status == 2
  assert message in errors
  assert "Traceback" not in errors
  assert printed == ""
  assert not list(tmp_path.iterdir())


def test_a_block_that_the_network_does_not_have(run, folders, tmp_path):
  args = "--model", folders / "unet", "--guidance", "pag:blocks=middle_block_9"
  status, printed, errors = run("sample", "--out", tmp_path / "s.npz", *args)
  assert (status, printed) == (2, "")
  assert "unknown attention block 'middle_block_9'" in errors
  assert "Traceback" not in errors
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["s.jpg", "s", "file/s.npz", "folder.npz"])
def test_an_output_that_cannot_be_written(run, tmp_path, name):
  (tmp_path / "file").touch()
  (tmp_path / "folder.npz").mkdir()
  status, _, errors = run("sample", "--out", tmp_path / name)
  assert status == 2
  assert errors.startswith(("jaxguide: cannot write", "jaxguide: unknown format", "jaxguide: out must be a file"))
  assert errors.count("\n") == 1


def test_models_that_are_missing_torn_or_do_not_match(run, folders, tmp_path, monkeypatch, capsys):
  def error(*args):
    monkeypatch.setattr(sys, "argv", ["jaxguide", "sample", "--out", str(tmp_path / "s.npz"), *map(str, args)])
    with pytest.raises(SystemExit) as exit:
      cli.main()
    assert exit.value.code == 2
    return capsys.readouterr().err

  assert "there is no model in" in error("--model", tmp_path / "nowhere")
  assert "is a classifier, and samples are drawn from a denoiser" in error("--model", folders / "larger")
  assert "unet holds a unet, not a classifier" in error("--model", folders / "unet", "--classifier", folders / "unet")
  both = ("--model", folders / "denoiser", "--guidance", "classifier", "--classifier")
  assert "has image_shape (16, 16, 1), but the model has (8, 8, 1)" in error(*both, folders / "larger")
  assert not (tmp_path / "s.npz").exists()


def test_demo_refuses_an_output_before_any_work(run, tmp_path):
  (tmp_path / "file").touch()
  status, printed, errors = run("demo", "--out", tmp_path / "file" / "demo")
  assert (status, printed) == (2, "")
  assert "file is not a folder" in errors
  assert errors.count("\n") == 1


def test_ctrl_c_says_how_to_go_on(run, tmp_path, monkeypatch):
  def interrupted(*args, **options):
    raise KeyboardInterrupt

  monkeypatch.setattr(generate, "run", interrupted)
  status, _, errors = run("sample", "--out", tmp_path / "s.npz")
  assert status == 130
  assert "Start the same command again to go on" in errors


def test_help_says_what_there_is(run):
  status, printed, _ = run("sample", "--help-all")
  assert status == 0
  words = " ".join(printed.split())
  assert "the power in p(x) p(y|x)^scale" in words
  named = [name for rows in generate.overview().values() for name, _, _ in rows if name]
  assert {"cfg", "unipc", "karras", "rescaled", "cfg++"} <= set(named)
  printed = " ".join(run("methods")[1].split())
  for name in named:
    assert f" {name} " in words
    assert f" {name} " in printed


@pytest.mark.parametrize("file", readme.FILES)
def test_the_tables_are_those_of_the_code(file):
  assert (readme.ROOT / file).read_text() == readme.filled(file), "run python tests/readme.py"


def test_guidances_name_functions_that_there_are():
  for method in methods.METHODS.values():
    assert callable(getattr(jaxguide, method.function))


# What `--guidance` can say of these networks, and what the library calls it: ``(model, null, classifier, weak)``.
ASKED = {
  "cfg:scale=3": lambda m, c, w: jg.classifier_free(10, 3.0),
  "cfg": lambda m, c, w: jg.classifier_free(10, 2.0),
  "cfg:scale=3,combine=rescaled,phi=0.9": lambda m, c, w: jg.classifier_free(10, 3.0, jg.rescaled(0.9)),
  "cfg:scale=3,combine=projected,norm_threshold=0.5,momentum=-0.5": lambda m, c, w: jg.classifier_free(
    10, 3.0, jg.projected(norm_threshold=0.5, momentum=-0.5)
  ),
  "cfg:scale=3,combine=zero-star": lambda m, c, w: jg.classifier_free(10, 3.0, jg.zero_star()),
  "cfg:scale=3,combine=channels,channels=1,of=rescaled,phi=0.9": lambda m, c, w: jg.classifier_free(
    10, 3.0, jg.combine.channels(1, jg.rescaled(0.9))
  ),
  "cfg:scale=3,step_lo=1": lambda m, c, w: jg.interval(jg.classifier_free(10, 3.0), step_lo=1, sigmas=jg.karras(3)),
  "cfg:scale=3,combine=tangential": lambda m, c, w: jg.classifier_free(10, 3.0, jg.tangential),
  "cfg:scale=3,combine=frequency-decoupled,ratios=1/0.2": lambda m, c, w: jg.classifier_free(
    10, 3.0, jg.frequency_decoupled(1.0, 0.2)
  ),
  "cfg:scale=3,profile=linear,floor=1.5": lambda m, c, w: jg.classifier_free(
    10, jg.scales.linear(3.0, m.config.noise_schedule, 1.5)
  ),
  "cfg:scale=3,profile=raised-cosine": lambda m, c, w: jg.classifier_free(
    10, jg.scales.raised_cosine(3.0, m.config.noise_schedule)
  ),
  "cfg:scale=3,profile=powered-cosine,power=0.5": lambda m, c, w: jg.classifier_free(
    10, jg.scales.powered_cosine(3.0, m.config.noise_schedule, 0.5)
  ),
  "cfg:scale=0.6,profile=cfg++": lambda m, c, w: jg.classifier_free(10, jg.scales.cfg_pp(0.6, jg.karras(3), 0.0)),
  "cfg:scale=3,sigma_lo=0.5,sigma_hi=20": lambda m, c, w: jg.interval(jg.classifier_free(10, 3.0), 0.5, 20.0),
  "cfg:ratio=0.3": lambda m, c, w: jg.normalized(jg.classifier_free(10, 2.0), 0.3),
  "classifier:scale=30": lambda m, c, w: jg.classifier(c.log_prob, 30.0),
  "classifier:scale=30,every=2": lambda m, c, w: jg.classifier(c.log_prob, 30.0, every=2),
  "cfg:scale=1": lambda m, c, w: jg.classifier_free(10, jg.scales.static(1)),
  "classifier:scale=0": lambda m, c, w: jg.classifier(c.log_prob, jg.scales.static(0)),
  "autoguidance:scale=3,weak={weak}": lambda m, c, w: jg.autoguidance(w.denoiser, 3.0),
  "pag:scale=8": lambda m, c, w: jg.autoguidance(_perturbed(m, "identity", "middle_block_1"), 8.0),
  "seg:scale=8,width=1": lambda m, c, w: jg.autoguidance(_perturbed(m, "smooth", "middle_block_1", width=1.0), 8.0),
  "slg:scale=8,blocks=middle_block_0/middle_block_1": lambda m, c, w: jg.autoguidance(
    _perturbed(m, "skip", "middle_block_0", "middle_block_1"), 8.0
  ),
  "reconstruction:scale=30": lambda m, c, w: jg.reconstruction(_clean(c, 0.01), 30.0),
  "reconstruction:scale=30,every=3": lambda m, c, w: jg.reconstruction(_clean(c, 0.01), 30.0, 3),
  "backward:scale=30,steps=2": lambda m, c, w: jg.backward_guidance(_clean(c, 0.01), 30.0, 2),
  "backward:scale=30,every=2": lambda m, c, w: jg.backward_guidance(_clean(c, 0.01), 30.0, 1, 2),
  "clip:bound=0.2": lambda m, c, w: jg.clip_x0(0.2),
  "dynamic-threshold:quantile=0.5,bound=0.1": lambda m, c, w: jg.dynamic_threshold(0.5, 0.1),
}
GRADIENT = ("classifier", "reconstruction", "backward")  # of a classifier: the network goes without the label


def _perturbed(model, kind, *blocks, **options):
  return jg.perturbed(model.denoiser, jg.Perturbation(kind, blocks, **options))


def _clean(classifier, level):
  return Partial(methods._at_level, classifier.log_prob, level)


@pytest.fixture(scope="module")
def networks(folders):
  """The UNet, the classifier and the weak UNet, as the command has them."""
  return [load(folders / name) for name in ("unet", "classifier", "weak")]


def settings(folders, **given):
  return generate.Settings(str(folders / "unet"), num=2, steps=3, labels=[3], **given)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("asked", ASKED)
def test_every_guidance_by_name(folders, networks, asked, clip):
  got = plan(settings(folders, guidance=asked.format(weak=folders / "weak"), clip=clip), read).denoiser
  name = asked.partition(":")[0]
  parts = [jg.unconditional(10)] if name in GRADIENT else []
  parts.append(ASKED[asked](*networks))
  if clip and name not in ("clip", "dynamic-threshold"):
    # What the network says is clipped, and what a classifier does to it is not.
    parts.insert(1 if name == "classifier" else len(parts), jg.clip_x0())
  assert_same(got, jg.chain(*parts)(networks[0].denoiser))


X, SIGMA = np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8, 1), np.float32(0.7)


def operations(denoiser):
  """Count the operations of a program whose argument is the denoiser with its scale, as in `jaxguide.sample_batch`."""
  compiled = jax.jit(lambda denoiser: denoiser(jnp.asarray(X), jnp.asarray(SIGMA), jnp.asarray(3))).lower(denoiser)
  return compiled.compile().cost_analysis()["flops"]


@pytest.fixture(scope="module")
def of_one_pass(networks):
  """The operations of the network alone: of the larger one, where what passes share is little."""
  return operations(networks[2].denoiser)


@pytest.mark.parametrize(
  ("asked", "passes"),
  [
    ("cfg:scale=0", 1),
    ("cfg:scale=1", 1),
    ("cfg:scale=2", 2),
    ("classifier:scale=0", 1),
    ("pag:scale=1", 1),
    ("reconstruction:scale=0", 1),
    ("backward:scale=0", 1),
    ("cfg:scale=1,profile=raised-cosine", 2),
  ],
)
def test_at_scales_of_0_and_1_one_pass_of_the_network_runs(folders, of_one_pass, asked, passes):
  asked = dataclasses.replace(settings(folders, guidance=asked), model=str(folders / "weak"))
  got = operations(plan(asked, read).denoiser) / of_one_pass
  assert got == pytest.approx(passes, rel=0.05)


def test_every_guidance_is_asked():
  names = [asked.partition(":")[0] for asked in ASKED]
  assert {*names, "compose"} == set(methods.METHODS)
  for option, table in (("combine", rules.COMBINES), ("profile", rules.PROFILES)):
    assert {name for name in table if any(f"{option}={name}" in asked for asked in ASKED)} >= {*table} - {
      "linear",
      "constant",
    }


def test_composed_labels_are_those_that_are_asked_for(folders, networks):
  model = networks[0].denoiser
  got = plan(settings(folders, guidance="compose:scale=2,labels=3/4,scales=1/-1", clip=False), read).denoiser
  wanted = jg.compose(10, np.array([2.0, 1.0, -1.0], np.float32))(model)
  ours, theirs, bare = jax.jit(
    lambda x, sigma, label: (
      got(x, sigma, label),
      wanted(x, sigma, jnp.stack([label, 3, 4])),
      model(x, sigma, label),
    )
  )(X, SIGMA, np.int32(5))
  chex.assert_trees_all_close(ours, theirs, rtol=1e-5)
  assert np.abs(np.asarray(ours) - bare).max() > 1e-3


@pytest.mark.parametrize(
  "asked",
  ["cfg:scale=3,combine=projected,momentum=-0.5,sigma_lo=0.5,sigma_hi=100", "reconstruction:scale=30"],
)
def test_a_guidance_changes_what_is_sampled(run, tmp_path, asked):
  def drawn(name, guidance):
    args = "--label", 3, "--num", 4, "--no-clip", "--guidance", guidance, *QUICK
    status, _, errors = run("sample", "--out", tmp_path / name, *args)
    assert (status, errors) == (0, "")
    return data.load_npz(tmp_path / name)[0]

  assert (drawn("a.npz", asked) != drawn("b.npz", "none")).any()


def test_guidances_are_joined(folders, networks):
  model, classifier, _ = networks
  cfg, away = jg.classifier_free(10, 6.0), jg.classifier(classifier.log_prob, 40.0)
  texts = ("cfg:scale=6", "classifier:scale=40")
  chain, again, parallel, swapped = (
    plan(settings(folders, guidance=guidance, **join), read).denoiser
    for guidance, join in (
      (texts, {}),
      (texts, {"join": "chain"}),
      (texts, {"join": "parallel"}),
      (texts[::-1], {"join": "parallel"}),
    )
  )
  wanted = jg.chain(cfg, jg.clip_x0(), away)(model.denoiser)
  assert_same(chain, wanted)
  assert_same(again, wanted)
  # A classifier beside another guidance leaves the network its label, in whatever order they come.
  assert_same(parallel, jg.chain(jg.parallel(cfg, away), jg.clip_x0())(model.denoiser))
  assert_same(swapped, jg.chain(jg.parallel(away, cfg), jg.clip_x0())(model.denoiser))


BY_NAME = {
  "euler": jg.Euler(),
  "ddim": jg.DDIM(),
  "ddim:eta=0.5": jg.DDIM(0.5),
  "ddpm": jg.DDPM(),
  "ddpm:variance=large": jg.DDPM("large"),
  "heun": jg.Heun(),
  "dpmpp-2m": jg.DPMpp2M(),
  "euler-ancestral": jg.EulerAncestral(),
  "dpmpp-3m": jg.DPMpp3M(),
  "dpmpp-2m-sde": jg.DPMpp2MSDE(),
  "dpmpp-2m-sde:eta=0.5,solver_type=heun": jg.DPMpp2MSDE(eta=0.5, solver_type="heun"),
  "dpmpp-3m-sde": jg.DPMpp3MSDE(),
  "unipc": jg.UniPC(),
  "unipc:predictor=3": jg.UniPC(predictor=3),
  "dpmpp-2s": jg.DPMpp2S(),
  "dpmpp-2s-ancestral": jg.DPMpp2SAncestral(),
  "dpmpp-2s-sde": jg.DPMpp2SSDE(),
  "edm-stochastic": jg.EDMStochastic(),
  "edm-stochastic:churn=0.6,s_min=0.1,s_max=9,s_noise=1.01": jg.EDMStochastic.from_churn(
    0.6, num_steps=3, s_min=0.1, s_max=9.0, s_noise=1.01
  ),
  "consistency": jg.Consistency(),
  "consistency:sigma_min=0.01": jg.Consistency(0.01),
}


@pytest.mark.parametrize("solver", BY_NAME)
def test_every_solver_by_name(folders, solver):
  assert_same(plan(settings(folders, solver=solver), read).solver, BY_NAME[solver])


def test_every_solver_is_asked():
  assert {name.partition(":")[0] for name in BY_NAME} == set(solvers.SOLVERS)


@pytest.mark.parametrize("solver", ["unipc"])
def test_a_solver_samples(run, tmp_path, solver):
  status, _, errors = run("sample", "--out", tmp_path / "s.npz", "--num", 4, "--solver", solver, *QUICK)
  assert (status, errors) == (0, "")


@pytest.mark.parametrize("grid", [*schedules.GRIDS, "karras:rho=3,sigma_min=0.05,sigma_max=20"])
def test_every_grid_by_name(run, folders, tmp_path, grid):
  name, _, options = grid.partition(":")
  given = {option: float(value) for option, _, value in (each.partition("=") for each in options.split(",") if each)}
  wanted = schedules.GRIDS[name](3, **given)
  np.testing.assert_array_equal(plan(settings(folders, grid=grid), read).sigmas, wanted)
  # On every grid it is the program that it is on the others.
  status, _, errors = run("sample", "--out", tmp_path / "s.npz", "--num", 4, "--grid", grid, *QUICK)
  assert (status, errors) == (0, "")


# --- a run that is cut off ------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["heun", "edm-stochastic"])
def test_heuns_method_does_not_begin_at_pure_noise(solver, folders):
  with pytest.raises(ValueError, match="Heun's method cannot step from level 1e"):
    plan(settings(folders, solver=solver, grid="flow:sigma_max=1e7"), read)
  plan(settings(folders, solver=solver, grid="flow"), read)
  plan(settings(folders, solver="euler", grid="flow:sigma_max=1e7"), read)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_run_that_was_killed_goes_on(run, tmp_path, monkeypatch, at):
  args = ["--num", 11, "--steps", 2, "--batch-size", 4, "--solver", "ddpm", "--guidance", "classifier"]
  run("sample", "--out", tmp_path / "whole.npz", *args)
  write, made = unfinished.Unfinished.write, []

  def killed(self, rows, images):
    if len(made) == at:
      # As far as it gets: the images are there, and the count of them is not.
      self.images[rows] = 7
      raise KeyboardInterrupt
    made.append(len(images))
    write(self, rows, images)

  with monkeypatch.context() as patch:
    patch.setattr(unfinished.Unfinished, "write", killed)
    assert run("sample", "--out", tmp_path / "s.npz", *args)[0] != 0
  assert not (tmp_path / "s.npz").exists()
  if at:  # A run without a sample stands in nobody's way.
    status, _, errors = run("sample", "--out", tmp_path / "s.npz", *args, "--seed", 1)
    assert status == 2
    assert "settings.seed is 0 there, and 1 here" in errors

  monkeypatch.setattr(unfinished.Unfinished, "write", lambda *x: (made.append(len(x[2])), write(*x)))
  assert run("sample", "--out", tmp_path / "s.npz", *args)[0] == 0
  assert made == [4, 4, 3]  # nothing twice
  for got, wanted in zip(data.load_npz(tmp_path / "s.npz"), data.load_npz(tmp_path / "whole.npz"), strict=True):
    np.testing.assert_array_equal(got, wanted)
  assert sorted(path.name for path in tmp_path.iterdir()) == ["s.npz", "whole.npz"]


@pytest.fixture
def begun(run, tmp_path, monkeypatch):
  """The folder of a run that was killed after its first batch, and how to start it again."""
  args = ["sample", "--out", tmp_path / "s.npz", "--steps", 2, "--num", 5, "--batch-size", 2]
  write, calls = unfinished.Unfinished.write, []

  def once(self, rows, images):
    if calls:
      sys.exit(9)
    calls.append(write(self, rows, images))

  with monkeypatch.context() as patch:
    patch.setattr(unfinished.Unfinished, "write", once)
    assert run(*args)[0] == 9
  return tmp_path / "s.npz.unfinished", lambda: run(*args)


def cut(path):
  path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize(
  ("name", "harm"),
  [
    ("images.npy", lambda path: path.write_bytes(b"")),
    ("images.npy", lambda path: path.write_bytes(b"no array")),
    ("images.npy", cut),
    ("images.npy", lambda path: np.save(path, np.zeros((5, 4, 4, 1), np.uint8))),
    ("images.npy", lambda path: np.save(path, np.zeros((5, 8, 8, 1), np.int8))),
    ("done.json", lambda path: path.write_text("99")),
    ("done.json", lambda path: path.write_text("-1")),
    ("done.json", lambda path: path.write_text('"x"')),
    ("done.json", lambda path: path.unlink()),
    ("settings.json", lambda path: path.write_bytes(b"\xff\xfe")),
    ("settings.json", lambda path: path.write_text("[1]")),
    ("settings.json", lambda path: path.write_text("null")),
  ],
)
def test_an_unfinished_run_that_is_torn(begun, name, harm):
  folder, again = begun
  harm(folder / name)
  status, _, errors = again()
  assert status == 2
  assert "s.npz.unfinished is damaged" in errors
  assert errors.count("\n") == 1


def test_what_is_not_ours_is_left_alone(run, tmp_path):
  folder = tmp_path / "s.npz.unfinished"
  folder.mkdir()
  (folder / "thesis.txt").touch()
  status, _, errors = run("sample", "--out", tmp_path / "s.npz", "--steps", 2)
  assert status == 2
  assert "s.npz.unfinished holds thesis.txt" in errors
  assert (folder / "thesis.txt").exists()
  (folder / "thesis.txt").unlink()
  folder.rmdir()
  folder.touch()
  assert "s.npz.unfinished is a file" in run("sample", "--out", tmp_path / "s.npz", "--steps", 2)[2]


def test_a_run_does_not_go_on_with_another_model(begun, folders):
  _, again = begun
  whole = models.load(folders / "denoiser")
  try:
    other = dataclasses.replace(whole.config, schedule="linear")
    models.save(folders / "denoiser", models.Model(other, whole.params))
    assert "network.schedule is 'cosine' there, and 'linear' here" in again()[2]
    moved = jax.tree.map(lambda leaf: np.asarray(leaf) + np.float32(1e-3), whole.params)
    models.save(folders / "denoiser", models.Model(whole.config, moved))
    assert "data.crc32 is " in again()[2]
  finally:
    models.save(folders / "denoiser", whole)
  assert again()[0] == 0


# --- models of a discrete process -----------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory):
  """What the published models are, in small: a learned variance, no null class, a table; with and without classes."""
  folder = tmp_path_factory.mktemp("published")
  common = {"prediction": "eps", "schedule": "linear", "diffusion_steps": 1000}
  learned = {**TINY, "out_channels": 2, "null_class": False}
  for name, network, fields, classes, extra in (
    ("conditional", "unet", learned, 10, {"variance": "learned_range"}),
    ("unconditional", "unet", learned, None, {"variance": "learned_range"}),
    ("classifier", "classifier", {**TINY, "num_head_channels": 8}, 10, {"scale": 4.0}),
    ("upsampler", "super_res_unet", learned, 10, {"variance": "learned_range", "low_res_shape": (4, 4, 1)}),
  ):
    save(folder / name, ModelConfig(network, fields, (8, 8, 1), classes, **common, **extra))
  return folder


@pytest.fixture
def sample_published(published, monkeypatch, capsys, tmp_path):
  count = itertools.count()

  def sample(name, *args):
    out = tmp_path / f"s{next(count)}.npz"
    command = ["sample", "--model", published / name, "--out", out, "--no-progress", *args]
    monkeypatch.setattr(sys, "argv", ["jaxguide", *map(str, command)])
    with pytest.raises(SystemExit) as exit:
      cli.main()
    if exit.value.code:
      return exit.value.code, capsys.readouterr().err
    with np.load(out) as arrays:
      return dict(arrays)

  return sample


# What is asked of a published model, and the solver, the levels and the guidance that it means, where the classifier's
# recommended scale is 4.
PUBLISHED = {
  "--guidance classifier --solver ddpm --steps 6": lambda table, by, scale: (
    jg.DDPM("learned_range", by, scale),
    jg.respaced(table, 6),
    [jg.clip_x0()],
  ),
  "--guidance classifier --steps 3,3 --solver ddpm:gradient_at=mean,variance=large": lambda table, by, scale: (
    jg.DDPM("large", by, scale, "mean"),
    jg.respaced(table, "3,3"),
    [jg.clip_x0()],
  ),
  "--guidance classifier:every=3 --solver ddpm --steps 6": lambda table, by, scale: (
    jg.DDPM("learned_range", by, scale, every=3),
    jg.respaced(table, 6),
    [jg.clip_x0()],
  ),
  "--guidance classifier --solver ddim --steps ddim5": lambda table, by, scale: (
    jg.DDIM(),
    jg.respaced(table, "ddim5"),
    [jg.clip_x0(), jg.classifier(by, scale)],
  ),
  "--guidance classifier --solver dpmpp-2m --steps 4 --grid karras": lambda table, by, scale: (
    jg.DPMpp2M(),
    jg.karras(4),
    [jg.clip_x0(), jg.classifier(by, scale)],
  ),
  "--solver ddpm --steps 4 --no-clip": lambda table, by, scale: (
    jg.DDPM("learned_range"),
    jg.respaced(table, 4),
    [],
  ),
  "--solver edm-stochastic:churn=2 --steps 4": lambda table, by, scale: (
    jg.EDMStochastic.from_churn(2.0, num_steps=4),
    jg.respaced(table, 4),
    [jg.clip_x0()],
  ),
}


@pytest.mark.parametrize("name", ["conditional", "unconditional"])
@pytest.mark.parametrize("args", PUBLISHED)
def test_published_models(published, monkeypatch, name, args):
  model, classifier = load(published / name), load(published / "classifier")

  def planned(*more):
    asked = []
    monkeypatch.setattr(generate, "run", lambda out, settings, **_: asked.append(settings))
    command = ["sample", "--out", "s.npz", "--model", published / name, "--num", 3, *args.split(), *more]
    monkeypatch.setattr(sys, "argv", ["jaxguide", *map(str, command)])
    with pytest.raises(SystemExit) as exit:
      cli.main()
    assert exit.value.code in (0, None)
    return plan(*asked, read)

  def wanted(scale):
    solver, sigmas, guidances = PUBLISHED[args](model.config.noise_schedule, classifier.log_prob, scale)
    # What has no classes is given no label, though the classifier is.
    without = [jg.unconditional(None)] if name == "unconditional" else []
    return jg.chain(*without, *guidances)(model.denoiser), solver, sigmas

  got = planned()
  assert_same((got.denoiser, got.solver, got.sigmas), wanted(4.0))
  # Without classes or a classifier there are no labels to write.
  labelled = name == "conditional" or "classifier" in args
  assert (None if got.labels is None else got.labels.tolist()) == ([0, 1, 2] if labelled else None)
  if "classifier" in args:
    # The recommended scale, 4, is the default, and another scale is another.
    four, forty = planned("--scale", 4), planned("--scale", 40)
    assert_same((four.denoiser, four.solver), wanted(4.0)[:2])
    assert_same((forty.denoiser, forty.solver), wanted(40.0)[:2])
  # All of it goes together: the program can be traced.
  cond = None if got.cond is None else jnp.asarray(got.cond[0])
  traced = jax.eval_shape(
    lambda key: jg.sample(got.denoiser, key, got.image_shape, got.sigmas, got.solver, cond)[0], jax.random.key(0)
  )
  assert traced.shape == (8, 8, 1)


@pytest.mark.parametrize(
  ("name", "args"),
  [
    ("conditional", "--guidance classifier --solver ddpm --steps 6"),
    ("unconditional", "--solver edm-stochastic:churn=2 --steps 4"),
  ],
)
def test_published_models_sample(sample_published, name, args):
  assert args in PUBLISHED
  arrays = sample_published(name, "--num", 3, *args.split())
  assert isinstance(arrays, dict), arrays
  assert arrays["arr_0"].shape == (3, 8, 8, 1)
  assert arrays["arr_0"].dtype == np.uint8
  assert len(np.unique(arrays["arr_0"])) > 1
  assert ("arr_1" in arrays) == (name == "conditional" or "classifier" in args)
  if "classifier" in args:
    again = sample_published(name, "--num", 3, "--scale", 4, *args.split())["arr_0"]
    np.testing.assert_array_equal(again, arrays["arr_0"])
    assert (sample_published(name, "--num", 3, "--scale", 40, *args.split())["arr_0"] != arrays["arr_0"]).any()


@pytest.mark.parametrize(
  ("name", "args", "message"),
  [
    ("conditional", ["--guidance", "cfg"], "the model has no null class"),
    ("unconditional", ["--label", 3], "the model has no classes"),
    ("unconditional", ["--steps", "ddim600"], "no whole stride visits exactly 600 of 1000 steps"),
    ("unconditional", ["--steps", 1001], "steps must be at most the 1000 steps of the table"),
    ("unconditional", ["--grid", "respaced:sigma_max=80"], "'respaced' has no option 'sigma_max'; it has spacing"),
    ("unconditional", ["--scale", 2], "guidance 'none' takes no scale (none is the default of a model that has no"),
    ("conditional", ["--guidance", "none", "--scale", 2], "guidance 'none' takes no scale: leave it out"),
  ],
)
def test_what_published_models_cannot_do(sample_published, name, args, message):
  status, errors = sample_published(name, *args)
  assert status == 2
  assert message in errors


def test_a_model_that_is_not_guided_for_want_of_a_null_class_is_said(published, tmp_path):
  given = {"model": published / "conditional", "steps": 4}
  message = r"the model in .*conditional has no null class: the samples have their labels, but no guidance\."
  with pytest.warns(UserWarning, match=message):
    plan(generate.Settings(**given))
  alone = shutil.copytree(published / "conditional", tmp_path / "conditional")  # No classifier is beside it.
  with pytest.warns(UserWarning, match=message), pytest.raises(ValueError, match="num must be"):
    evaluation.sweep(tmp_path / "out", generate.Settings(model=alone, num=1))
  with warnings.catch_warnings():
    warnings.simplefilter("error")  # What was asked for, and what never has labels.
    plan(generate.Settings(**given, guidance="none"))
    plan(generate.Settings(**given, guidance="classifier"))
    plan(generate.Settings(model=published / "unconditional", steps=4))


def test_an_upsampler_takes_samples_in_turn(sample_published, tmp_path):
  base = tmp_path / "base.npz"
  low = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 1)).astype(np.uint8)
  data.save_npz(base, low, np.array([3, 7]))
  args = ["--num", 3, "--solver", "ddpm", "--steps", 3]
  arrays = sample_published("upsampler", "--base-samples", base, *args)
  assert arrays["arr_0"].shape == (3, 8, 8, 1)
  assert arrays["arr_1"].tolist() == [3, 7, 3]
  data.save_npz(base, low[::-1].copy(), np.array([3, 7]))
  assert (sample_published("upsampler", "--base-samples", base, *args)["arr_0"] != arrays["arr_0"]).any()

  for more, message in (
    (
      [],
      "the model needs base_samples (--base-samples FILE), low-resolution images: an .npz with uint8 images of shape ",
    ),
    (["--base-samples", base, "--label", 3], "the labels are those of base_samples"),
    (["--base-samples", base, "--guidance", "classifier"], "is sampled with guidance 'none', not 'classifier'"),
    (["--base-samples", base, "--scale", 2], "guidance 'none' takes no scale"),
  ):
    status, errors = sample_published("upsampler", *args, *more)
    assert status == 2
    assert message in errors
  status, errors = sample_published("conditional", "--base-samples", base)
  assert status == 2
  assert "the model takes no base_samples" in errors
  data.save_npz(base, np.zeros((1, 2, 2, 1), np.uint8), np.array([3]))
  _, errors = sample_published("upsampler", "--base-samples", base)
  assert "has images of shape (2, 2, 1), but the model takes (4, 4, 1)" in errors


def test_networks_compute_in_bfloat16(sample_published, published):
  args = ["conditional", "--num", 3, "--steps", "ddim2", "--guidance", "none"]
  full, half = (sample_published(*args, "--dtype", dtype)["arr_0"] for dtype in ("float32", "bfloat16"))
  assert (half != full).any()
  assert np.abs(half.astype(int) - full).mean() < 10
  assert "unknown dtype 'float16'" in sample_published(*args, "--dtype", "float16")[1]
  if jax.default_backend() == "cpu":
    assert (sample_published(*args, "--dtype", "bfloat16", "--cudnn-attention")["arr_0"] == half).all()
  assert "cudnn_attention is for half precision: give dtype bfloat16" in sample_published(*args, "--cudnn-attention")[1]
  # Both networks compute so.
  fields = {"dtype": "bfloat16", "cudnn_attention": True}
  got = plan(generate.Settings(str(published / "conditional"), guidance="classifier", **fields)).denoiser
  model, classifier = (load(published / name, **fields) for name in ("conditional", "classifier"))
  assert_same(got, jg.chain(jg.clip_x0(), jg.classifier(classifier.log_prob, 4.0))(model.denoiser))
