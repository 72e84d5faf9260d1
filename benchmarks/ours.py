"""Our training step, through the package's own code, and the machine's ceiling. A worker, see `worker.py`."""

import dataclasses
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import numpy as np
import worker

INSTALL = "make setup"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ours:
  """One of our systems: the preset `article` with differences."""

  work: str
  computes: str
  implementation: str = "chunked"
  mask_padding: bool = False
  bucket_by_length: bool = False
  recurrent_dropout: bool = True


_SHARED = "masks shared by the gates"

SYSTEMS = {
  "ours-chunked": Ours(work="article", computes=_SHARED),
  "ours-scan": Ours(work="article", computes=_SHARED, implementation="scan"),
  "ours-mosaic-gpu": Ours(
    work="article", computes=f"{_SHARED}; recurrent products bfloat16", implementation="mosaic_gpu"
  ),
  "ours-masked": Ours(work="masked", computes=f"{_SHARED}; up to the longest review of a batch", mask_padding=True),
  "ours-bucketed": Ours(
    work="masked", computes=f"{_SHARED}; batches by length", mask_padding=True, bucket_by_length=True
  ),
  "ours-cudnn": Ours(
    work="less", computes="cuDNN has no recurrent dropout", implementation="cudnn", recurrent_dropout=False
  ),
}
SGEMM = "sgemm"


class _Training:
  """The steps of `imdb_jax.steps` over the batches of `imdb_jax.data.batches`, as `imdb_jax.training.loop` runs it."""

  modules: tuple[str, ...] = ("jax", "flax", "optax")

  def __init__(self, job: worker.Job):
    from imdb_jax import config, lstm, sharding, state, steps
    from imdb_jax.data.tokens import TokenSplit
    from imdb_jax.model import SentimentLSTM

    self._job, self._system, self._sharding = job, SYSTEMS[job.system], sharding
    self._mesh = _start(job)
    self.device = _describe(self._mesh.devices.flat[0], self._mesh.size)
    self._batch_size = sharding.padded_batch_size(job.batch_size, self._mesh)
    self._split = TokenSplit(**worker.read_arrays(job.arrays))
    article = config.preset("article")
    model_config = dataclasses.replace(
      article.model,
      embedding_size=job.embedding_size,
      hidden_size=job.hidden_size,
      mask_padding=self._system.mask_padding,
      recurrent_dropout_rate=article.model.recurrent_dropout_rate if self._system.recurrent_dropout else 0.0,
    )
    problem = lstm.unsupported(
      self._system.implementation,
      hidden_size=job.hidden_size,
      recurrent_dropout=self._system.recurrent_dropout,
      gate_activation=model_config.gate_activation,
    )
    if problem is not None:
      raise worker.UnableError(problem)
    model = SentimentLSTM(model_config, job.vocabulary_size, self._system.implementation)
    optimizer = state.make_optimizer(article.optimizer, job.num_steps)
    self._state = state.create(model, optimizer, job.seed, self._mesh)
    self._num_steps = config.RuntimeConfig().steps_per_dispatch
    self._reviews = sharding.put(vars(self._split), sharding.replicated(self._mesh))
    self._steps = steps.make_train_steps(steps.make_train_step(model, optimizer, self._mesh), self._mesh)

  def epoch(self, epoch: int) -> list[np.ndarray]:
    from imdb_jax.data import batches

    size, seed, lengths = self._job.batch_size, self._job.seed, self._split.lengths
    if self._system.bucket_by_length:
      return batches.epoch_batches_by_length(lengths, batch_size=size, seed=seed, epoch=epoch)
    return batches.epoch_batches(len(lengths), batch_size=size, seed=seed, epoch=epoch)

  def shape(self, batch: np.ndarray) -> Hashable:
    """All alike: a smaller batch is filled up with reviews of weight 0."""
    del batch
    return None

  def train(self, batches: list[np.ndarray]) -> float:
    import jax

    from imdb_jax.data.batches import filled
    from imdb_jax.training.recorder import Sums

    sharding, sums, pending = self._sharding, Sums(), None
    for start in range(0, len(batches), self._num_steps):
      some = batches[start : start + self._num_steps]
      rows = sharding.put(filled(some, self._num_steps, self._batch_size), sharding.over_reviews(self._mesh, 1))
      num_steps = sharding.put(np.array(len(some), np.int32), sharding.replicated(self._mesh))
      self._state, metrics = self._steps(self._state, self._reviews, rows, num_steps)
      # As the trainer's recorder does: read after the next steps are dispatched.
      if pending is not None:
        sums.add(jax.device_get(pending))
      pending = metrics
    if pending is not None:
      sums.add(jax.device_get(pending))
    jax.block_until_ready(self._state)
    return float(sums.loss.sum() / sums.weight.sum())


class _Sgemm:
  """Products of two large float32 matrices by JAX, on one device that has all cores. A step is one product."""

  modules: tuple[str, ...] = ("jax",)

  def __init__(self, job: worker.Job):
    mesh = _start(dataclasses.replace(job, num_devices=1))
    import jax

    self.device = _describe(mesh.devices.flat[0], 1)
    left, right = jax.random.split(jax.random.key(job.seed))
    shape = (job.matmul_size, job.matmul_size)
    with jax.default_device(mesh.devices.flat[0]):
      self._operands = jax.random.normal(left, shape), jax.random.normal(right, shape)
    self._product = jax.jit(lambda a, b: a @ b)

  def epoch(self, epoch: int) -> list:
    del epoch
    return [None]

  def shape(self, batch) -> Hashable:
    return batch

  def train(self, batches: list) -> None:
    for _ in batches:
      self._product(*self._operands).block_until_ready()


def _start(job: worker.Job):
  import jax

  from imdb_jax import config, sharding

  # The name was checked by the command that started this process.
  platform: Any = job.platform
  runtime = config.RuntimeConfig(platform=platform, num_devices=job.num_devices, cache_dir=Path(job.scratch))
  sharding.keep_freed_memory(runtime)
  mesh = sharding.start(runtime)
  jax.config.update("jax_default_matmul_precision", config.preset("article").training.matmul_precision)
  return mesh


def _describe(device, num_devices: int) -> str:
  return f"{num_devices} x {device.device_kind} ({device.platform})"


def build(job: worker.Job) -> worker.System:
  return _Sgemm(job) if job.system == SGEMM else _Training(job)


if __name__ == "__main__":
  worker.serve(build)
