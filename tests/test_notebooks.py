import base64
import os
import struct
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import jaxguide

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CELL = f"""\
import importlib.util
import pathlib

# Nothing is on PyPI. In a clone, this installs the clone; elsewhere, in Colab say, the repository at a release's tag.
REPOSITORY = "https://github.com/OWNER/jaxguide"  # OWNER: the account that hosts the repository
if importlib.util.find_spec("jaxguide") is None:
  here = pathlib.Path.cwd()
  clone = next((folder for folder in (here, *here.parents) if (folder / "jaxguide" / "__init__.py").exists()), None)
  source = clone or f"git+{{REPOSITORY}}@v{jaxguide.__version__}"
  %pip install -q "{{source}}"\
"""
LEAST = 600  # pixels: the width of a picture
LONGEST = 600  # seconds that a cell may take. Each notebook is made for a minute of two cores; a machine may be busy.

# What makes each notebook small, so that it takes seconds: a text of its cells, and what it is run with instead.
SMALL = {
  "evaluation_and_report": {"num=40": "num=20", "steps=6": "steps=3", "resamples=50": "resamples=3"},
  "guide_an_nnx_network": {"steps = 1500": "steps = 200", "num, scales = 3000": "num, scales = 300"},
  "quickstart": {"jg.karras(12": "jg.karras(4"},
  "solvers_compared": {
    "grid(1000)": "grid(200)",
    "many = 4000": "many = 500",
    "(6, 12, 24)": "(4, 6, 8)",
    "evaluations < 24": "evaluations < 8",
    '(2M), 24"': '(2M), 8"',
  },
  "train_on_your_data": {
    "range(120)": "range(30)",
    "steps=800": "steps=40",
    "save_every=800": "save_every=40",
    "steps=500": "steps=40",
    "save_every=500": "save_every=40",
  },
  "what_the_scale_does": {"num = jax.random.key(0), 40_000": "num = jax.random.key(0), 2_000"},
}


def make_small(notebook, texts):
  """Replace texts, each of which one cell has."""
  for old, new in texts.items():
    cells = [cell for cell in notebook.cells if cell.cell_type == "code" and old in cell.source]
    assert len(cells) == 1, f"{len(cells)} cells have {old!r}: change SMALL as the notebook"
    cells[0].source = cells[0].source.replace(old, new)


def outputs(notebook):
  return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def width(output):
  return struct.unpack(">I", base64.b64decode(output["data"]["image/png"])[16:20])[0]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
  # The notebook runs as on a user's machine, on one device and with JAX's usual promotion of types and ranks; jaxguide
  # is imported from this source tree.
  for name in ("JAX_NUMPY_DTYPE_PROMOTION", "JAX_NUMPY_RANK_PROMOTION"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
  monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
  notebook = nbformat.read(path, as_version=4)
  make_small(notebook, SMALL.get(path.stem, {}))
  NotebookClient(notebook, timeout=LONGEST, resources={"metadata": {"path": str(tmp_path)}}).execute()
  widths = [width(output) for output in outputs(notebook) if "image/png" in output.get("data", {})]
  assert widths
  assert min(widths) >= LEAST, widths


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_has_no_outputs(path):
  notebook = nbformat.read(path, as_version=4)
  assert not outputs(notebook)
  assert not any(cell.get("execution_count") for cell in notebook.cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_first_cell_installs_this_version(path):
  first = next(cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
  assert first.source == CELL, "write it by: python tests/test_notebooks.py"


def write_first_cells():
  """Write the cell that installs into each notebook, for a new version."""
  for path in NOTEBOOKS:
    notebook = nbformat.read(path, as_version=4)
    next(cell for cell in notebook.cells if cell.cell_type == "code").source = CELL
    nbformat.write(notebook, path)


if __name__ == "__main__":
  write_first_cells()
