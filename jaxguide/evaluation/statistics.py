"""Reference statistics: the moments and features of a set of real images, in a file.

`read_statistics` reads our own files and those of others: OpenAI's reference batches, EDM's and pytorch-fid's ``.npz``,
and EDM2's ``.pkl``.
"""

import dataclasses
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from jaxguide._core import checks, files, pickles
from jaxguide.data.files import check_sizes
from jaxguide.evaluation.metrics.arrays import check_features
from jaxguide.evaluation.metrics.frechet import Gaussian, Moments, check_gaussian

VERSION = 1
"""The version of our files."""


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
  """What is known of the features of a set of images.

  Args:
    mu: shape (d,), the mean of the features; converted to float64.
    sigma: shape (d, d), their unbiased covariance; converted to float64.
    n: the number of images; None if it is not known.
    mu_s: shape (e,), the mean of the spatial features, for the sFID; None if there are none.
    sigma_s: shape (e, e), their covariance; None if there are none.
    features: shape (m, d), features of all or some of the images, for the KID, precision and recall; None if they were
      not kept.
    labels: int of shape (m,), the classes of the images whose features were kept; None if they are not known.
    class_names: the names of the classes; None if they are not known.
    fingerprint: what identifies the images; None if it is not known.
    protocol: everything that the features depend on, as plain data; None if it is not known.
    source: the file that they were read from, for error messages. It is not written.

  Raises:
    ValueError: if a shape or a type is wrong, a value is not finite, or a covariance is not symmetric or not positive
      semi-definite up to the rounding errors of float32.

  >>> statistics = Statistics(np.zeros(2), np.eye(2))
  >>> statistics.require("features", "the kernel distance")
  Traceback (most recent call last):
  ...
  ValueError: the kernel distance needs features, which the statistics do not have: compute them from the reference
  images
  """

  mu: np.ndarray
  sigma: np.ndarray
  n: int | None = None
  mu_s: np.ndarray | None = None
  sigma_s: np.ndarray | None = None
  features: np.ndarray | None = None
  labels: np.ndarray | None = None
  fingerprint: str | None = None
  protocol: Mapping[str, Any] | None = None
  source: str = ""
  class_names: Sequence[str] | None = None

  def __post_init__(self) -> None:
    def keep(**values: Any) -> None:
      for name, value in values.items():
        object.__setattr__(self, name, value)

    mu, sigma = check_gaussian(f"mu and sigma{self._of}", self.mu, self.sigma)
    keep(mu=mu, sigma=sigma)
    if (self.mu_s is None) != (self.sigma_s is None):
      raise ValueError(f"mu_s and sigma_s{self._of} belong together, but there is only one of them")
    if self.mu_s is not None and self.sigma_s is not None:
      mu_s, sigma_s = check_gaussian(f"mu_s and sigma_s{self._of}", self.mu_s, self.sigma_s)
      keep(mu_s=mu_s, sigma_s=sigma_s)
    if self.n is not None:
      keep(n=checks.at_least(f"n{self._of}", self.n, 2))
    if self.features is not None:
      features = check_features(f"the features{self._of}", self.features, least=1)
      if features.shape[1] != len(mu):
        raise ValueError(f"the features{self._of} have {features.shape[1]} columns, but mu has {len(mu)} numbers")
      if self.n is not None and len(features) > self.n:
        raise ValueError(f"there are {len(features)} rows of features{self._of}, but only n = {self.n} images")
      keep(features=features)
    if self.labels is not None:
      labels = np.asarray(self.labels)
      if self.features is None or labels.shape != self.features.shape[:1] or labels.dtype.kind not in "iu":
        raise ValueError(
          f"labels{self._of} must be whole numbers, one for each row of features, got {labels.dtype} of {labels.shape}"
        )
      keep(labels=labels)
    if self.class_names is not None:
      names = tuple(self.class_names) if isinstance(self.class_names, list | tuple) else ()
      if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"class_names{self._of} must be a list of texts, got {self.class_names!r}")
      keep(class_names=names)
    if self.fingerprint is not None and not isinstance(self.fingerprint, str):
      raise ValueError(f"the fingerprint{self._of} must be a text, got {self.fingerprint!r}")
    if self.protocol is not None:
      if not isinstance(self.protocol, Mapping):
        raise ValueError(f"the protocol{self._of} must be a dictionary, got {self.protocol!r}")
      # Lists, not tuples: it is the same before it is written and after it is read.
      keep(protocol=json.loads(json.dumps(checks.plain("protocol", self.protocol))))

  @property
  def _of(self) -> str:
    return f" of {self.source}" if self.source else ""

  @property
  def gaussian(self) -> Gaussian:
    """The Gaussian of the features, for `jaxguide.evaluation.metrics.frechet_distance`."""
    return Gaussian(self.mu, self.sigma, self.n)

  @property
  def spatial(self) -> Gaussian:
    """The Gaussian of the spatial features.

    Raises:
      ValueError: if there are none.
    """
    return Gaussian(self.require("mu_s", "the sFID"), self.require("sigma_s", "the sFID"), self.n)

  def require(
    self, name: Literal["n", "mu_s", "sigma_s", "features", "labels", "fingerprint", "protocol"], purpose: str
  ) -> Any:
    """Return what a file need not have.

    Args:
      name: ``"n"``, ``"mu_s"``, ``"sigma_s"``, ``"features"``, ``"labels"``, ``"fingerprint"`` or ``"protocol"``.
      purpose: what needs it, for the error message.

    Raises:
      ValueError: if it is not there.
    """
    known = {field.name: None for field in dataclasses.fields(self) if field.name != "source"}
    checks.lookup("part of the statistics", name, known)
    value = getattr(self, name)
    if value is None:
      where = self.source or "the statistics"
      verb = "does" if self.source else "do"
      raise ValueError(f"{purpose} needs {name}, which {where} {verb} not have: compute them from the reference images")
    return value

  @classmethod
  def of(
    cls,
    features: npt.ArrayLike,
    spatial: npt.ArrayLike | None = None,
    keep: npt.ArrayLike | None = None,
    labels: npt.ArrayLike | None = None,
    fingerprint: str | None = None,
    protocol: Mapping[str, Any] | None = None,
  ) -> "Statistics":
    """Compute the statistics of feature arrays. For arrays that do not fit in memory see `metrics.Moments`.

    Args:
      features: shape (n, d), n at least 2.
      spatial: shape (n, e), the spatial features, of which the moments alone are kept; None if there are none.
      keep: the rows of the features to keep, int of shape (m,); None keeps none.
      labels: int of shape (n,), the classes of the images; those of the rows in ``keep`` are kept.
      fingerprint: what identifies the images.
      protocol: everything that the features depend on, as plain data.

    Raises:
      ValueError: if the features are not valid, the numbers of rows differ, or labels are given and no rows to keep.

    >>> statistics = Statistics.of([[0.0], [2.0], [4.0]], keep=[0, 2])
    >>> statistics.mu, statistics.sigma, statistics.n, statistics.features
    (array([2.]), array([[4.]]), 3, array([[0.],
           [4.]]))
    """
    moments, others = Moments(), Moments()
    features = check_features("features", features)
    moments.add(features)
    if spatial is not None:
      spatial = check_features("spatial features", spatial)
      if len(spatial) != len(features):
        raise ValueError(f"there are {len(features)} rows of features, but {len(spatial)} of spatial features")
      others.add(spatial)
    rows = None if keep is None else np.asarray(keep)
    if rows is not None and (rows.dtype.kind not in "iu" or rows.ndim != 1 or not len(rows)):
      raise ValueError(f"keep must be the numbers of at least one row, of shape (m,), got {rows.dtype} of {rows.shape}")
    if rows is not None and (rows.min() < 0 or rows.max() >= len(features)):
      raise ValueError(f"keep must be rows from 0 to {len(features) - 1}, got {rows.min()} to {rows.max()}")
    if labels is not None and rows is None:
      raise ValueError("labels are kept beside features: give the rows to keep, or leave labels out")
    if labels is not None:
      labels = np.asarray(labels)
      if labels.shape != features.shape[:1]:
        raise ValueError(f"labels must be one for each of the {len(features)} images, got shape {labels.shape}")
    fitted, spatial_fit = moments.gaussian(), others.gaussian() if others.n else None
    return cls(
      fitted.mean,
      fitted.covariance,
      fitted.n,
      None if spatial_fit is None else spatial_fit.mean,
      None if spatial_fit is None else spatial_fit.covariance,
      None if rows is None else features[rows],
      None if labels is None or rows is None else labels[rows],
      fingerprint,
      protocol,
    )


ARRAYS = ("mu", "sigma", "mu_s", "sigma_s", "features", "labels")


def write_statistics(path: files.PathLike, statistics: Statistics) -> None:
  """Write statistics atomically to an ``.npz`` file.

  OpenAI's evaluator reads ``mu``, ``sigma``, ``mu_s`` and ``sigma_s`` of it (it wants images as ``arr_0`` as well),
  EDM's and pytorch-fid's programs read ``mu`` and ``sigma``. Ours are ``n``, ``features``, ``labels``, ``fingerprint``,
  ``protocol`` (a JSON text) and ``version``; what is None is left out.

  Raises:
    ValueError: if the name does not end in ``.npz``.
    OSError: if the file cannot be written. The old file, if any, stays.

  >>> import tempfile
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   write_statistics(f"{folder}/reference.npz", Statistics(np.zeros(2), np.eye(2), n=50_000))
  ...   read_statistics(f"{folder}/reference.npz").n
  50000
  """
  if Path(path).suffix.lower() != ".npz":
    raise ValueError(f"statistics are written to a file that ends in .npz, got {path}")
  content = {name: getattr(statistics, name) for name in ARRAYS}
  content |= {"n": statistics.n, "fingerprint": statistics.fingerprint, "version": VERSION}
  content["protocol"] = None if statistics.protocol is None else json.dumps(statistics.protocol)
  content["class_names"] = None if statistics.class_names is None else json.dumps(statistics.class_names)
  present: dict[str, Any] = {name: np.asarray(value) for name, value in content.items() if value is not None}
  with files.replacing(path) as file:
    np.savez(file, allow_pickle=False, **present)


def read_statistics(path: files.PathLike, metric: str | None = None) -> Statistics:
  """Read statistics: our own ``.npz``, OpenAI's, EDM's and pytorch-fid's, or EDM2's ``.pkl``.

  Of an ``.npz``, ``mu`` and ``sigma`` have to be there. Images in it (``arr_0`` of OpenAI's reference batches) are not
  read, and ``n`` is not their number: the moments may be those of more images. Of a ``.pkl``, which is read without
  running any code in it, the moments of one metric and the number of images are taken.

  Args:
    path: the file.
    metric: which of the statistics of a ``.pkl`` to take: ``"fid"`` (Inception) or ``"fd_dinov2"`` in EDM2's. It can be
      left out if there is only one. An ``.npz`` has one, and the argument must be left out.

  Raises:
    FileNotFoundError: if there is no such file.
    OSError: if it cannot be read.
    ValueError: if it is damaged, has no statistics, or they are not valid.
  """
  path = Path(path)
  files.check_readable(path)
  if not path.exists():
    raise FileNotFoundError(f"there is no {path}: give a file of reference statistics, .npz or .pkl")
  if path.suffix.lower() == ".npz":
    if metric is not None:
      raise ValueError(f"metric chooses among the statistics of a .pkl, but {path} has one set of them: leave it out")
    return _from_npz(path)
  if path.suffix.lower() == ".pkl":
    return _from_pickle(path, metric)
  raise ValueError(f"statistics are in a file that ends in .npz or .pkl, got {path}")


def _from_npz(path: Path) -> Statistics:
  try:
    check_sizes(path)
    loaded = np.load(path, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
      raise ValueError("it is a single array")
    with loaded as archive:
      names = archive.files
      wanted = [*ARRAYS, "n", "fingerprint", "protocol", "class_names", "version"]
      content = {name: archive[name] for name in wanted if name in names}
  except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
    raise ValueError(f"{path} cannot be read as statistics: {error or type(error).__name__}") from error
  if "mu" not in content or "sigma" not in content:
    hint = "; it is a batch of images, whose statistics have to be computed first" if "arr_0" in names else ""
    raise ValueError(f"{path} has no mu and sigma, only {', '.join(names) or 'nothing'}{hint}")
  facts = {name: _single(path, name, content.pop(name)) for name in wanted[len(ARRAYS) :] if name in content}
  version = facts.pop("version", VERSION)
  if type(version) is not int or version > VERSION:
    raise ValueError(
      f"{path} has version {version!r}, but this jaxguide reads versions up to {VERSION}: use a newer one"
    )
  if "class_names" in facts:
    try:
      facts["class_names"] = json.loads(facts["class_names"])
    except (TypeError, ValueError) as error:
      raise ValueError(f"the class_names of {path} are not a JSON text: {error}") from error
  if "protocol" in facts:
    try:
      facts["protocol"] = json.loads(facts["protocol"])
    except (TypeError, ValueError) as error:
      raise ValueError(f"the protocol of {path} is not a JSON text: {error}") from error
    if not isinstance(facts["protocol"], dict):
      raise ValueError(f"the protocol of {path} must be a dictionary, got {facts['protocol']!r}")
  return Statistics(**content, **facts, source=str(path))


def _single(path: Path, name: str, value: np.ndarray) -> Any:
  if value.shape:
    raise ValueError(f"{name} of {path} must be one value, got shape {value.shape}")
  return value.item()


def _from_pickle(path: Path, metric: str | None) -> Statistics:
  with path.open("rb") as file:
    content = pickles.read(file, path)
  if not isinstance(content, dict):
    raise ValueError(f"{path} has no statistics: it must hold a dictionary, got {type(content).__name__}")
  found = {name: part for name, part in content.items() if isinstance(part, dict) and {"mu", "sigma"} <= {*part}}
  if not found:
    raise ValueError(f"{path} has no mu and sigma of any metric, only {', '.join(map(str, content)) or 'nothing'}")
  if metric is None and len(found) > 1:
    raise ValueError(f"{path} has the statistics of {', '.join(map(str, found))}: choose one by metric=...")
  part = checks.lookup(f"metric of {path}", next(iter(found)) if metric is None else metric, found)
  n = content.get("num_images")
  return Statistics(part["mu"], part["sigma"], None if n is None else int(n), source=str(path))
