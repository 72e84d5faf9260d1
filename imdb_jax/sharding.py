"""Processes, devices and one mesh with one axis, over which the reviews of a batch are spread."""

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from imdb_jax.config import RuntimeConfig
from imdb_jax.errors import PlatformError, first_line

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
  happens on a GPU or TPU, or where the memory is not glibc's. It holds for the whole process, so only commands over a
  whole split ask for it, not the prediction of a few texts within somebody's program.
  """
  if runtime.platform in ("gpu", "tpu") or sys.platform != "linux":
    return
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
  if mallopt is not None:
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_ARENA_MAX, 1)


def start(runtime: RuntimeConfig) -> Mesh:
  """Joins the other processes, starts the platform and lays the mesh. Must come before JAX's first computation.

  Raises:
    PlatformError: the platform or that many devices are not there, or the other processes do not answer.
  """
  if runtime.deterministic:
    # XLA reads it when the platform starts.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".strip()
  jax.config.update("jax_compilation_cache_dir", str(runtime.cache_dir.absolute() / "xla"))
  # Prediction of one review and its like compile in less than the default of one second.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
  if runtime.platform == "cpu":
    jax.config.update("jax_platforms", "cpu")
  # A small product gains nothing from a second thread, a second device with half the batch does.
  _request_cpu_devices(runtime.num_devices or num_cores())
  _join_processes(runtime)
  return Mesh(np.array(_devices(runtime)), (AXIS,))


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


@contextlib.contextmanager
def together() -> Iterator[None]:
  """A part that all processes pass or none: where one fails, the others leave too, instead of waiting for it.

  Raises:
    PlatformError: another process failed.
  """
  failure = None
  try:
    yield
  # Of any kind: it is raised again below.
  except Exception as error:
    failure = error
  if jax.process_count() > 1:
    has_failed = multihost_utils.process_allgather(np.int32(failure is not None))
    if failure is None and has_failed.any():
      raise PlatformError("Another process could not go on; it says why.")
  if failure is not None:
    raise failure


@contextlib.contextmanager
def leaving() -> Iterator[None]:
  """Has a command that exits early wait for the other processes, but not for one that has gone.

  JAX would wait for that one for a minute, and then abort.
  """
  try:
    yield
  except SystemExit as early:
    if jax.distributed.is_initialized():
      farewell = threading.Thread(target=jax.distributed.shutdown, daemon=True)
      farewell.start()
      # The coordinator last: JAX aborts those that lose it.
      farewell.join(_FAREWELL + (2 if jax.process_index() == 0 else 0))
      if farewell.is_alive():
        os._exit(early.code if isinstance(early.code, int) else 1)
    raise


@contextlib.contextmanager
def device_errors() -> Iterator[None]:
  """Says in one line that memory did not suffice, or that a process that this one computes with has gone.

  Raises:
    PlatformError: the computation failed.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    raise PlatformError(
      f"The computation failed: {first_line(error)}. If memory did not suffice, take smaller batches or fewer seeds."
    ) from error


def _devices(runtime: RuntimeConfig) -> list:
  platform = runtime.platform
  try:
    devices = jax.devices() if platform == "auto" else jax.devices(platform)
  except RuntimeError as error:
    # Never a silent run on the CPU: it is the most missed warning of the field.
    seen = ", ".join(sorted({device.platform for device in jax.devices()}))
    raise PlatformError(f"--platform {platform}: JAX sees only {seen}. {_INSTALL.get(platform, '')}") from error
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
