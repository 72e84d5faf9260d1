"""The article's layers in Keras and PyTorch. A worker, see `worker.py`; runs in the benchmark environment."""

import dataclasses
import importlib
import os
from collections.abc import Hashable, Iterator
from typing import Any, Literal

import numpy as np
import worker

# Packages of another environment than the one that is type-checked.
_import: Any = importlib.import_module


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keras:
  """Embedding, LSTM and Dense of Keras 3, compiled and trained as its guides do: what it chooses by default."""

  work: str
  computes: str
  backend: Literal["jax", "tensorflow"]
  mask_zero: bool = False
  install: str = "make bench"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Torch:
  """`nn.LSTM`, which has no recurrent dropout."""

  work: str
  computes: str
  install: str = "make bench, or pip install torch in .venv-bench"


_ARTICLE, _MASKED = "dropout masks of each gate", "padding masked, dropout masks of each gate; full length"

SYSTEMS = {
  "keras-jax": Keras(work="article", computes=_ARTICLE, backend="jax"),
  "keras-tensorflow": Keras(work="article", computes=_ARTICLE, backend="tensorflow"),
  "keras-jax-masked": Keras(work="masked", computes=_MASKED, backend="jax", mask_zero=True),
  "keras-tensorflow-masked": Keras(work="masked", computes=_MASKED, backend="tensorflow", mask_zero=True),
  "torch": Torch(work="less", computes="no recurrent dropout: nn.LSTM cannot"),
}

# Of the LSTM's inputs, and of its hidden state.
_DROPOUT_RATE = 0.2


class _Training:
  """Batches of row numbers over arrays; a review's tokens and label are gathered step by step, as ours are."""

  device = "cpu"

  def __init__(self, job: worker.Job):
    arrays = job.read_arrays()
    self._tokens, self._labels = arrays["tokens"], arrays["labels"]
    self._job = job

  def epoch(self, epoch: int) -> list[np.ndarray]:
    order = np.random.default_rng([self._job.seed, epoch]).permutation(len(self._labels))
    starts = range(0, len(order), self._job.batch_size)
    return [order[start : start + self._job.batch_size] for start in starts]

  def shape(self, batch: np.ndarray) -> Hashable:
    return len(batch)

  def _gather(self, batches: list[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields tokens i32[b, t] and labels f32[b, 1] of each batch."""
    for rows in batches:
      yield self._tokens[rows].astype(np.int32), self._labels[rows, None].astype(np.float32)


class _KerasTraining(_Training):
  """`train_on_batch` with Keras's own choice of `jit_compile`, which is XLA on both backends."""

  def __init__(self, job: worker.Job, system: Keras):
    super().__init__(job)
    os.environ["KERAS_BACKEND"] = system.backend
    self.modules = ("keras", system.backend)
    keras = _import("keras")
    keras.utils.set_random_seed(job.seed)
    layers = keras.layers
    self._model = keras.Sequential(
      [
        layers.Embedding(job.vocabulary_size, job.embedding_size, mask_zero=system.mask_zero),
        layers.LSTM(job.hidden_size, dropout=_DROPOUT_RATE, recurrent_dropout=_DROPOUT_RATE),
        layers.Dense(1, activation="sigmoid"),
      ]
    )
    self._model.compile(optimizer=keras.optimizers.Adam(), loss="binary_crossentropy", metrics=["accuracy"])

  def train(self, batches: list[np.ndarray]) -> float:
    self._model.reset_metrics()
    loss = 0.0
    for tokens, labels in self._gather(batches):
      # The mean since the reset, as a number of Python: the step has finished.
      loss, _ = self._model.train_on_batch(tokens, labels)
    return float(loss)


class _TorchTraining(_Training):
  """The article's layers but for recurrent dropout; the input mask is one per review, constant over time."""

  modules = ("torch",)

  def __init__(self, job: worker.Job):
    super().__init__(job)
    torch = _import("torch")
    torch.manual_seed(job.seed)
    nn = torch.nn
    self._torch = torch
    self._layers = nn.ModuleList(
      [
        nn.Embedding(job.vocabulary_size, job.embedding_size),
        nn.LSTM(job.embedding_size, job.hidden_size, batch_first=True),
        nn.Linear(job.hidden_size, 1),
      ]
    )
    self._optimizer = torch.optim.Adam(self._layers.parameters(), eps=1e-7)

  def train(self, batches: list[np.ndarray]) -> float:
    torch, (embedding, lstm, dense) = self._torch, self._layers
    losses = []
    for tokens, labels in self._gather(batches):
      embedded = embedding(torch.from_numpy(tokens))
      mask = torch.nn.functional.dropout(torch.ones_like(embedded[:, :1]), _DROPOUT_RATE)
      hidden, _ = lstm(embedded * mask)
      loss = torch.nn.functional.binary_cross_entropy_with_logits(dense(hidden[:, -1]), torch.from_numpy(labels))
      self._optimizer.zero_grad()
      loss.backward()
      self._optimizer.step()
      losses.append(loss.item())
    return float(np.mean(losses))


def build(job: worker.Job) -> worker.System:
  system = SYSTEMS[job.system]
  return _KerasTraining(job, system) if isinstance(system, Keras) else _TorchTraining(job)


if __name__ == "__main__":
  worker.serve(build)
