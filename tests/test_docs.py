"""The documentation: every public name has a place in it, and every link and index entry leads somewhere."""

import ast
import importlib
import re

import public_names
import pytest

ROOT = public_names.DOCS.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(public_names.DOCS.glob("*.md"))]
PAGES += sorted((public_names.DOCS / "api").glob("*.md"))
INDEXES = [page for page in PAGES if "{toctree}" in page.read_text()]


def without_code(text):
  """Leave out blocks and spans of code, where brackets are no links and ``#`` begins no heading."""
  return re.sub(r"`[^`\n]*`", "`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(text):
  """Give the anchors of the headings, as GitHub and MyST make them."""
  text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
  headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
  return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def lost(page, text):
  """Give the links of a page that lead to no file or no heading."""
  links = re.findall(r"\]\(([^)\s]+)\)", without_code(text)) + re.findall(r'(?:src|href)="([^"]+)"', without_code(text))
  for link in links:
    if re.match(r"[a-z]+:", link):
      continue
    path, _, heading = link.partition("#")
    file = page.parent / path if path else page
    found = file.exists() and (not heading or heading in anchors(text if file == page else file.read_text()))
    if not found:
      yield link


def entries(text):
  """Give the entries of the tables of contents of a page."""
  for block in re.findall(r"```\{toctree\}\n(.*?)```", text, flags=re.DOTALL):
    yield from (line for line in block.splitlines() if line and not line.startswith(":"))


def missing(shown):
  """Give the public names that are not shown."""
  return [name for name, thing in public_names.public() if public_names.documented_as(thing, shown) is None]


@pytest.fixture(scope="module")
def shown():
  return public_names.documented()


def test_every_public_name_is_on_a_page_of_the_api(shown):
  assert not missing(shown), "add these to docs/api"


@pytest.mark.parametrize(
  "name", ["jaxguide.guidance.classifier_free", "jaxguide.solvers.SOLVERS", "jaxguide.denoisers.scaling.edm_weight"]
)
def test_a_name_that_is_on_no_page_is_noticed(shown, name):
  without = {key: thing for key, thing in shown.items() if key != name}
  assert len(without) == len(shown) - 1
  assert name.rpartition(".")[2] in {lacking.rpartition(".")[2] for lacking in missing(without)}


def test_the_packages_are_those_that_have_public_names():
  found = set(public_names.packages())
  assert {"jaxguide", "jaxguide.guidance", "jaxguide.evaluation.metrics", "jaxguide.cli"} <= found
  assert not any("._" in name for name in found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
  assert not list(lost(page, page.read_text()))


@pytest.mark.parametrize("link", ["none.md", "notation.md#none", "#none", "../docs/none.png"])
def test_a_link_to_nowhere_is_noticed(link):
  page = public_names.DOCS / "index.md"
  text = "# Here\n\n[one](notation.md#noise-levels), [two](#here), [three](https://example.org), `[four](none.md)`"
  assert not list(lost(page, text))
  assert list(lost(page, f"{text} [five]({link})")) == [link]


@pytest.mark.parametrize("index", INDEXES, ids=lambda page: str(page.relative_to(ROOT)))
def test_index_entries_are_pages(index):
  listed = list(entries(index.read_text()))
  assert listed
  assert not [entry for entry in listed if not (index.parent / f"{entry}.md").is_file()]


def test_every_page_is_in_an_index():
  listed = {(index.parent / f"{entry}.md").resolve() for index in INDEXES for entry in entries(index.read_text())}
  pages = {page.resolve() for page in PAGES if page.is_relative_to(public_names.DOCS)}
  assert pages - listed == {(public_names.DOCS / "index.md").resolve()}


def test_pages_with_code_are_run():
  settings = (ROOT / "pyproject.toml").read_text()
  assert '"README.md", "docs"' in settings
  assert "--doctest-glob=*.md" in settings


def lacking(code):
  """Give the names of jaxguide in a program that there are not. Programs that a doctest cannot run are checked so."""
  known = {}
  for node in ast.walk(ast.parse(code)):
    names = node.names if isinstance(node, ast.Import | ast.ImportFrom) else ()
    for name in names:
      module = getattr(node, "module", None) or name.name
      if module.partition(".")[0] != "jaxguide":
        continue
      thing = importlib.import_module(module)
      if isinstance(node, ast.ImportFrom):
        if not hasattr(thing, name.name):
          yield f"{module}.{name.name}"
          continue
        thing = getattr(thing, name.name)
      known[name.asname or name.name] = thing
  for node in ast.walk(ast.parse(code)):
    text = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
    words = text.split(".") if re.fullmatch(r"[\w.]+", text) else [""]
    thing = known.get(words[0])
    for word in words[1:] if thing is not None else ():
      if not hasattr(thing, word):
        yield ".".join(words)
        break
      thing = getattr(thing, word)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_programs_name_what_there_is(page):
  for program in re.findall(r"^```python\n(?!>>>)(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL):
    assert not list(lacking(program))


@pytest.mark.parametrize("wrong", ["jg.karas(3)", "data.lod('digits')", "from jaxguide import modles"])
def test_a_name_in_a_program_that_there_is_not_is_noticed(wrong):
  program = "import jaxguide as jg\nfrom jaxguide import data\nx = jg.karras(3), data.load('digits'), y.shape\n"
  assert not list(lacking(program))
  assert list(lacking(program + wrong))
