"""Settings of the documentation. `sphinx-build -W -b html docs docs/_build` builds it.

The API pages are made of the docstrings. Two parts of pages are made while building: the table of all names, and the
help of the commands. The build fails if a public name is on no page.
"""

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

import public_names  # noqa: E402, it stands in tests
import typer.main  # noqa: E402
from sphinx.pycode import ModuleAnalyzer  # noqa: E402
from sphinx.util import logging  # noqa: E402
from sphinx.util.nodes import make_refnode  # noqa: E402

import jaxguide  # noqa: E402
from jaxguide.cli import app as cli  # noqa: E402

PUBLIC = list(public_names.public())  # Names that a package imports late are among its members from here on.

project = "jaxguide"
version = release = jaxguide.__version__
copyright = "the jaxguide developers, Apache-2.0"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"jaxguide {version}"
html_theme_options = {"navigation_with_keys": True}
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]

nitpicky = True
default_role = "py:obj"  # What stands between single backticks in a docstring is a name.
add_module_names = False
toc_object_entries = False
python_use_unqualified_type_names = True
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_type_aliases = {name: f"jaxguide._core.typing.{name}" for name in jaxguide.typing.__all__}
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
viewcode_follow_imported_members = True


def setup(app: Any) -> None:
  """Make what is not in files: the parts of pages that follow from the code, and links of names."""
  app.connect("source-read", fill)
  app.connect("missing-reference", find)
  app.connect("autodoc-process-docstring", keep, priority=400)
  app.connect("autodoc-process-docstring", restore, priority=600)
  app.connect("autodoc-process-docstring", escape, priority=700)
  app.connect("autodoc-process-signature", shorten)
  app.connect("autodoc-skip-member", skip)
  app.connect("env-check-consistency", check)


def fill(app: Any, page: str, source: list[str]) -> None:
  """Put the tables where pages have a place for them."""
  for place, make in (("<!-- names of jaxguide -->", names), ("<!-- help of the commands -->", commands)):
    if place in source[0]:
      source[0] = source[0].replace(place, make())
  # A doctest in Markdown ends at an empty line, which the page does not need.
  source[0] = re.sub(r"^(```python\n(?:.*\n)*?)\n```$", r"\1```", source[0], flags=re.MULTILINE)


def escape(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
  """Keep the star of shapes such as (*shape), which would begin emphasis."""
  for i, line in enumerate(lines):
    parts = line.split("``")
    parts[::2] = [re.sub(r"(?<=[(\s])\*(?=\w)(?![^*]*\w\*)", r"\\*", part) for part in parts[::2]]
    lines[i] = "``".join(parts)


def keep(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
  """Remember the text of a value. Napoleon would read what stands before its first colon as a type."""
  is_plain = what in ("attribute", "data", "property") and not any(line.startswith("Raises:") for line in lines)
  _kept[name] = list(lines) if is_plain else None


def restore(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
  """Give the text of a value back, after Napoleon."""
  kept = _kept.pop(name, None)
  lines[:] = lines if kept is None else kept


_kept: dict[str, list[str] | None] = {}


def shorten(
  app: Any, what: str, name: str, thing: Any, options: Any, signature: str | None, returned: str | None
) -> tuple[str | None, str | None]:
  """Write types in signatures by their short names."""
  return _short(signature), _short(returned)


def _short(text: str | None) -> str | None:
  if text is None:
    return None
  for pattern, name in SHORT.items():
    text = re.sub(pattern, name, text)
  return text


SHORT = {
  r"~?TypeAliasForwardRef\('([^']+)'\)": r"\1",
  r"~?(?:jaxtyping\.)?Float\[~?jaxlib\._jax\.Array, '\*shape'\]": "jaxguide._core.typing.Example",
  r"~?(?:jaxtyping\.)?Float\[~?jaxlib\._jax\.Array, ''\]": "jaxguide._core.typing.Scalar",
  r"~?[\w.]*\bArray \| ~?[\w.]*ndarray \| ~?[\w.]*bool \| ~?[\w.]*number \| bool \| int \| float \| complex": (
    "jaxguide._core.typing.ArrayLike"
  ),
  r"jaxlib\._jax\.Array": "Array",
}
"""Long types, as autodoc writes them, and their short names."""


def skip(app: Any, what: str, name: str, thing: Any, skipped: bool, options: Any) -> bool | None:
  """Leave out the method ``replace`` of every dataclass, whose text is Python's."""
  return True if name == "replace" else None


def names() -> str:
  """Give the table of the names of `jaxguide`: each with the first sentence of its docstring."""
  comments = {
    name: text for (_, name), text in ModuleAnalyzer.for_module("jaxguide._core.typing").find_attr_docs().items()
  }
  lines = ["| `jg.` | what it is |", "|---|---|"]
  for name in jaxguide.__all__:
    thing = getattr(jaxguide, name)
    text = "\n".join(comments[name]) if name in comments else inspect.getdoc(thing)
    first = " ".join((text or "").split("\n\n")[0].split()).replace("|", "\\|").replace("``", "`")
    target = public_names.documented_as(thing, public_names.documented()) or thing.__name__
    lines.append(f"| {{py:obj}}`{name} <{target}>` | {first} |")
  return "\n".join(lines)


def commands() -> str:
  """Give the help of every command."""
  group = typer.main.get_command(cli)
  texts = []
  for words, command in _commands(group, ("jaxguide",)):
    with command.make_context(" ".join(words), [], resilient_parsing=True, terminal_width=84) as context:
      formatter = context.make_formatter()
      command.rich_markup_mode = None  # Plain text, as where rich is not installed.
      if (whole := getattr(command, "whole_help", None)) is not None:
        formatter.write(whole(context))
      else:
        command.format_help(context, formatter)
      texts.append(f"## {' '.join(words)}\n\n```text\n{formatter.getvalue().rstrip()}\n```")
  return "\n\n".join(texts)


def _commands(command: Any, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
  yield words, command
  for name, inner in getattr(command, "commands", {}).items():
    yield from _commands(inner, (*words, name))


def find(app: Any, env: Any, node: Any, content: Any) -> Any:
  """Find a name that a docstring gives shortly, such as `chain` or `jaxguide.classifier`, on the page that has it.

  Types in signatures, names of other libraries and names of jaxguide that are not public stay without a link. A name in
  a docstring that is nowhere is an error.
  """
  domain = env.get_domain("py")
  target = node.get("reftarget", "")
  is_ours = target.startswith(("jaxguide.", "jg."))
  parts = target.split(".")
  for end in (".".join(parts[-2:]), parts[-1]) if is_ours else (target,):
    found = [name for name in domain.objects if name.endswith(f".{end}")]
    if found:
      # The nearest to where it is said: the name that shares the longest beginning.
      here = node.get("py:module") or ""
      best = max(found, key=lambda name: (_shared(name, here), -len(name)))
      entry = domain.objects[best]
      return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, content, best)
  return content if node.get("reftype") != "obj" or _exists(parts) else None


OPTIONAL = ("equinox", "haiku")
"""Libraries that docstrings name and that the pages are built without."""


def _exists(parts: list[str]) -> bool:
  """Say whether a name stands for something in jaxguide or in another library."""
  if len(parts) > 1 and parts[0] not in ("jaxguide", "jg") and (parts[0] in OPTIONAL or parts[0] in sys.modules):
    return True
  ours = [module for name, module in sys.modules.items() if name.startswith("jaxguide.")]
  return any(parts[-1] in vars(module) for module in ours) or f"jaxguide.{parts[-1]}" in sys.modules


def _shared(one: str, other: str) -> int:
  return sum(a == b for a, b in zip(one.split("."), other.split("."), strict=False))


def check(app: Any, env: Any) -> None:
  """Fail where a public name is on no page of the API."""
  domain = env.get_domain("py")
  on_pages: dict[str, Any] = {name: sys.modules.get(name) for name in domain.modules}
  for name in domain.objects.keys() - on_pages.keys():
    module, _, last = name.rpartition(".")
    on_pages[name] = getattr(sys.modules.get(module), last, None)
  for name, thing in PUBLIC:
    if public_names.documented_as(thing, on_pages) is None:
      logging.getLogger(__name__).warning("%s is on no page: add it to docs/api", name)
