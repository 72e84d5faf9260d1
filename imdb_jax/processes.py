"""Processes of a run: joining a cluster, agreeing, leaving, and signals."""

import contextlib
import ctypes
import hashlib
import os
import re
import signal
import socket
import threading
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from imdb_jax.config import RuntimeConfig
from imdb_jax.errors import PlatformError, UsageError, first_line

# Seconds to wait for other processes to start, and for a sign of life afterwards.
_TIMEOUT = 60
# Seconds to wait for other processes at the end. After a failure they leave within a step, or never.
_LEAVE_TIMEOUT = 5
# Name of a thread, which lives on if the others do not come.
_JOINING = "joining"


def join(runtime: RuntimeConfig) -> None:
  """Join the other processes of the run, if the settings ask for it; raise PlatformError if they do not answer."""
  if jax.distributed.is_initialized() or not name(runtime):
    return
  # JAX would take over SIGTERM. `StopRequest` makes all processes save the same step instead.
  jax.config.update("jax_enable_preemption_service", False)
  flag, address = "--distributed", runtime.coordinator_address
  settings: dict[str, Any] = {"local_device_ids": local_device_ids(os.environ)}
  if address is not None:
    flag = f"--coordinator-address {address}"
    settings = {
      "coordinator_address": address,
      "num_processes": runtime.num_processes,
      "process_id": runtime.process_id,
      # All visible devices. Inside a SLURM job JAX would use one.
      "local_device_ids": None if "JAX_LOCAL_DEVICE_IDS" in os.environ else [],
      # By default the coordinator, which has no authentication, listens on every interface.
      "coordinator_bind_address": address if runtime.process_id == 0 else None,
    }
  failures = []

  def initialize() -> None:
    try:
      jax.distributed.initialize(
        **settings,
        # Longer than this process waits: JAX would abort with a stack trace.
        initialization_timeout=10 * _TIMEOUT,
        heartbeat_timeout_seconds=_TIMEOUT,
        shutdown_timeout_seconds=_TIMEOUT,
      )
    except (RuntimeError, ValueError) as error:
      failures.append(error)

  thread = threading.Thread(target=initialize, name=_JOINING, daemon=True)
  thread.start()
  # The coordinator gives up last: JAX aborts processes that lose it.
  thread.join(_TIMEOUT + (_LEAVE_TIMEOUT if _rank(runtime) == "0" else 0))
  if thread.is_alive():
    problem = "not all processes have joined"
    if address is not None and runtime.process_id:
      host, port = address.rsplit(":", 1)
      try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
      except OSError as error:
        problem = f"process 0 does not answer: {error}"
    raise PlatformError(f"{flag}: after {_TIMEOUT} s, {problem}.")
  for error in failures:
    problem = "cannot join the other processes"
    if address is None and isinstance(error, ValueError):
      problem = "JAX finds no job of SLURM, Open MPI or a TPU pod that this process belongs to"
    raise PlatformError(f"{flag}: {problem}: {first_line(error)}.") from error


def name(runtime: RuntimeConfig) -> str:
  """Return the host and the rank of this process; an empty text if the settings do not ask to join others."""
  if not runtime.distributed and runtime.coordinator_address is None:
    return ""
  return f"{socket.gethostname()} process {_rank(runtime) or '?'}"


def _rank(runtime: RuntimeConfig) -> str | None:
  """Return the index of this process before it has joined the others; None if only JAX can find out."""
  if runtime.process_id is not None:
    return str(runtime.process_id)
  return os.environ.get("SLURM_PROCID") or os.environ.get("OMPI_COMM_WORLD_RANK")


def local_device_ids(environ: Mapping[str, str]) -> list[int] | None:
  """Return which of the visible GPUs this task of a SLURM or Open MPI job uses: [] for all, None for JAX's choice.

  JAX gives each task one GPU, that of the task's rank on its node (jax#16788), also to the only task of a node.
  """
  tasks = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("OMPI_COMM_WORLD_LOCAL_SIZE")
  if tasks is None or "JAX_LOCAL_DEVICE_IDS" in environ:
    return None
  # As 1(x3): one task on each of three nodes.
  is_alone = re.fullmatch(r"1(\(x\d+\))?", tasks) is not None
  # With --gpus-per-task, SLURM shows each task only the GPUs that belong to it.
  has_own = "SLURM_GPUS_PER_TASK" in environ or len(environ.get("CUDA_VISIBLE_DEVICES", ",").split(",")) == 1
  return [] if is_alone or has_own else None


@contextlib.contextmanager
def together() -> Iterator[None]:
  """Run a block that all processes must pass: if one fails or has gone, the others raise PlatformError and leave."""
  failure = None
  try:
    yield
  except Exception as error:
    failure = error
  if jax.process_count() > 1:
    try:
      has_failed = multihost_utils.process_allgather(np.int32(failure is not None))
    # Gloo, which connects CPUs, raises ValueError.
    except (jax.errors.JaxRuntimeError, ValueError) as error:
      raise failure or PlatformError(f"Another process has gone: {first_line(error)}.") from error
    if failure is None and has_failed.any():
      raise PlatformError("Another process failed; see its output.")
  if failure is not None:
    raise failure


def largest(values: list[int]) -> list[int]:
  """Return the largest of each value over all processes. All of them must call it."""
  if jax.process_count() == 1:
    return values
  return np.max(multihost_utils.process_allgather(np.array(values, np.int32)), axis=0).tolist()


def require_equal(settings: Mapping[str, Any]) -> None:
  """Raise UsageError in every process if they were started with unequal settings, which would deadlock."""
  if jax.process_count() == 1:
    return
  digests = [np.frombuffer(hashlib.sha256(repr(value).encode()).digest(), np.uint8) for value in settings.values()]
  gathered = multihost_utils.process_allgather(np.stack(digests))
  differing = [
    name for name, rows in zip(settings, np.moveaxis(gathered, 1, 0), strict=True) if (rows != rows[0]).any()
  ]
  if differing:
    raise UsageError(f"The processes were started with different values of {', '.join(differing)}.")


@contextlib.contextmanager
def leaving() -> Iterator[None]:
  """Let a command that exits early wait for the other processes. For one that has gone, JAX would wait a minute."""
  try:
    yield
  except BaseException as early:
    is_joining = any(thread.name == _JOINING for thread in threading.enumerate())
    if is_joining or jax.distributed.is_initialized():
      shutdown = threading.Thread(target=jax.distributed.shutdown, daemon=True)
      if not is_joining:
        shutdown.start()
        # The coordinator leaves last: JAX aborts processes that lose it.
        shutdown.join(_LEAVE_TIMEOUT + (2 if jax.process_index() == 0 else 0))
      if is_joining or shutdown.is_alive():
        code = early.code if isinstance(early, SystemExit) else None
        if code is None:
          traceback.print_exc()
        os._exit(code if isinstance(code, int) else 1)
    raise


@contextlib.contextmanager
def computing() -> Iterator[None]:
  """Turn a failed computation into a PlatformError of one line: out of memory, or another process has gone."""
  try:
    yield
  except (jax.errors.JaxRuntimeError, ValueError) as error:
    if isinstance(error, ValueError) and "Gloo" not in str(error):
      raise
    advice = (
      "If memory did not suffice, use smaller batches or fewer seeds."
      if jax.process_count() == 1
      else "Another process may have gone."
    )
    raise PlatformError(f"The computation failed: {first_line(error)}. {advice}") from error


class Interrupted(Exception):
  """Training stopped on the signal `signal`, after saving the step `step`."""

  def __init__(self, number: signal.Signals, step: int):
    super().__init__(f"{number.name}: saved step {step}")
    self.signal, self.step = number, step


class StopRequest:
  """Signal handler for Ctrl-C, SIGTERM and SIGHUP (a lost connection).

  While the context is entered, the first signal only sets the attribute `signal`; a second SIGINT or SIGTERM ends the
  process at once. Signals that are ignored already stay ignored: a shell makes background commands ignore Ctrl-C, and
  nohup makes any command ignore SIGHUP.
  """

  _HANDLED = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

  def __init__(self):
    self.signal: signal.Signals | None = None
    self._previous = {}

  def __enter__(self) -> "StopRequest":
    # Python lets only the main thread handle signals.
    if threading.current_thread() is threading.main_thread():
      for number in self._HANDLED:
        if signal.getsignal(number) != signal.SIG_IGN:
          self._previous[number] = signal.signal(number, self._on_signal)
    return self

  def __exit__(self, *exception) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _on_signal(self, number, frame) -> None:
    del frame
    # Signals that arrive together count as one.
    self.signal = self.signal or signal.Signals(number)
    for each in self._previous:
      # A handler in Python would run only after the computation; the default action of the kernel is immediate.
      # A lost terminal may send SIGHUP twice, from the shell and from the kernel.
      action = signal.SIG_DFL if each in (signal.SIGINT, signal.SIGTERM) else signal.SIG_IGN
      # Python keeps its handler: without one, it would print an error for each signal that has already arrived.
      ctypes.CDLL(None).signal(each.value, ctypes.c_void_p(action.value))
