"""Worker of the benchmark environment: the article's layers, and the recurrence alone, in Keras and PyTorch."""

import importlib
import os
import sys
from collections.abc import Hashable, Iterator
from typing import Any

import numpy as np
import systems
import worker
from systems import DROPOUT_RATE

# The type checker does not know the packages of the benchmark environment.
_import: Any = importlib.import_module

# Divides the 25,000 test reviews, so that there is one shape.
_TEST_BATCH_SIZE = 500


def _import_keras(backend: str) -> Any:
  os.environ["KERAS_BACKEND"] = backend
  if backend == "jax":
    # Keras imports TensorFlow if it is installed: 350 MB that a user of JAX need not have.
    sys.modules["tensorflow"] = None  # pyright: ignore[reportArgumentType]: Python then finds no such module.
  return _import("keras")


def _import_torch(job: worker.Job) -> tuple[Any, str]:
  """Return PyTorch and the name of its device."""
  try:
    torch = _import("torch")
  except ModuleNotFoundError as error:
    raise worker.UnableError("missing torch: make bench, or pip install torch in .venv-bench") from error
  return torch, "cuda" if torch.cuda.is_available() and job.platform != "cpu" else "cpu"


class _Training(worker.System):
  """Batches of row numbers; the reviews of each batch are gathered step by step, as in our training."""

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
  """Yield tokens i32[b, t] and labels f32[b, 1] of each batch."""
  for rows in batches:
    yield arrays["tokens"][rows].astype(np.int32), arrays["labels"][rows, None].astype(np.float32)


class _KerasTraining(_Training):
  """`train_on_batch`, which is as fast as `fit`."""

  def __init__(self, job: worker.Job, system: systems.System):
    super().__init__(job)
    self.modules = ("keras", system.backend)
    keras = _import_keras(system.backend)
    if system.backend == "jax":
      self.device = _import("jax").default_backend()
    keras.utils.set_random_seed(job.seed)
    layers = keras.layers
    recurrent = 0.0 if system.work == "less" else DROPOUT_RATE
    xla = {"use_cudnn": False} if system.force_xla else {}
    embedding = layers.Embedding(job.vocabulary_size, job.embedding_size, mask_zero=system.mask_zero)
    lstm = layers.LSTM(job.hidden_size, dropout=DROPOUT_RATE, recurrent_dropout=recurrent, **xla)
    self._model = keras.Sequential([embedding, lstm, layers.Dense(1, activation="sigmoid")])
    settings = {"metrics": ["accuracy"], "jit_compile": system.force_xla or "auto"}
    self._model.compile("adam", "binary_crossentropy", **settings)
    self._test: Any = None
    self._initial = []
    if job.test_arrays is not None:
      self._test = worker.read_arrays(job.test_arrays)
      self._model.build((None, self._arrays["tokens"].shape[1]))
      self._model.optimizer.build(self._model.trainable_variables)
      # Everything that training changes, also the counters of the optimizer and of dropout.
      variables = [*self._model.variables, *self._model.optimizer.variables]
      self._initial = [(variable, np.array(variable)) for variable in variables]

  def train(self, batches: list[np.ndarray]) -> float:
    self._model.reset_metrics()
    loss = 0.0
    for tokens, labels in _gather(self._arrays, batches):
      # The mean since the reset, as a Python number: the step has finished.
      loss, _ = self._model.train_on_batch(tokens, labels)
    return float(loss)

  def test_batches(self) -> list[np.ndarray]:
    return [] if self._test is None else _split(np.arange(len(self._test["labels"])), _TEST_BATCH_SIZE)

  def evaluate(self, batches: list[np.ndarray]) -> float:
    correct = 0
    for tokens, labels in _gather(self._test, batches):
      correct += int(np.sum((self._model.predict_on_batch(tokens) > 0.5) == (labels > 0.5)))
    return correct / sum(map(len, batches))

  def forget(self) -> None:
    for variable, value in self._initial:
      variable.assign(value)


class _TorchTraining(_Training):
  """The article's layers without recurrent dropout. The input mask is constant over time."""

  modules = ("torch",)

  def __init__(self, job: worker.Job):
    super().__init__(job)
    self._torch, self.device = _import_torch(job)
    self._torch.manual_seed(job.seed)
    nn = self._torch.nn
    embedding = nn.Embedding(job.vocabulary_size, job.embedding_size)
    lstm = nn.LSTM(job.embedding_size, job.hidden_size, batch_first=True)
    self._layers = nn.ModuleList([embedding, lstm, nn.Linear(job.hidden_size, 1)]).to(self.device)
    self._optimizer = self._torch.optim.Adam(self._layers.parameters(), eps=1e-7)

  def train(self, batches: list[np.ndarray]) -> float:
    torch, (embedding, lstm, dense) = self._torch, self._layers
    losses = []
    for tokens, labels in _gather(self._arrays, batches):
      embedded = embedding(torch.from_numpy(tokens).to(self.device))
      mask = torch.nn.functional.dropout(torch.ones_like(embedded[:, :1]), DROPOUT_RATE)
      hidden, _ = lstm(embedded * mask)
      targets = torch.from_numpy(labels).to(self.device)
      loss = torch.nn.functional.binary_cross_entropy_with_logits(dense(hidden[:, -1]), targets)
      self._optimizer.zero_grad()
      loss.backward()
      self._optimizer.step()
      losses.append(loss.item())
    return float(np.mean(losses))


def _keras_recurrence(job: worker.Job) -> worker.Calls:
  keras = _import_keras("jax")
  rate = DROPOUT_RATE if systems.RECURRENCES[job.system] else 0.0
  layer = keras.layers.LSTM(job.hidden_size, recurrent_dropout=rate, return_sequences=True)
  inputs = _random_inputs(job)
  layer.build(inputs.shape)
  state = [variable.value for variable in layer.non_trainable_variables]

  def recurrence(inputs, *weights):
    return layer.stateless_call(list(weights), state, inputs, training=True)[0]

  arrays = inputs, *(variable.value for variable in layer.trainable_variables)
  return worker.jax_calls(recurrence, arrays, job.gradients, module="keras")


def _torch_recurrence(job: worker.Job) -> worker.Calls:
  torch, device = _import_torch(job)
  dtype = torch.bfloat16 if job.system == "torch-bfloat16" else torch.float32
  torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
  layer = torch.nn.LSTM(job.embedding_size, job.hidden_size, batch_first=True).to(device, dtype)
  inputs = torch.from_numpy(_random_inputs(job)).to(device, dtype).requires_grad_()

  def call():
    hidden, _ = layer(inputs)
    if job.gradients:
      hidden.backward(torch.ones_like(hidden))

  wait = torch.cuda.synchronize if device == "cuda" else lambda: None
  return worker.Calls(call, lambda _: wait(), device, modules=("torch",))


def _random_inputs(job: worker.Job) -> np.ndarray:
  shape = job.batch_size, job.sequence_length, job.embedding_size
  return np.random.default_rng(0).standard_normal(shape, np.float32)


def _build(job: worker.Job) -> worker.System:
  if job.arrays is None:
    return _keras_recurrence(job) if job.system.startswith("keras") else _torch_recurrence(job)
  system = systems.BASELINES[job.system]
  return _TorchTraining(job) if system.backend == "torch" else _KerasTraining(job, system)


if __name__ == "__main__":
  worker.serve(worker.Handlers(_build), install="make bench")
