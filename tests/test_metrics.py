"""Figures of feature arrays against exact mathematics, the papers written anew in NumPy, and other programs."""

import importlib.util
import math
import tracemalloc

import numpy as np
import pytest

from jaxguide.evaluation import metrics
from jaxguide.evaluation.metrics import Gaussian, balls, intervals, neighbours


@pytest.fixture
def rng():
  return np.random.default_rng(0)


@pytest.fixture(scope="module")
def sets():
  """Features like those of a network: not negative, skewed and correlated; two sets that overlap in part."""
  rng = np.random.default_rng(1)
  mix = rng.normal(size=(24, 24)) / 5
  real, generated = (np.exp(rng.normal(size=(n, 24)) @ mix) for n in (300, 260))
  return real.astype(np.float32), (1.1 * generated + 0.1).astype(np.float32)


@pytest.fixture(scope="module")
def fidelity():
  """``name -> module`` of torch-fidelity. It imports torchvision, which its functions on features do not need."""
  if importlib.util.find_spec("torch_fidelity") is None:
    pytest.skip("torch-fidelity is not installed")
  try:
    importlib.import_module("torchvision")
  except RuntimeError:
    pytest.skip("torchvision does not fit PyTorch")
  return lambda name: importlib.import_module(f"torch_fidelity.metric_{name}")


# --- Fréchet distance -----------------------------------------------------------------------------


def positive(rng, d):
  root = rng.normal(size=(d, d))
  return root @ root.T / d + 0.1 * np.eye(d)


def test_frechet_distance_of_gaussians_that_do_not_commute(rng):
  """A symmetric positive map T is the optimal transport of N(m, S), so the distance is the mean of |x - T x|^2."""
  covariance, transport, mean = positive(rng, 12), positive(rng, 12), rng.normal(size=12)
  moved = Gaussian(mean + 1, transport @ covariance @ transport)
  expected = 12 + np.trace((np.eye(12) - transport) @ covariance @ (np.eye(12) - transport))
  got = metrics.frechet_distance(Gaussian(mean, covariance), moved)
  assert got == pytest.approx(expected, rel=1e-10)


def test_features_and_their_gaussian_have_one_distance(rng):
  real, few = rng.normal(size=(100, 8)), rng.normal(size=(6, 8)) + 0.5
  expected = metrics.frechet_distance(metrics.gaussian(real), metrics.gaussian(few))
  assert metrics.frechet_distance(real, few) == pytest.approx(expected, rel=1e-9)
  assert metrics.frechet_distance(few, metrics.gaussian(real)) == pytest.approx(expected, rel=1e-9)
  root = np.linalg.eigvals(np.cov(real.T) @ np.cov(few.T)).astype(complex)
  offset = real.mean(0) - few.mean(0)
  by_hand = offset @ offset + np.trace(np.cov(real.T) + np.cov(few.T)) - 2 * np.sqrt(root).real.sum()
  assert expected == pytest.approx(by_hand, abs=1e-6)


@pytest.mark.parametrize("n", [60, 900])
def test_equal_sets_have_no_distance(rng, n):
  features = np.float32(100 * rng.gamma(0.1, size=(n, 128)))  # variances from 0 to thousands
  features[:, :3] = 7
  shuffled = features[rng.permutation(n)]
  assert metrics.frechet_distance(features, shuffled) < 1e-6
  assert metrics.frechet_distance(metrics.gaussian(features), metrics.gaussian(shuffled)) < 1e-6


@pytest.mark.slow
def test_equal_sets_of_inceptions_width_have_no_distance(rng):
  features = np.float32(rng.gamma(0.5, size=(5000, 2048)) @ (np.abs(rng.normal(size=(2048, 2048))) / 2048))
  assert metrics.frechet_distance(features, features[::-1]) < 1e-6


def test_moments_of_batches_far_from_the_origin(rng, monkeypatch):
  monkeypatch.setattr("jaxguide.evaluation.metrics.arrays._CHUNK", 64)
  features = rng.normal(size=(50, 7)) + 1e6
  moments = metrics.Moments()
  for part in np.split(features, [1, 4, 30]):
    moments.add(part)
  mean, covariance, n = moments.gaussian()
  assert n == 50
  np.testing.assert_allclose(mean, features.mean(0), rtol=1e-14)
  np.testing.assert_allclose(covariance, np.cov(features.T), atol=1e-9)


def test_moments_copy_pieces_alone(monkeypatch):
  monkeypatch.setattr("jaxguide.evaluation.metrics.arrays._CHUNK", 2**19)
  features = np.ones((20_000, 250), np.float32)
  features[::2] = 3
  tracemalloc.start()
  fitted = metrics.gaussian(features)
  most = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert most < 1.2e7  # The features have 2e7 bytes, and 4e7 in float64.
  assert fitted.mean[0] == 2
  assert fitted.covariance[3, 5] == pytest.approx(20_000 / 19_999)


@pytest.mark.parametrize(("n", "d"), [(60, 16), (24, 16), (8, 16)])
def test_frechet_bias_is_the_mean_of_samples(rng, n, d):
  covariance = np.diag(np.geomspace(3, 0.05, d))
  exact = Gaussian(np.zeros(d), covariance)
  drawn = [metrics.frechet_distance(rng.normal(size=(n, d)) * np.sqrt(np.diag(covariance)), exact) for _ in range(150)]
  assert metrics.frechet_bias(covariance, n) == pytest.approx(np.mean(drawn), rel=0.1)
  assert metrics.frechet_bias(np.zeros((d, d)), n) == 0


def test_few_samples_are_a_warning(rng):
  reference = Gaussian(np.zeros(20), np.eye(20))
  assert metrics.few_samples_warning(21, reference) == ""
  text = metrics.few_samples_warning(20, reference)
  assert "20 samples are too few for 20 features: their covariance has rank 19 at most" in text
  assert f"about {metrics.frechet_bias(np.eye(20), 20):.3g}," in text


def test_gaussians_without_a_meaning_are_refused():
  good = Gaussian(np.zeros(2), np.eye(2))
  for covariance, message in [
    (np.eye(3), r"covariance of shape \(d, d\), got \(2,\) and \(3, 3\)"),
    (np.diag([1.0, -0.5]), "features_b has a negative eigenvalue"),
    (np.array([[1.0, 0.5], [0.0, 1.0]]), "features_b is not symmetric"),
    (np.diag([1.0, np.nan]), "features_b must be finite"),
    (np.eye(2, dtype=complex), "features_b must be real numbers"),
  ]:
    with pytest.raises(ValueError, match=message):
      metrics.frechet_distance(good, Gaussian(np.zeros(2), covariance))
  with pytest.raises(ValueError, match="one width, got 2 and 1"):
    metrics.frechet_distance(good, np.zeros((3, 1)))
  with pytest.raises(ValueError, match="overflow float64"):
    metrics.frechet_distance(good, 1e200 * np.eye(2))
  with pytest.raises(ValueError, match="overflow float64"):
    metrics.gaussian(1e200 * np.arange(10.0)[:, None])
  with pytest.raises(ValueError, match="at least 2 feature vectors, got 0"):
    metrics.Moments().gaussian()


@pytest.mark.torch
def test_frechet_distance_is_that_of_torch_fidelity(sets, fidelity):
  torch = pytest.importorskip("torch")
  theirs = fidelity("fid")
  ours = metrics.frechet_distance(*sets)
  statistics = [theirs.fid_features_to_statistics(torch.from_numpy(each.astype(np.float64))) for each in sets]
  value = theirs.fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
  assert ours == pytest.approx(value, rel=1e-6)
  single = [theirs.fid_features_to_statistics(torch.from_numpy(each)) for each in sets]  # Their means are in float32.
  assert ours == pytest.approx(theirs.fid_statistics_to_metric(*single, False)["frechet_inception_distance"], rel=1e-5)


@pytest.mark.torch
def test_frechet_distance_is_pytorch_fids(sets, fidelity, monkeypatch):
  linalg = pytest.importorskip("scipy.linalg")
  theirs = pytest.importorskip("pytorch_fid.fid_score")
  sqrtm = linalg.sqrtm  # It calls SciPy's function by an argument that SciPy no longer has.
  monkeypatch.setattr(theirs.linalg, "sqrtm", lambda matrix, disp=True: sqrtm(matrix) if disp else (sqrtm(matrix), 0.0))
  moments = [part for each in sets for part in (each.mean(0, dtype=np.float64), np.cov(each, rowvar=False))]
  assert metrics.frechet_distance(*sets) == pytest.approx(theirs.calculate_frechet_distance(*moments), rel=1e-6)


# --- kernel distance ------------------------------------------------------------------------------


def kernel_distance(real, generated):
  """Equation 4 of Binkowski et al. 2018, pair by pair."""

  def kernel(x, y):
    return (x @ y / len(x) + 1) ** 3

  def among(a):
    return np.mean([kernel(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j])

  return among(real) + among(generated) - 2 * np.mean([kernel(x, y) for x in real for y in generated])


def test_kid_of_whole_sets_is_the_papers(rng):
  real, generated = rng.normal(size=(2, 12, 3)) + np.array([0.0, 0.3])[:, None, None]
  whole = metrics.kid(real, generated, subsets=2, subset_size=12)
  assert whole.mean == pytest.approx(kernel_distance(real, generated), rel=1e-10)
  assert whole.std == pytest.approx(0, abs=1e-12)


def test_kid_has_no_bias(rng):
  """Over small samples of two known distributions, its mean is the exact squared discrepancy."""
  x, y = np.array([0.0, 1.0]), np.array([0.0, 0.5, 1.5])

  def kernel(a, b):
    return ((a[:, None] * b + 1) ** 3).mean()

  exact = kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)
  drawn = [
    metrics.kid(rng.choice(x, (12, 1)), rng.choice(y, (12, 1)), subsets=1, subset_size=12).mean for _ in range(1500)
  ]
  error = np.std(drawn) / math.sqrt(len(drawn))
  assert abs(np.mean(drawn) - exact) < 3 * error < 0.5 * exact


def test_kid_refuses(sets):
  with pytest.raises(ValueError, match=r"subset_size is 1,000, but there are only 300 real and 260 generated .*=260"):
    metrics.kid(*sets)
  with pytest.raises(ValueError, match="seed must be a whole number from 0"):
    metrics.kid(*sets, subset_size=9, seed=-1)
  with pytest.raises(ValueError, match="overflow float64"):
    metrics.kid(1e60 * np.eye(3), 1e60 * np.eye(3), subset_size=3)


@pytest.mark.torch
def test_kid_is_torch_fidelitys(sets, fidelity):
  torch = pytest.importorskip("torch")
  theirs = fidelity("kid")
  real, generated = (torch.from_numpy(each.astype(np.float64)) for each in sets)
  options = {"kid_subsets": 7, "kid_subset_size": 50, "rng_seed": 2020, "verbose": False}
  value = theirs.kid_features_to_metric(generated, real, **options)
  ours = metrics.kid(*sets, subsets=7, subset_size=50, seed=2020)
  assert ours == pytest.approx(tuple(value.values()), rel=1e-9)


# --- Inception score ------------------------------------------------------------------------------


def test_inception_score_by_hand(rng):
  logits = rng.normal(size=(11, 4))
  p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  scores = []
  for part in (p[:3], p[3:7], p[7:]):  # 11 samples in 3 splits
    scores.append(np.exp(np.mean([(row * np.log(row / part.mean(0))).sum() for row in part])))
  assert metrics.inception_score(logits, 3) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-12)


def test_inception_score_of_extremes(rng):
  assert metrics.inception_score(np.zeros((20, 5)), 2) == pytest.approx((1, 0))
  sure = np.repeat(1e5 * np.eye(5, 6), 8, axis=0)  # The other classes have probability 0, and one class all along.
  assert metrics.inception_score(sure, 1).mean == pytest.approx(5)
  assert metrics.inception_score(sure, 5).mean == pytest.approx(1)  # sorted by class
  assert metrics.inception_score(sure, 5, seed=0).mean > 3
  with pytest.raises(ValueError, match="at most the number of samples, 3, got 10"):
    metrics.inception_score(np.zeros((3, 2)))


@pytest.mark.torch
@pytest.mark.parametrize("shuffle", [True, False])
def test_inception_score_is_torch_fidelitys(sets, fidelity, shuffle):
  torch = pytest.importorskip("torch")
  theirs = fidelity("isc")
  value = theirs.isc_features_to_metric(torch.from_numpy(sets[0]), 7, shuffle, 2020)
  ours = metrics.inception_score(sets[0], 7, 2020 if shuffle else None)
  assert ours == pytest.approx(tuple(value.values()), rel=1e-9)


# --- neighbours -----------------------------------------------------------------------------------


def all_distances(a, b):
  return np.sqrt(np.square(a[:, None].astype(np.float64) - b[None]).sum(2))


@pytest.fixture
def small_blocks(monkeypatch):
  """Several blocks, of which the last is not full."""
  monkeypatch.setattr(neighbours, "_BLOCK", 64)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("k", [1, 5])
def test_nearest_is_that_of_all_pairs(sets, small_blocks, own, k):
  real, generated = sets
  distances, rows = metrics.nearest(generated, None if own else real, k)
  every = all_distances(generated, generated if own else real)
  if own:
    np.fill_diagonal(every, np.inf)
  order = np.argsort(every, axis=1)[:, :k]
  np.testing.assert_array_equal(rows, order)
  np.testing.assert_allclose(distances, np.take_along_axis(every, order, 1), rtol=1e-12)


def test_nearest_finds_copies_at_distance_zero(rng):
  base = np.float32(rng.normal(size=(90, 300)) + 50)
  distances, rows = metrics.nearest(base[40:43], base, 2)
  assert (distances[:, 0] == 0).all()
  assert (distances[:, 1] > 1).all()
  assert rows[:, 0].tolist() == [40, 41, 42]
  twice = np.concatenate([base, base[:1]])
  distances, rows = metrics.nearest(twice, None, 1)  # Itself is excluded, its copy is not.
  assert (distances[[0, 90], 0] == 0).all()
  assert (distances[1:90] > 1).all()
  assert rows[[0, 90], 0].tolist() == [90, 0]


def test_nearest_where_float32_cannot_tell(rng):
  """Two tight clusters far from each other, of which one is nearly a point."""
  clusters = np.concatenate([rng.normal(size=(70, 20)) * 1e-7 + 1, rng.normal(size=(70, 20)) * 1e-3 - 1])
  distances, rows = metrics.nearest(clusters, None, 4)
  every = all_distances(clusters, clusters)
  np.fill_diagonal(every, np.inf)
  np.testing.assert_array_equal(rows, np.argsort(every, axis=1)[:, :4])
  np.testing.assert_allclose(distances, np.sort(every, axis=1)[:, :4], rtol=1e-9)


def test_nearest_at_the_ends(rng):
  big = rng.normal(size=(10, 3))
  distances, _ = metrics.nearest(1e150 * big, None, 9)
  np.testing.assert_allclose(distances, 1e150 * metrics.nearest(big, None, 9)[0], rtol=1e-12)
  assert metrics.nearest(np.zeros((4, 2), np.float16), None, 3)[0].sum() == 0
  with pytest.raises(ValueError, match="k must be a whole number from 1 to 9, got 10"):
    metrics.nearest(big, None, 10)
  with pytest.raises(ValueError, match="one width, got 3 and 2"):
    metrics.nearest(big, big[:, :2], 1)


def by_brute_force(real, generated, k):
  """The definitions of the two papers; the k-th neighbour is the k-th after the sample itself."""
  every = all_distances(real, generated)
  of_real = np.sort(all_distances(real, real), axis=1)[:, k]
  of_generated = np.sort(all_distances(generated, generated), axis=1)[:, k]
  precision = (every <= of_real[:, None]).any(0).mean()
  recall = (every <= of_generated[None]).any(1).mean()
  density = (every <= of_real[:, None]).sum() / (k * len(generated))
  coverage = (every <= of_real[:, None]).any(1).mean()
  return precision, recall, density, coverage


@pytest.mark.parametrize("k", [1, 3])
def test_neighbourhoods_are_those_of_all_pairs(sets, small_blocks, k):
  expected = by_brute_force(*sets, k)
  assert metrics.neighbourhoods(*sets, k, k)[:4] == pytest.approx(expected, rel=1e-12)
  assert 0.1 < expected[0] < 0.9
  assert 0.1 < expected[1] < 0.9
  assert metrics.precision_recall(*sets, k)[:2] == pytest.approx(expected[:2], rel=1e-12)
  assert metrics.density_coverage(*sets, k)[:2] == pytest.approx(expected[2:], rel=1e-12)


def test_neighbourhoods_with_copies(sets, small_blocks):
  """Copies of neighbours are on the surface of balls, where float32 cannot tell inside from outside."""
  real = sets[0]
  k = 3
  expected = by_brute_force(real, real, k)
  found = metrics.neighbourhoods(real, real.copy(), k, k)
  assert found[:4] == expected == (1.0, 1.0, (k + 1) / k, 1.0)
  mixed = np.concatenate([real[:50], sets[1][:80], real[:9]])
  assert metrics.neighbourhoods(real, mixed, k, k)[:4] == pytest.approx(by_brute_force(real, mixed, k), rel=1e-12)


@pytest.mark.parametrize("many", [1, 10**9])
def test_neighbourhoods_of_crowds(rng, monkeypatch, many):
  """All pairs of a block are in doubt: one by one, or as a whole."""
  monkeypatch.setattr(balls, "_MANY", many)
  real = np.concatenate([np.ones((30, 5)), rng.normal(size=(30, 5)) * 1e-8])
  generated = np.concatenate([np.ones((20, 5)), rng.normal(size=(20, 5)) * 1e-8])
  assert metrics.neighbourhoods(real, generated, 3, 3)[:4] == pytest.approx(by_brute_force(real, generated, 3))


def test_precision_and_recall_of_intervals(rng):
  """Real samples on [0, 1] and generated ones on [0.25, 2]: 3/7 of these are real, which cover 3/4 of those."""
  real, generated = rng.uniform(0, 1, (1500, 1)), rng.uniform(0.25, 2, (1500, 1))
  found = metrics.precision_recall(real, generated)
  share = generated[:, 0] < 1
  assert found.precision == pytest.approx(share.mean(), abs=0.02)
  assert abs(found.precision - 3 / 7) < 0.04
  assert found.recall == pytest.approx((real > 0.25).mean(), abs=0.02)
  assert (found.in_real == share).mean() > 0.98


def test_density_and_coverage_of_one_distribution(rng):
  """A new sample is among the k nearest of n with probability k / n, whatever the distribution is."""
  n, m, k = 60, 40, 3
  found = [metrics.density_coverage(*np.split(rng.normal(size=(n + m, 2)), [n]), k)[:2] for _ in range(60)]
  missed = math.prod((n - i) / (m + n - i) for i in range(1, k + 1))
  density, coverage = np.mean(found, 0)
  error = np.std(found, 0) / math.sqrt(len(found))
  assert abs(density - 1) < 3 * error[0] < 0.1
  assert abs(coverage - (1 - missed)) < 3 * error[1] < 0.03


def test_neighbourhoods_refuse(sets):
  with pytest.raises(ValueError, match="k is 3, but the smaller set has 3 samples, of which each has 2 neighbours"):
    metrics.precision_recall(sets[0], sets[1][:3])
  with pytest.raises(ValueError, match="one width, got 24 and 2"):
    metrics.density_coverage(sets[0], sets[1][:, :2])


def openai_precision_recall(real, generated, k, batch, dtype):
  """The rule of OpenAI's evaluator: squared distances, in float16 unless they overflow, block by block."""

  def distances(u, v):
    with np.errstate(over="ignore", invalid="ignore"):
      u_, v_ = u.astype(dtype), v.astype(dtype)
      found = np.maximum((u_**2).sum(1)[:, None] - 2 * (u_ @ v_.T) + (v_**2).sum(1)[None], 0)
    if not np.isfinite(found).all():
      u_, v_ = u.astype(np.float32), v.astype(np.float32)
      found = np.maximum((u_**2).sum(1)[:, None] - 2 * (u_ @ v_.T) + (v_**2).sum(1)[None], 0)
    return found.astype(np.float32)

  def blocks(a):
    return [slice(i, i + batch) for i in range(0, len(a), batch)]

  def radii(a):
    rows = [np.concatenate([distances(a[i], a[j]) for j in blocks(a)], 1) for i in blocks(a)]
    return np.partition(np.concatenate(rows), k, axis=1)[:, k]

  of_real, of_generated = radii(real), radii(generated)
  real_in, generated_in = np.zeros(len(real), bool), np.zeros(len(generated), bool)
  for i in blocks(real):
    for j in blocks(generated):
      block = distances(real[i], generated[j])
      real_in[i] |= (block <= of_generated[j]).any(1)
      generated_in[j] |= (block <= of_real[i][:, None]).any(0)
  return generated_in.mean(), real_in.mean()


def test_precision_and_recall_are_openais(sets):
  ours = metrics.precision_recall(*sets)[:2]
  assert ours == openai_precision_recall(*sets, 3, 100, np.float32)
  # In float16 they round distances to 0.1 %: some pairs change sides.
  assert ours == pytest.approx(openai_precision_recall(*sets, 3, 100, np.float16), abs=0.02)


@pytest.mark.torch
def test_precision_and_recall_are_torch_fidelitys(sets, fidelity):
  torch = pytest.importorskip("torch")
  theirs = fidelity("prc")
  real, generated = map(torch.from_numpy, sets)
  options = {"prc_neighborhood": 3, "prc_batch_size": 100, "save_cpu_ram": True, "verbose": False}
  value = theirs.prc_features_to_metric(generated, real, **options)
  assert metrics.precision_recall(*sets)[:2] == pytest.approx((value["precision"], value["recall"]), rel=1e-6)


@pytest.mark.torch
def test_density_and_coverage_are_the_authors(sets):
  theirs = pytest.importorskip("prdc").compute_prdc(*(each.astype(np.float64) for each in sets), nearest_k=5)
  found = metrics.neighbourhoods(*sets, 5, 5)
  for name in ("precision", "recall", "density", "coverage"):
    assert getattr(found, name) == pytest.approx(theirs[name], rel=1e-9)


# --- diversity ------------------------------------------------------------------------------------


def test_diversity_of_features_in_blocks(rng, monkeypatch):
  monkeypatch.setattr("jaxguide.evaluation.metrics.within_class._BLOCK", 8)
  features, labels = rng.normal(size=(50, 6)) + 100, rng.integers(2, size=50)
  means = []
  for label in (0, 1):
    every = all_distances(features[labels == label], features[labels == label])
    means.append(every.sum() / (len(every) * (len(every) - 1)))
  assert metrics.diversity(features, labels) == pytest.approx(np.mean(means), rel=1e-10)
  images = rng.integers(0, 256, (30, 2, 2, 3), np.uint8)
  pixels = images.reshape(30, -1) / 255
  same = np.zeros(30, int)
  assert metrics.diversity(images, same) == pytest.approx(metrics.diversity(pixels, same), rel=1e-12)
  assert metrics.diversity(np.repeat(features[:1], 30, 0), same) == 0


def test_diversity_of_features_refuses():
  with pytest.raises(ValueError, match="one for each of the 3 feature vectors, got float64"):
    metrics.diversity(np.eye(3), np.zeros(3))
  with pytest.raises(ValueError, match="features must be finite"):
    metrics.diversity(np.array([[np.nan], [1.0]]), np.zeros(2, int))
  with pytest.raises(ValueError, match="images must be uint8"):
    metrics.diversity(np.zeros((2, 2, 2, 1)), np.zeros(2, int))


# --- intervals ------------------------------------------------------------------------------------


def test_wilsons_interval_covers_what_it_says():
  """The exact probability, summed over the binomial distribution; it swings around the level."""
  n = 100
  found = [metrics.proportion_interval(count, n)[:2] for count in range(n + 1)]
  covered = []
  for p in np.linspace(0.02, 0.98, 97):
    weights = [math.comb(n, count) * p**count * (1 - p) ** (n - count) for count in range(n + 1)]
    covered.append(sum(w for w, (low, high) in zip(weights, found, strict=True) if low <= p <= high))
  assert np.mean(covered) == pytest.approx(0.95, abs=0.005)
  assert min(covered) > 0.9
  assert found[0][0] == 0 < found[0][1]
  assert found[n][1] == 1 > found[n][0]


def test_intervals_of_means(rng):
  values = rng.poisson(2, 400) / 5
  expected = values.mean() + np.array([-1.96, 1.96]) * values.std() / 20
  by_rows = metrics.bootstrap(lambda rows: values[rows].mean(), 400, resamples=2000)
  by_values = metrics.mean_interval(values)
  np.testing.assert_allclose(by_rows[:2], expected, atol=0.006)
  np.testing.assert_allclose(by_values[:2], expected, atol=0.006)
  narrow = metrics.mean_interval(values, level=0.5)
  assert narrow.kind.startswith("50 % of 2,000 bootstrap resamples")
  assert (narrow.high - narrow.low) / (by_values.high - by_values.low) == pytest.approx(0.6745 / 1.96, abs=0.03)
  assert metrics.mean_interval(values) == by_values
  assert metrics.mean_interval(values, seed=1) != by_values


def test_intervals_refuse():
  with pytest.raises(ValueError, match="figure of a bootstrap resample is infinite or NaN"):
    metrics.bootstrap(lambda rows: math.nan, 5)
  with pytest.raises(ValueError, match="level must be between 0 and 1, without both"):
    metrics.proportion_interval(1, 2, level=1.0)
  with pytest.raises(ValueError, match="count must be a whole number from 0 to 2"):
    metrics.proportion_interval(3, 2)
  with pytest.raises(ValueError, match="at least two finite numbers"):
    metrics.mean_interval([1.0, math.inf])
  with pytest.raises(ValueError, match="at least two sets of samples, got 1"):
    metrics.least_of([1.0])
  with pytest.raises(ValueError, match="3 feature vectors"):
    metrics.frechet_interval(np.eye(2), np.eye(2))


@pytest.mark.parametrize("n", [7, 24])
def test_few_samples_and_a_gaussian_have_the_distance_of_their_covariances(rng, n):
  """The span of the samples against SciPy's root of the product of the covariances."""
  import scipy.linalg

  real, few = rng.normal(size=(70, 48)) @ rng.normal(size=(48, 48)), rng.normal(size=(n, 48)) + 0.3
  reference, offset = metrics.gaussian(real), real.mean(0) - few.mean(0)
  values = scipy.linalg.eigvals(np.cov(real.T) @ np.cov(few.T)).astype(complex)
  expected = offset @ offset + np.trace(np.cov(real.T) + np.cov(few.T)) - 2 * np.sqrt(values).real.sum()
  assert metrics.frechet_distance(few, reference) == pytest.approx(expected, rel=1e-6)
  assert metrics.frechet_distance(reference, few) == metrics.frechet_distance(few, reference)
  distance, counts = intervals._Resampled(reference, few), np.bincount(rng.integers(n, size=n), minlength=n) * 1.0
  assert distance.spanned is not None
  rows = np.repeat(few, counts.astype(int), axis=0)
  assert distance(counts) == pytest.approx(metrics.frechet_distance(real, rows), rel=1e-6)
  with pytest.raises(ValueError, match="one width, got 47 and 48"):
    metrics.frechet_distance(few[:, 1:], reference)


def test_few_samples_of_the_reference_have_no_distance(rng):
  real = rng.gamma(0.2, size=(20, 60))
  assert metrics.frechet_distance(real, metrics.gaussian(real)) < 1e-6


def test_the_warning_of_few_samples_is_the_same_in_the_span(rng):
  real = rng.normal(size=(12, 30))
  reference = metrics.gaussian(real)
  assert metrics.few_samples_warning(9, reference, real) == metrics.few_samples_warning(9, reference)


# --- the jackknife ---


@pytest.mark.parametrize("m", [7, 50])
def test_what_is_left_out_of_recall_and_coverage(rng, m):
  real, generated = rng.normal(size=(60, 3)), 0.7 * rng.normal(size=(m, 3))
  found = metrics.neighbourhoods(real, generated, 3, 4, jackknife_seed=5)
  groups = min(m, 20)
  group = np.random.default_rng(5).permutation(m) % groups
  expected = [metrics.neighbourhoods(real, generated[group != g], 3, 4) for g in range(groups)]
  np.testing.assert_allclose(found.left.recalls, [each.recall for each in expected])
  np.testing.assert_allclose(found.left.coverages, [each.coverage for each in expected])
  assert metrics.neighbourhoods(real, generated[:4], 3, 3, jackknife_seed=5).left is None


@pytest.mark.parametrize(("n", "stretch"), [(40, 0.5), (30, 1.0)])
def test_jackknife_intervals_cover_the_mean_of_other_samples(rng, n, stretch):
  """The reference is kept, and other samples of the same normal distribution are drawn 100 times."""
  real = rng.normal(size=(300, 2))
  found = [metrics.neighbourhoods(real, stretch * rng.normal(size=(n, 2)), jackknife_seed=0) for _ in range(100)]
  for values, left in (
    ([each.recall for each in found], [each.left.recalls for each in found]),
    ([each.coverage for each in found], [each.left.coverages for each in found]),
  ):
    made = [metrics.jackknife_interval(value, part, n) for value, part in zip(values, left, strict=True)]
    assert np.mean([low <= np.mean(values) <= high for low, high, _ in made]) >= 0.9
    half = np.mean([high - low for low, high, _ in made]) / 2
    assert 1.6 * np.std(values) < half < 3.5 * np.std(values)


@pytest.mark.parametrize("n", [9, 60])
def test_a_resamples_distance_is_that_of_its_rows(rng, n):
  real, generated = rng.normal(size=(80, 12)), 3 * rng.normal(size=(n, 12)) + 1
  distance = intervals._Resampled(real, generated)
  counts = np.bincount(rng.integers(n, size=n), minlength=n).astype(np.float64)
  rows = np.repeat(generated, counts.astype(int), axis=0)
  assert distance(counts) == pytest.approx(metrics.frechet_distance(real, rows), rel=1e-5)
  assert distance(np.ones(n)) == pytest.approx(metrics.frechet_distance(real, generated), rel=1e-5)


def covers(runs, resamples, n=500, d=16, shift=0.25, stretch=1.3):
  """How often the intervals of a known distance cover the mean figure, and the distance itself."""
  rng = np.random.default_rng(3)
  scales = np.geomspace(1.5, 0.3, d)
  exact = Gaussian(np.full(d, shift), np.diag((stretch * scales) ** 2))
  known = d * shift**2 + ((stretch - 1) ** 2 * scales**2).sum()
  figures, found = [], {"figure": [], "limit": []}
  for run in range(runs):
    generated = rng.normal(size=(n, d)) * scales
    figures.append(metrics.frechet_distance(exact, generated))
    for of, kept in found.items():
      kept.append(metrics.frechet_interval(exact, generated, resamples, seed=run, of=of)[:2])
  targets = {"figure": np.mean(figures), "limit": known}
  return {of: np.mean([low <= targets[of] <= high for low, high in kept]) for of, kept in found.items()}


def test_frechet_intervals_cover_a_known_distance():
  assert min(covers(40, 60).values()) > 0.85


@pytest.mark.slow
def test_frechet_intervals_cover_as_often_as_they_say():
  for share in covers(300, 100).values():
    assert 0.91 < share < 0.98  # 95 %, with a standard error of 1.3 %


def test_frechet_interval_says_what_it_is(rng):
  real, generated = rng.normal(size=(50, 20)), rng.normal(size=(40, 20))
  figure = metrics.frechet_interval(real, generated, 10)
  assert figure.kind == (
    "95 % by 10 bootstrap resamples of the 40 generated samples, the reference kept; of the expected distance of 40 "
    "samples"
  )
  assert figure.low < metrics.frechet_distance(real, generated) < figure.high
  limit = metrics.frechet_interval(metrics.gaussian(real), generated, 10, of="limit")
  assert "not to be trusted: 40 samples are too few for 20 features" in limit.kind
  assert limit.high < figure.high
  with pytest.raises(
    ValueError, match="of='limit' needs at least twice as many samples as columns, got 39 samples of 20"
  ):
    metrics.frechet_interval(real, generated[1:], 10, of="limit")
  with pytest.raises(ValueError, match="level must be between"):
    metrics.frechet_interval(real, generated, level=0.0)
