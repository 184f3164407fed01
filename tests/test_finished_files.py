"""What a sampling run may and may not do to what is there: finished files, folders of killed and failed runs, locks."""

import contextlib
import functools
import gc
import itertools
import os
import threading
import zipfile

import jax
import numpy as np
import pytest

from jaxguide import data, generate
from jaxguide._core import files
from jaxguide.generate import Settings, unfinished
from jaxguide.models import folders as models
from jaxguide.models.model import shapes
from jaxguide.training import ModelConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  config = ModelConfig("tiny:Mlp", {}, (8, 8, 1), 3)
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: 0.1 * rng.normal(size=leaf.shape).astype(leaf.dtype), shapes(config))
  folder = tmp_path_factory.mktemp("model")
  models.save(folder, models.Model(config, params))
  return folder


@pytest.fixture
def settings(folder):
  return lambda **changes: Settings(model=str(folder), **{"num": 3, "steps": 2, "batch_size": 4, **changes})


def draw(out, settings, **options):
  return generate.run(out, settings, progress=False, **options)


@pytest.mark.parametrize("suffix", [".npz", ".png"])
def test_a_finished_file_stays_unless_it_may_be_overwritten(settings, tmp_path, suffix):
  out = tmp_path / f"s{suffix}"
  assert draw(out, settings()) is True
  before = out.read_bytes()
  assert draw(out, settings()) is False
  for changes, difference in (
    ({"seed": 1}, "settings.seed is 0 there, and 1 here"),
    ({"scale": 3.0}, "settings.scale is None there, and 3.0 here"),
    ({"labels": (2,)}, r"settings.labels is None there, and \[2\] here"),
  ):
    with pytest.raises(ValueError, match=rf"s\{suffix} exists already.*{difference}.*--overwrite"):
      draw(out, settings(**changes))
  assert out.read_bytes() == before
  assert draw(out, settings(seed=1), overwrite=True) is True
  assert out.read_bytes() != before
  assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_a_file_that_says_nothing_is_somebody_elses(settings, tmp_path):
  out = tmp_path / "s.npz"
  data.save_npz(out, np.zeros((3, 8, 8, 1), np.uint8))
  with pytest.raises(ValueError, match="does not tell what it was made with"):
    draw(out, settings())
  assert draw(out, settings(), overwrite=True)


def test_settings_do_not_change_what_evaluators_read(settings, tmp_path):
  draw(tmp_path / "s.npz", settings())
  with np.load(tmp_path / "s.npz") as arrays:
    assert sorted(arrays) == ["arr_0", "arr_1", "settings"]
  assert data.load_npz(tmp_path / "s.npz")[0].shape == (3, 8, 8, 1)


def test_two_runs_at_once(settings, tmp_path):
  out = tmp_path / "s.npz"
  with files.lock(tmp_path / ".s.npz.lock", out), pytest.raises(OSError, match=rf"in use by process {os.getpid()} on"):
    draw(out, settings())
  assert draw(out, settings())


def test_what_a_kill_leaves_behind(settings, tmp_path):
  out, left = tmp_path / "s.npz", tmp_path / "s.npz.unfinished"
  for names in ([], [".4c0f1e2d.part"], ["images.npy"], ["images.npy", "done.json", ".ab.part"]):
    left.mkdir()
    for name in names:
      (left / name).touch()
    assert draw(out, settings(), overwrite=True)
    assert not left.exists()
  # Killed after the file, while it cleaned up.
  left.mkdir()
  (left / "done.json").touch()
  assert draw(out, settings()) is False
  assert not left.exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_kill_between_the_file_and_the_cleaning_up(settings, tmp_path, monkeypatch, overwrite):
  out, left = tmp_path / "s.npz", tmp_path / "s.npz.unfinished"
  with monkeypatch.context() as patch:
    patch.setattr(unfinished.Unfinished, "remove", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
      draw(out, settings())
  assert left.is_dir()
  # The samples of the finished file are in nobody's way, whatever is asked for next.
  assert draw(out, settings(seed=int(overwrite)), overwrite=overwrite) is overwrite
  assert not left.exists()


class Killed(BaseException):
  """Stands for the signal that a process cannot catch."""


class Deadly:
  """The system's calls that change files, of which the n-th ends the process: nothing it would do then is done."""

  def __init__(self, patch, n):
    self.calls, self.n = 0, n
    for name in ("mkdir", "rmdir", "unlink", "replace", "fsync", "posix_fallocate"):
      patch.setattr(os, name, functools.partial(self.call, getattr(os, name)))

  def call(self, function, *args, **kwargs):
    if threading.current_thread() is threading.main_thread():
      self.calls += 1
      if self.calls > self.n:
        raise Killed
    return function(*args, **kwargs)


def killed_everywhere(work, finished, tmp_path):
  """Do the work in a new folder, killed before each change of a file in turn; then again, to the end."""
  for n in itertools.count():
    folder = tmp_path / str(n)
    with pytest.MonkeyPatch.context() as patch:
      folder.mkdir()
      deadly = Deadly(patch, n)
      with contextlib.suppress(Killed):
        work(folder)
    gc.collect()  # The lock of a process goes with it.
    work(folder)
    finished(folder)
    if deadly.calls <= n:
      return n


@pytest.mark.slow
def test_a_run_that_is_killed_anywhere_goes_on(settings, tmp_path):
  draw(tmp_path / "whole.npz", settings())
  wanted = (tmp_path / "whole.npz").read_bytes()

  def finished(folder):
    assert (folder / "s.npz").read_bytes() == wanted
    assert [path.name for path in folder.iterdir()] == ["s.npz"]

  assert killed_everywhere(lambda folder: draw(folder / "s.npz", settings()), finished, tmp_path) > 20


@pytest.mark.slow
def test_a_model_whose_saving_is_killed_anywhere_is_saved_again(folder, tmp_path):
  model = models.load(folder)

  def finished(folder):
    again = models.load(folder / "model")
    assert again.config == model.config
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, model.params))

  assert killed_everywhere(lambda folder: models.save(folder / "model", model), finished, tmp_path) > 5


def test_what_is_not_ours_stays_beside_a_finished_file(settings, tmp_path):
  out, left = tmp_path / "s.npz", tmp_path / "s.npz.unfinished"
  draw(out, settings())
  left.mkdir()
  for name in ("thesis.txt", "images.npy"):
    (left / name).touch()
  assert draw(out, settings()) is False
  assert sorted(path.name for path in left.iterdir()) == ["images.npy", "thesis.txt"]


def test_a_large_picture_says_what_it_was_made_with(settings, tmp_path, monkeypatch):
  out = tmp_path / "s.png"
  draw(out, settings())
  monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 100)
  assert draw(out, settings()) is False
  out.write_bytes(b"no picture")
  with pytest.raises(ValueError, match="does not tell what it was made with"):
    draw(out, settings())


def claim(file, shape):
  np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
  file.write(bytes(100))


def test_a_finished_file_whose_settings_are_none(settings, tmp_path):
  out = tmp_path / "s.npz"
  for text in ("[1]", "null", "{", "[" * 100_000):
    data.save_npz(out, np.zeros((3, 8, 8, 1), np.uint8), settings=text)
    with pytest.raises(ValueError, match="does not tell what it was made with"):
      draw(out, settings())
  with zipfile.ZipFile(out, "w") as members, members.open("settings.npy", "w") as file:
    claim(file, (10**14,))
  with pytest.raises(ValueError, match="does not tell what it was made with"):
    draw(out, settings())


def test_a_bare_array_that_claims_more_than_it_holds(settings, tmp_path):
  out = tmp_path / "s.npz"
  with out.open("wb") as file:
    claim(file, (10**14,))
  with pytest.raises(ValueError, match=r"s\.npz is not an .npz file"):
    data.load_npz(out)
  with pytest.raises(ValueError, match="does not tell what it was made with"):
    draw(out, settings())


def test_a_failed_run_does_not_stand_in_the_way(settings, tmp_path):
  out = tmp_path / "s.npz"
  with pytest.raises(FloatingPointError):
    draw(out, settings(guidance=("cfg:scale=3e38",) * 2, clip=False))
  assert list(tmp_path.iterdir()) == []
  assert draw(out, settings(scale=2.0))


def test_seeds_are_all_of_their_digits(settings, tmp_path):
  made = []
  for seed in (0, 2**32, 2**64 - 1):
    draw(tmp_path / f"{seed}.npz", settings(seed=seed))
    made.append(data.load_npz(tmp_path / f"{seed}.npz")[0].tobytes())
  assert len(set(made)) == 3
  for seed in (2**64, -1, 99999999999999999999):
    with pytest.raises(ValueError, match="seed must be a whole number"):
      settings(seed=seed)


def test_numbers_out_of_reach(settings, tmp_path):
  with pytest.raises(ValueError, match="num must be at most 100000000"):
    settings(num=10**12)


def test_too_little_room_is_said_beforehand(settings, tmp_path, monkeypatch):
  monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100})())
  with pytest.raises(OSError, match=r"cannot keep 3 samples in .*s\.npz\.unfinished: .* are needed and .* are free"):
    draw(tmp_path / "s.npz", settings())
  assert list(tmp_path.iterdir()) == []


def test_an_npz_that_claims_more_than_it_holds(tmp_path):
  path = tmp_path / "s.npz"
  header = {"descr": "|u1", "fortran_order": False, "shape": (10**7, 128, 128, 1)}
  with zipfile.ZipFile(path, "w") as members, members.open("arr_0.npy", "w") as file:
    np.lib.format.write_array_header_1_0(file, header)
    file.write(bytes(100))
  with pytest.raises(ValueError, match=r"s\.npz is not an .npz file.*states 163840000000 bytes"):
    data.load_npz(path, labelled=False)


def test_a_fifo_is_no_file(tmp_path):
  os.mkfifo(tmp_path / "s.npz")
  with pytest.raises(OSError, match="not a regular file"):
    data.load_npz(tmp_path / "s.npz")


def test_saturated_samples_are_said(settings, tmp_path, recwarn):
  draw(tmp_path / "a.npz", settings(guidance="none"))
  assert not [warning for warning in recwarn if "saturated" in str(warning.message)]
  with pytest.warns(UserWarning, match=r"of the pixel values lie at the ends of their range.*lower the scale"):
    draw(tmp_path / "b.npz", settings(scale=1e30))


# --- more samples ---------------------------------------------------------------------------------


def test_a_finished_file_is_continued_by_more_samples(settings, tmp_path):
  few, many = tmp_path / "few.npz", tmp_path / "many.npz"
  draw(few, settings(num=3, batch_size=4))
  draw(many, settings(num=11, batch_size=4))
  told = []
  assert generate.run(few, settings(num=11, batch_size=4), grow=True, progress=told.append)
  assert told == [3, 4, 4]  # Three were there, and eight are new.
  for ours, theirs in zip(data.load_npz(few), data.load_npz(many), strict=True):
    np.testing.assert_array_equal(ours, theirs)
  assert data.settings_of(few) == data.settings_of(many)
  before = few.read_bytes()
  for num in (11, 5):
    assert not draw(few, settings(num=num, batch_size=4), grow=True)
  assert few.read_bytes() == before
  for changes in ({"seed": 1}, {"scale": 3.0}, {"num": 13, "seed": 1}, {"num": 2, "steps": 3}):
    with pytest.raises(ValueError, match=r"few\.npz exists already, made with other settings"):
      draw(few, settings(**{"num": 11, **changes}), grow=True)
  with pytest.raises(ValueError, match=r"samples in \.png cannot be continued"):
    draw(tmp_path / "s.png", settings(), grow=True)


def test_a_killed_continuation_goes_on(settings, tmp_path):
  few, many = tmp_path / "few.npz", tmp_path / "many.npz"
  draw(few, settings(num=3, batch_size=4))
  draw(many, settings(num=12, batch_size=4))
  done = []

  def stop(number):
    done.append(number)
    if sum(done) >= 7:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    generate.run(few, settings(num=12, batch_size=4), grow=True, progress=stop)
  assert len(data.load_npz(few)[0]) == 3
  told = []
  generate.run(few, settings(num=12, batch_size=4), grow=True, progress=told.append)
  assert told == [7, 4, 1]
  np.testing.assert_array_equal(data.load_npz(few)[0], data.load_npz(many)[0])
  assert sorted(path.name for path in tmp_path.iterdir()) == ["few.npz", "many.npz"]


def test_runs_of_one_process_share_their_program(settings, tmp_path):
  from jaxguide.models import load as read
  from jaxguide.sampling import batches

  read = functools.cache(read)
  sizes = []
  for scale in (0.5, 1.5, 2.5, 1.0, 0.0):
    draw(tmp_path / f"{scale}.npz", settings(guidance="cfg", scale=scale), load=read)
    sizes.append(batches._sample_many._cache_size())
  assert sizes[0] == sizes[1] == sizes[2]
  # Scales of 0 and 1 have smaller programs, with one pass.
  assert sizes[4] == sizes[3] + 1 == sizes[2] + 2
