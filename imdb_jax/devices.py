"""Devices: platform, mesh, memory allocation, and the cache of compiled programs."""

import collections
import ctypes
import os
import stat
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import platformdirs
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from imdb_jax import processes
from imdb_jax.config import RuntimeConfig
from imdb_jax.errors import PlatformError, UsageError

# The one axis of the mesh. The rows of a batch are sharded over it.
AXIS = "data"

# Parameters of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_DETERMINISTIC_FLAG = "--xla_gpu_deterministic_ops=true"
_INSTALL = {
  "gpu": "Install JAX for CUDA (pip install 'imdb_jax[gpu]') and check the driver with nvidia-smi.",
  "tpu": "Install JAX for TPUs (pip install 'imdb_jax[tpu]') on a TPU machine.",
}


def keep_freed_memory(runtime: RuntimeConfig) -> None:
  """Make glibc keep freed memory for the whole process, to avoid page faults on every step.

  XLA allocates the temporary arrays of each step anew: tens of MB, a third of a step's time on a CPU. Call it before
  `start`: a thread that has already allocated keeps an arena of its own, which does not reuse large arrays. It does
  nothing if a GPU or TPU is requested, or without glibc.
  """
  if runtime.platform in ("gpu", "tpu") or sys.platform != "linux":
    return
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
  if mallopt is not None:
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_ARENA_MAX, 1)


def start(runtime: RuntimeConfig, batch_size: int) -> Mesh:
  """Join the other processes, start the platform and return a mesh over its devices.

  Call it before JAX's first computation. It sets what JAX keeps for the whole program: the number of CPU devices, and
  the cache of compiled programs unless the program has set one. By default, no more devices are used than a batch has
  rows.

  Raises:
    PlatformError: the platform or that many devices are missing, or the other processes do not answer.
    UsageError: `deterministic` is requested for a GPU after JAX has started.
  """
  if jax.config.values["jax_compilation_cache_dir"] is None:
    _cache_compiled_programs()
  if runtime.platform == "cpu":
    jax.config.update("jax_platforms", "cpu")
  has_started = False
  try:
    # A small product gains nothing from a second thread. A second device with half of the batch does.
    jax.config.update("jax_num_cpu_devices", runtime.num_devices or min(num_cores(), batch_size))
  except RuntimeError:
    # JAX has started already, as in a notebook. `_choose` raises if there are too few devices.
    has_started = True
  flags = os.environ.get("XLA_FLAGS", "").split()
  is_deterministic = _DETERMINISTIC_FLAG in flags
  if runtime.deterministic and not is_deterministic and not has_started:
    # XLA reads the flag when the platform starts.
    os.environ["XLA_FLAGS"] = " ".join([*flags, _DETERMINISTIC_FLAG])
  processes.join(runtime)
  devices = _choose(runtime, batch_size)
  if runtime.deterministic and devices[0].platform == "gpu" and has_started and not is_deterministic:
    raise UsageError(f"--deterministic: JAX has started already; set XLA_FLAGS={_DETERMINISTIC_FLAG} before it does.")
  if devices[0].platform != "cpu":
    require_arithmetic(next(device for device in devices if device.process_index == jax.process_index()))
  return Mesh(np.array(devices), (AXIS,))


def require_arithmetic(device: Any) -> None:
  """Raise PlatformError if a device computes wrongly, as some GPUs do with some versions of JAX (jax#40633)."""
  x = np.linspace(-4, 4, 256, dtype=np.float32).reshape(16, 16)
  with jax.default_device(device), jax.default_matmul_precision("float32"):
    y, drawn = jnp.asarray(x), np.asarray(jax.random.normal(jax.random.key(0), (1024,)))
    pairs = {
      "tanh": (jnp.tanh(y), np.tanh(x)),
      "sqrt": (jnp.sqrt(jnp.abs(y)), np.sqrt(np.abs(x))),
      "add": (y + 1, x + 1),
      "sum": (jnp.sum(y, axis=0), x.sum(axis=0)),
      "matmul": (y @ y.T, x @ x.T),
      # Four standard errors.
      "random.normal": (np.array([drawn.mean(), drawn.std() - 1]) / 8, np.zeros(2)),
    }
    wrong = [name for name, (found, right) in pairs.items() if not np.allclose(found, right, rtol=1e-3, atol=0.016)]
  if wrong:
    versions = f"jax {jax.__version__}, {device.client.platform_version}"
    raise PlatformError(f"{device.device_kind} computes wrongly: {', '.join(wrong)} ({versions}). Try another jax.")


def num_cores() -> int:
  """Return the number of cores that this process may use; a container or a scheduler may limit it."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cache_compiled_programs() -> None:
  """Make JAX cache compiled programs in a folder that only this user can read and write, if there is one.

  An entry holds native code, and JAX runs it unchecked. The folder is therefore apart from the cache folder of a run,
  which may have been copied from elsewhere.
  """
  try:
    folder = platformdirs.user_cache_path("imdb_jax-programs", appauthor=False).expanduser()
    folder.mkdir(mode=stat.S_IRWXU, parents=True, exist_ok=True)
    found = folder.lstat()
  # RuntimeError: the user has no home.
  except (OSError, RuntimeError):
    return
  is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
  is_private = not found.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
  # JAX would warn about each program that it cannot save.
  if is_own and is_private and os.access(folder, os.W_OK):
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # The default of one second would leave out small programs, such as prediction of a single review.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _choose(runtime: RuntimeConfig, batch_size: int) -> list[Any]:
  """Return the devices to use, the same number in each process."""
  platform = runtime.platform
  try:
    devices = jax.devices() if platform == "auto" else jax.devices(platform)
  except RuntimeError as error:
    # Never fall back to the CPU silently.
    seen = ", ".join(sorted({device.platform for device in jax.devices()}))
    raise PlatformError(f"--platform {platform}: JAX sees only {seen}. {_INSTALL.get(platform, '')}") from error
  by_process = collections.defaultdict(list)
  for device in devices:
    by_process[device.process_index].append(device)
  counts = {process: len(by_process[process]) for process in sorted(by_process)}
  if len(set(counts.values())) > 1:
    shown = ", ".join(f"process {process}: {count}" for process, count in counts.items())
    raise PlatformError(f"The processes have different numbers of devices ({shown}). Give all the same --num-devices.")
  available, most = counts[min(counts)], batch_size // len(counts)
  if most == 0:
    raise PlatformError(f"{len(counts)} processes cannot share a batch of {batch_size}: raise --batch-size.")
  wanted = runtime.num_devices or min(available, most)
  if wanted > available:
    raise PlatformError(f"--num-devices {wanted}: JAX sees {available} on platform {devices[0].platform}.")
  if wanted > most:
    raise PlatformError(f"--num-devices {wanted}: a batch of {batch_size} has work for {most} per process at most.")
  return [device for process in sorted(by_process) for device in by_process[process][:wanted]]


def replicated(mesh: Mesh) -> NamedSharding:
  """Return the sharding with which every device holds the whole array."""
  return NamedSharding(mesh, PartitionSpec())


def over_rows(mesh: Mesh, axis: int = 0) -> NamedSharding:
  """Return the sharding that spreads one axis, the rows of a batch, over the devices."""
  return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))


def padded_size(num_rows: int, mesh: Mesh) -> int:
  """Return the smallest multiple of the number of devices that is not below `num_rows`."""
  return -(-num_rows // mesh.size) * mesh.size


def put(arrays: Any, sharding: NamedSharding) -> Any:
  """Place a tree of host arrays on the devices; every process passes the same global arrays."""
  if jax.process_count() == 1:
    return jax.device_put(arrays, sharding)
  return jax.tree.map(
    lambda array: jax.make_array_from_callback(array.shape, sharding, lambda index: array[index]), arrays
  )
