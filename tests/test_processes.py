"""Processes find each other and their GPUs, agree, and leave together; the first signal is noted, the second obeyed."""

import os
import signal
import socket
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from imdb_jax import processes
from imdb_jax.config import RuntimeConfig
from imdb_jax.errors import PlatformError, UsageError
from imdb_jax.processes import StopRequest

ALL_GPUS = "0,1,2,3,4,5,6,7"


def slurm(tasks: str, rank: int = 0, node: int = 0, gpus: str | None = ALL_GPUS, **others: str) -> dict[str, str]:
  """Return the variables that SLURM sets for a task of a step."""
  # Of the job, in which a step may have fewer tasks.
  variables = {"SLURM_JOB_ID": "7", "SLURM_TASKS_PER_NODE": "64(x9)", "SLURM_NTASKS": "576", "SLURM_PROCID": "9"}
  variables |= {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_LOCALID": str(rank), "SLURM_NODEID": str(node)}
  return variables | ({} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus}) | others


def open_mpi(tasks: int, rank: int, gpus: str | None = ALL_GPUS) -> dict[str, str]:
  variables = {"OMPI_COMM_WORLD_LOCAL_SIZE": str(tasks), "OMPI_COMM_WORLD_LOCAL_RANK": str(rank)}
  return variables | ({} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus})


@pytest.mark.parametrize(
  ("environ", "expected"),
  [
    # One task per node uses all GPUs of the node.
    (slurm("1"), []),
    (slurm("1(x2)", node=1), []),
    (slurm("1(x2)", node=1, gpus=None), []),
    # With --gpus-per-task, a task sees only its own.
    (slurm("8", rank=5, gpus="5"), []),
    (slurm("4", rank=3, gpus="6,7", SLURM_GPUS_PER_TASK="2"), []),
    (slurm("2", rank=1, gpus="0,1", SLURM_GPUS_PER_TASK="a100:2"), []),
    # Of tasks that see all GPUs, JAX gives each the one of its rank.
    (slurm("8", rank=5), None),
    (slurm("2(x3),1", rank=1, node=2), None),
    (slurm("8", rank=5, gpus=None), None),
    # Open MPI.
    (open_mpi(1, 0), []),
    (open_mpi(8, 3), None),
    (open_mpi(2, 1, gpus=None), None),
    (open_mpi(2, 1, gpus="3"), []),
    # JAX decides.
    ({}, None),
    ({"CUDA_VISIBLE_DEVICES": ALL_GPUS}, None),
    ({"SLURM_JOB_ID": "7", "SLURM_TASKS_PER_NODE": "8"}, None),
    (slurm("1", JAX_LOCAL_DEVICE_IDS="0,1"), None),
    (open_mpi(1, 0) | {"JAX_LOCAL_DEVICE_IDS": "0"}, None),
  ],
)
def test_a_task_uses_all_gpus_that_are_its_own(environ, expected):
  assert processes.local_device_ids(environ) == expected


@pytest.fixture
def initialized(monkeypatch):
  """Return the settings of the calls of jax.distributed.initialize, which has no effect."""
  calls = []
  monkeypatch.setattr(jax.distributed, "initialize", lambda **settings: calls.append(settings))
  for name in list(os.environ):
    if name.startswith(("SLURM", "OMPI", "CUDA", "JAX_LOCAL")):
      monkeypatch.delenv(name)
  return calls


@pytest.mark.parametrize(
  ("environ", "expected"),
  [
    (slurm("1(x2)"), []),
    (slurm("8", rank=3), None),
    (slurm("1", JAX_LOCAL_DEVICE_IDS="0"), None),
  ],
)
def test_joining_a_cluster_passes_the_gpus_of_the_task(environ, expected, initialized, monkeypatch):
  for name, value in environ.items():
    monkeypatch.setenv(name, value)
  processes.join(RuntimeConfig(distributed=True))
  (settings,) = initialized
  assert settings["local_device_ids"] == expected
  assert "coordinator_address" not in settings, "JAX finds it"


@pytest.mark.parametrize(("environ", "expected"), [({}, []), ({"JAX_LOCAL_DEVICE_IDS": "1"}, None)])
@pytest.mark.parametrize("is_in_slurm_job", [False, True])
@pytest.mark.parametrize("process_id", [0, 1])
def test_joining_by_hand_uses_all_visible_gpus(
  environ, expected, is_in_slurm_job, process_id, initialized, monkeypatch
):
  """Inside a SLURM job JAX would give each process one GPU."""
  for name, value in (environ | (slurm("8", rank=3) if is_in_slurm_job else {})).items():
    monkeypatch.setenv(name, value)
  processes.join(RuntimeConfig(coordinator_address="host:1234", num_processes=2, process_id=process_id))
  (settings,) = initialized
  assert [settings[name] for name in ("coordinator_address", "num_processes", "process_id")] == [
    "host:1234",
    2,
    process_id,
  ]
  assert settings["local_device_ids"] == expected
  # JAX would listen on every interface.
  assert settings["coordinator_bind_address"] == ("host:1234" if process_id == 0 else None)


def test_one_process_joins_nothing(initialized):
  processes.join(RuntimeConfig())
  assert initialized == []


BY_HAND = {"coordinator_address": "127.0.0.1:1", "num_processes": 2}


@pytest.mark.parametrize(
  ("settings", "error", "words"),
  [
    ({"distributed": True}, RuntimeError("Refused.\nstack"), "--distributed: cannot join the other processes: Refused"),
    ({"distributed": True}, ValueError("no address"), "--distributed: JAX finds no job of SLURM.*: no address"),
    (BY_HAND | {"process_id": 0}, RuntimeError("in use"), "--coordinator-address 127.0.0.1:1: cannot join .*: in use"),
  ],
)
def test_a_failed_join_is_reported_in_one_line(settings, error, words, initialized, monkeypatch):
  def fail(**settings):
    raise error

  monkeypatch.setattr(jax.distributed, "initialize", fail)
  with pytest.raises(PlatformError, match=rf"^{words}\.$") as caught:
    processes.join(RuntimeConfig(**settings))
  assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("process_id", [None, 0, 1])
def test_a_process_that_waits_in_vain_names_the_flag(process_id, initialized, monkeypatch):
  """JAX would abort with a stack trace."""
  ended = threading.Event()
  monkeypatch.setattr(jax.distributed, "initialize", lambda **settings: ended.wait())
  monkeypatch.setattr(processes, "_TIMEOUT", 0.2)
  monkeypatch.setattr(processes, "_LEAVE_TIMEOUT", 0.2)
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{probe.getsockname()[1]}"
    settings = {"distributed": True} if process_id is None else BY_HAND | {"coordinator_address": address}
    flag = "--distributed" if process_id is None else f"--coordinator-address {address}"
    runtime = RuntimeConfig(**settings, process_id=process_id)
    refused = "process 0 does not answer: .*refused" if process_id == 1 else "not all processes have joined"
    with pytest.raises(PlatformError, match=rf"^{flag}: after 0.2 s, {refused}\.$"):
      processes.join(runtime)
    probe.listen()
    with pytest.raises(PlatformError, match=rf"^{flag}: after 0.2 s, not all processes have joined\.$"):
      processes.join(runtime)
  ended.set()


@pytest.mark.parametrize(
  ("settings", "environ", "expected"),
  [
    ({}, {"SLURM_PROCID": "0"}, ""),
    ({"distributed": True}, {"SLURM_PROCID": "3"}, "host process 3"),
    ({"distributed": True}, {"OMPI_COMM_WORLD_RANK": "0"}, "host process 0"),
    ({"distributed": True}, {}, "host process ?"),
    (BY_HAND | {"process_id": 0}, {"SLURM_PROCID": "3"}, "host process 0"),
  ],
)
def test_one_of_several_processes_has_a_name(settings, environ, expected, initialized, monkeypatch):
  monkeypatch.setattr(socket, "gethostname", lambda: "host")
  for name, value in environ.items():
    monkeypatch.setenv(name, value)
  assert processes.name(RuntimeConfig(**settings)) == expected


@pytest.fixture
def two_processes(monkeypatch):
  """Pretend to be the first of two processes; return a function that sets what the other one contributes."""
  monkeypatch.setattr(jax, "process_count", lambda: 2)

  def set_other(answer) -> None:
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda mine: np.stack([mine, answer(mine)]))

  return set_other


def test_unequal_settings_are_named_in_every_process(two_processes):
  settings = {"--epochs": 2, "--seed": 3, "--batch-size": 4}
  two_processes(lambda mine: mine)
  processes.require_equal(settings)
  two_processes(lambda mine: np.stack([mine[0], *mine[1:] ^ 1]))
  with pytest.raises(UsageError, match=r"different values of --seed, --batch-size\.$"):
    processes.require_equal(settings)


def test_the_largest_value_of_all_processes_counts(two_processes):
  two_processes(lambda mine: np.array([5, 0], np.int32))
  assert processes.largest([3, 7]) == [5, 7]


def test_one_process_agrees_with_itself():
  processes.require_equal({"--epochs": 2})
  assert processes.largest([3, 7]) == [3, 7]
  with processes.together():
    pass
  with pytest.raises(KeyError), processes.together():
    raise KeyError


def test_a_block_fails_in_all_processes_or_in_none(two_processes):
  two_processes(lambda mine: np.int32(0))
  with processes.together():
    pass
  with pytest.raises(KeyError), processes.together():
    raise KeyError
  two_processes(lambda mine: np.int32(1))
  with pytest.raises(PlatformError, match="Another process failed; see its output"), processes.together():
    pass
  with pytest.raises(KeyError), processes.together():
    raise KeyError


@pytest.mark.parametrize(
  "error", [jax.errors.JaxRuntimeError("UNAVAILABLE\nmore"), ValueError("Gloo: connection closed")]
)
def test_a_process_that_has_gone_is_reported_in_one_line(error, two_processes):
  def gone(mine):
    raise error

  two_processes(gone)
  with pytest.raises(PlatformError, match=r"^Another process has gone: .*\.$") as caught, processes.together():
    pass
  assert len(str(caught.value).splitlines()) == 1
  # The own failure is the more useful message.
  with pytest.raises(KeyError), processes.together():
    raise KeyError


@pytest.mark.parametrize(("count", "advice"), [(1, "use smaller batches or fewer seeds"), (2, "Another process")])
def test_a_failed_computation_is_reported_in_one_line(count, advice, monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: count)
  for error in (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED\nmore"), ValueError("Gloo: connection closed")):
    with pytest.raises(PlatformError, match=f"^The computation failed: .*{advice}") as caught, processes.computing():
      raise error
    assert len(str(caught.value).splitlines()) == 1
  with pytest.raises(ValueError, match="a bug"), processes.computing():
    raise ValueError("a bug")


ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.mark.parametrize("number", ALL)
def test_the_first_signal_is_noted_and_all_handlers_return_at_the_end(number):
  before = {each: signal.getsignal(each) for each in ALL}
  with StopRequest() as stop:
    assert stop.signal is None
    os.kill(os.getpid(), number)
    assert stop.signal == number
  assert {each: signal.getsignal(each) for each in ALL} == before
  with StopRequest() as stop:
    os.kill(os.getpid(), number)
    assert stop.signal == number


def test_a_terminal_that_hangs_up_twice_ends_nothing():
  with StopRequest() as stop:
    for number in (signal.SIGHUP, signal.SIGHUP):
      os.kill(os.getpid(), number)
  assert stop.signal == signal.SIGHUP


# A process forks for each case. The child enters a StopRequest and computes; the parent sends it two signals.
PAIRS_OF_SIGNALS = """
import hashlib, os, signal, sys, time
from imdb_jax.processes import StopRequest

def compute(iterations):
  # No handler in Python runs meanwhile.
  hashlib.pbkdf2_hmac("sha256", b"", b"", iterations)

def child(ready, iterations):
  # As the scripts do.
  signal.signal(signal.SIGINT, signal.SIG_DFL)
  with StopRequest() as stop:
    os.write(ready, b".")
    while stop.signal is None:
      compute(iterations)
    os.write(ready, b".")
    # As a save does: a second signal has to end it.
    compute(iterations)
  return stop.signal

def pair(first, second, delay, iterations):
  seen, ready = os.pipe()
  pid = os.fork()
  if pid == 0:
    os._exit(child(ready, iterations))
  os.close(ready)
  os.read(seen, 1)
  os.kill(pid, first)
  # None: until the first signal has been noted.
  time.sleep(delay) if delay is not None else os.read(seen, 1)
  started = time.monotonic()
  os.kill(pid, second)
  code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
  os.close(seen)
  return code, time.monotonic() - started
"""


def test_two_signals_at_nearly_the_same_time_stop_a_run_or_end_it_without_a_word():
  code = f"""{PAIRS_OF_SIGNALS}
numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
for trial in range(100):
  first, second = numbers[trial % 3], numbers[trial // 3 % 3]
  # The computation takes a few milliseconds.
  code, _ = pair(first, second, trial / 100 * 0.02, 5_000)
  # Signals that arrive together count as one: either may be noted first.
  assert code in (first, second, -signal.SIGINT, -signal.SIGTERM), (trial, code)
  assert code >= 0 or code == -second, (trial, code)
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
  assert (done.returncode, done.stderr) == (0, "")


def test_a_second_signal_ends_a_long_computation_at_once():
  code = f"""{PAIRS_OF_SIGNALS}
for first in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
  for second in (signal.SIGINT, signal.SIGTERM):
    started = time.monotonic()
    compute(400_000)
    whole = time.monotonic() - started
    code, seconds = pair(first, second, None, 400_000)
    assert code == -second, code
    assert seconds < whole / 2, (seconds, whole)
  assert pair(first, signal.SIGHUP, None, 1_000)[0] == first
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
  assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_signals_that_a_shell_has_made_a_run_ignore_stay_ignored(number):
  previous = signal.signal(number, signal.SIG_IGN)
  try:
    with StopRequest() as stop:
      os.kill(os.getpid(), number)
      assert stop.signal is None
      os.kill(os.getpid(), signal.SIGTERM)
      assert stop.signal == signal.SIGTERM
      assert signal.getsignal(number) == signal.SIG_IGN
    assert signal.getsignal(number) == signal.SIG_IGN
  finally:
    signal.signal(number, previous)
