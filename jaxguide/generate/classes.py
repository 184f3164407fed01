"""Classes by name or by number, as the options take them."""

import re
import unicodedata
from collections.abc import Sequence

from jaxguide._core import checks
from jaxguide.models.model import Model


def classes_of(model: Model, classifier: Model | None) -> int | None:
  """Give the number of classes that samples are of; None if there are none."""
  return model.config.num_classes if classifier is None else classifier.config.num_classes


def names_of(model: Model, classifier: Model | None) -> Sequence[str] | None:
  """Give the names of all classes, those of the model before those of the classifier; None if there are none."""
  names = model.config.class_names
  return classifier.config.class_names if names is None and classifier is not None else names


def number_of(label: int | str, names: Sequence[str] | None) -> int:
  """Give the number of a class. A text that is both a name and a number is the class of that name.

  Args:
    label: a name, or a number as such or as a text.
    names: the names of all classes; None if they have none.

  Raises:
    ValueError: for a text that is neither; the message has the nearest name.

  >>> number_of("dog", ["cat", "dog"]), number_of("0", ["cat", "dog"]), number_of("1", ["1", "2"])
  (1, 0, 0)
  """
  if not isinstance(label, str):
    return label
  numbers = {} if names is None else {name: number for number, name in enumerate(names)}
  # An umlaut is one character or two: folders of a Mac often have two, and keyboards give one.
  composed = {unicodedata.normalize("NFC", name): name for name in numbers}
  if label not in numbers:
    label = composed.get(unicodedata.normalize("NFC", label), label)
  if label not in numbers and re.fullmatch(r"[+-]?[0-9]+", label):
    return int(label)
  if names is None:
    raise ValueError(f"the classes of the model have no names: give label as a number, got {label!r}")
  return checks.lookup("class", label, numbers)


def numbered(text: str, names: Sequence[str] | None) -> str:
  """Write classes, with / between them, as numbers. A name stays where the number is the name of another class.

  >>> numbered("dog/0", ["cat", "dog"]), numbered("1", ["1", "0"])
  ('1/0', '1')
  """
  labels = text.split("/")
  found = [(label, number_of(label, names)) for label in labels]
  return "/".join(str(number) if number_of(str(number), names) == number else label for label, number in found)
