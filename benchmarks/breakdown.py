"""Where the time of our training step goes: `python benchmarks/breakdown.py --help`.

Parts of the article's step are compiled and timed by themselves, in turns, each on all devices at once and with the
batch spread over them. What a part holds more than the one inside it is the difference of their times. The products
stand alone too: what they take is what the step could not go below.
"""

import dataclasses
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measuring
import tyro
from rich.console import Console
from rich.table import Table

from imdb_jax import config
from imdb_jax.errors import ImdbJaxError

# Positions per large product, as in `imdb_jax.lstm.chunked`.
_CHUNK = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(measuring.Options):
  """Time a training step and its parts."""

  windows: int = 7
  """Timed windows of each part."""
  window_seconds: float = 1.0
  """How long a window takes, about."""
  batch_size: int = measuring.ARTICLE_SIZES["batch_size"]
  """Reviews per step."""
  sequence_length: int = measuring.ARTICLE_SIZES["sequence_length"]
  """Positions of a review, padding included."""
  cache_dir: Path = dataclasses.field(default_factory=config.default_cache_dir)
  """Where XLA's programs are cached."""


def _parts(options: Options) -> dict[str, Callable[[], Any]]:
  """Each part as a call that returns arrays, compiled."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  import optax
  from jax.sharding import PartitionSpec

  from imdb_jax import sharding, state, steps
  from imdb_jax.lstm import lstm
  from imdb_jax.model import SentimentLSTM

  runtime = config.RuntimeConfig(
    platform=options.platform, num_devices=options.num_devices, cache_dir=options.cache_dir
  )
  sharding.keep_freed_memory(runtime)
  mesh = sharding.start(runtime)
  jax.config.update("jax_default_matmul_precision", measuring.ARTICLE.training.matmul_precision)
  sizes = measuring.ARTICLE_SIZES
  e, h, t = sizes["embedding_size"], sizes["hidden_size"], options.sequence_length
  b = sharding.padded_batch_size(options.batch_size, mesh)
  split = measuring.random_reviews(b, t, sizes["vocabulary_size"])
  examples = sharding.put(split.gather(np.arange(b), b), sharding.over_reviews(mesh))
  model = SentimentLSTM(measuring.ARTICLE.model, sizes["vocabulary_size"])

  def training(optimizer: optax.GradientTransformation) -> Callable[[], Any]:
    step = steps.make_train_step(model, optimizer, mesh)
    # The old state is donated, so it has to be kept up.
    kept = [state.create(model, optimizer, 0, mesh)]

    def run():
      kept[0], metrics = step(kept[0], examples)
      return metrics

    return run

  reviews, everywhere = PartitionSpec(sharding.AXIS), PartitionSpec()

  def on_devices(function: Callable, *arrays: jax.Array) -> Callable[[], Any]:
    """The function on each device's rows of the first array; the others are everywhere."""
    specs = (reviews, *(everywhere for _ in arrays[1:]))
    call = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=reviews, check_vma=False))
    placed = [jax.device_put(array, jax.NamedSharding(mesh, spec)) for array, spec in zip(arrays, specs, strict=True)]
    return lambda: call(*placed)

  keys = jax.random.split(jax.random.key(0), 4)
  inputs = 0.05 * jax.random.normal(keys[0], (b, t, e))
  weights = [
    jax.random.normal(key, shape) / shape[0] ** 0.5
    for key, shape in zip(keys[1:], ((e, 4 * h), (h, 4 * h)), strict=False)
  ]
  bias = jnp.zeros(4 * h)

  def forward(inputs, kernel, recurrent_kernel, bias):
    return lstm(inputs, kernel, recurrent_kernel, bias)[:, -1]

  def both(*arrays):
    last, vjp = jax.vjp(forward, *arrays)
    d_inputs, *d_weights = vjp(jnp.ones_like(last))
    return d_inputs, *(d_weight[None] for d_weight in d_weights)

  def small_products(rows, recurrent_kernel):
    def step(carry, _):
      return jnp.tanh(carry @ recurrent_kernel) @ recurrent_kernel.T, None

    return jax.lax.scan(step, rows, length=t)[0]

  def large_products(rows, kernel):
    def chunk(d_weights, at):
      x, hidden = at
      z = x @ kernel
      d_kernel, d_recurrent = d_weights
      return (d_kernel + x.T @ z, d_recurrent + hidden.T @ z), z @ kernel.T

    chunks = rows.reshape(-1, _CHUNK * rows.shape[0], rows.shape[-1])
    zeros = jnp.zeros_like(kernel)
    d_weights, dx = jax.lax.scan(chunk, (zeros, zeros), (chunks, chunks[::-1]))
    return *(d_weight[None] for d_weight in d_weights), dx

  return {
    "step": training(state.make_optimizer(measuring.ARTICLE.optimizer, 1)),
    "step without Adam": training(optax.set_to_zero()),
    "recurrence, forward and backward": on_devices(both, inputs, *weights, bias),
    "recurrence, forward": on_devices(forward, inputs, *weights, bias),
    "small products of the time loops": on_devices(small_products, inputs[:, 0], weights[1]),
    "large products of the chunks": on_devices(large_products, inputs, weights[0]),
  }


def measure(options: Options) -> dict[str, list[float]]:
  """Milliseconds of each part, window by window."""
  import jax

  parts = _parts(options)
  repeats = {}
  for name, call in parts.items():
    for _ in range(3):
      jax.block_until_ready(call())
    started = time.perf_counter()
    jax.block_until_ready(call())
    repeats[name] = max(1, round(options.window_seconds / (time.perf_counter() - started)))
  times: dict[str, list[float]] = {name: [] for name in parts}
  for _, (name, call) in itertools.product(range(options.windows), parts.items()):
    started = time.perf_counter()
    for _ in range(repeats[name]):
      # One at a time: XLA stands still where many calls that meet across devices of one CPU are under way.
      jax.block_until_ready(call())
    times[name].append(1e3 * (time.perf_counter() - started) / repeats[name])
  return times


def main() -> None:
  try:
    options = tyro.cli(Options, description=__doc__)
    times = measure(options)
  except ImdbJaxError as error:
    sys.exit(f"error: {error}")
  import flax
  import jax

  results = {
    "machine": {
      **measuring.describe_machine([{"jax": jax.__version__, "flax": flax.__version__}]),
      "data": "reviews of random words (no real reviews)",
    },
    "windows": options.windows,
    "ms": times,
  }
  if options.json is not None:
    measuring.write_json(options.json, results)
  table = Table(title="A training step and its parts", title_justify="left")
  for column in ("part", "ms", "min - max", "of the step"):
    table.add_column(column, justify="left" if column == "part" else "right", no_wrap=True)
  step = statistics.median(times["step"])
  for name, values in times.items():
    median = statistics.median(values)
    table.add_row(name, f"{median:.2f}", f"{min(values):.2f} - {max(values):.2f}", f"{median / step:.0%}")
  console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
  console.print(table)
  for line in (f"Median of {options.windows} windows.", *measuring.machine_lines(results["machine"])):
    console.print(line, markup=False, soft_wrap=True)


if __name__ == "__main__":
  main()
