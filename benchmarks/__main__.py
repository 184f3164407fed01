"""``python -m benchmarks NAME``: run one benchmark, print its table."""

import importlib
import pkgutil
import sys

import benchmarks
from jaxguide import checks


def main() -> None:
  """Run the benchmark that the command line names, or list them all."""
  others = {"__main__", "timing"}
  names = sorted({module.name for module in pkgutil.iter_modules(benchmarks.__path__)} - others)
  modules = {name: importlib.import_module(f"benchmarks.{name}") for name in names}
  if len(sys.argv) != 2:
    print("python -m benchmarks NAME, with NAME one of")
    for name, module in modules.items():
      print(f"  {name:16} {module.__doc__.splitlines()[0]}")
    return
  try:
    checks.lookup("benchmark", sys.argv[1], modules).main()
  except ValueError as error:
    sys.exit(f"benchmarks: {error}")


main()
