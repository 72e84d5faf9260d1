"""Our training step, through the package's own code, and the machine's ceiling. A worker, see `worker.py`."""

import dataclasses
from collections.abc import Hashable
from pathlib import Path
from typing import Any, Literal

import worker

INSTALL = "make setup"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ours:
  """One of our systems: the preset `article` with differences."""

  work: str
  computes: str
  implementation: Literal["chunked", "scan"] = "chunked"
  model: dict[str, Any] = dataclasses.field(default_factory=dict)
  """Fields of `ModelConfig` that differ."""


_ARTICLE, _MASKED = "dropout masks shared by the gates", "padding skipped, dropout masks shared by the gates"

SYSTEMS = {
  "ours-chunked": Ours(work="article", computes=_ARTICLE),
  "ours-scan": Ours(work="article", computes=_ARTICLE, implementation="scan"),
  "ours-masked": Ours(work="masked", computes=f"{_MASKED}; full length", model={"mask_padding": True}),
}
SGEMM = "sgemm"


class _Training:
  """The step of `imdb_jax.steps` over the batches of `imdb_jax.data.batches`, as `imdb_jax.training.loop` runs it."""

  modules = ("jax", "flax", "optax")

  def __init__(self, job: worker.Job):
    from imdb_jax import config, sharding, state, steps
    from imdb_jax.data.tokens import TokenSplit
    from imdb_jax.model import SentimentLSTM

    system = SYSTEMS[job.system]
    self._job, self._sharding = job, sharding
    self._mesh = _start(job)
    self.device = _describe(self._mesh.devices.flat[0], self._mesh.size)
    self._batch_size = sharding.padded_batch_size(job.batch_size, self._mesh)
    self._split = TokenSplit(**job.read_arrays())
    article = config.preset("article")
    sizes = {"embedding_size": job.embedding_size, "hidden_size": job.hidden_size}
    model = SentimentLSTM(
      dataclasses.replace(article.model, **sizes, **system.model), job.vocabulary_size, system.implementation
    )
    optimizer = state.make_optimizer(article.optimizer)
    self._state = state.create(model, optimizer, job.seed, self._mesh)
    self._step = steps.make_train_step(model, optimizer, self._mesh)

  def epoch(self, epoch: int) -> list:
    from imdb_jax.data import batches

    num_rows, sequence_length = self._split.tokens.shape
    return batches.epoch_batches(
      num_rows,
      sequence_length=sequence_length,
      batch_size=self._job.batch_size,
      seed=self._job.seed,
      epoch=epoch,
    )

  def shape(self, batch) -> Hashable:
    return batch.length

  def train(self, batches: list) -> float:
    import jax

    from imdb_jax.training.recorder import Sums

    sums, pending = Sums(), None
    for batch in batches:
      examples = self._sharding.shard_reviews(self._split.gather(batch, self._batch_size), self._mesh)
      self._state, metrics = self._step(self._state, examples)
      # As the trainer's recorder does: read after the next step is dispatched.
      if pending is not None:
        sums.add(jax.device_get(pending))
      pending = metrics
    if pending is not None:
      sums.add(jax.device_get(pending))
    jax.block_until_ready(self._state)
    return sums.means()["loss"]


class _Sgemm:
  """Products of two large float32 matrices by JAX, on one device that has all cores. A step is one product."""

  modules = ("jax",)

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
  mesh = sharding.start(
    config.RuntimeConfig(platform=platform, num_devices=job.num_devices, cache_dir=Path(job.scratch))
  )
  jax.config.update("jax_default_matmul_precision", config.preset("article").training.matmul_precision)
  return mesh


def _describe(device, num_devices: int) -> str:
  return f"{num_devices} x {device.device_kind} ({device.platform})"


def build(job: worker.Job) -> worker.System:
  return _Sgemm(job) if job.system == SGEMM else _Training(job)


if __name__ == "__main__":
  worker.serve(build)
