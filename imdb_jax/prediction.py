"""New texts through a trained model."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh

from imdb_jax import run_directory, sharding, state, steps
from imdb_jax.checkpoint import Checkpoints
from imdb_jax.config import Config, RuntimeConfig, expand_home
from imdb_jax.data.tokenizer import Vocabulary
from imdb_jax.data.tokens import TokenSplit
from imdb_jax.evaluation import Evaluation, evaluate, predict_logits
from imdb_jax.model import SentimentLSTM


class Classifier:
  """A restored model with its vocabulary. A run of several seeds is one ensemble, which averages their probabilities.

  Attributes:
    config: of the run.
    vocabulary: the words that it knows.
    step: the restored one.
  """

  def __init__(self, config: Config, vocabulary: Vocabulary, params: dict, mesh: Mesh, step: int):
    self.config, self.vocabulary, self.step = config, vocabulary, step
    self._params, self._mesh = params, mesh
    self._predict_step = steps.make_predict_step(SentimentLSTM.of_run(config), mesh, config.training.num_seeds)

  @classmethod
  def load(
    cls,
    run_dir: str | Path,
    *,
    step: int | Literal["best", "latest"] = "best",
    runtime: RuntimeConfig | None = None,
  ) -> "Classifier":
    """Restores a run, whatever devices it was trained on.

    Args:
      run_dir: of the run.
      step: which checkpoint; best is the one with the highest validation accuracy.
      runtime: where to compute.

    Raises:
      UsageError: the folder is not that of a run, or its files are damaged.
      CheckpointError: the checkpoint is absent, damaged or does not fit config and vocabulary.
      PlatformError: the platform is not there.
    """
    run_dir, runtime = expand_home(run_dir), runtime or RuntimeConfig()
    config = run_directory.load_config(run_dir, runtime)
    vocabulary = run_directory.load_vocabulary(run_dir)
    mesh = sharding.start(runtime)
    model = SentimentLSTM.of_run(config)
    optimizer = state.make_optimizer(config.optimizer, num_steps=1)
    abstract = state.abstract(model, optimizer, mesh, config.training.num_seeds)
    with contextlib.closing(Checkpoints(run_dir, read_only=True)) as checkpoints:
      saved, restored = checkpoints.find_and_restore(step, abstract)
    return cls(config, vocabulary, restored.params, mesh, saved.step)

  @contextlib.contextmanager
  def _computing(self) -> Iterator[None]:
    with sharding.device_errors(), jax.default_matmul_precision(self.config.training.matmul_precision):
      yield

  def predict(self, texts: Sequence[str]) -> np.ndarray:
    """The probability that each text is positive, f32[n]; a text without a known word gets an answer too.

    Raises:
      TypeError: texts is one text, whose letters would be taken for texts, or holds what is none.
    """
    if isinstance(texts, str):
      raise TypeError("texts: must be a list of texts, not one text")
    for row, text in enumerate(texts):
      if not isinstance(text, str):
        raise TypeError(f"texts[{row}]: must be a str, not {type(text).__name__}")
    tokens, lengths = self.vocabulary.encode(texts, self.config.dataset.sequence_length)
    split = TokenSplit(tokens=tokens, lengths=lengths, labels=np.zeros(len(texts), np.int32))
    # Powers of two: few shapes to compile, little waste.
    wanted = 1 << max(len(texts) - 1, 0).bit_length()
    batch_size = min(wanted, self.config.runtime.evaluation_batch_size)
    logits = np.zeros((self.config.training.num_seeds, len(texts)), np.float64)
    with self._computing():
      for rows, values in predict_logits(self._predict_step, self._params, split, self._mesh, batch_size):
        logits[:, rows] = values
    return np.mean(0.5 * (1 + np.tanh(0.5 * logits)), axis=0).astype(np.float32)

  def evaluate(self, split: TokenSplit) -> Evaluation:
    """Metrics over encoded reviews, see `imdb_jax.evaluation`."""
    size, num_seeds = self.config.runtime.evaluation_batch_size, self.config.training.num_seeds
    with self._computing():
      return evaluate(self._predict_step, self._params, split, self._mesh, size, num_seeds=num_seeds)
