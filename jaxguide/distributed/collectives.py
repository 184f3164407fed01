"""The collectives of a compiled program: what its devices send to each other, read from XLA's own text of the program.

The bytes are those that one device has. A collective inside a loop counts as often as the loop runs, where XLA knows
it. On a TPU XLA writes a reduce-scatter as a fusion ``all-reduce-scatter`` of an all-reduce and a slice; here that is
a reduce-scatter.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

KINDS = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-broadcast",
  "collective-permute",
)
"""The kinds of collectives, as XLA names them."""


@dataclasses.dataclass(frozen=True)
class Collective:
  """A collective of a compiled program.

  Args:
    kind: one of `KINDS`.
    name: the name of the instruction.
    operand_bytes: bytes of its operands on one device.
    result_bytes: bytes of its result on one device.
    devices: number of devices in a group. The groups work side by side.
    in_loop: whether it stands inside a while loop.
    runs: how often the program runs it; None if that depends on data, or XLA does not say, as for a TPU. In a branch it
      counts as if the branch were taken.
    asynchronous: whether the program computes other things until it is done.
  """

  kind: str
  name: str
  operand_bytes: int
  result_bytes: int
  devices: int
  in_loop: bool
  runs: int | None
  asynchronous: bool

  @property
  def sent(self) -> float:
    """The bytes that each device sends in one run, by the ring algorithms.

    With n devices, these are (n - 1) / n of the whole array for an all-gather, a reduce-scatter and an all-to-all,
    twice that for an all-reduce, and the whole operand for a permutation or a broadcast (Patarasuk & Yuan 2009,
    doi:10.1016/j.jpdc.2008.09.002).
    """
    share = (self.devices - 1) / self.devices
    if self.kind in ("collective-permute", "collective-broadcast"):
      return float(self.operand_bytes)
    if self.kind == "all-gather":
      return share * self.result_bytes
    return share * self.operand_bytes * (2 if self.kind == "all-reduce" else 1)


def collectives(program: Any) -> list[Collective]:
  """Read the collectives of a compiled program, in the order of its text.

  Args:
    program: the compiled program, ``jax.jit(function).lower(...).compile()``, or its text, ``compiled.as_text()``.

  Raises:
    TypeError: if it is neither a compiled program nor a text.
    ValueError: if the text is not that of a compiled program. That of a lowered one is not, since the partitioner,
      which adds most collectives, has not run yet.

  >>> import jax, jax.numpy as jnp
  >>> from jax.sharding import PartitionSpec as P
  >>> mesh = jax.sharding.Mesh(jax.devices()[:2], ("data",))
  >>> total = jax.shard_map(lambda x: jax.lax.psum(x, "data"), mesh=mesh, in_specs=P("data"), out_specs=P())
  >>> compiled = jax.jit(total).lower(jnp.zeros((2, 100), jnp.float32)).compile()
  >>> [(found.kind, found.result_bytes, found.devices, found.runs) for found in collectives(compiled)]
  [('all-reduce', 400, 2, 1)]
  """
  text = program if isinstance(program, str) else _text(program)
  entry, computations = _computations(text)
  header = re.search(r"^HloModule .*$", text, re.MULTILINE)
  if entry is None or header is None:
    raise ValueError(
      "the text is not that of a compiled program, which begins with HloModule: give "
      "jax.jit(function).lower(...).compile() or its as_text()"
    )
  counts = [re.search(rf"\b{name}=(\d+)", header.group()) for name in ("num_partitions", "replica_count")]
  everyone = math.prod(int(count.group(1)) for count in counts if count)
  runs = _runs(entry, computations)
  return [
    _sliced(one, instructions) if name.startswith("all-reduce-scatter") else one
    for name, instructions in computations.items()
    if name in runs
    for types in [{instruction.name: instruction.type for instruction in instructions}]
    for instruction in instructions
    if (kind := _kind(instruction.operation)) is not None
    for one in [_collective(instruction, kind, types, everyone, *runs[name])]
  ]


class Total(NamedTuple):
  """The collectives of one kind together.

  Args:
    number: how many instructions they are.
    runs: how often they run.
    operand_bytes: bytes of the operands of all runs, on one device.
    result_bytes: bytes of the results of all runs, on one device.
    sent: bytes that each device sends in all runs.
  """

  number: int
  runs: int
  operand_bytes: int
  result_bytes: int
  sent: float


def totals(found: Iterable[Collective]) -> dict[str, Total]:
  """Add collectives up by their kind.

  Raises:
    ValueError: if it is not known how often one of them runs. `dataclasses.replace` can set it.

  >>> one = Collective("all-gather", "a", 25, 100, 4, in_loop=True, runs=3, asynchronous=False)
  >>> totals([one, one])
  {'all-gather': Total(number=2, runs=6, operand_bytes=150, result_bytes=600, sent=450.0)}
  """
  added: dict[str, Total] = {}
  for one in found:
    if one.runs is None:
      raise ValueError(
        f"XLA does not say how often {one.name} runs, so its bytes cannot be added up: leave it out, or set its runs"
      )
    row = (1, one.runs, one.runs * one.operand_bytes, one.runs * one.result_bytes, one.runs * one.sent)
    added[one.kind] = Total(*map(sum, zip(added.get(one.kind, (0,) * 5), row, strict=True)))  # type: ignore[arg-type]
  return added


# --- the text of a program ------------------------------------------------------------------------


class _Instruction(NamedTuple):
  """An instruction: ``name = type operation(operands), attributes``."""

  name: str
  type: str
  operation: str
  operands: str
  attributes: str


_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_NAME = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_OPERATION = re.compile(r" ?([a-z][a-z0-9\-]*)\(")
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,<=]*)\]")
_CALLED = re.compile(
  r"\b(?:calls|to_apply|body|condition|branch_computations|called_computations|true_computation|false_computation)="
  r"(\{[^}]*\}|%?[\w.\-]+)"
)


def _text(program: Any) -> str:
  try:
    return program.as_text()
  except AttributeError:
    raise TypeError(
      "program must be a compiled program, jax.jit(function).lower(...).compile(), or its text, got "
      f"{type(program).__name__}"
    ) from None


def _computations(text: str) -> tuple[str | None, dict[str, list[_Instruction]]]:
  """Return the name of the computation where the program starts, and the instructions of each computation."""
  entry, current = None, None
  computations: dict[str, list[_Instruction]] = {}
  for line in text.splitlines():
    if found := _COMPUTATION.match(line):
      current = computations.setdefault(found.group(2), [])
      entry = found.group(2) if found.group(1) else entry
    elif current is not None and (found := _NAME.match(line)):
      type, rest = _cut(line[found.end() :], " ")
      operation = _OPERATION.match(rest)
      if operation:
        operands, attributes = _cut(rest[operation.end() - 1 :], ",")
        current.append(_Instruction(found.group(1), type, operation.group(1), operands, attributes))
  return entry, computations


def _cut(text: str, end: str) -> tuple[str, str]:
  """Cut a text at the first ``end`` outside of brackets, or where a bracket closes that it does not open."""
  depth = 0
  for place, character in enumerate(text):
    if depth == 0 and character == end:
      return text[:place], text[place:]
    depth += (character in "([{") - (character in ")]}")
    if depth < 0:
      return text[:place], text[place:]
  return text, ""


def _elements(type: str) -> list[str]:
  """Return the parts of a tuple; of anything else, the type itself."""
  if not type.startswith("("):
    return [type]
  rest, parts = type[1:], []
  while rest:
    part, rest = _cut(rest, ",")
    parts.append(re.sub(r"/\*.*?\*/", "", part).strip())
    rest = rest[1:]
  return parts


def _bytes(type: str) -> int:
  """Return the bytes of all arrays in a type, such as ``(f32[2,3]{1,0}, bf16[])``."""
  total = 0
  for dtype, shape in _ARRAY.findall(type):
    bits = re.search(r"\d+", dtype)  # The first number of bf16, s4 or f8e4m3fn; pred, which has none, is a byte.
    numbers = math.prod(int(size.lstrip("<=")) for size in shape.split(",") if size)
    total += -(-numbers * (int(bits.group()) if bits else 8) // 8)
  return total


def _kind(operation: str) -> str | None:
  """Return the kind of a collective, whether it is asynchronous or not; None for the end of one and other things."""
  kind = operation.removesuffix("-start")
  return kind if kind in KINDS else None


def _collective(
  instruction: _Instruction, kind: str, types: dict[str, str], everyone: int, in_loop: bool, runs: int | None
) -> Collective:
  result, asynchronous = instruction.type, instruction.operation.endswith("-start")
  if asynchronous and kind != "all-reduce" and len(parts := _elements(result)) > 1:
    result = parts[1]  # The type is (operands, results, and what the device needs besides).
  operands = [part.split()[-1].lstrip("%") if part else "" for part in _elements(instruction.operands)]
  known = [types[name] for name in operands if name in types]
  return Collective(
    kind=kind,
    name=instruction.name,
    operand_bytes=sum(map(_bytes, known)) if len(known) == len(operands) else _bytes(instruction.operands),
    result_bytes=_bytes(result),
    devices=_devices(instruction.attributes, everyone),
    in_loop=in_loop,
    runs=runs,
    asynchronous=asynchronous,
  )


def _sliced(one: Collective, instructions: list[_Instruction]) -> Collective:
  """Return the reduce-scatter that a fusion of an all-reduce and a slice is. The last instruction has its result."""
  return dataclasses.replace(one, kind="reduce-scatter", result_bytes=_bytes(instructions[-1].type))


def _devices(attributes: str, everyone: int) -> int:
  """Return the number of devices in a group, from each of the ways in which XLA writes groups."""
  if pairs := re.search(r"source_target_pairs=\{(.*?)\}(?:,|\}|$)(?! *\{)", attributes):
    return _cycle([tuple(map(int, pair.split(","))) for pair in re.findall(r"\d+ *, *\d+", pairs.group(1))])
  if axes := re.search(r"replica_groups=mesh\[(.*?)\].*?\{(.*?)\}", attributes):  # Axes of a mesh, named.
    sizes = {name: int(size) for name, size in re.findall(r"('[^']*')=(\d+)", axes.group(1))}
    used = re.findall(r"('[^']*')(?::\(\d+\)(\d+))?", axes.group(2))  # 'x':(1)2 is a part of the axis.
    return math.prod(int(part) if part else sizes[name] for name, part in used) if used else everyone
  if table := re.search(r"replica_groups=\[(\d+(?:,\d+)*)\]", attributes):  # [groups, devices]<=[...].
    return int(table.group(1).split(",")[-1])
  if group := re.search(r"replica_groups=\{\{([\d, ]+)\}", attributes):
    return group.group(1).count(",") + 1
  return everyone


def _cycle(pairs: list[tuple[int, ...]]) -> int:
  """Return the largest number of devices that pairs of a source and a target connect."""
  groups: list[set[int]] = []
  for pair in pairs:
    joined = [group for group in groups if group & {*pair}]
    groups = [group for group in groups if not group & {*pair}] + [{*pair}.union(*joined)]
  return max(map(len, groups), default=1)


def _runs(entry: str, computations: dict[str, list[_Instruction]]) -> dict[str, tuple[bool, int | None]]:
  """Return whether each computation that is reached stands in a loop, and how often it runs."""
  calls = {name: [*_calls(instructions)] for name, instructions in computations.items()}
  found: dict[str, tuple[bool, int | None]] = {entry: (False, 1)}
  for name in _callers_first(entry, calls):
    in_loop, runs = found[name]
    for called, looped, times in calls[name]:
      more = None if runs is None or times is None else runs * times
      before, already = found.get(called, (False, 0))
      found[called] = (before or in_loop or looped, None if more is None or already is None else already + more)
  return found


def _calls(instructions: Iterable[_Instruction]) -> Iterator[tuple[str, bool, int | None]]:
  """Yield the computations that instructions call: name, whether it is that of a loop, and how often it runs."""
  for instruction in instructions:
    looped, times = instruction.operation == "while", 1
    if looped:
      known = re.search(r'"?known_trip_count"?[:=]\{"?n"?[:=]"?(\d+)', instruction.attributes)
      times = int(known.group(1)) if known else None  # type: ignore[assignment]
    for names in _CALLED.findall(instruction.attributes):
      for name in re.findall(r"[\w.\-]+", names):
        yield name, looped, times


def _callers_first(entry: str, calls: dict[str, list[tuple[str, bool, int | None]]]) -> list[str]:
  """Return the computations that are reached, each after all that call it. Programs have no recursion."""
  done: dict[str, None] = {}

  def visit(name: str) -> None:
    for called, _, _ in calls.get(name, ()):
      if called not in done and called in calls:
        visit(called)
    done[name] = None

  visit(entry)
  return [*done][::-1]
