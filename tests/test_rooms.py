"""The plan of the package: every room imports from those before it alone, and the mathematics needs few libraries."""

import ast
import subprocess
import sys
from pathlib import Path

import jaxguide

PACKAGE = Path(jaxguide.__file__).parent
MATHEMATICS = ["_core", "schedules", "nn", "denoisers", "guidance", "solvers", "sampling"]
PROGRAMS = ["data", "models", "training", "evaluation", "generate", "cli"]
ROOMS = [*MATHEMATICS, *PROGRAMS]
LIBRARIES = {"flax", "jax", "jaxtyping", "numpy", *sys.stdlib_module_names}
# Rooms that hold files about pixels and locks, which need a library when they are used and not before.
LATER = {"_core": {"filelock"}}


def imports(path):
  """The modules that a file imports, as dotted names."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    if isinstance(node, ast.ImportFrom):
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files():
  return [(room, path) for room in ROOMS for path in (PACKAGE / room).rglob("*.py")]


def test_the_rooms_are_those_of_the_plan():
  assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} == {*ROOMS}
  assert [path.name for path in PACKAGE.glob("*.py")] == ["__init__.py"]


def test_a_room_imports_from_those_before_it_alone():
  upward = []
  for room, path in files():
    for name in imports(path):
      parts = name.split(".")
      if parts[0] == "jaxguide" and len(parts) > 1 and parts[1] in ROOMS and ROOMS.index(parts[1]) > ROOMS.index(room):
        upward.append(f"{path.relative_to(PACKAGE)} imports {name}")
  assert upward == []


def test_the_mathematics_needs_jax_and_flax_alone():
  further = []
  for room, path in files():
    if room in MATHEMATICS:
      libraries = {name.partition(".")[0] for name in imports(path)}
      further += [f"{path.relative_to(PACKAGE)} imports {name}" for name in libraries - LIBRARIES - {"jaxguide"}]
  allowed = {f"_core/files.py imports {name}" for name in LATER["_core"]}
  assert {*further} <= allowed


def test_heavy_libraries_are_imported_where_they_are_used():
  """``import jaxguide`` brings none of them, and the command's help no more than optax."""
  heavy = ["optax", "orbax", "tensorflow_datasets", "sklearn", "matplotlib", "PIL", "jinja2", "torch", "tensorflow"]
  code = "import sys, jaxguide; before = set(sys.modules); import jaxguide.cli; print(*before, '|', *sys.modules)"
  out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
  library, command = ({name.partition(".")[0] for name in part.split()} for part in out.split("|"))
  assert not library & {*heavy}
  assert not command & {*heavy} - {"optax"}
