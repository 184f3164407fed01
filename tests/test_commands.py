"""The shell lines of the documentation: every name in them exists, and they run, with small sizes, in their order."""

import contextlib
import dataclasses
import io
import re
import shlex
import shutil
import sys
import time
from pathlib import Path

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sweeps
import tiny

from jaxguide import cli
from jaxguide.evaluation import demo, sweep_plots
from jaxguide.models import Model, pretrained
from jaxguide.models.model import shapes

SHOWN = {page: list(commands.commands_of(page.read_text())) for page in commands.PAGES}


def names_of(pages):
  return pytest.mark.parametrize("page", pages, ids=lambda page: str(page.relative_to(commands.ROOT)))


@names_of([page for page, shown in SHOWN.items() if shown])
def test_what_commands_name_exists(page):
  for command in SHOWN[page]:
    try:
      commands.check(command)
    except Exception as error:
      pytest.fail(f"{page.name}, {command}\n{type(error).__name__}: {error}")


@names_of(commands.PAGES)
def test_options_in_sentences_exist(page):
  text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
  for span in re.findall(r"`(jaxguide [^`]+)`", text):
    try:
      commands.check_span(span)
    except ValueError as error:
      pytest.fail(f"{page.name}, `{span}`\n{error}")


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("jaxguide smaple --out a.png", "unknown command 'smaple'"),
    ("jaxguide sample --out a.png --scael 2", "No such option: --scael"),
    ("jaxguide sample --scale 2", "Missing parameter: out"),
    ("jaxguide sample --out a.png --solver hoin", "unknown solver 'hoin'"),
    ("jaxguide sample --out a.png --solver ddim:etta=1", "etta"),
    ("jaxguide sample --out a.png --guidance cgf", "unknown guidance 'cgf'"),
    ("jaxguide sample --out a.png --grid karas", "unknown grid 'karas'"),
    ("pip install . && jaxguide sample --out a.png \\\n  --grid karas", "unknown grid 'karas'"),
    ("ssh host 'jaxguide sample --out a.png --grid karas'", "unknown grid 'karas'"),
    ("srun jaxguide sample --out a.png --grid karas", "unknown grid 'karas'"),
    ('echo "$(jaxguide completoin bash)"', "unknown command 'completoin'"),
    ("jaxguide sweep --model m --out s --guidance cfg,classifer", "unknown guidance 'classifer'"),
    ("jaxguide sweep --model m --out s --over stepps=1,2", "stepps"),
    ("jaxguide train --data ./photos --out r --network unett", "unett"),
    ("jaxguide train --data ./photos --out r --preset DiT-S/3", "DiT-S/3"),
    ("jaxguide train --data ./photos --out r --set model.fields.model_chanels=8", "model_chanels"),
    ("jaxguide train --data ./photos --out r --set training.optimizer=adamm", "adamm"),
    ("jaxguide train animal --out r", "animal"),
    ("jaxguide evaluate a.npz --features inceptoin:weights=a", "inceptoin"),
    ("jaxguide evaluate a.npz --measures fid", "fid"),
    ("jaxguide import a.pt --family ditt --out r", "ditt"),
    ("jaxguide import-adm a.pt --preset 256x256_diffusoin --out r", "256x256_diffusoin"),
    ("pip install '.[tset]'", "unknown extra 'tset'"),
    ("pip install 'jaxguide[torch,wandbb] @ git+https://example.org/jaxguide'", "unknown extra 'wandbb'"),
    ("python -m benchmarks neighbors", "there is no benchmark 'neighbors'"),
    ("pytest tests/test_nothing.py", "there is no file tests/test_nothing.py"),
  ],
)
def test_a_name_that_does_not_exist_is_noticed(line, message):
  with pytest.raises(Exception, match=re.escape(message)):
    list(map(commands.check, commands.commands_of(f"# Page\n\n```\nls\n{line}\n```\n")))


def test_blocks_and_lines_are_found():
  text = """
```python
>>> print("jaxguide nothing")
```

```
pip install . && jaxguide demo      # a remark
jaxguide sample --out a.png \\
  --scale 2 --over 'a b' > log.txt
XLA_FLAGS=--x jaxguide doctor
It's some output.
```
<!-- not run: needs weights -->

```console
$ jaxguide import a.pt --out runs/a; jaxguide methods
```

1. In a list:

   ```
   jaxguide methods cfg
   ```
"""
  wanted = [
    (7, "pip install .", None, None),
    (7, "jaxguide demo", None, None),
    (8, "jaxguide sample --out a.png --scale 2 --over 'a b'", "log.txt", None),
    (10, "jaxguide doctor", None, None),
    (16, "jaxguide import a.pt --out runs/a", None, "needs weights"),
    (16, "jaxguide methods", None, "needs weights"),
    (22, "jaxguide methods cfg", None, None),
  ]
  got = [(each.line, str(each).partition(": ")[2], each.output, each.reason) for each in commands.commands_of(text)]
  assert got == wanted


def test_a_command_is_made_small():
  line = "sweep --model animals --out s --num 1000 --scales 0,1,2,4 --over steps=5,10,20 --over cfg:sigma_hi=2,5,inf"
  added = "--steps 2 --num 4 --features pixels"
  wanted = f"sweep --model animals --out s --num 1000 --scales 0,1 --over steps=2,3 --over cfg:sigma_hi=2,5 {added}"
  assert " ".join(commands.small(line.split())) == wanted
  line = "train --data ./photos --out r --mesh data=2,fsdp=4 --batch-size 64"
  assert " ".join(commands.small(line.split())).startswith(
    f"{line.replace('fsdp=4', 'fsdp=2')} --steps 2 --size 8 --held-out 0.25 --batch-size 4"
  )
  assert commands.small(["demo"]) == ["demo"]
  assert commands.small(["train", "--out", "r"], continues=True) == ["train", "--out", "r", "--steps", "4"]
  assert "r" in commands.read(["train", "--out", "r"])
  assert "r" not in commands.read(["train", "--out", "r", "--data", "./photos"])


# --- in their order -------------------------------------------------------------------------------


# What a page may name without making it: the command that makes it when it is first read, and all that this makes.
PROVIDED = {
  "runs/photos": ("jaxguide train --data ./photos --size 64 --out runs/photos", "runs/photos"),
  "runs/photos-classifier": (
    "jaxguide train --data ./photos --network classifier --out runs/photos-classifier",
    "runs/photos-classifier",
  ),
  "samples.npz": ("jaxguide sample --model runs/photos --out samples.npz", "samples.npz"),
  "runs/demo/denoiser": ("jaxguide demo", "runs/demo"),
}


def narrow(config):
  """Give the configuration of a network with few channels in the place of another."""
  fields = {**config.fields, **commands.SMALL["unet"], "num_head_channels": 8}
  return dataclasses.replace(config, fields=fields)


@pytest.fixture
def small_networks(monkeypatch):
  """Make the networks of the demos and of the package small, the trainings of the demos short; leave out plots."""
  monkeypatch.setattr(sweep_plots, "plot", sweeps.unplotted)
  for name, whole in list(demo.DEMOS.items()):
    changed = {"scales": (0.0, 2.0), "num": 20, "steps": 2, "batch_size": 20}
    for network in ("denoiser", "classifier"):
      training = getattr(whole, f"{network}_training")
      changed[network] = narrow(getattr(whole, network))
      changed[f"{network}_training"] = dataclasses.replace(training, steps=2, batch_size=3)
    monkeypatch.setitem(demo.DEMOS, name, whole._replace(**changed))

  def load(name, load=pretrained.load):
    config, rng = narrow(load(name).config), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.02, leaf.shape), leaf.dtype), shapes(config))
    return Model(config, params)

  monkeypatch.setattr(pretrained, "load", load)


class Runner:
  """Run commands of a page in a folder, in this process, with small sizes.

  Args:
    monkeypatch: pytest's.
    kept: a folder with copies of what was provided to other pages, so that it is made once.
  """

  def __init__(self, monkeypatch, kept):
    self._patch, self._kept = monkeypatch, kept
    self._making = set()

  def __call__(self, words, output=None):
    """Run a command of jaxguide.

    Raises:
      AssertionError: if it fails, or does not write the file that it should.
    """
    self._provide(commands.read(words[1:]))
    out = commands.written(words[1:])
    arguments = commands.small(words[1:], continues=out is not None and (Path(out) / "training.json").exists())
    if out is not None:
      Path(out).parent.mkdir(parents=True, exist_ok=True)
    self._patch.setattr(sys, "argv", ["jaxguide", *arguments])
    printed, errors, start = io.StringIO(), io.StringIO(), time.process_time()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
      try:
        cli.main()
        status = 0
      except SystemExit as stop:
        status = stop.code or 0
    # What it took, which pytest shows by -rP.
    sys.stdout.write(f"{time.process_time() - start:6.1f} s of CPU  jaxguide {shlex.join(arguments)}\n")
    if "needs the package animal-mnist" in errors.getvalue():
      pytest.skip("animal-mnist is not installed")
    assert status == 0, f"jaxguide {' '.join(arguments)}\n{errors.getvalue()[-3000:]}"
    assert out is None or Path(out).exists(), f"jaxguide {' '.join(arguments)} did not write {out}"
    if output is not None:
      Path(output).write_text(printed.getvalue())
    return printed.getvalue()

  def _provide(self, paths):
    for path in paths:
      name = path.removeprefix("./")
      if name in PROVIDED and not Path(name).exists() and name not in self._making:
        self._making.add(name)
        line, made = PROVIDED[name]
        if (self._kept / made).exists() and not Path(made).exists():
          copy(self._kept / made, made)
          continue
        self(line.split())
        if not (self._kept / made).exists():
          copy(made, self._kept / made)


def copy(path, to):
  """Copy a file or a folder."""
  Path(to).parent.mkdir(parents=True, exist_ok=True)
  (shutil.copytree if Path(path).is_dir() else shutil.copy2)(path, to)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
  return tmp_path_factory.mktemp("kept")


@pytest.fixture
def runner(tmp_path, monkeypatch, small_networks, kept):
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(tmp_path)
  tiny.draw_photos(tmp_path / "photos", 12, 16)
  return Runner(monkeypatch, kept)


def run_page(page, runner):
  """Run the commands of a page; give those that failed, with what they wrote."""
  failed = []
  for command in SHOWN.get(page) or commands.commands_of(page.read_text()):
    if command.is_ours and command.reason is None:
      try:
        runner(command.words, command.output)
      except AssertionError as error:
        failed.append(f"{page.name}, {command}\n{error}")
  return failed


@pytest.mark.slow
@names_of([page for page, shown in SHOWN.items() if any(each.is_ours and not each.reason for each in shown)])
def test_commands_run(page, runner):
  failed = run_page(page, runner)
  assert not failed, "\n\n".join(failed)


def test_a_command_that_fails_is_noticed(runner, tmp_path):
  page = tmp_path / "page.md"
  page.write_text("```\njaxguide methods cfg > cfg.txt\njaxguide sample --model runs/none --out a.png\n```\n")
  failed = run_page(page, runner)
  assert len(failed) == 1
  assert "page.md, line 3: jaxguide sample --model runs/none --out a.png" in failed[0]
  assert "runs/none" in failed[0].partition("\n")[2]
  assert "cfg" in (tmp_path / "cfg.txt").read_text()
  page.write_text(f"<!-- not run: has no model -->\n{page.read_text()}")
  assert not run_page(page, runner)
