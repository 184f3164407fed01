"""What is said about the package outside its code: one version, pinned hooks, files that a wheel must have."""

import configparser
import fnmatch
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import jaxguide

ROOT = Path(__file__).parents[1]


def setup():
  parser = configparser.ConfigParser()
  parser.read(ROOT / "setup.cfg")
  return parser


def pins():
  lines = (ROOT / "requirements.txt").read_text().splitlines()
  return dict(line.split("==") for line in lines if "==" in line)


def test_the_version_is_in_one_place():
  assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", jaxguide.__version__)
  assert setup()["metadata"]["version"] == "attr: jaxguide.__version__"
  assert not re.search(r"^version", (ROOT / "pyproject.toml").read_text(), re.M)
  assert not re.search(r"^version", (ROOT / "CITATION.cff").read_text(), re.M)
  # setuptools reads it without an import, so it has to be a plain text.
  assert f'\n__version__ = "{jaxguide.__version__}"' in (ROOT / "jaxguide" / "__init__.py").read_text()


def test_the_changelog_begins_with_this_version():
  text = (ROOT / "CHANGELOG.md").read_text()
  heading = re.search(r"^## (\S+) .*?(\d{4}-\d{2}-\d{2})", text, re.M)
  assert heading[1] == jaxguide.__version__
  kinds = set(re.findall(r"^### (.*)$", text, re.M))
  assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_a_wheel_has_each_file_of_the_package():
  """Files beside the modules, such as templates and weights, are in a wheel if package_data names them."""
  if shutil.which("git") is None:
    pytest.skip("Git is not installed")
  listed = subprocess.run(["git", "ls-files", "jaxguide"], cwd=ROOT, capture_output=True, text=True, check=False)
  if listed.returncode:
    pytest.skip("this is no clone of the repository")
  patterns = setup()["options.package_data"]
  for name in listed.stdout.split():
    path = Path(name)
    if path.suffix == ".py":
      continue
    package = next(parent for parent in path.parents if (ROOT / parent / "__init__.py").exists())
    within = str(path.relative_to(package))
    allowed = patterns.get(str(package).replace("/", "."), "").split()
    assert any(fnmatch.fnmatch(within, pattern) for pattern in allowed), name


def test_hooks_have_the_versions_of_the_requirements():
  hooks = re.findall(r"\[([\w-]+)==([\w.]+)\]", (ROOT / ".pre-commit-config.yaml").read_text())
  assert {name for name, _ in hooks} == {"ruff", "nbstripout"}
  assert all(pins()[name] == version for name, version in hooks)


def test_the_workflow_runs_what_a_machine_runs():
  yaml = pytest.importorskip("yaml")
  jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
  lines = [step.get("run", "") for job in jobs.values() for step in job["steps"]]
  assert "bash .ci/run" in lines
  assert "sphinx-build -W -b html docs docs/_build" in lines
  minor = int(setup()["options"]["python_requires"].removeprefix(">=3."))
  assert f"3.{minor}" in jobs["tests"]["strategy"]["matrix"]["python"]
  stated = re.findall(r"Python :: (3\.\d+)", setup()["metadata"]["classifiers"])
  assert jobs["tests"]["strategy"]["matrix"]["python"] == stated


def test_the_citation():
  yaml = pytest.importorskip("yaml")
  citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
  assert {"cff-version", "message", "title", "authors"} <= set(citation)
  assert citation["authors"] == [{"name": setup()["metadata"]["author"]}]
  assert citation["license"] == setup()["metadata"]["license"]
