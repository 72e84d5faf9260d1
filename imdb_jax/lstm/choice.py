"""Choice of the implementation for a call, with the self-check that the kernel must pass first."""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from imdb_jax.lstm import chunked
from imdb_jax.lstm.shared import Masks, Weights

Cell = Literal["lstm", "gru", "rnn", "bag"]
GateActivation = Literal["sigmoid", "hard_sigmoid"]
Precision = Literal["auto", "float32", "tensorfloat32", "bfloat16"]

IMPLEMENTATIONS = ("mosaic_gpu", "chunked", "scan")
# Whole blocks of 64 units, whose recurrent weights fit on chip: bfloat16 [128, 512] takes 128 of 227 KiB.
_KERNEL_HIDDEN_SIZES = (64, 128)
# Hopper.
_KERNEL_CAPABILITY = 9.0
# Relative norm of the difference between kernel and `chunked`: twice the rounding of bfloat16, 2^-8.
_SELF_CHECK_TOLERANCE = 2**-7


def implementation_of(name: str) -> Callable[..., jax.Array]:
  """Return the function behind a name of `IMPLEMENTATIONS` except scan."""
  if name == "mosaic_gpu":
    # The GPU part of Pallas is slow to import, and some builds of JAX lack it.
    from imdb_jax.lstm import mosaic_gpu

    return mosaic_gpu.lstm
  return chunked.lstm


@dataclasses.dataclass(frozen=True)
class Call:
  """Properties of a call that decide which implementations can compute it."""

  hidden_size: int
  cell: Cell = "lstm"
  per_gate_masks: bool = False  # Each gate has its own dropout masks.
  gate_activation: GateActivation = "sigmoid"
  precision: Precision = "auto"  # Of matrix products; "auto" leaves it to the implementation.


class Choice(NamedTuple):
  """The name of an implementation and the reason for it, for people."""

  name: str
  reason: str


def choose(call: Call, device: Any = None) -> Choice:
  """Return the fastest implementation that supports a call on a `jax.Device`, or on the first local one.

  A device of another process is represented by the first local one of its platform.
  """
  problem = unsupported("chunked", call, device)
  if problem is not None:
    return Choice("scan", f"chunked: {problem}")
  problem = unsupported("mosaic_gpu", call, device) or _self_check_problem(call.hidden_size, _local(device))
  if problem is not None:
    return Choice("chunked", f"mosaic_gpu: {problem}")
  return Choice("mosaic_gpu", "agrees with chunked on this device")


def unsupported(name: str, call: Call, device: Any = None) -> str | None:
  """Return why an implementation cannot compute a call, or None if it can; arguments as for `choose`."""
  if name not in IMPLEMENTATIONS:
    return f"must be one of {', '.join(IMPLEMENTATIONS)}"
  if name == "scan":
    return None
  if call.cell != "lstm":
    return f"its cell is an LSTM; only scan computes {call.cell}"
  if call.per_gate_masks:
    return "its gates share one dropout mask; only scan computes one mask per gate"
  if call.gate_activation != "sigmoid":
    return f"its gates are sigmoids; only scan computes {call.gate_activation}"
  if name == "mosaic_gpu":
    if call.precision in ("float32", "tensorfloat32"):
      return f"it computes recurrent products in bfloat16; precision {call.precision} excludes it"
    if call.hidden_size not in _KERNEL_HIDDEN_SIZES:
      return f"it supports hidden sizes of {' and '.join(map(str, _KERNEL_HIDDEN_SIZES))}, not {call.hidden_size}"
    return gpu_problem(_local(device))
  return None


def recurrent_precision(name: str, precision: Precision) -> str:
  """Return the precision of the recurrent products of an implementation under a setting of the precision."""
  if name == "mosaic_gpu":
    return "bfloat16"
  return "float32" if precision == "auto" else precision


def gpu_problem(device: Any) -> str | None:
  """Return why a device is not an NVIDIA GPU that the kernel supports, or None if it is."""
  if device.platform != "gpu":
    return f"it needs an NVIDIA GPU, and JAX computes on {device.platform}"
  found = float(getattr(device, "compute_capability", 0))
  if found < _KERNEL_CAPABILITY:
    return f"it needs compute capability {_KERNEL_CAPABILITY}, and {device.device_kind} has {found}"
  return None


def _local(device: Any) -> Any:
  if device is not None and device.process_index == jax.process_index():
    return device
  return jax.local_devices(backend=None if device is None else device.platform)[0]


@functools.cache
def _self_check_problem(hidden_size: int, device: Any) -> str | None:
  """Return what is wrong with the kernel on a device, or None if it agrees with `chunked`; checked once per process."""
  # The caller may be tracing. Tracing is local to a thread, so another thread computes right away.
  with concurrent.futures.ThreadPoolExecutor(1) as executor:
    return executor.submit(_self_check, hidden_size, device).result()


def _self_check(hidden_size: int, device: Any) -> str | None:
  """Compare hidden states and all gradients of the kernel with those of `chunked`.

  The check covers what `choose` permits: both masks, two tiles with lengths from 0 to t, both directions, one model and
  two under `jax.vmap`.
  """
  (b, t, e), h = (20, 3, 5), hidden_size
  rng = np.random.default_rng(0)

  def draw(*shape: int, scale: float = 1.0) -> Any:
    return (scale * rng.standard_normal((2, *shape))).astype(np.float32)

  arrays = draw(b, t, e), Weights(draw(e, 4 * h, scale=e**-0.5), draw(h, 4 * h, scale=h**-0.5), draw(4 * h))
  lengths = np.arange(b, dtype=np.int32) % (t + 1)
  models = arrays, Masks(draw(b, e), draw(b, h)), np.stack([lengths, lengths[::-1]]), draw(b, t, h)

  def run(name: str) -> list[Any]:
    function = implementation_of(name)

    def hidden_and_gradients(reverse, arrays, masks, lengths, cotangent):
      hidden, vjp = jax.vjp(lambda *arrays: function(*arrays, masks, lengths, reverse=reverse), *arrays)
      return hidden, vjp(cotangent)

    @jax.jit
    def compute(models):
      calls = [functools.partial(hidden_and_gradients, reverse) for reverse in (False, True)]
      return [(call(*jax.tree.map(lambda x: x[0], models)), jax.vmap(call)(*models)) for call in calls]

    with jax.default_matmul_precision("float32"), jax.default_device(device):
      return jax.tree.leaves(jax.device_get(compute(models)))

  try:
    found = run("mosaic_gpu")
  # Whatever a compiler or driver raises: a kernel that does not run must not keep a model from training.
  except Exception as error:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return f"it failed its self-check: {reason[0]}"
  norm = np.linalg.norm
  # Not Python's max, which skips NaN unless it comes first.
  distance = np.max([norm(x - y) / norm(y) for x, y in zip(found, run("chunked"), strict=True)])
  return None if distance <= _SELF_CHECK_TOLERANCE else f"it differs from chunked on this device by {distance:.1e}"
