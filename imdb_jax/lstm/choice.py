"""Which implementation serves a call, and whether the kernel may."""

import concurrent.futures
import contextlib
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from imdb_jax.lstm import chunked, cudnn, scan

GateActivation = Literal["sigmoid", "hard_sigmoid"]

IMPLEMENTATIONS = ("mosaic_gpu", "cudnn", "chunked", "scan")
# Blocks of 64 units, whose recurrent weights fit on chip: bfloat16 [128, 512] is 128 KiB, of 227 of shared memory.
_KERNEL_HIDDEN_SIZES = (64, 128)
# Of the kernel against `chunked`, relative norms: twice the rounding of bfloat16, 2^-8. A mistake gives far more.
_SELF_CHECK_TOLERANCE = 2**-7


def implementation_of(name: str) -> Callable[..., jax.Array]:
  """The function behind a name of `IMPLEMENTATIONS`."""
  if name == "mosaic_gpu":
    # Pallas's GPU part takes time to import, and not every build of JAX has it.
    from imdb_jax.lstm import mosaic_gpu

    return mosaic_gpu.lstm
  return {"cudnn": cudnn, "chunked": chunked, "scan": scan}[name].lstm


class Choice(NamedTuple):
  """Attributes:
  name: of an implementation.
  reason: why it is the one, for people.
  """

  name: str
  reason: str


def choose(hidden_size: int) -> Choice:
  """What `implementation=None` takes on the default device."""
  problem = _kernel_problem(hidden_size) or _self_check_problem(hidden_size)
  if problem is None:
    return Choice("mosaic_gpu", "agrees with chunked on this device")
  return Choice("chunked", f"mosaic_gpu: {problem}")


def unsupported(
  implementation: str,
  *,
  hidden_size: int,
  recurrent_dropout: bool,
  gate_activation: GateActivation,
  several_models: bool = False,
) -> str | None:
  """Why an implementation cannot serve such calls on the default device, or None if it can.

  Args:
    implementation: a name of `IMPLEMENTATIONS`.
    hidden_size: of the call.
    recurrent_dropout: there is a mask for it.
    gate_activation: of the call.
    several_models: the call is under `jax.vmap`.
  """
  if implementation == "mosaic_gpu":
    return _kernel_problem(hidden_size)
  if implementation != "cudnn":
    return None
  if recurrent_dropout:
    return "cuDNN knows no recurrent dropout"
  if gate_activation != "sigmoid":
    return f"cuDNN knows no {gate_activation}"
  if several_models:
    return "jax.experimental.rnn knows no jax.vmap, by which several models are computed"
  return gpu_problem(0.0)


def _kernel_problem(hidden_size: int) -> str | None:
  if hidden_size not in _KERNEL_HIDDEN_SIZES:
    served = " and ".join(map(str, _KERNEL_HIDDEN_SIZES))
    return f"it serves hidden sizes of {served}, not {hidden_size}"
  return gpu_problem(9.0)


def gpu_problem(capability: float) -> str | None:
  """Why the default device is no NVIDIA GPU of that compute capability or a later one, or None if it is."""
  device = jax.local_devices()[0]
  if device.platform != "gpu":
    return f"it needs an NVIDIA GPU, and JAX computes on {device.platform}"
  found = float(getattr(device, "compute_capability", 0))
  return (
    None if found >= capability else f"it needs compute capability {capability}, and {device.device_kind} has {found}"
  )


@functools.cache
def _self_check_problem(hidden_size: int) -> str | None:
  """What is wrong with the kernel on the default device; None if it agrees with `chunked`.

  It is tried once a process. Where JAX caches its programs, a kernel that has agreed is not tried again.
  """
  agreed = _mark_of_agreement(hidden_size)
  if agreed is not None and agreed.exists():
    return None
  # The call may be under trace, which is a thread's own affair.
  with concurrent.futures.ThreadPoolExecutor(1) as executor:
    problem = executor.submit(_self_check, hidden_size).result()
  if problem is None and agreed is not None:
    # Without room the kernel is as good, and is tried again.
    with contextlib.suppress(OSError):
      agreed.parent.mkdir(parents=True, exist_ok=True)
      agreed.touch()
  return problem


def _mark_of_agreement(hidden_size: int) -> Path | None:
  """The file that says so, for this device, these versions and this kernel; None if JAX caches no programs."""
  folder = jax.config.values["jax_compilation_cache_dir"]
  if folder is None:
    return None
  device, kernel = jax.local_devices()[0], Path(__file__).with_name("mosaic_gpu.py")
  facts = device.device_kind, device.client.platform_version, jax.__version__, jax.lib.__version__, hidden_size
  digest = hashlib.sha256(repr(facts).encode() + kernel.read_bytes())
  return Path(folder) / f"mosaic_gpu-agrees-{digest.hexdigest()}"


def _self_check(hidden_size: int) -> str | None:
  """Two tiles, lengths from none to all, masks; forward and backward."""
  (b, t, e), h = (20, 7, 8), hidden_size
  rng = np.random.default_rng(0)

  def draw(*shape: int, scale: float = 1.0) -> np.ndarray:
    return (scale * rng.standard_normal(shape)).astype(np.float32)

  arrays = draw(b, t, e), draw(e, 4 * h, scale=e**-0.5), draw(h, 4 * h, scale=h**-0.5), draw(4 * h)
  mask = ((rng.random((b, h)) < 0.8) / 0.8).astype(np.float32)
  lengths, cotangent = np.arange(b, dtype=np.int32) % (t + 1), draw(b, t, h)

  def run(name: str) -> tuple[jax.Array, ...]:
    def call(*arrays):
      return implementation_of(name)(
        *arrays,
        input_dropout_mask=None,
        recurrent_dropout_mask=jnp.asarray(mask),
        lengths=jnp.asarray(lengths),
        gate_activation="sigmoid",
        reverse=False,
      )

    @jax.jit
    def hidden_and_gradients(*arrays):
      hidden, vjp = jax.vjp(call, *arrays)
      return hidden, *vjp(cotangent)

    with jax.default_matmul_precision("float32"):
      return jax.device_get(hidden_and_gradients(*arrays))

  try:
    found = run("mosaic_gpu")
  # Whatever a compiler or driver raises: a kernel that does not run must not keep a model from training.
  except Exception as error:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return f"it failed its self-check: {reason[0]}"
  norm = np.linalg.norm
  # np.max: Python's own passes over a NaN that is not the first.
  distance = np.max([norm(x - y) / norm(y) for x, y in zip(found, run("chunked"), strict=True)])
  return None if distance <= _SELF_CHECK_TOLERANCE else f"it differs from chunked on this device by {distance:.1e}"
