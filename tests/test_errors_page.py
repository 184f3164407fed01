"""The page of the errors: each message that it quotes is one of the package's."""

import ast
import functools
import re
from pathlib import Path

import public_names
import pytest

import jaxguide

PAGE = (public_names.DOCS / "errors.md").read_text()
OURS = PAGE.partition("\n## Installation")[2].partition("\n## Errors of JAX itself")[0]
MESSAGES = [found[1] for line in OURS.splitlines() if (found := re.match(r"\| `([^`]+)` \|", line))]
ANY = "\0"
LEAST = 12
"""The number of fixed letters that say something."""


def text_of(node):
  """Give the text of a literal, with `ANY` for what differs; None for other nodes."""
  if isinstance(node, ast.Constant):
    return node.value if isinstance(node.value, str) else None
  if isinstance(node, ast.JoinedStr):
    return "".join(value.value if isinstance(value, ast.Constant) else ANY for value in node.values)
  return None


@functools.cache
def literals():
  """Give all texts in the package that may be messages."""
  found = set()
  for path in Path(jaxguide.__file__).parent.rglob("*.py"):
    found |= {text_of(node) for node in ast.walk(ast.parse(path.read_text()))}
  return {text for text in found if text and len(text) >= LEAST}


def fixed(message):
  """Give the fixed parts of a message. In ``run....`` the first point is one of them."""
  return [part for part in re.split(r"\.\.\.(?!\.)", message) if part.strip()]


def is_said(message):
  """Whether a text of the package has all fixed parts of a message, in their order."""
  pattern = re.compile(".*".join(map(re.escape, fixed(message))), re.DOTALL)
  return any(pattern.search(text) for text in literals())


def test_there_are_many_messages():
  assert len(MESSAGES) > 80
  assert len(set(MESSAGES)) == len(MESSAGES)


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_one_of_the_package(message):
  assert sum(map(len, fixed(message))) >= LEAST
  assert is_said(message)


@pytest.mark.parametrize(
  "message", ["there is no moddel in ...: ...", "the mesh ... needs ... devices, and has ...: give"]
)
def test_a_message_that_has_drifted_is_noticed(message):
  assert not is_said(message)
