"""Files of reference statistics: ours, and those of other programs."""

import pickle

import numpy as np
import pytest

from jaxguide.evaluation import metrics
from jaxguide.evaluation.statistics import Statistics, read_statistics, write_statistics


@pytest.fixture
def rng():
  return np.random.default_rng(0)


@pytest.fixture
def full(rng):
  features, spatial = rng.normal(size=(40, 5)).astype(np.float32), rng.normal(size=(40, 3))
  keep, labels = np.arange(0, 40, 4), rng.integers(7, size=40)
  protocol = {"features": "inception", "version": 1, "sizes": (64, 64)}
  return Statistics.of(features, spatial, keep, labels, "a1b2", protocol), features, spatial, labels


def equal(a, b):
  names = ("mu", "sigma", "n", "mu_s", "sigma_s", "features", "labels", "fingerprint", "protocol")
  for name in names:
    np.testing.assert_equal(getattr(a, name), getattr(b, name), err_msg=name)


def test_statistics_of_features(full):
  statistics, features, spatial, labels = full
  np.testing.assert_allclose(statistics.mu, features.mean(0), atol=1e-7)
  np.testing.assert_allclose(statistics.sigma, np.cov(features.T), rtol=1e-6)
  np.testing.assert_allclose(statistics.spatial.covariance, np.cov(spatial.T), rtol=1e-12)
  np.testing.assert_array_equal(statistics.features, features[::4])
  np.testing.assert_array_equal(statistics.labels, labels[::4])
  assert statistics.n == statistics.gaussian.n == 40
  assert metrics.frechet_distance(statistics.gaussian, features) < 1e-9


def test_what_is_written_is_read(full, tmp_path):
  path = tmp_path / "new" / "reference.npz"
  write_statistics(path, full[0])
  again = read_statistics(path)
  equal(again, full[0])
  assert again.features.dtype == np.float32
  assert again.protocol == {"features": "inception", "version": 1, "sizes": [64, 64]}
  assert again.source == str(path)
  assert [*path.parent.iterdir()] == [path]
  bare = Statistics(np.zeros(2), np.eye(2))
  write_statistics(path, bare)
  equal(read_statistics(path), bare)
  assert set(np.load(path).files) == {"mu", "sigma", "version"}


def test_other_programs_can_read_ours(full, tmp_path):
  """OpenAI's evaluator reads these four by name, and none of them as a pickle."""
  write_statistics(tmp_path / "r.npz", full[0])
  archive = np.load(tmp_path / "r.npz")
  for name in ("mu", "sigma", "mu_s", "sigma_s"):
    np.testing.assert_array_equal(archive[name], getattr(full[0], name))
  assert all(archive[name].dtype.kind != "O" for name in archive.files)


def test_openais_reference_batch(full, tmp_path):
  statistics = full[0]
  images = np.zeros((6, 4, 4, 3), np.uint8)
  moments = {name: getattr(statistics, name).astype(np.float32) for name in ("mu", "sigma", "mu_s", "sigma_s")}
  np.savez(tmp_path / "batch.npz", images, np.zeros(6, int), **moments)
  read = read_statistics(tmp_path / "batch.npz")
  np.testing.assert_allclose(read.sigma, statistics.sigma, rtol=1e-6)
  np.testing.assert_allclose(read.spatial.mean, statistics.mu_s, rtol=1e-6)
  assert read.n is None  # The moments are not those of the six images alone.
  np.savez(tmp_path / "images.npz", images)
  with pytest.raises(ValueError, match=r"images.npz has no mu and sigma, only arr_0; it is a batch of images"):
    read_statistics(tmp_path / "images.npz")


def test_edms_and_pytorch_fids(full, tmp_path):
  statistics = full[0]
  for save in (np.savez, np.savez_compressed):
    save(tmp_path / "edm.npz", mu=statistics.mu, sigma=statistics.sigma)
    read = read_statistics(tmp_path / "edm.npz")
    np.testing.assert_array_equal(read.sigma, statistics.sigma)
    with pytest.raises(ValueError, match=r"the KID needs features, which .*edm.npz does not have: compute them from"):
      read.require("features", "the KID")
    with pytest.raises(ValueError, match="the sFID needs mu_s, which"):
      _ = read.spatial
    with pytest.raises(ValueError, match="needs n, which"):
      read.require("n", "the warning")
  with pytest.raises(ValueError, match=r"metric chooses among the statistics of a .pkl"):
    read_statistics(tmp_path / "edm.npz", "fid")


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_edm2s_pickle(full, tmp_path, protocol):
  path = tmp_path / "img512.pkl"
  fid = {"mu": full[0].mu, "sigma": full[0].sigma}
  dino = {"mu": np.zeros(3), "sigma": np.eye(3)}
  path.write_bytes(pickle.dumps({"num_images": 1000, "fid": fid, "fd_dinov2": dino}, protocol=protocol))
  read = read_statistics(path, "fid")
  np.testing.assert_array_equal(read.sigma, full[0].sigma)
  assert read.n == 1000
  assert len(read_statistics(path, "fd_dinov2").mu) == 3
  with pytest.raises(ValueError, match="has the statistics of fid, fd_dinov2: choose one by metric"):
    read_statistics(path)
  with pytest.raises(ValueError, match="did you mean 'fd_dinov2'"):
    read_statistics(path, "fd_dino")
  path.write_bytes(pickle.dumps({"fid": fid}, protocol=protocol))
  np.testing.assert_array_equal(read_statistics(path).mu, full[0].mu)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
  (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"fid": print}))
  with pytest.raises(ValueError, match=r"evil.pkl cannot be read: it needs builtins.print"):
    read_statistics(tmp_path / "evil.pkl")
  np.savez(tmp_path / "evil.npz", mu=np.array([{}], dtype=object), sigma=np.eye(1))
  with pytest.raises(ValueError, match=r"evil.npz cannot be read as statistics: Object arrays cannot be loaded"):
    read_statistics(tmp_path / "evil.npz")


def test_files_that_are_no_statistics_are_refused(full, tmp_path):
  with pytest.raises(FileNotFoundError, match=r"absent.npz: give a file of reference statistics"):
    read_statistics(tmp_path / "absent.npz")
  with pytest.raises(OSError, match="not a regular file"):
    read_statistics(tmp_path)
  with pytest.raises(ValueError, match=r"ends in .npz or .pkl"):
    read_statistics(__file__)
  with pytest.raises(ValueError, match=r"ends in .npz, got"):
    write_statistics(tmp_path / "r.pkl", full[0])
  whole = tmp_path / "r.npz"
  write_statistics(whole, full[0])
  for name, content in (("cut", whole.read_bytes()[:-300]), ("empty", b""), ("text", b"mu"), ("array", None)):
    path = tmp_path / f"{name}.npz"
    if content is None:
      with path.open("wb") as file:
        np.save(file, np.zeros(3))
    else:
      path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}.npz cannot be read as statistics"):
      read_statistics(path)
  for name, content in (("list", []), ("other", {"fid": 3})):
    (tmp_path / f"{name}.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"has no (statistics|mu and sigma)"):
      read_statistics(tmp_path / f"{name}.pkl")


@pytest.mark.parametrize(
  ("changed", "message"),
  [
    ({"version": 2}, "has version 2, but this jaxguide reads versions up to 1"),
    ({"protocol": "{"}, "protocol of .* is not a JSON text"),
    ({"protocol": "[]"}, "protocol of .* must be a dictionary"),
    ({"n": [3, 4]}, r"n of .* must be one value, got shape \(2,\)"),
    ({"n": 1}, "n of .* must be a whole number of at least 2, got 1"),
    ({"sigma": np.diag([1.0, -1.0])}, "mu and sigma of .*bad.npz has a negative eigenvalue"),
    ({"sigma": np.array([[1.0, 0.1], [0.0, 1.0]])}, "is not symmetric"),
    ({"sigma": np.diag([1.0, np.inf])}, "must be finite"),
    ({"sigma": np.eye(3)}, r"got \(2,\) and \(3, 3\)"),
    ({"mu_s": np.zeros(2)}, "belong together"),
    ({"features": np.zeros((3, 5))}, "have 5 columns, but mu has 2 numbers"),
    ({"features": np.zeros((3, 2)), "n": 2}, "3 rows of features of .*, but only n = 2"),
    ({"labels": np.zeros(3, int)}, "one for each row of features"),
    ({"features": np.full((3, 2), np.nan)}, "must be finite"),
  ],
)
def test_what_is_not_valid_is_refused(tmp_path, changed, message):
  np.savez(tmp_path / "bad.npz", **({"mu": np.zeros(2), "sigma": np.eye(2)} | changed))
  with pytest.raises(ValueError, match=message):
    read_statistics(tmp_path / "bad.npz")


def test_rounding_errors_of_float32_are_allowed(rng, tmp_path):
  features = rng.gamma(0.5, size=(50, 120))  # Of rank 49: the other eigenvalues are rounding errors of either sign.
  sigma = np.cov(features.astype(np.float32).T).astype(np.float32)
  assert np.linalg.eigvalsh(sigma)[0] < 0
  np.savez(tmp_path / "r.npz", mu=features.mean(0), sigma=sigma)
  gaussian = read_statistics(tmp_path / "r.npz").gaussian
  assert metrics.frechet_distance(gaussian, gaussian) < 1e-3


def test_a_failed_write_leaves_the_old_file(full, tmp_path, monkeypatch):
  path = tmp_path / "r.npz"
  write_statistics(path, full[0])

  def full_disk(self, target):
    raise OSError("no space left on device")

  monkeypatch.setattr("pathlib.Path.replace", full_disk)
  with pytest.raises(OSError, match="no space"):
    write_statistics(path, Statistics(np.zeros(2), np.eye(2)))
  equal(read_statistics(path), full[0])
  assert [*tmp_path.iterdir()] == [path]


def test_statistics_of_features_refuse(rng):
  features = rng.normal(size=(6, 2))
  for options, message in [
    ({"spatial": features[:3]}, "6 rows of features, but 3 of spatial features"),
    ({"keep": [6]}, "rows from 0 to 5, got 6 to 6"),
    ({"keep": [0.5]}, "numbers of at least one row"),
    ({"labels": np.zeros(6, int)}, "give the rows to keep, or leave labels out"),
    ({"labels": np.zeros(5, int), "keep": [0]}, r"one for each of the 6 images, got shape \(5,\)"),
    ({"protocol": {"function": print}}, "must be plain data"),
  ]:
    with pytest.raises(ValueError, match=message):
      Statistics.of(features, **options)
