"""``python -m benchmarks NAME [ARGUMENT ...]``: run one benchmark, print its tables, write results/NAME.json.

Some take arguments, of which part to run: ``python -m benchmarks NAME --help`` says it.
"""

import importlib
import inspect
import os
import pkgutil
import sys

# PyTorch has to find room beside JAX on the same card.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# PyTorch's threads would spin while they wait: into the turns of others, and tenfold slower where a core is shared.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import benchmarks
from jaxguide import checks


def main() -> None:
  """Run the benchmark that the command line names, or list them all."""
  others = {"__main__", "canvas", "gallery", "networks", "peers", "timing"}
  names = sorted({module.name for module in pkgutil.iter_modules(benchmarks.__path__)} - others)
  modules = {name: importlib.import_module(f"benchmarks.{name}") for name in names}
  asked = {*sys.argv[2:]} & {"-h", "--help"}
  if asked and sys.argv[1] in modules:
    module = modules[sys.argv[1]]
    print(f"{inspect.getdoc(module)}\n\nArguments {inspect.signature(module.main)}: {inspect.getdoc(module.main)}")
    return
  if {*sys.argv[1:]} & {"-h", "--help"} or len(sys.argv) < 2:
    print("python -m benchmarks NAME, with NAME one of (NAME --help says more of it)")
    for name, module in modules.items():
      print(f"  {name:16} {module.__doc__.splitlines()[0]}")
    return
  try:
    checks.lookup("benchmark", sys.argv[1], modules).main(*sys.argv[2:])
  except (ImportError, ValueError) as error:
    sys.exit(f"benchmarks: {error}")


try:
  main()
  sys.stdout.flush()
except BrokenPipeError:  # Whoever reads the list has seen enough.
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
