"""Processes, devices and one mesh with one axis, over which the reviews of a batch are spread."""

import collections
import contextlib
import ctypes
import hashlib
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from imdb_jax.config import RuntimeConfig
from imdb_jax.errors import PlatformError, UsageError, first_line

AXIS = "data"

# Seconds to wait for other processes: at the start, at the end, and for a sign of life in between.
_PATIENCE = 60
# Seconds to wait for them after a failure or a signal, which all of them get within a step or never.
_FAREWELL = 5

# glibc, malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8

_INSTALL = {
  "gpu": "Install JAX for CUDA (pip install 'imdb_jax[gpu]') and check the driver with nvidia-smi.",
  "tpu": "Install JAX for TPUs (pip install 'imdb_jax[tpu]') on a TPU machine.",
}


def keep_freed_memory(runtime: RuntimeConfig) -> None:
  """Has glibc keep what is freed, instead of giving it back and faulting it in again, page by page, every step.

  XLA allocates the temporary arrays of a step anew each time: tens of MB, a third of a step's time. Call it before
  `start`: a thread that has already allocated keeps an arena of its own, to which large arrays do not return. Nothing
  happens where a GPU or TPU is asked for, or where the memory is not glibc's. It holds for the whole process, so `fit`
  and the commands ask for it, but not a `Classifier` within somebody's program.
  """
  if runtime.platform in ("gpu", "tpu") or sys.platform != "linux":
    return
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
  if mallopt is not None:
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_ARENA_MAX, 1)


def start(runtime: RuntimeConfig, batch_size: int | None = None) -> Mesh:
  """Joins the other processes, starts the platform and lays the mesh. Must come before JAX's first computation.

  It sets what JAX keeps for the whole program: the number of CPU devices, and the cache of compiled programs where the
  program has not named one.

  Args:
    runtime: where to compute.
    batch_size: rows that are spread: no more cores than that become devices.

  Raises:
    PlatformError: the platform or that many devices are not there, or the other processes do not answer.
  """
  if runtime.deterministic:
    # XLA reads it when the platform starts.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".strip()
  if jax.config.values["jax_compilation_cache_dir"] is None:
    _keep_compiled_programs(runtime.cache_dir.absolute() / "xla")
  if runtime.platform == "cpu":
    jax.config.update("jax_platforms", "cpu")
  # A small product gains nothing from a second thread, a second device with half the batch does.
  _request_cpu_devices(runtime.num_devices or min(num_cores(), batch_size or num_cores()))
  _join_processes(runtime)
  return Mesh(np.array(_devices(runtime)), (AXIS,))


def _keep_compiled_programs(folder: Path) -> None:
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError:
    return
  # JAX would warn of each program that it cannot keep.
  if os.access(folder, os.W_OK):
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Prediction of one review and its like compile in less than the default of one second.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def num_cores() -> int:
  """Cores that this process may use, of which a container or a scheduler often allows a few. Only Linux tells."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _request_cpu_devices(num_devices: int) -> None:
  try:
    jax.config.update("jax_num_cpu_devices", num_devices)
  except RuntimeError:
    # JAX has started already, as in a notebook. `_devices` says so if there are too few.
    return


def _join_processes(runtime: RuntimeConfig) -> None:
  if jax.distributed.is_initialized():
    return
  # JAX would take SIGTERM for itself; the trainer's own handler has all processes save the same step.
  jax.config.update("jax_enable_preemption_service", False)
  if runtime.process_id:
    _await_coordinator(str(runtime.coordinator_address))
  try:
    if runtime.coordinator_address is not None:
      jax.distributed.initialize(
        runtime.coordinator_address,
        runtime.num_processes,
        runtime.process_id,
        initialization_timeout=_PATIENCE,
        heartbeat_timeout_seconds=_PATIENCE,
        shutdown_timeout_seconds=_PATIENCE,
        # Only the named address: the coordinator is not authenticated, and JAX would listen on every interface.
        coordinator_bind_address=runtime.coordinator_address if runtime.process_id == 0 else None,
      )
    elif runtime.distributed:
      jax.distributed.initialize(
        initialization_timeout=_PATIENCE, heartbeat_timeout_seconds=_PATIENCE, shutdown_timeout_seconds=_PATIENCE
      )
  except (RuntimeError, ValueError) as error:
    raise PlatformError(f"The other processes could not be joined: {first_line(error)}.") from error


def _await_coordinator(address: str) -> None:
  """Where nobody listens JAX would end the process after that time, with a stack trace."""
  host, port = address.rsplit(":", 1)
  give_up_at = time.monotonic() + _PATIENCE
  while True:
    try:
      socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE).close()
    except OSError as error:
      if time.monotonic() > give_up_at:
        raise PlatformError(f"--coordinator-address {address}: the first process does not answer: {error}.") from error
      time.sleep(0.2)
    else:
      return


@contextlib.contextmanager
def together() -> Iterator[None]:
  """A part that all processes pass or none: where one fails, the others leave too, instead of waiting for it.

  Raises:
    PlatformError: another process failed, or has gone.
  """
  failure = None
  try:
    yield
  # Of any kind: it is raised again below.
  except Exception as error:
    failure = error
  if jax.process_count() > 1:
    try:
      has_failed = multihost_utils.process_allgather(np.int32(failure is not None))
    # A few kinds, as in `device_errors`.
    except (jax.errors.JaxRuntimeError, ValueError) as error:
      raise failure or PlatformError(f"Another process has gone: {first_line(error)}.") from error
    if failure is None and has_failed.any():
      raise PlatformError("Another process could not go on; it says why.")
  if failure is not None:
    raise failure


def require_alike(settings: Mapping[str, Any]) -> None:
  """Makes sure that all processes were started with the same settings, where computing together depends on them.

  Args:
    settings: of this process, by the names that people know; of each the `repr` is compared.

  Raises:
    UsageError: they differ, in every process.
  """
  if jax.process_count() == 1:
    return
  digests = [np.frombuffer(hashlib.sha256(repr(value).encode()).digest(), np.uint8) for value in settings.values()]
  of_all = multihost_utils.process_allgather(np.stack(digests))
  differing = [name for name, rows in zip(settings, np.moveaxis(of_all, 1, 0), strict=True) if (rows != rows[0]).any()]
  if differing:
    raise UsageError(f"The processes were started with different values of {', '.join(differing)}.")


@contextlib.contextmanager
def leaving() -> Iterator[None]:
  """Has a command that exits early wait for the other processes, but not for one that has gone.

  JAX would wait for that one for a minute, and then abort.
  """
  try:
    yield
  except BaseException as early:
    if jax.distributed.is_initialized():
      farewell = threading.Thread(target=jax.distributed.shutdown, daemon=True)
      farewell.start()
      # The coordinator last: JAX aborts those that lose it.
      farewell.join(_FAREWELL + (2 if jax.process_index() == 0 else 0))
      if farewell.is_alive():
        code = early.code if isinstance(early, SystemExit) else None
        if code is None:
          traceback.print_exc()
        os._exit(code if isinstance(code, int) else 1)
    raise


@contextlib.contextmanager
def device_errors() -> Iterator[None]:
  """Says in one line that memory did not suffice, or that a process that this one computes with has gone.

  Raises:
    PlatformError: the computation failed.
  """
  try:
    yield
  # Some of what Gloo, which connects CPUs, has to say arrives as a ValueError.
  except (jax.errors.JaxRuntimeError, ValueError) as error:
    if isinstance(error, ValueError) and "Gloo" not in str(error):
      raise
    advice = (
      "If memory did not suffice, take smaller batches or fewer seeds."
      if jax.process_count() == 1
      else "Another process may have gone."
    )
    raise PlatformError(f"The computation failed: {first_line(error)}. {advice}") from error


def _devices(runtime: RuntimeConfig) -> list:
  platform = runtime.platform
  try:
    devices = jax.devices() if platform == "auto" else jax.devices(platform)
  except RuntimeError as error:
    # Never a silent run on the CPU: it is the most missed warning of the field.
    seen = ", ".join(sorted({device.platform for device in jax.devices()}))
    raise PlatformError(f"--platform {platform}: JAX sees only {seen}. {_INSTALL.get(platform, '')}") from error
  counts = collections.Counter(device.process_index for device in devices)
  if len(set(counts.values())) > 1:
    # JAX's agreements between processes ask for equal numbers.
    shown = ", ".join(f"process {process}: {counts[process]}" for process in sorted(counts))
    raise PlatformError(f"The processes have different numbers of devices ({shown}). Give all the same --num-devices.")
  if runtime.num_devices is None:
    return devices
  chosen = []
  for process in range(jax.process_count()):
    own = [device for device in devices if device.process_index == process]
    if runtime.num_devices > len(own):
      raise PlatformError(f"--num-devices {runtime.num_devices}: JAX sees {len(own)} on platform {own[0].platform}.")
    chosen += own[: runtime.num_devices]
  return chosen


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device holds the whole array."""
  return NamedSharding(mesh, PartitionSpec())


def over_reviews(mesh: Mesh, num_axes_before: int = 0) -> NamedSharding:
  """The axis of the reviews is spread over the devices; axes of steps or seeds may stand before it."""
  return NamedSharding(mesh, PartitionSpec(*[None] * num_axes_before, AXIS))


def padded_batch_size(batch_size: int, mesh: Mesh) -> int:
  """The smallest size from `batch_size` on that divides over the devices."""
  return -(-batch_size // mesh.size) * mesh.size


def put(arrays: Any, place: NamedSharding) -> Any:
  """Host arrays, one or a tree, on the devices; every process passes the same global arrays."""
  if jax.process_count() == 1:
    return jax.device_put(arrays, place)
  return jax.tree.map(
    lambda array: jax.make_array_from_callback(array.shape, place, lambda index: array[index]), arrays
  )
