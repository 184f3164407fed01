"""Commands that several processes run together: the same files, and what happens when something goes wrong."""

import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import several
from tiny import Mlp

from jaxguide import data, distributed, training
from jaxguide.cli.joining import join
from jaxguide.distributed import meeting, processes
from jaxguide.models import arrays
from jaxguide.models.model import init_params
from jaxguide.training import checkpoints
from jaxguide.training.step import TrainState

NUM = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """The folder of a denoiser with random parameters."""
  folder = tmp_path_factory.mktemp("models") / "mlp"
  config = training.ModelConfig(Mlp(num_classes=3), {}, (4, 4, 1), 3)
  training.save(folder, training.Model(config, init_params(config, jax.random.key(0))))
  return folder


def command(*args, of=None, devices=1):
  """Start a command, alone or as one of several: ``of`` is the port, their number and the index of this one."""
  joined = [] if of is None else ["--coordinator", f"127.0.0.1:{of[0]}", "--processes", of[1], "--process-index", of[2]]
  line = [sys.executable, "-m", "jaxguide.cli", *args, *joined]
  return subprocess.Popen(
    [*map(str, line)], env=several.environment(devices), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )


def ended(started, timeout=120):
  """Wait for commands, and return the status, the output and the errors of each."""
  said = [process.communicate(timeout=timeout) for process in started]
  return [(process.returncode, *texts) for process, texts in zip(started, said, strict=True)]


def together(*args, number=2, devices=1):
  port = several.free_port()
  return [command(*args, of=(port, number, index), devices=devices) for index in range(number)]


# --- starting -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ({"coordinator": "127.0.0.1:1"}, "coordinator, processes and index belong together, and processes and index are"),
    ({"processes": 2, "index": 0}, "coordinator are missing"),
    ({"coordinator": "localhost", "processes": 2, "index": 0}, "coordinator must be HOST:PORT, such as 10.0.0.1:1234"),
    ({"coordinator": "a:99999", "processes": 2, "index": 0}, "coordinator must be HOST:PORT"),
    ({"coordinator": "http://a:1", "processes": 2, "index": 1, "timeout": 1}, "coordinator must be HOST:PORT"),
    ({"coordinator": " a:1", "processes": 2, "index": 1, "timeout": 1}, "coordinator must be HOST:PORT"),
    ({"coordinator": "a:1", "processes": 0, "index": 0}, "processes must be"),
    ({"coordinator": "a:1", "processes": 2, "index": 2}, "index must be"),
    ({"coordinator": "a:1", "processes": 2, "index": 0, "timeout": 0}, "timeout must be"),
  ],
)
def test_what_start_refuses(given, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    distributed.start(**given)
  assert not processes.several()


def test_start_finds_nobody_and_comes_first():
  assert jax.devices()
  with pytest.raises(RuntimeError, match="call start once, and before anything else of JAX"):
    distributed.start()
  code = "from jaxguide import distributed; distributed.start()"
  result = subprocess.run(
    [sys.executable, "-c", code], env=several.environment(), capture_output=True, text=True, check=False
  )
  assert "ValueError: JAX finds no other processes here (it knows Cloud TPU, GKE, SLURM and Open MPI)" in result.stderr


def test_a_coordinator_that_cannot_be_reached():
  began = time.monotonic()
  with pytest.raises(OSError, match=r"the coordinator 127\.0\.0\.1:\d+ cannot be reached after 1 s \(.*is process 0"):
    distributed.start(f"127.0.0.1:{several.free_port()}", 2, 1, timeout=1)
  assert time.monotonic() - began < 60


def test_a_port_that_is_in_use():
  message = r"the coordinator's port \d+ cannot be used \(Address already in use\)"
  with socket.create_server(("", 0)) as listener, pytest.raises(OSError, match=message):
    distributed.start(f"127.0.0.1:{listener.getsockname()[1]}", 2, 0)


def met(*told, timeout=20):
  """What each of several processes, told a number of processes and an index, says of a meeting; None if it is good."""
  port = several.free_port()

  def go(processes, index):
    try:
      return meeting.meet("127.0.0.1", port, processes, index, timeout)
    except (OSError, ValueError) as error:
      return f"{type(error).__name__}: {error}"

  with ThreadPoolExecutor() as pool:
    return list(pool.map(go, *zip(*told, strict=True)))


def test_processes_meet():
  assert met((3, 0), (3, 2), (3, 1)) == [None] * 3
  same = met((3, 0), (3, 1), (3, 1))
  assert {said for said in same if said} == {
    "ValueError: two processes have the number 1: give each its own --process-index"
  }
  other = met((2, 0), (3, 1))
  assert set(other) == {"ValueError: process 0 was told of 2 processes, and process 1 of 3"}
  alone = met((3, 0), (3, 2), timeout=1)
  assert "of 3 processes, number 1 did not come within 1 s: was the command started on every host" in alone[0]
  assert alone[1].startswith("OSError: the coordinator")


def presented(port, processes, index):
  """The connection of a process that has presented itself, when the first process has answered."""
  while True:
    try:
      connection = socket.create_connection(("127.0.0.1", port))
    except ConnectionRefusedError:
      time.sleep(0.01)
      continue
    connection.sendall(json.dumps({"index": index, "processes": processes}).encode() + b"\n")
    assert meeting._line(connection, time.monotonic() + 20) == meeting.HERE
    return connection


def test_a_process_that_ended_while_it_waited_may_come_again():
  port = several.free_port()
  with ThreadPoolExecutor() as pool:
    first = pool.submit(meeting.meet, "127.0.0.1", port, 3, 0, 20)
    presented(port, 3, 1).close()
    second = pool.submit(meeting.meet, "127.0.0.1", port, 3, 2, 20)
    time.sleep(0.2)
    assert not first.done()  # Two came, and one of them has gone.
    meeting.meet("127.0.0.1", port, 3, 1, 20)
    assert first.result() is second.result() is None


def test_a_proxy_that_closes_is_not_the_first_process():
  with ThreadPoolExecutor() as pool, socket.create_server(("127.0.0.1", 0)) as proxy:
    port = proxy.getsockname()[1]
    other = pool.submit(meeting.meet, "127.0.0.1", port, 2, 1, 20)
    for _ in range(2):
      proxy.accept()[0].close()
    proxy.close()
    meeting.meet("127.0.0.1", port, 2, 0, 20)
    assert other.result() is None
  with ThreadPoolExecutor() as pool, socket.create_server(("127.0.0.1", 0)) as proxy:
    other = pool.submit(meeting.meet, "127.0.0.1", proxy.getsockname()[1], 2, 1, 20)
    connection, _ = proxy.accept()
    connection.sendall(json.dumps(meeting.HERE).encode() + b"\n")
    connection.close()
    with pytest.raises(OSError, match="ended before all processes were there: see what process 0 says"):
      other.result()


def test_a_stranger_at_the_port_does_not_count(monkeypatch):
  monkeypatch.setattr(meeting, "ANSWER", 0.3)
  port = several.free_port()
  with ThreadPoolExecutor() as pool, contextlib.ExitStack() as silent:
    first = pool.submit(meeting.meet, "127.0.0.1", port, 2, 0, 20)
    for content in (b"GET / HTTP/1.1\r\n\n", b"{}\n", b""):
      while True:
        try:
          with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(content)
            silent.enter_context(socket.create_connection(("127.0.0.1", port)))
            break
        except ConnectionRefusedError:
          time.sleep(0.01)
    meeting.meet("127.0.0.1", port, 2, 1, 20)
    first.result()


def test_options_without_distributed():
  with pytest.raises(ValueError, match="processes and process_index are for --distributed"):
    join({"distributed": False, "coordinator": None, "processes": 2, "process_index": 0, "mesh": None})
  options = {
    "distributed": False,
    "coordinator": None,
    "processes": None,
    "process_index": None,
    "mesh": "fsdp=2",
    "x": 1,
  }
  assert join(options) == "fsdp=2"
  assert options == {"x": 1}


def test_one_process_alone_waits_for_nobody():
  assert processes.from_each({"a": 1}) == [{"a": 1}]
  assert processes.from_first([1, None]) == [1, None]
  assert processes.first_does(lambda: 7) == 7
  processes.wait_for_all("nothing")
  processes.check_same({"a": 1})
  assert processes.gathered({"x": jax.numpy.ones(2)})["x"].tolist() == [1, 1]


def late():
  """Do a task for longer than Gloo waits for processes that are not connected, and return its result."""
  return processes.first_does(lambda: time.sleep(33) or 5)


@pytest.mark.slow
def test_processes_wait_for_a_long_task_of_the_first():
  assert several.run("test_processes:late", 2) == [5, 5]


@pytest.mark.slow
def test_processes_with_different_numbers_of_devices(tmp_path):
  port = several.free_port()
  args = sample_command("animals", tmp_path / "x.npz")
  for status, _, errors in ended([command(*args, of=(port, 2, index), devices=index + 1) for index in range(2)]):
    assert status == 2
    assert "all processes must have the same number of devices, but process 0 has 1 and process 1 has 2" in errors
    assert "Traceback" not in errors


def restored(folder):
  """Save two checkpoints, the last of which the second process cannot read; return the step that is restored."""
  import orbax.checkpoint as ocp

  place, folder, whole = distributed.placement("fsdp=-1"), Path(folder), ocp.CheckpointManager.restore

  def state(step):
    arrays = {"w": np.full((64, 128), step, np.float32), "b": np.ones(3, np.float32)}
    return place.shards(TrainState(np.int32(step), arrays, (), (), np.int32(0)))

  with checkpoints.Checkpoints(folder) as saved:
    for step in (1, 2):
      saved.save(state(step), step)

  def restore(manager, step, **options):
    read = whole(manager, step, **options)
    if step == 2 and jax.process_index() == 1:
      raise OSError("this host cannot read it")
    return read

  ocp.CheckpointManager.restore = restore
  template = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state(0))
  return int(checkpoints.restore(folder, template, lambda: state(0)).step)


def of_one_process():
  """What each process says of a mesh that has the device of the first one alone."""
  try:
    return dict(distributed.placement(jax.devices()[:1]).mesh.shape)
  except ValueError as error:
    return str(error)


@pytest.mark.slow
def test_a_mesh_without_devices_of_a_process():
  mesh, said = several.run("test_processes:of_one_process", 2)
  assert mesh["data"] == 1
  assert "none of the 1 devices is of process 1: give devices of every process" in said


@pytest.mark.slow
def test_a_checkpoint_that_one_process_cannot_read_is_left_out_by_all(tmp_path):
  assert several.results(several.start("test_processes:restored", 2, folder=str(tmp_path / "x")), timeout=120) == [1, 1]


# --- the same files -------------------------------------------------------------------------------


def sample_command(model, out, *more):
  return (
    "sample",
    "--model",
    model,
    "--out",
    out,
    "--num",
    NUM,
    "--steps",
    3,
    "--batch-size",
    8,
    "--no-progress",
    *more,
  )


@pytest.mark.slow
def test_a_file_of_samples_is_the_same_after_a_process_has_died(model, tmp_path):
  one, two = tmp_path / "one.npz", tmp_path / "two.npz"
  assert ended([command(*sample_command(model, one))])[0][0] == 0
  # The second process dies when a third of the samples are done.
  started = together(*sample_command(model, two, "--mesh", "data=2"))
  done = tmp_path / "two.npz.unfinished" / "done.json"
  while not (done.exists() and json.loads(done.read_text())["done"] >= 8):
    assert started[0].poll() is None, started[0].communicate()
    time.sleep(0.005)
  began = time.monotonic()
  started[1].send_signal(signal.SIGKILL)
  status, _, errors = ended(started)[0]
  assert time.monotonic() - began < 60
  if status == 0:  # The first one had finished already.
    pytest.skip("the samples were drawn before the process was killed")
  assert "the communication with the other processes failed" in errors
  # Another number of processes goes on, with what is there.
  before = json.loads(done.read_text())["done"]
  assert before >= 8
  (status, printed, errors) = ended([command(*sample_command(model, two, "--mesh", "data=3"), devices=3)])[0]
  assert (status, printed) == (0, f"{NUM} samples are in {two}.\n"), errors
  (images, labels), (wanted, wanted_labels) = data.load_npz(two), data.load_npz(one)
  np.testing.assert_array_equal(labels, wanted_labels)
  assert np.abs(images.astype(int) - wanted).max() <= 1


@pytest.mark.slow
def test_a_sweep_of_two_processes_has_the_figures_of_one(model, tmp_path):
  real = tmp_path / "real.npz"
  data.save_npz(real, np.random.default_rng(0).integers(0, 256, (40, 4, 4, 1)).astype(np.uint8))
  table = {}
  for number in (1, 2):
    out = tmp_path / str(number)
    args = ["--model", model, "--guidance", "cfg", "--scales", "1,3", "--num", 12, "--steps", 2, "--batch-size", 4]
    args += ["--reference", real, "--features", "pixels", "--judge", "none", "--measures", "frechet_distance"]
    found = ended(together("sweep", *args, "--out", out, "--no-progress", number=number), timeout=500)
    assert [status for status, _, _ in found] == [0] * number, found
    # Gloo prints to the output as well.
    assert ["distance" in printed for _, printed, _ in found] == [True] + [False] * (number - 1)
    table[number] = (out / "sweep.csv").read_text().splitlines()
    assert (out / "report.html").exists()
  rows = [[line.split(",")[:4] for line in lines] for lines in table.values()]
  assert rows[0][0] == rows[1][0]
  for one, two in zip(rows[0][1:], rows[1][1:], strict=True):
    assert one[:3] == two[:3]
    assert float(one[3]) == pytest.approx(float(two[3]), rel=1e-3)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_processes_with_other_settings_are_told_so(model, tmp_path):
  port = several.free_port()
  started = [
    command(*sample_command(model, tmp_path / "x.npz", "--seed", seed), of=(port, 2, seed)) for seed in range(2)
  ]
  for status, _, errors in ended(started):
    assert status == 2
    assert "the processes do not run the same" in errors
    assert "settings.seed is 0 in process 0 and 1 in process 1" in errors
    assert "Traceback" not in errors
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_every_process_says_an_error_that_all_have():
  code = "import sys, time; from jaxguide import distributed; i = int(sys.argv[1]); "
  code += "distributed.start(f'127.0.0.1:{sys.argv[2]}', 2, i, timeout=60); time.sleep(i); "
  code += "raise ValueError('no such batch')"
  port = str(several.free_port())
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": several.environment()}
  started = [subprocess.Popen([sys.executable, "-c", code, str(index), port], **pipes) for index in range(2)]
  for status, _, errors in ended(started):
    assert status == 1
    assert "ValueError: no such batch" in errors
    assert "detected fatal errors" not in errors


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (("--mesh", "data=2"), 'the mesh is {"data": 1, "fsdp": 2, "tensor": 1} in process 0 and {"data": 2,'),
    (("--batch-size", 9), "batch_size is 64 in process 0 and 9 in process 1"),
  ],
)
def test_processes_with_other_arguments_are_told_so(model, tmp_path, options, message):
  images = tmp_path / "images.npz"
  data.save_npz(images, np.random.default_rng(0).integers(0, 256, (8, 4, 4, 1)).astype(np.uint8))
  args = sample_command(model, tmp_path / "x.npz", "--mesh", "fsdp=2")
  if "--mesh" not in options:
    args = ("evaluate", images, "--reference", images, "--features", "pixels", "--judge", "none", "--no-progress")
  port = several.free_port()
  started = [command(*args, *(options if index else ()), of=(port, 2, index)) for index in range(2)]
  for status, _, errors in ended(started):
    assert status == 2
    assert message in errors
    assert "Traceback" not in errors
  assert list(tmp_path.iterdir()) == [images]


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others(model, tmp_path):
  """The model of the second process is not there."""
  port = several.free_port()
  out = tmp_path / "x.npz"
  started = [command(*sample_command(model, out), of=(port, 2, 0))]
  began = time.monotonic()
  started.append(command(*sample_command(tmp_path / "nowhere", out), of=(port, 2, 1)))
  (first, _, errors), (second, _, own) = ended(started)
  assert time.monotonic() - began < 90
  assert second == 2
  assert "there is no model in" in own
  assert first != 0
  assert errors


def out_of_space(folder):
  """Train where the second process alone has too little space for a checkpoint; return the error."""
  if jax.process_index():
    arrays.shutil = SimpleNamespace(**{**vars(shutil), "disk_usage": lambda path: SimpleNamespace(free=0)})
  config = training.ModelConfig(Mlp(num_classes=3), {}, (4, 4, 1), 3)
  pixels = np.random.default_rng(0).integers(0, 256, (16, 4, 4, 1)).astype(np.uint8)
  images = data.Images(pixels, np.arange(16) % 3, 3, "random")
  how = training.TrainingConfig(steps=6, batch_size=8, save_every=2)
  try:
    training.fit(config, how, images, folder, progress=False, run=training.RunConfig(mesh="fsdp=-1", sample_every=0))
  except OSError as error:
    return str(error)


@pytest.mark.slow
def test_a_process_without_space_for_a_checkpoint_ends_all_with_its_reason(tmp_path):
  said = several.run("test_processes:out_of_space", 2, folder=str(tmp_path / "run"))
  assert said[0] == said[1]
  assert re.fullmatch(
    r"cannot write .*/checkpoints/2: No space left on device, it needs .* and 0 are free; .*", said[0]
  )
