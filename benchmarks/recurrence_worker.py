"""The recurrence alone in one system, in a process of its own that computes only when it is told to.

A line each way: a line with a `Point` builds and warms up a call, a line with a number makes so many of them.
"""

import dataclasses
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import worker

# Packages of another environment than the one that is type-checked.
_import: Any = importlib.import_module

_DROPOUT_RATE = 0.2
# One call, and a wait for whatever has been called.
Calls = tuple[Callable[[], Any], Callable[[Any], None]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
  """Sizes of a call, inputs as wide as the hidden state, and whether gradients of all arrays are asked for."""

  batch_size: int
  num_steps: int
  hidden_size: int
  gradients: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
  """Attributes:
  problem: why the system has no figure, or None.
  seconds: of a call, once all is compiled.
  """

  problem: str | None
  seconds: float = 0.0


class _UnableError(Exception):
  """The system does not do this."""


def _normal(*shape: int) -> np.ndarray:
  return np.random.default_rng(0).standard_normal(shape, np.float32)


def _jax_calls(function: Callable, arrays: tuple, gradients: bool) -> Calls:
  import jax

  def both(*arrays):
    hidden, vjp = jax.vjp(function, *arrays)
    return vjp(hidden)

  call = jax.jit(both if gradients else function)
  placed = jax.device_put(arrays)
  return lambda: call(*placed), jax.block_until_ready


def _ours(name: str, platform: str, point: Point) -> Calls:
  import jax
  import jax.numpy as jnp

  from imdb_jax import config, sharding
  from imdb_jax.lstm import lstm, unsupported

  # The name was checked by the command that started this process.
  known: Any = platform
  runtime = config.RuntimeConfig(platform=known, num_devices=1)
  sharding.keep_freed_memory(runtime)
  sharding.start(runtime)
  b, h = point.batch_size, point.hidden_size
  problem = unsupported(name, hidden_size=h, recurrent_dropout=name != "cudnn", gate_activation="sigmoid")
  if problem is not None:
    raise _UnableError(problem)
  keeps = jax.random.bernoulli(jax.random.key(0), 1 - _DROPOUT_RATE, (b, h))
  mask = None if name == "cudnn" else jnp.where(keeps, 1 / (1 - _DROPOUT_RATE), 0.0).astype(jnp.float32)

  def call(*arrays):
    return lstm(*arrays, recurrent_dropout_mask=mask, implementation=name)

  weights = _normal(h, 4 * h) / np.sqrt(h, dtype=np.float32)
  arrays = _normal(b, point.num_steps, h), weights, weights[::-1].copy(), _normal(4 * h)
  return _jax_calls(call, arrays, point.gradients)


def _keras(name: str, platform: str, point: Point) -> Calls:
  del platform
  os.environ["KERAS_BACKEND"] = "jax"
  sys.modules["tensorflow"] = None  # pyright: ignore[reportArgumentType]: so Keras does not import it.
  keras = _import("keras")
  rate = 0.0 if name == "keras-jax-without" else _DROPOUT_RATE
  layer = keras.layers.LSTM(point.hidden_size, recurrent_dropout=rate, return_sequences=True)
  inputs = _normal(point.batch_size, point.num_steps, point.hidden_size)
  layer.build(inputs.shape)
  state = [variable.value for variable in layer.non_trainable_variables]

  def call(inputs, *weights):
    return layer.stateless_call(list(weights), state, inputs, training=True)[0]

  return _jax_calls(call, (inputs, *(variable.value for variable in layer.trainable_variables)), point.gradients)


def _torch(name: str, platform: str, point: Point) -> Calls:
  torch = _import("torch")
  device = "cuda" if torch.cuda.is_available() and platform != "cpu" else "cpu"
  dtype = torch.bfloat16 if name == "torch-bfloat16" else torch.float32
  torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
  layer = torch.nn.LSTM(point.hidden_size, point.hidden_size, batch_first=True).to(device, dtype)
  inputs = torch.from_numpy(_normal(point.batch_size, point.num_steps, point.hidden_size)).to(device, dtype)
  inputs.requires_grad_()

  def call():
    hidden, _ = layer(inputs)
    if point.gradients:
      hidden.backward(torch.ones_like(hidden))
    return hidden

  def wait(_) -> None:
    if device == "cuda":
      torch.cuda.synchronize()

  return call, wait


# What builds a call, and whether it has recurrent dropout.
SYSTEMS = {
  "mosaic_gpu": (_ours, True),
  "chunked": (_ours, True),
  "scan": (_ours, True),
  "cudnn": (_ours, False),
  "keras-jax": (_keras, True),
  "keras-jax-without": (_keras, False),
  "torch-float32": (_torch, False),
  "torch-bfloat16": (_torch, False),
}
BASELINES = ("keras-jax", "keras-jax-without", "torch-float32", "torch-bfloat16")


def main() -> None:
  file = worker.answers()
  name, platform = sys.argv[1:]
  build, _ = SYSTEMS[name]
  calls: Calls | None = None

  def seconds(number: int) -> float:
    assert calls is not None
    call, wait = calls
    started = time.perf_counter()
    last: Any = None
    for _ in range(number):
      last = call()
    wait(last)
    return (time.perf_counter() - started) / number

  for line in sys.stdin:
    if line.startswith("{"):
      try:
        calls = build(name, platform, Point(**json.loads(line)))
        seconds(2)
        answer = Answer(problem=None, seconds=seconds(1))
      except ModuleNotFoundError as error:
        answer = Answer(problem=f"missing {error.name}: make bench")
      except _UnableError as error:
        answer = Answer(problem=str(error))
    else:
      answer = Answer(problem=None, seconds=seconds(int(line)))
    print(json.dumps(dataclasses.asdict(answer)), file=file, flush=True)


if __name__ == "__main__":
  main()
