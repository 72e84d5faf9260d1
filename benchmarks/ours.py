"""Worker: our training step and its parts, the recurrence alone, the machine's ceiling, and whole runs of the trainer.

Besides the requests of `worker.py` it handles {"train": FLAGS} and {"linear": FIELDS}.
"""

import dataclasses
import functools
import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import systems
import worker
from jax.sharding import Mesh, PartitionSpec

import imdb_jax
from imdb_jax import arguments, devices
from imdb_jax.comparison import rows
from imdb_jax.config import Config, DataConfig
from imdb_jax.data import batches as batches_lib
from imdb_jax.data import sources, tokens
from imdb_jax.data.tokens import TokenSplit
from imdb_jax.errors import UsageError
from imdb_jax.lstm import Call, lstm, unsupported
from imdb_jax.model import draw_dropout_masks
from imdb_jax.optimizer import make_optimizer
from imdb_jax.program import Program


def _start(job: worker.Job, flags: str = "") -> tuple[Config, Mesh]:
  """Start JAX as the trainer does, with the preset `article`, some flags, and the sizes and devices of a job."""
  settings = {name: getattr(job, name) for name in (*worker.SIZES, "seed", "platform", "num_devices")}
  config = arguments.parse_config("", [*flags.split(), *worker.as_flags(settings)])
  devices.keep_freed_memory(config.runtime)
  return config, devices.start(config.runtime, config.training.batch_size)


class Training(worker.System):
  """Steps of `imdb_jax.program` over the batches of `imdb_jax.data.batches`, as `imdb_jax.training.loop` runs them."""

  modules = ("jax", "flax", "optax")

  def __init__(self, job: worker.Job, optimizer: optax.GradientTransformation | None = None):
    self._config, mesh = _start(job, systems.OURS[job.system].flags)
    try:
      self._program = Program(self._config, mesh, optimizer or make_optimizer(self._config.optimizer, job.num_steps))
    except UsageError as error:
      problem = str(error).removeprefix(f"--implementation {self._config.runtime.implementation}: ")
      raise worker.UnableError(problem.removesuffix(".")) from error
    self.device, self.precision = worker.device_name(mesh.devices.flat), self._program.precision
    self._split = TokenSplit(**worker.read_arrays(job.arrays))
    self._loss_weights, self._state = np.ones(len(self._split), np.float32), self._program.init()

  def epoch(self, epoch: int) -> list[np.ndarray]:
    """Return the rows of each step, i32[1, b]. A smaller batch is padded, so all share a compiled step."""
    training = self._config.training
    settings = {"seeds": training.seeds, "batch_size": training.batch_size, "by_length": training.bucket_by_length}
    return list(batches_lib.epoch_rows(self._split.lengths, epoch=epoch, **settings))

  def train(self, batches: list[np.ndarray]) -> float:
    size, total, pending = self._config.runtime.steps_per_dispatch, np.zeros(2), []
    for start in range(0, len(batches), size):
      rows = np.stack(batches[start : start + size])
      placed = self._program.put_batches(self._split, self._loss_weights, rows)
      self._state, sums = self._program.train_steps(self._state, *placed)
      pending.append((sums["loss"], sums["weight"]))
      # Like the trainer, read the sums of a dispatch after the next one has started.
      if len(pending) == 2:
        total += np.sum(jax.device_get(pending.pop(0)), axis=(1, 2))
    total += np.sum(jax.device_get(pending.pop()), axis=(1, 2))
    jax.block_until_ready(self._state)
    return float(total[0] / total[1])


class _Part(worker.Calls):
  """Calls of a function of `_arrays` on all devices, each with its rows of the inputs and all weights."""

  precision = "float32"

  def __init__(self, job: worker.Job, function: Callable[..., Any]):
    _, mesh = _start(job)
    specs = (PartitionSpec(devices.AXIS), *[PartitionSpec()] * 3)
    arrays = _arrays(job, devices.padded_size(job.batch_size, mesh))
    placed = jax.device_put(arrays, tuple(jax.NamedSharding(mesh, spec) for spec in specs))
    sharded = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
    compiled = jax.jit(jax.default_matmul_precision("float32")(sharded))
    # XLA deadlocks if many calls that synchronize the devices of a CPU are in flight, so each call waits.
    call = lambda: jax.block_until_ready(compiled(*placed))  # noqa: E731
    super().__init__(call, lambda _: None, worker.device_name(mesh.devices.flat), modules=("jax",))


def _arrays(job: worker.Job, b: int) -> tuple[jax.Array, ...]:
  """Return random inputs, kernel, recurrent kernel and bias."""
  t, e, h = job.sequence_length, job.embedding_size, job.hidden_size
  keys = jax.random.split(jax.random.key(job.seed), 3)
  return (
    0.05 * jax.random.normal(keys[0], (b, t, e)),
    jax.random.normal(keys[1], (e, 4 * h)) / e**0.5,
    jax.random.normal(keys[2], (h, 4 * h)) / h**0.5,
    jnp.zeros(4 * h),
  )


def _step(job: worker.Job, optimizer: optax.GradientTransformation | None = None) -> worker.System:
  return Training(dataclasses.replace(job, system="ours-chunked"), optimizer)


def _forward(inputs, kernel, recurrent_kernel, bias):
  return lstm(inputs, kernel, recurrent_kernel, bias, implementation="chunked")[:, -1]


def _both(*arrays):
  last, vjp = jax.vjp(_forward, *arrays)
  d_inputs, *d_weights = vjp(jnp.ones_like(last))
  return d_inputs, *(d_weight[None] for d_weight in d_weights)


def _small_products(inputs, kernel, recurrent_kernel, bias):
  """Multiply by the recurrent kernel and by its transpose at every position."""

  def step(carry, _):
    return jnp.tanh(carry @ recurrent_kernel) @ recurrent_kernel.T, None

  return jax.lax.scan(step, inputs[:, 0], length=inputs.shape[1])[0]


def _large_products(inputs, kernel, recurrent_kernel, bias):
  """Compute the projection, the gradients of both kernels and of the inputs, chunk by chunk."""

  def chunk(d_weights, at):
    x, hidden = at
    z = x @ kernel
    d_kernel, d_recurrent = d_weights
    return (d_kernel + x.T @ z, d_recurrent + hidden.T @ z), z @ kernel.T

  # 20 positions per product, as in `imdb_jax.lstm.chunked`.
  chunks = inputs.reshape(-1, 20 * inputs.shape[0], inputs.shape[-1])
  d_weights, dx = jax.lax.scan(chunk, (jnp.zeros_like(kernel),) * 2, (chunks, chunks[::-1]))
  return *(d_weight[None] for d_weight in d_weights), dx


PARTS: dict[str, Callable[[worker.Job], worker.System]] = {
  "step": _step,
  "step without Adam": functools.partial(_step, optimizer=optax.set_to_zero()),
  "recurrence, forward and backward": lambda job: _Part(job, _both),
  "recurrence, forward": lambda job: _Part(job, _forward),
  "small products of the time loops": lambda job: _Part(job, _small_products),
  "large products of the chunks": lambda job: _Part(job, _large_products),
}


def _sgemm(job: worker.Job) -> worker.System:
  """Multiply two large float32 matrices on one device, which has all cores."""
  _start(dataclasses.replace(job, num_devices=1))
  matrices = jax.random.normal(jax.random.key(job.seed), (2, job.matmul_size, job.matmul_size))
  return worker.jax_calls(functools.partial(jnp.matmul, precision="float32"), tuple(matrices), False, "flax")


def _recurrence(job: worker.Job) -> worker.System:
  """Call an implementation of the recurrence, with recurrent dropout."""
  config, mesh = _start(dataclasses.replace(job, num_devices=1))
  problem = unsupported(job.system, Call(hidden_size=job.hidden_size), mesh.devices.flat[0])
  if problem is not None:
    raise worker.UnableError(problem)
  _, mask = draw_dropout_masks(jax.random.key(job.seed), config.model, job.batch_size)

  def recurrence(*arrays):
    return lstm(*arrays, recurrent_dropout_mask=mask, implementation=job.system)

  return worker.jax_calls(recurrence, _arrays(job, job.batch_size), job.gradients, "flax")


def build(job: worker.Job) -> worker.System:
  if job.system in systems.RECURRENCES:
    return _recurrence(job)
  return {"sgemm": _sgemm, **PARTS}.get(job.system, Training)(job)


class _Handlers(worker.Handlers):
  def train(self, flags: list[str]) -> dict[str, Any]:
    """Run the trainer; return its history, and how it was computed."""
    result = imdb_jax.fit(arguments.parse_config("train", flags))
    start = json.loads((result.run_dir / "provenance.json").read_text(encoding="utf-8"))["starts"][-1]
    facts = {"device": start["devices"], "precision": start["precision"], "versions": start["versions"]}
    return {"history": result.history, "facts": facts | {"compile_seconds": result.compile_seconds}}

  def linear(self, fields: dict[str, Any]) -> dict[str, Any]:
    """Fit a linear model of `imdb_jax.comparison` to the reviews of an archive, or to those of TFDS."""
    config, archive = DataConfig(limit=fields["limit"]), fields["archive"] and Path(fields["archive"])
    source = sources.find(config, archive, Path(fields["cache_dir"]))
    splits = tokens.split(config, source.load(lambda line: None))
    result = rows.LINEAR[fields["system"]](splits["train"], splits["test"])
    is_right = (np.array(result.logits) > 0) == splits["test"].labels
    seconds = {"seconds": result.train_seconds, "evaluation_seconds": result.predict_seconds}
    versions = {name: importlib.metadata.version(name) for name in ("numpy", "scikit-learn")}
    return seconds | {"accuracy": float(np.mean(is_right)), "versions": versions}


if __name__ == "__main__":
  worker.serve(_Handlers(build), install="make setup")
