"""The collectives of compiled programs whose collectives are known, and each way in which XLA writes them."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxguide.distributed.collectives import Collective, collectives, totals

AXES = ("data", "fsdp")


@pytest.fixture(scope="module")
def mesh():
  """Four devices, in two rows of two."""
  return jax.make_mesh((2, 2), AXES, axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])


def compiled(function, mesh, *shapes):
  """Compile what each device does with its rows."""
  rows = P(mesh.axis_names)
  mapped = jax.shard_map(function, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
  return jax.jit(mapped).lower(*(jnp.zeros(shape, jnp.float32) for shape in shapes)).compile()


def only(program):
  """The only collective of a program."""
  (found,) = collectives(program)
  return found


def facts(found):
  return found.kind, found.operand_bytes, found.result_bytes, found.devices, found.in_loop, found.runs


# Each device has (1, 8) of (4, 8): 32 bytes.
ROWS = (4, 8)


@pytest.mark.parametrize(
  ("function", "expected", "sent"),
  [
    (lambda x: jax.lax.psum(x, AXES), ("all-reduce", 32, 32, 4, False, 1), 48),
    (lambda x: jax.lax.psum(x, "fsdp"), ("all-reduce", 32, 32, 2, False, 1), 32),
    (lambda x: jax.lax.all_gather(x, AXES), ("all-gather", 32, 128, 4, False, 1), 96),
    (lambda x: jax.lax.all_gather(x, "data"), ("all-gather", 32, 64, 2, False, 1), 32),
    (
      lambda x: jax.lax.psum_scatter(x, AXES, scatter_dimension=1, tiled=True),
      ("reduce-scatter", 32, 8, 4, False, 1),
      24,
    ),
    (lambda x: jax.lax.all_to_all(x, AXES, 1, 0, tiled=True), ("all-to-all", 32, 32, 4, False, 1), 24),
    (
      lambda x: jax.lax.ppermute(x, AXES, [(i, (i + 1) % 4) for i in range(4)]),
      ("collective-permute", 32, 32, 4, False, 1),
      32,
    ),
    (lambda x: jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 0)]), ("collective-permute", 32, 32, 2, False, 1), 32),
  ],
)
def test_each_kind(function, expected, sent, mesh):
  found = only(compiled(function, mesh, ROWS))
  assert facts(found) == expected
  assert found.sent == sent


def test_two_arrays_in_one_collective(mesh):
  found = collectives(compiled(lambda x, y: jax.lax.psum((x, y), AXES), mesh, ROWS, (4, 100)))
  # XLA may join them; together they have the bytes of both.
  assert totals(found)["all-reduce"].result_bytes == 32 + 400


def gathers(x, length):
  """Gather what changes in each step."""

  def step(carry, _):
    return carry + jax.lax.all_gather(carry, AXES).sum(0), None

  return jax.lax.scan(step, x, length=length)[0]


def test_a_gather_in_a_scan_counts_as_often_as_it_runs(mesh):
  program = compiled(lambda x: gathers(x, 5), mesh, ROWS)
  assert facts(only(program)) == ("all-gather", 32, 128, 4, True, 5)
  assert totals(collectives(program))["all-gather"] == (1, 5, 160, 640, 480.0)


def test_a_scan_in_a_scan_multiplies(mesh):
  def twice(x):
    return jax.lax.scan(lambda carry, _: (gathers(carry, 3) * 0.1, None), x, length=7)[0]

  assert facts(only(compiled(twice, mesh, ROWS))) == ("all-gather", 32, 128, 4, True, 21)


def test_a_loop_that_depends_on_data_has_no_count(mesh):
  def until(x):
    return jax.lax.while_loop(lambda carry: carry.sum() < 100, lambda carry: carry + jax.lax.psum(carry, AXES), x)

  found = only(compiled(until, mesh, ROWS))
  assert facts(found) == ("all-reduce", 32, 32, 4, True, None)
  with pytest.raises(ValueError, match=r"XLA does not say how often .* runs"):
    totals([found])


def test_the_partitioners_collectives_are_read_as_well(mesh):
  split, whole = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P())
  program = jax.jit(lambda w: w * 2, in_shardings=split, out_shardings=whole).lower(jnp.zeros((6, 5), jnp.float32))
  assert facts(only(program.compile())) == ("all-gather", 60, 120, 2, False, 1)


def test_one_device_sends_nothing():
  mesh = Mesh(jax.devices()[:1], ("data",))
  program = compiled(lambda x: x + 1, mesh, ROWS)
  assert collectives(program) == []


# --- how GPUs and TPUs write them -----------------------------------------------------------------


def program(*lines, others=""):
  """A program's text with some instructions."""
  body = "\n".join(f"  {line}" for line in lines)
  return (
    "HloModule jit_f, is_scheduled=true, replica_count=1, num_partitions=8\n\n"
    f"{others}\nENTRY %main.1_spmd (p: f32[2,3], q: bf16[4]) -> f32[] {{\n"
    "  %p = f32[2,3]{1,0:T(8,128)S(1)} parameter(0)\n  %q = bf16[4]{0:T(8)(2,1)} parameter(1)\n"
    f"{body}\n  ROOT %r = f32[] constant(0)\n}}\n"
  )


DONE = "%d = f32[4,3]{1,0} all-gather-done(%s)"


@pytest.mark.parametrize(
  ("lines", "expected"),
  [
    (
      ["%s = (f32[2,3]{1,0}, f32[4,3]{1,0}) all-gather-start(%p), replica_groups={{0,1},{2,3}}, dimensions={0}", DONE],
      ("all-gather", 24, 48, 2),
    ),
    (
      ["%s = ((f32[2,3], bf16[4]), (f32[16,3], bf16[32])) all-gather-start(%p, %q), replica_groups=[1,8]<=[8]"],
      ("all-gather", 32, 256, 8),
    ),
    (["%s = f32[2,3]{1,0} all-reduce-start(%p), replica_groups=[2,4]<=[4,2]T(1,0)"], ("all-reduce", 24, 24, 4)),
    (["%s = (f32[2,3], bf16[4]) all-reduce-start(%p, %q), replica_groups={}"], ("all-reduce", 32, 32, 8)),
    (
      ["%s = ((f32[2,3]), f32[1,3], u32[]) reduce-scatter-start(%p), replica_groups={{0,1}}"],
      ("reduce-scatter", 24, 12, 2),
    ),
    (
      ["%s = (f32[2,3], f32[2,3], u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,2},{2,4},{1,3}}"],
      ("collective-permute", 24, 24, 3),
    ),
    (["%a = f32[2,3]{1,0} all-reduce(f32[2,3]{1,0} %p), replica_groups={}"], ("all-reduce", 24, 24, 8)),
    (["%a = f32[2,3]{1,0} all-reduce(f32[2,3]{1,0} %elsewhere), replica_groups={}"], ("all-reduce", 24, 24, 8)),
    (
      ["%a = (bf16[4]{0}, f32[2,3]{1,0}, /*index=2*/f32[]) all-reduce(%q, %p, /*index=2*/%q), replica_groups={}"],
      ("all-reduce", 40, 36, 8),
    ),
    (
      [
        "%a = bf16[32] all-gather(%q), replica_groups=mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'b'}, dimensions={0}"
      ],
      ("all-gather", 8, 64, 4),
    ),
    (
      ["%a = bf16[32] all-gather(%q), replica_groups=mesh['a'=2,'b'=8] {'a','b':(1)4}, metadata={op_name='x=(y)'}"],
      ("all-gather", 8, 64, 8),
    ),
    (
      ["%a = (s4[6], pred[3], c64[2], f8e4m3fn[5]) all-to-all(%p), replica_groups={{0,1,2}}"],
      ("all-to-all", 24, 27, 3),
    ),
  ],
)
def test_each_way_to_write_it(lines, expected):
  found = only(program(*lines))
  assert (found.kind, found.operand_bytes, found.result_bytes, found.devices) == expected
  assert found.asynchronous == ("-start(" in lines[0])


SCATTER = """
%all-reduce-scatter.3 (input: f32[2,3]) -> f32[1,3] {
  %input = f32[2,3]{1,0} parameter(0)
  %all-reduce.5 = f32[2,3]{1,0} all-reduce(%input), replica_groups={{0,1}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,3]{1,0} dynamic-slice(%all-reduce.5, %zero, %zero), dynamic_slice_sizes={1,3}
}
"""


def test_a_tpus_reduce_scatter():
  text = program("%f = f32[1,3]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.3", others=SCATTER)
  assert facts(only(text)) == ("reduce-scatter", 24, 12, 2, False, 1)


LOOPS = """
%inner (c: f32[2,3]) -> f32[2,3] {
  %c = f32[2,3]{1,0} parameter(0)
  ROOT %a = f32[2,3]{1,0} all-reduce(%c), replica_groups={{0,1}}, to_apply=%add
}

%outer (d: f32[2,3]) -> f32[2,3] {
  %d = f32[2,3]{1,0} parameter(0)
  ROOT %w = f32[2,3]{1,0} while(%d), condition=%less, body=%inner, backend_config={"known_trip_count":{"n":"6"},"x":[]}
}

%nobody (e: f32[2,3]) -> f32[2,3] {
  %e = f32[2,3]{1,0} parameter(0)
  ROOT %b = f32[2,3]{1,0} all-reduce(%e), replica_groups={{0,1}}, to_apply=%add
}
"""
LOOP = '%v = f32[2,3]{1,0} while(%p), condition=%less, body=%outer, backend_config={"known_trip_count":{"n":"10"}}'


def test_loops_calls_and_branches():
  assert facts(only(program(LOOP, others=LOOPS))) == ("all-reduce", 24, 24, 2, True, 60)
  unknown = LOOP.partition(", backend_config")[0]
  assert facts(only(program(unknown, others=LOOPS)))[-2:] == (True, None)
  # Called from two places, once within a loop.
  twice = program(LOOP, "%k = f32[2,3]{1,0} call(%p), to_apply=%inner", others=LOOPS)
  assert facts(only(twice))[-2:] == (True, 61)
  # In a function that the body of a loop calls.
  within = LOOPS.replace("while(%d), condition=%less, body=%inner", "call(%d), to_apply=%inner")
  assert facts(only(program(LOOP, others=within)))[-2:] == (True, 10)
  branch = "%k = f32[2,3] conditional(%i, %p, %p), branch_computations={%inner, %nobody}"
  assert [(found.in_loop, found.runs) for found in collectives(program(branch, others=LOOPS))] == [(False, 1)] * 2
  # What nothing calls does not run.
  assert collectives(program(others=LOOPS)) == []


def test_what_is_no_compiled_program():
  lowered = jax.jit(lambda x: x + 1).lower(1.0)
  with pytest.raises(ValueError, match=r"begins with HloModule: give jax\.jit"):
    collectives(lowered)
  with pytest.raises(TypeError, match="got int"):
    collectives(3)


def test_totals_are_by_kind():
  one = Collective("all-gather", "a", 25, 100, 4, in_loop=False, runs=2, asynchronous=True)
  two = Collective("all-reduce", "b", 8, 8, 2, in_loop=True, runs=3, asynchronous=False)
  assert totals([one, two, one]) == {"all-gather": (2, 4, 100, 400, 300.0), "all-reduce": (1, 3, 24, 24, 24.0)}
  assert totals([]) == {}
