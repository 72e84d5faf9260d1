"""Restored models: predictions for new texts, and evaluation."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from imdb_jax import devices, evaluation, processes
from imdb_jax.config import RuntimeConfig
from imdb_jax.data.reviews import CLASSES
from imdb_jax.data.tokenizer import Vocabulary
from imdb_jax.data.tokens import TokenSplit
from imdb_jax.errors import CheckpointError
from imdb_jax.program import Program
from imdb_jax.store import run_directory
from imdb_jax.store.checkpoints import Checkpoints
from imdb_jax.task import Evaluation

# Few batch sizes, so that few programs are compiled; larger requests use `evaluation_batch_size`.
_SMALL_BATCHES = (1, 16)


class Classifier:
  """A restored run with its vocabulary. With several seeds it is an ensemble, which averages their probabilities.

  Attributes:
    config: settings of the run.
    classes: names of the classes, in the order of the probabilities.
    vocabulary: the words that the model knows.
    step: the restored step.
    temperature: by which logits are divided; 1 if the run has held out no reviews to calibrate it.
  """

  def __init__(self, program: Program, vocabulary: Vocabulary, params: Any, step: int, temperature: float = 1.0):
    self.config, self.vocabulary, self.step, self.temperature = program.config, vocabulary, step, temperature
    self.classes = CLASSES
    self._program, self._params = program, params

  @classmethod
  def load(
    cls,
    run_dir: str | Path,
    *,
    step: int | Literal["best", "latest"] = "best",
    runtime: RuntimeConfig | None = None,
    calibrate: bool = True,
  ) -> "Classifier":
    """Restore a run, whatever devices it was trained on.

    Args:
      run_dir: the run directory.
      step: which checkpoint; best is the one with the highest validation accuracy.
      runtime: where to compute.
      calibrate: use the temperature that was fitted to the held-out reviews, if the run has held out some.

    Raises:
      UsageError: the folder is not a run directory, or its files are damaged.
      CheckpointError: the checkpoint is missing or damaged, or does not fit config and vocabulary.
      PlatformError: the platform is missing.
    """
    runtime = dataclasses.replace(runtime or RuntimeConfig(), run_dir=Path(run_dir))
    # The settings have expanded ~.
    run_dir = runtime.run_dir or Path(run_dir)
    config = run_directory.load_config(run_dir, runtime)
    run_directory.check(run_dir)
    vocabulary = Vocabulary.load(run_dir / "vocab.json", config.data)
    program = Program(config, devices.start(runtime, runtime.evaluation_batch_size))
    with contextlib.closing(Checkpoints(run_dir, program.abstract_state(), read_only=True)) as checkpoints:
      saved, state = checkpoints.restore(step)
    temperature = saved.progress.get("temperature", 1.0) if calibrate else 1.0
    if type(temperature) is not float or not 0 < temperature < 100:
      raise CheckpointError(f"{run_dir}: step {saved.step:,}: the checkpoint's progress has an invalid temperature.")
    return cls(program, vocabulary, state.params, saved.step, temperature)

  @property
  def num_parameters(self) -> int:
    """Number of parameters of all seeds together."""
    return sum(leaf.size for leaf in jax.tree.leaves(self._params))

  def _batch_size(self, num_texts: int) -> int:
    largest = self.config.runtime.evaluation_batch_size
    return next((size for size in _SMALL_BATCHES if num_texts <= size <= largest), largest)

  def warmup(self) -> None:
    """Compile the programs for all batch sizes, so that no later call of `predict` has to wait for that."""
    for size in {*map(self._batch_size, _SMALL_BATCHES), self.config.runtime.evaluation_batch_size}:
      self.predict_proba([""] * size)

  def predict(self, texts: Sequence[str]) -> np.ndarray:
    """Return the name of the most probable class of each text, str[n]; raise as `predict_proba` does."""
    return np.array(self.classes)[self.predict_proba(texts).argmax(axis=1)]

  def predict_proba(self, texts: Sequence[str]) -> np.ndarray:
    """Return the probability of each class, f32[n, classes]. A text without a known word gets an answer too.

    Raises:
      TypeError: texts is a single text, or holds something that is not a text.
    """
    if isinstance(texts, str):
      raise TypeError("texts: must be a list of texts, not one text")
    for row, text in enumerate(texts):
      if not isinstance(text, str):
        raise TypeError(f"texts[{row}]: must be a str, not {type(text).__name__}")
    tokens, lengths = self.vocabulary.encode(texts, self.config.data.sequence_length)
    split = TokenSplit(tokens=tokens, lengths=lengths, labels=np.zeros(len(texts), np.int32))
    with processes.computing():
      logits = evaluation.predict(self._program, self._params, split, self._batch_size(len(texts)))
    return self._program.task.probabilities(logits, self.temperature)

  def logits(self, split: TokenSplit) -> np.ndarray:
    """Return the logits of encoded reviews, f32[seeds, n, 1]."""
    with processes.computing():
      return evaluation.predict(self._program, self._params, split, self.config.runtime.evaluation_batch_size)

  def evaluate(self, split: TokenSplit) -> Evaluation:
    """Return the metrics over encoded reviews."""
    return self._program.task.evaluate(self.logits(split), split.labels, self.temperature)
