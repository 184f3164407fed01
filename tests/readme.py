"""The tables of docs that follow from the code: ``python tests/readme.py`` writes them anew.

A table stands between the lines ``<!-- table: NAME -->`` and ``<!-- end of table -->``. A test holds that the
files have the tables that the code gives.
"""

import argparse
import dataclasses
import gc
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import config_tables
import jax

from jaxguide import generate, solvers
from jaxguide.evaluation import MEASURES
from jaxguide.generate import methods
from jaxguide.models import pretrained
from jaxguide.schedules import SCHEDULES
from jaxguide.training import presets
from jaxguide.training.describe import describe, in_bytes

ROOT = Path(__file__).parents[1]
ANIMALS = pretrained.FOLDER / "animals-figures.json"
TITLES = {
  "--guidance": "`--guidance`",
  "combine= of cfg, autoguidance, pag, seg and slg": "`combine=`",
  "profile= of a scale": "`profile=`",
  "--solver": "`--solver`",
  "--grid": "`--grid`",
}


def linked(text: str) -> str:
  """Make links of arXiv numbers, and escape what Markdown would read as its own."""
  text = re.sub(r"arXiv:([0-9.]+[0-9])", r"[\1](https://arxiv.org/abs/\1)", text)
  return text.replace("|", "\\|").replace("*", "\\*")


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
  """Lay rows out as Markdown."""
  head = list(head)
  lines = [head, ["---"] * len(head), *rows]
  return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def of_guidances() -> str:
  """The guidance methods."""
  rows = [
    (f"`{row.name}`", linked(row.text.rstrip(".")), f"`{method.function}`", method.passes, f"`{row.options}`")
    for row, method in zip(generate.overview()["--guidance"], methods.METHODS.values(), strict=True)
  ]
  return table(("`--guidance`", "what it is", "function", "passes of the network", "options"), rows)


def of_variants() -> str:
  """The combine rules and the scale profiles."""
  overview = generate.overview()
  kinds = {"combine": "combine= of cfg, autoguidance, pag, seg and slg", "profile": "profile= of a scale"}
  return table(
    ("option", "what it is", "further options"),
    [
      (f"`{kind}={row.name}`", linked(row.text.rstrip(".")), f"`{row.options}`" if row.options else "")
      for kind, title in kinds.items()
      for row in overview[title]
    ],
  )


def of_solvers() -> str:
  """The solvers."""
  rows = []
  for row in generate.overview()["--solver"]:
    solver = solvers.solver(row.name)
    fields = [field.name for field in dataclasses.fields(solver)]
    noise = next((name for name in ("eta", "gamma") if name in fields), None)
    noise = "churn" if noise == "gamma" else noise  # As the command line has it.
    noise = f"yes, by `{noise}`" if noise and solver.stochastic else "yes" if solver.stochastic else "no"
    rows.append(
      (
        f"`{row.name}`",
        f"`{type(solver).__name__}`",
        str(solver.order),
        str(solver.evaluations),
        noise,
        f"`{row.options}`" if row.options else "",
        linked(row.text.rstrip(".")),
      )
    )
  return table(("`--solver`", "class", "order", "evaluations a step", "noise", "options", "what it is"), rows)


def of_grids() -> str:
  """The grids."""
  rows = [(f"`{row.name}`", linked(row.text.rstrip(".")), f"`{row.options}`") for row in generate.overview()["--grid"]]
  return table(("`--grid`", "what it is", "options"), rows)


def of_names() -> str:
  """All names, a line for each kind."""
  overview = generate.overview()
  rows = [(title, ", ".join(f"`{row.name}`" for row in overview[kind])) for kind, title in TITLES.items()]
  return table(("option", "names"), [*rows, ("noise schedules", ", ".join(f"`{name}`" for name in SCHEDULES))])


def of_presets() -> str:
  """The presets of trainings, with what `describe` computes for 3 channels and 10 classes."""
  rows = []
  for network, sizes in presets.PUBLISHED.items():
    for size in sizes:
      preset = presets.preset(network, size)
      model = preset.model_config((size, size, 3), 10)
      training = preset.training_config(model)
      # A batch of two, since what an example takes is wanted.
      taken = describe(model, preset.training_config(model, batch_size=2))
      rows.append(
        (
          f"`{network}`, {size}x{size}",
          f"{taken.parameters / 1e6:,.3g} million",
          f"{training.batch_size:,}",
          f"{training.learning_rate:g}",
          f"{training.steps:,}",
          in_bytes(sum(taken.bytes.values())),
          in_bytes(taken.activations / 2),
          f"{taken.operations / 2:.2g}",
          linked(preset.source.partition(f" {presets.PROCESS}")[0].rstrip(".")),
        )
      )
  return table(
    (
      "preset",
      "parameters",
      "batch",
      "learning rate",
      "steps",
      "memory of the state",
      "memory of an example",
      "operations of an example",
      "source",
    ),
    rows,
  )


def of_measured() -> str:
  """The measured steps of the presets, from the files in ``benchmarks/measured`` that `benchmarks.presets` wrote."""
  rows = []
  for path in sorted((ROOT / "benchmarks" / "measured").glob("presets*.json")):
    report = json.loads(path.read_text())
    for row in report["tables"]["presets"]:
      rows.append(
        (
          f"`{row['network']}`, {row['size']}x{row['size']}",
          report["machine"].replace("JAX on ", ""),
          f"{row['batch']:,}",
          row["type"],
          row["remat"],
          f"{row['ms a step']:,.3g} ms" if row["ms a step"] < 1000 else f"{row['ms a step'] / 1000:,.3g} s",
          f"{row['examples/s']:,.3g}" if row["examples/s"] < 1000 else f"{row['examples/s']:,.0f}",
          in_bytes(row["memory, GiB"] * 2**30),
        )
      )
  return table(("preset", "machine", "batch", "type", "remat", "time a step", "examples/s", "memory a step"), rows)


def of_animal_models() -> str:
  """The trained models that come with the package."""
  rows = []
  for name in pretrained.names():
    model, record = pretrained.load(name), pretrained.training(name)
    numbers = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    size = pretrained.settings(name).with_suffix(".safetensors").stat().st_size
    accuracy = [f"{share:.0%}" for share in record.get("held_out", {}).get("accuracy", ())]
    rows.append(
      (
        f"`{name}`",
        f"{numbers / 1e6:.2f} million",
        f"{size / 1e6:.1f} MB",
        f"{record['step']:,} of {record['training']['batch_size']}",
        f"{record['hours']:g}",
        f"{record['loss']:.3f}",
        f"{accuracy[0]} to {accuracy[-1]}" if accuracy else "",
      )
    )
  head = ("model", "parameters", "file", "steps", "hours", "loss", "accuracy on held-out images, by noise level")
  return table(head, rows)


def of_float16() -> str:
  """What the float16 of the file of the animals changes."""
  measured = json.loads(ANIMALS.read_text())["float16"]
  return table(("float16 against float32", ""), [(what, f"{value:.4g}") for what, value in measured.items()])


OF_ANIMALS = ("accuracy", "frechet_distance", "diversity")


def of_animals() -> str:
  """The figures of the animals, which `benchmarks.animals` measured."""
  rows = []
  for row in json.loads(ANIMALS.read_text())["rows"]:
    scale = f"{row['scale']:g}" if "scale" in row else ""
    figures = [MEASURES[name].text(row[name]) for name in OF_ANIMALS]
    rows.append((row["guidance"], scale, f"{row['n']:,}", *figures))
  titles = [MEASURES[name].title_on("pixels") for name in OF_ANIMALS]
  return table(("guidance", "scale", "images", *titles), rows)


def of_scaling(name: str) -> Callable[[], str]:
  """A table of `benchmarks.on_paper`, from what `benchmarks.scaling` counted."""

  def make() -> str:
    if str(ROOT) not in sys.path:  # When this file runs as a script.
      sys.path.append(str(ROOT))
    from benchmarks import on_paper

    rows = on_paper.TABLES[name]()
    return table(rows[0], [map(linked, row.values()) for row in rows])

  return make


CHOOSING = ROOT / "benchmarks" / "measured" / "choosing.json"


def with_interval(row: Mapping[str, float], name: str, digits: str) -> str:
  """A figure with the ends of its interval."""
  low, high = (format(row[f"{name}_{end}"], digits) for end in ("low", "high"))
  return f"{row[name]:{digits}} ({low} to {high})"


def of_solver_distances() -> str:
  """Solvers by evaluations: the distances that `benchmarks.choosing` measured."""
  rows = [row for row in json.loads(CHOOSING.read_text())["solvers"]["rows"] if "distance" in row]
  counts = sorted({row["evaluations"] for row in rows} - {100})
  names = dict.fromkeys(row["solver"] for row in rows if row["evaluations"] in counts)
  found = {(row["solver"], row["evaluations"]): with_interval(row, "distance", "#.2g") for row in rows}
  return table(
    ("`--solver`", *(f"{count} evaluations" for count in counts)),
    [(f"`{name}`", *(found.get((name, count), "") for count in counts)) for name in names],
  )


def of_solver_figures() -> str:
  """Solvers by evaluations: the figures that `benchmarks.choosing` measured."""
  rows = [row for row in json.loads(CHOOSING.read_text())["solvers"]["rows"] if "accuracy" in row]
  rows.sort(key=lambda row: row["evaluations"])
  return table(
    (
      "evaluations",
      "`--solver`",
      "`--steps`",
      "judged accuracy",
      "Fréchet distance (pixels)",
      "diversity within a class",
    ),
    [(str(row["evaluations"]), f"`{row['solver']}`", str(row["steps"]), *of_samples(row)) for row in rows],
  )


def of_samples(row: Mapping[str, float]) -> tuple[str, str, str]:
  """The figures of samples of `benchmarks.choosing`."""
  return (
    with_interval(row, "accuracy", ".2f"),
    with_interval(row, "frechet_distance", ".1f"),
    MEASURES["diversity"].text(row["diversity"]),
  )


def of_grid_distances() -> str:
  """Grids by steps: the distances that `benchmarks.choosing` measured."""
  rows = json.loads(CHOOSING.read_text())["grids"]["rows"]
  counts = sorted({row["steps"] for row in rows})
  found = {(row["grid"], row["steps"]): with_interval(row, "distance", "#.2g") for row in rows}
  names = dict.fromkeys(row["grid"] for row in rows)
  return table(
    ("`--grid`", *(f"{count} steps" for count in counts)),
    [(f"`{name}`", *(found[name, count] for count in counts)) for name in names],
  )


def of_high_scales() -> str:
  """Guidances at a high scale, which `benchmarks.choosing` measured."""
  rows = json.loads(CHOOSING.read_text())["high"]["rows"]
  return table(
    ("`--guidance`", "scale", "judged accuracy", "Fréchet distance (pixels)", "diversity within a class"),
    [(f"`{row['guidance']}`", f"{row['scale']:g}", *of_samples(row)) for row in rows],
  )


def of_animal_scales() -> str:
  """The figures of the animals by scale, with Wilson's interval of their accuracy."""
  rows = []
  for row in json.loads(ANIMALS.read_text())["rows"]:
    n, share, z = row["n"], row["accuracy"], 1.96
    middle, half = (share + z**2 / (2 * n)), z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    low, high = ((middle + sign * half) / (1 + z**2 / n) for sign in (-1, 1))
    scale = f"{row['scale']:g}" if "scale" in row else ""
    rows.append(
      (
        row["guidance"] if not scale else f"`{row['guidance']}`",
        scale,
        f"{n:,}",
        f"{share:.2f} ({low:.2f} to {high:.2f})",
        *(MEASURES[name].text(row[name]) for name in OF_ANIMALS[1:]),
      )
    )
  titles = [MEASURES[name].title_on("pixels") for name in OF_ANIMALS]
  return table(("`--guidance`", "scale", "images", *titles), rows)


OF_SCALING = ("rule", "sampling", "times", "chips", "networks", "steps", "bounds", "samples")


def of_config(name: str) -> Callable[[], str]:
  """A table of the fields of a configuration."""

  def make() -> str:
    rows = config_tables.TABLES[name]()
    return table(rows[0], rows[1:])

  return make


FILES: dict[str, dict[str, Callable[[], str]]] = {
  "docs/methods.md": {
    "names": of_names,
    "guidance": of_guidances,
    "variants": of_variants,
    "solvers": of_solvers,
    "grids": of_grids,
  },
  "docs/training.md": {"measured": of_measured},
  "docs/scaling.md": {name: of_scaling(name) for name in OF_SCALING},
  "docs/config.md": {name: of_config(name) for name in config_tables.TABLES} | {"example": config_tables.example},
  "docs/choosing.md": {
    "distances": of_solver_distances,
    "solvers": of_solver_figures,
    "grids": of_grid_distances,
    "scales": of_animal_scales,
    "high": of_high_scales,
  },
  "docs/animals.md": {"models": of_animal_models, "figures": of_animals, "float16": of_float16},
}

SLOW_FILES: dict[str, dict[str, Callable[[], str]]] = {"docs/training.md": {"presets": of_presets}}
"""Tables that take up to a minute."""


def filled(file: str, files: Mapping[str, Mapping[str, Callable[[], str]]] = FILES) -> str:
  """Give the text of a file with every table in its place."""
  text = (ROOT / file).read_text()
  for name, make in files[file].items():
    place = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end of table -->)", re.DOTALL)
    assert len(place.findall(text)) == 1, f"{file} must have one place for the table {name}"
    content = f"\n{make()}\n\n"
    text = place.sub(lambda match: match.group(1) + content + match.group(2), text)  # noqa: B023
  return text


def main() -> None:
  """Write the tables, or only compare them."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--check", action="store_true", help="write nothing; fail if a table differs")
  parser.add_argument("--slow", action="store_true", help="only the tables that take a minute")
  options = parser.parse_args()
  only_checks, stale = options.check, []
  gc.set_threshold(50_000, 20, 20)  # Tracing makes many objects and few cycles of them.
  for tables in (SLOW_FILES,) if options.slow else (FILES, SLOW_FILES):
    for file in tables:
      text = filled(file, tables)
      if text != (ROOT / file).read_text():
        stale.append(file)
        if not only_checks:
          (ROOT / file).write_text(text)
  if only_checks and stale:
    sys.exit(f"the tables of {', '.join(stale)} are not those of the code: run python tests/readme.py")


if __name__ == "__main__":
  main()
