import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
  # The notebook runs as on a user's machine: one device, with jaxguide imported from this source tree.
  monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
  monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
  notebook = nbformat.read(path, as_version=4)
  NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
  images = [
    output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
  ]
  assert images


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_has_no_outputs(path):
  cells = nbformat.read(path, as_version=4).cells
  assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
