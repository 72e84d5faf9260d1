"""The article's layers in Keras and PyTorch. A worker, see `worker.py`; runs in the benchmark environment."""

import dataclasses
import importlib
import os
import sys
from collections.abc import Hashable, Iterator
from typing import Any, Literal

import numpy as np
import worker

# Packages of another environment than the one that is type-checked.
_import: Any = importlib.import_module


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keras:
  """Embedding, LSTM and Dense of Keras 3.

  Attributes:
    force_xla: Keras does not use XLA for an LSTM on TensorFlow unless it is told to keep off cuDNN, even where there
      is none. Told so it takes about half the time. On JAX XLA is the default.
  """

  work: str
  computes: str
  backend: Literal["jax", "tensorflow"]
  mask_zero: bool = False
  force_xla: bool = False
  recurrent_dropout: bool = True
  install: str = "make bench"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Torch:
  """`nn.LSTM`, which has no recurrent dropout."""

  work: str
  computes: str
  install: str = "make bench, or pip install torch in .venv-bench"


_GATES = "masks of each gate"
_XLA = "jit_compile=True, use_cudnn=False"

SYSTEMS = {
  "keras-jax": Keras(work="article", computes=_GATES, backend="jax"),
  "keras-tensorflow": Keras(work="article", computes=f"{_GATES}; default settings", backend="tensorflow"),
  "keras-tensorflow-xla": Keras(work="article", computes=f"{_GATES}; {_XLA}", backend="tensorflow", force_xla=True),
  "keras-jax-masked": Keras(work="masked", computes=f"{_GATES}; full length", backend="jax", mask_zero=True),
  "keras-tensorflow-xla-masked": Keras(
    work="masked", computes=f"{_GATES}; {_XLA}; full length", backend="tensorflow", mask_zero=True, force_xla=True
  ),
  "keras-jax-less": Keras(work="less", computes="no recurrent dropout", backend="jax", recurrent_dropout=False),
  "torch": Torch(work="less", computes="nn.LSTM has no recurrent dropout"),
}

# Of the LSTM's inputs, and of its hidden state.
_DROPOUT_RATE = 0.2
# Divides the 25,000 test reviews: one shape.
_TEST_BATCH_SIZE = 500


class _Training:
  """Batches of row numbers over arrays; a review's tokens and label are gathered step by step, as ours are."""

  device = "cpu"
  modules: tuple[str, ...]

  def __init__(self, job: worker.Job):
    self._job, self._arrays = job, worker.read_arrays(job.arrays)

  def epoch(self, epoch: int) -> list[np.ndarray]:
    order = np.random.default_rng([self._job.seed, epoch]).permutation(len(self._arrays["labels"]))
    return _split(order, self._job.batch_size)

  def shape(self, batch: np.ndarray) -> Hashable:
    return len(batch)


def _split(rows: np.ndarray, batch_size: int) -> list[np.ndarray]:
  return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def _gather(arrays: dict[str, np.ndarray], batches: list[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields tokens i32[b, t] and labels f32[b, 1] of each batch."""
  for rows in batches:
    yield arrays["tokens"][rows].astype(np.int32), arrays["labels"][rows, None].astype(np.float32)


class _KerasTraining(_Training):
  """`train_on_batch`; `fit` is no faster."""

  def __init__(self, job: worker.Job, system: Keras):
    super().__init__(job)
    os.environ["KERAS_BACKEND"] = system.backend
    self.modules: tuple[str, ...] = ("keras", system.backend)
    if system.backend == "jax":
      # Keras imports it where it finds it, for 350 MB that whoever uses JAX need not have.
      sys.modules["tensorflow"] = None  # pyright: ignore[reportArgumentType]: so Python is told that there is none.
    keras = _import("keras")
    keras.utils.set_random_seed(job.seed)
    layers = keras.layers
    recurrent = _DROPOUT_RATE if system.recurrent_dropout else 0.0
    xla = {"use_cudnn": False} if system.force_xla else {}
    self._model = keras.Sequential(
      [
        layers.Embedding(job.vocabulary_size, job.embedding_size, mask_zero=system.mask_zero),
        layers.LSTM(job.hidden_size, dropout=_DROPOUT_RATE, recurrent_dropout=recurrent, **xla),
        layers.Dense(1, activation="sigmoid"),
      ]
    )
    self._model.compile(
      optimizer=keras.optimizers.Adam(),
      loss="binary_crossentropy",
      metrics=["accuracy"],
      jit_compile=True if system.force_xla else "auto",
    )
    if job.test_arrays is not None:
      self._test = worker.read_arrays(job.test_arrays)
      self._model.build((None, self._arrays["tokens"].shape[1]))
      self._model.optimizer.build(self._model.trainable_variables)
      # All that training changes: the counters of the optimizer and of dropout too.
      variables = [*self._model.variables, *self._model.optimizer.variables]
      self._initial = [(variable, np.array(variable)) for variable in variables]

  def train(self, batches: list[np.ndarray]) -> float:
    self._model.reset_metrics()
    loss = 0.0
    for tokens, labels in _gather(self._arrays, batches):
      # The mean since the reset, as a number of Python: the step has finished.
      loss, _ = self._model.train_on_batch(tokens, labels)
    return float(loss)

  def test_batches(self) -> list[np.ndarray]:
    return _split(np.arange(len(self._test["labels"])), _TEST_BATCH_SIZE)

  def evaluate(self, batches: list[np.ndarray]) -> float:
    correct = 0
    for tokens, labels in _gather(self._test, batches):
      correct += int(np.sum((self._model.predict_on_batch(tokens) > 0.5) == (labels > 0.5)))
    return correct / sum(map(len, batches))

  def forget(self) -> None:
    for variable, value in self._initial:
      variable.assign(value)


class _TorchTraining(_Training):
  """The article's layers but for recurrent dropout; the input mask is one per review, constant over time."""

  modules: tuple[str, ...] = ("torch",)

  def __init__(self, job: worker.Job):
    super().__init__(job)
    torch = _import("torch")
    torch.manual_seed(job.seed)
    nn = torch.nn
    self._torch = torch
    self.device = "cuda" if torch.cuda.is_available() and job.platform != "cpu" else "cpu"
    self._layers = nn.ModuleList(
      [
        nn.Embedding(job.vocabulary_size, job.embedding_size),
        nn.LSTM(job.embedding_size, job.hidden_size, batch_first=True),
        nn.Linear(job.hidden_size, 1),
      ]
    ).to(self.device)
    self._optimizer = torch.optim.Adam(self._layers.parameters(), eps=1e-7)

  def train(self, batches: list[np.ndarray]) -> float:
    torch, (embedding, lstm, dense) = self._torch, self._layers
    losses = []
    for tokens, labels in _gather(self._arrays, batches):
      embedded = embedding(torch.from_numpy(tokens).to(self.device))
      mask = torch.nn.functional.dropout(torch.ones_like(embedded[:, :1]), _DROPOUT_RATE)
      hidden, _ = lstm(embedded * mask)
      targets = torch.from_numpy(labels).to(self.device)
      loss = torch.nn.functional.binary_cross_entropy_with_logits(dense(hidden[:, -1]), targets)
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
