"""The recurrence: one operation, several implementations, one contract.

Gates stand in the order i, f, g, o (Keras, cuDNN and Flax agree on it):

    i, f, o = gate(x W + h U + b)        g = tanh(x W + h U + b)
    c' = f c + i g                       h' = o tanh(c')

with x and h multiplied by dropout masks that are constant over time (Gal and Ghahramani 2016, arXiv:1512.05287).
"""

import concurrent.futures
import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from imdb_jax.lstm import chunked, cudnn, mosaic_gpu, scan

GateActivation = Literal["sigmoid", "hard_sigmoid"]

IMPLEMENTATIONS = {
  "mosaic_gpu": mosaic_gpu.lstm,
  "cudnn": cudnn.lstm,
  "chunked": chunked.lstm,
  "scan": scan.lstm,
}
# Of the kernel against `chunked`, relative norms: twice the rounding of bfloat16, 2^-8. A mistake gives far more.
_SELF_CHECK_TOLERANCE = 2**-7


class Choice(NamedTuple):
  """Attributes:
  name: of an implementation.
  reason: why it is the one, for people.
  """

  name: str
  reason: str


def choose(hidden_size: int) -> Choice:
  """What `implementation=None` takes on the default device."""
  problem = mosaic_gpu.unsupported(hidden_size) or _self_check_problem(hidden_size)
  if problem is None:
    return Choice("mosaic_gpu", "agrees with chunked on this device")
  return Choice("chunked", f"mosaic_gpu: {problem}")


def unsupported(
  implementation: str, *, hidden_size: int, recurrent_dropout: bool, gate_activation: GateActivation
) -> str | None:
  """Why an implementation cannot serve such calls on the default device, or None if it can."""
  if implementation == "mosaic_gpu":
    return mosaic_gpu.unsupported(hidden_size)
  if implementation == "cudnn":
    return cudnn.unsupported(recurrent_dropout, gate_activation)
  return None


@functools.cache
def _self_check_problem(hidden_size: int) -> str | None:
  """What is wrong with the kernel on the default device, once a process; None if it agrees with `chunked`."""
  # The call may be under trace, which is a thread's own affair.
  with concurrent.futures.ThreadPoolExecutor(1) as executor:
    return executor.submit(_self_check, hidden_size).result()


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
      settings = {"recurrent_dropout_mask": jnp.asarray(mask), "lengths": jnp.asarray(lengths)}
      return lstm(*arrays, **settings, implementation=name)

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
    return f"it failed its self-check: {str(error).strip().splitlines()[0]}"
  norm = np.linalg.norm
  distance = max(float(norm(x - y) / norm(y)) for x, y in zip(found, run("chunked"), strict=True))
  return None if distance <= _SELF_CHECK_TOLERANCE else f"it differs from chunked on this device by {distance:.1e}"


def lstm(
  inputs: jax.Array,
  kernel: jax.Array,
  recurrent_kernel: jax.Array,
  bias: jax.Array,
  *,
  input_dropout_mask: jax.Array | None = None,
  recurrent_dropout_mask: jax.Array | None = None,
  lengths: jax.Array | None = None,
  gate_activation: GateActivation = "sigmoid",
  reverse: bool = False,
  implementation: str | None = None,
) -> jax.Array:
  """Runs an LSTM over time from a zero state.

  Args:
    inputs: f32[b, t, e].
    kernel: f32[e, 4h].
    recurrent_kernel: f32[h, 4h].
    bias: f32[4h].
    input_dropout_mask: f32[b, e], or f32[4, b, e] with one mask a gate; kept entries hold 1 / (1 - rate).
    recurrent_dropout_mask: f32[b, h] or f32[4, b, h], likewise.
    lengths: i32[b]; only the last lengths[b] positions are real, the ones before leave the state at zero. None: all
      are real.
    gate_activation: of i, f and o; hard_sigmoid is clip(0.2 x + 0.5, 0, 1) as in Keras 1.
    reverse: from the last position to the first.
    implementation: a name of `IMPLEMENTATIONS`, or None for the fastest that serves the call.

  Returns:
    hidden f32[b, t, h], the state after each position; zeros on positions that are not real.

  Raises:
    ValueError: shapes or dtypes break the contract, or there is no implementation of that name, or it cannot serve the
      call on the default device.
  """
  _check(inputs, kernel, recurrent_kernel, bias, input_dropout_mask, recurrent_dropout_mask, lengths)
  if gate_activation not in ("sigmoid", "hard_sigmoid"):
    raise ValueError(f"gate_activation {gate_activation!r}: must be sigmoid or hard_sigmoid")
  hidden_size = recurrent_kernel.shape[0]
  name = choose(hidden_size).name if implementation is None else implementation
  if name not in IMPLEMENTATIONS:
    raise ValueError(f"implementation {name!r}: must be one of {', '.join(IMPLEMENTATIONS)}")
  problem = unsupported(
    name,
    hidden_size=hidden_size,
    recurrent_dropout=recurrent_dropout_mask is not None,
    gate_activation=gate_activation,
  )
  if problem is not None:
    raise ValueError(f"implementation {name!r}: {problem}")
  return IMPLEMENTATIONS[name](
    inputs,
    kernel,
    recurrent_kernel,
    bias,
    input_dropout_mask=input_dropout_mask,
    recurrent_dropout_mask=recurrent_dropout_mask,
    lengths=lengths,
    gate_activation=gate_activation,
    reverse=reverse,
  )


def num_processed(t: int, longest: int, implementation: str | None = None) -> int:
  """Positions that a call with `lengths` computes of t, where the longest row has `longest` real ones."""
  if implementation == "mosaic_gpu":
    return longest
  return chunked.num_processed(t, longest) if implementation in (None, "chunked") else t


def _check(inputs, kernel, recurrent_kernel, bias, input_dropout_mask, recurrent_dropout_mask, lengths) -> None:
  if inputs.dtype != jnp.float32:
    raise ValueError(f"inputs is {inputs.dtype}, must be float32")
  if inputs.ndim != 3 or recurrent_kernel.ndim != 2:
    raise ValueError(f"inputs {inputs.shape} must be [b, t, e], recurrent_kernel {recurrent_kernel.shape} [h, 4h]")
  (b, _, e), h = inputs.shape, recurrent_kernel.shape[0]
  expected = {
    "kernel": (kernel, [(e, 4 * h)]),
    "recurrent_kernel": (recurrent_kernel, [(h, 4 * h)]),
    "bias": (bias, [(4 * h,)]),
    "input_dropout_mask": (input_dropout_mask, [(b, e), (4, b, e)]),
    "recurrent_dropout_mask": (recurrent_dropout_mask, [(b, h), (4, b, h)]),
  }
  for name, (array, shapes) in expected.items():
    if array is not None and (array.shape not in shapes or array.dtype != inputs.dtype):
      raise ValueError(f"{name} is {array.dtype}{array.shape}, must be {inputs.dtype} of shape {shapes}")
  if lengths is not None and (lengths.shape != (b,) or not jnp.issubdtype(lengths.dtype, jnp.integer)):
    raise ValueError(f"lengths is {lengths.dtype}{lengths.shape}, must be integers of shape {(b,)}")
