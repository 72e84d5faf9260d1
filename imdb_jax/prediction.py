"""Restored models: predictions for new texts, and evaluation."""

import contextlib
import dataclasses
import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeGuard

import jax
import numpy as np
from flax import linen as nn

from imdb_jax import devices, evaluation, explanation, processes
from imdb_jax.config import RuntimeConfig
from imdb_jax.data import sources, tokens
from imdb_jax.data.tokenizer import Vocabulary
from imdb_jax.errors import CheckpointError, DataError, UsageError, first_line, reraise_as
from imdb_jax.program import Program
from imdb_jax.report import page
from imdb_jax.report.page import Answers
from imdb_jax.store import arrays, run_directory
from imdb_jax.store.checkpoints import Checkpoints
from imdb_jax.task import Evaluation

# Few batch sizes, so that few programs are compiled; larger requests use `evaluation_batch_size`.
_SMALL_BATCHES = (1, 16)

Texts = Sequence[str] | tokens.TokenSplit


class Classifier:
  """A restored run with its vocabulary. With several seeds it is an ensemble, which averages their probabilities.

  Attributes:
    config: settings of the run.
    classes: names of the classes, in the order of the probabilities.
    vocabulary: the words that the model knows.
    program: the compiled functions.
    params: parameters of the model, a tree of dicts of f32[seeds, ...], and u32 for the keys of n-grams.
    step: the restored step.
    temperature: by which logits are divided; 1 if the run has held out no reviews to calibrate it.
    prior: shares of the classes in the training texts, f32[classes].
  """

  def __init__(self, program: Program, vocabulary: Vocabulary, params: Any, step: int, temperature: float = 1.0):
    self.config, self.vocabulary, self.step, self.temperature = program.config, vocabulary, step, temperature
    self.classes = program.task.classes
    self.prior = np.full(len(self.classes), 1 / len(self.classes), np.float32)
    self.program, self.params, self._prepared = program, params, program.prepare(params)

  @classmethod
  def load(
    cls,
    run_dir: str | Path,
    *,
    step: int | Literal["best", "latest"] = "best",
    runtime: RuntimeConfig | None = None,
    calibrate: bool = True,
    model: nn.Module | None = None,
  ) -> "Classifier":
    """Restore a run, whatever devices it was trained on.

    The best step is the one with the highest validation accuracy. `calibrate` uses the temperature that was fitted to
    the held-out reviews, if the run has held out some. `model` is the Flax module of a run that was trained with one.

    Raises:
      UsageError: the folder is not a run directory, or its files are damaged.
      CheckpointError: the checkpoint is missing or damaged, or does not fit config and vocabulary.
      PlatformError: the platform is missing.
    """

    def restore(program: Program, run_dir: Path) -> tuple[Any, int, float]:
      with contextlib.closing(Checkpoints(run_dir, program.abstract_state(), read_only=True)) as checkpoints:
        saved, state = checkpoints.restore(step)
      temperature = saved.progress.get("temperature", 1.0) if calibrate else 1.0
      if not _is_temperature(temperature):
        raise CheckpointError(f"{run_dir}: step {saved.step:,}: the checkpoint's progress has an invalid temperature.")
      return state.params, saved.step, temperature

    return cls._restored(run_dir, runtime, restore, is_run=True, model=model)

  @classmethod
  def from_safetensors(cls, folder: str | Path, *, runtime: RuntimeConfig | None = None) -> "Classifier":
    """Restore a model from the folder that `imdb-jax export --format safetensors` has written.

    Raises:
      UsageError: a file of the folder is missing or damaged.
      PlatformError: the platform is missing.
    """

    def restore(program: Program, folder: Path) -> tuple[Any, int, float]:
      facts = run_directory.read_json(folder / "model.json")
      facts = facts if isinstance(facts, dict) else {}
      step, temperature = facts.get("step"), facts.get("temperature")
      if type(step) is not int or not _is_temperature(temperature):
        raise UsageError(f"{folder / 'model.json'}: has no valid step and temperature.")
      shapes, path = program.abstract_state().params, folder / "model.safetensors"
      with reraise_as(UsageError, f"{path}: not the weights of this model", (OSError, ValueError)):
        found = arrays.load_safetensors(path, arrays.by_name(shapes))
      params = jax.tree.unflatten(jax.tree.structure(shapes), [found[name] for name in arrays.by_name(shapes)])
      return devices.put(params, devices.replicated(program.mesh)), step, temperature

    return cls._restored(folder, runtime, restore, is_run=False)

  @classmethod
  def _restored(
    cls,
    folder: str | Path,
    runtime: RuntimeConfig | None,
    restore: Callable[[Program, Path], tuple[Any, int, float]],
    *,
    is_run: bool,
    model: nn.Module | None = None,
  ) -> "Classifier":
    """Return the model of a folder, from which `restore` reads parameters, step and temperature."""
    runtime = dataclasses.replace(runtime or RuntimeConfig(), run_dir=Path(folder))
    # The settings have expanded ~.
    folder = runtime.run_dir or Path(folder)
    config, shares = run_directory.load_config(folder, runtime), run_directory.load_classes(folder)
    if config.training.objective != "label":
      raise UsageError(f"{folder}: holds a language model, which has no classes; a classifier takes it by --init-from.")
    if is_run:
      run_directory.check(folder, model=None if model is None else type(model).__name__)
    vocabulary = Vocabulary.load(folder / "vocab.json", config.data)
    mesh = devices.start(runtime, runtime.evaluation_batch_size)
    program = Program(config, mesh, classes=tuple(shares), model=model)
    classifier = cls(program, vocabulary, *restore(program, folder))
    classifier.prior = np.array([*shares.values()], np.float32)
    return classifier

  def __repr__(self) -> str:
    name, seeds = self.config.preset, self.config.training.num_seeds
    return (
      f"Classifier({', '.join(self.classes)}; preset {name}, {seeds} seed{'s' * (seeds > 1)}, step {self.step:,}; "
      f"{len(self.vocabulary.words):,} words, {self.num_parameters:,} parameters)"
    )

  def _repr_html_(self) -> str:
    return f"<p>{html.escape(repr(self))}</p>{page.notebook(self.config.run_dir)}"

  @property
  def num_parameters(self) -> int:
    """Number of parameters of all seeds together."""
    return sum(leaf.size for leaf in jax.tree.leaves(self.params))

  def _batch_size(self, num_texts: int) -> int:
    largest = self.config.runtime.evaluation_batch_size
    return next((size for size in _SMALL_BATCHES if num_texts <= size <= largest), largest)

  def warmup(self) -> None:
    """Compile the programs for all batch sizes, so that no later call of `predict` has to wait for that."""
    for size in {*map(self._batch_size, _SMALL_BATCHES), self.config.runtime.evaluation_batch_size}:
      self.predict_proba([""] * size)

  def predict(self, texts: Texts) -> np.ndarray:
    """Return the name of the most probable class of each text, str[n]; raise as `predict_proba` does.

    For a text without a known word, it is the most frequent class of the training texts.
    """
    return np.array(self.classes)[self.predict_proba(texts).argmax(axis=1)]

  def predict_proba(self, texts: Texts) -> np.ndarray:
    """Return the probability of each class, f32[n, classes], of n texts or encoded reviews.

    For a text without a known word, it is `prior`. Raises TypeError if texts is one text, or holds what is not a text.
    """
    split = self.encode(texts)
    found = self.program.task.probabilities(self.logits(split), self.temperature)
    return np.where(split.lengths[:, None] > 0, found, self.prior)

  def logits(self, texts: Texts) -> np.ndarray:
    """Return the logits of each seed, f32[seeds, n, head_size], without temperature; arguments as `predict_proba`."""
    return self._compute(texts, "logits")

  def features(self, texts: Texts) -> np.ndarray:
    """Return the pooled hidden states of each seed, f32[seeds, n, f], the inputs of the head; arguments likewise."""
    self._require_network()
    return self._compute(texts, "features")

  def _require_network(self) -> None:
    if self.program.own_model:
      raise UsageError(f"{self.program.own_model}: features and explanations require the network of the settings.")

  def explain(self, texts: Sequence[str], label: str | None = None) -> list[explanation.Explanation]:
    """Return the contributions of the words of each text to the logit of a class, whose sigmoid is its probability.

    By default, the class is the second of two, or of more the most probable one.

    Raises:
      TypeError: as for `predict_proba`.
      UsageError: there is no such class, or the model is one of your own.
    """
    self._require_network()
    if label is not None and label not in self.classes:
      raise UsageError(f"{label!r:.80}: is no class; there are {', '.join(self.classes)}.")
    split, size = self.encode(texts), devices.padded_size(explanation.MIN_STEPS + 1, self.program.mesh)
    default = self.predict(split).tolist() if len(self.classes) > 2 else [*self.classes][1:] * len(split)

    def explained(text: str, tokens: np.ndarray, length: np.int32, label: str) -> explanation.Explanation:
      def slopes(presence: np.ndarray) -> np.ndarray:
        place, some = np.int32(self.classes.index(label)), np.resize(presence.astype(np.float32), size)
        found = self.program.slopes(self.params, self.temperature, tokens, length, place, some)
        return jax.device_get(found)[: len(presence)]

      return explanation.explain(text, label, self.vocabulary.spans(text), slopes)

    with processes.computing():
      labels = default if label is None else [label] * len(split)
      return [explained(*each) for each in zip(texts, split.tokens, split.lengths, labels, strict=True)]

  def _compute(self, texts: Texts, output: Literal["logits", "features"]) -> np.ndarray:
    split = self.encode(texts)
    with processes.computing():
      return evaluation.predict(self.program, self._prepared, split, self._batch_size(len(split)), output=output)

  def encode(self, texts: Texts) -> tokens.TokenSplit:
    """Return encoded texts, with labels of 0; arguments as `predict_proba`."""
    if isinstance(texts, tokens.TokenSplit):
      return texts
    if isinstance(texts, str):
      raise TypeError("texts: must be a list of texts, not one text")
    for row, text in enumerate(texts):
      if not isinstance(text, str):
        raise TypeError(f"texts[{row}]: must be a str, not {type(text).__name__}")
    encoded, lengths = self.vocabulary.encode(texts)
    return tokens.TokenSplit(tokens=encoded, lengths=lengths, labels=np.zeros(len(texts), np.int32))

  def read_split(self, name: str, report: Callable[[str], None] = lambda line: None) -> tokens.TokenSplit:
    """Return the encoded reviews of "train", "validation" or "test". `report` gets a line before slow work.

    Raises DataError if the reviews are missing or damaged, or not those that the run was trained on.
    """
    data, runtime = self.config.data, self.config.runtime
    source = sources.find(data, runtime.archive, runtime.cache_dir)
    found = tokens.load(source, data, cache_dir=runtime.cache_dir, report=report)
    run_directory.check(self.config.run_dir, model=self.program.own_model, data=found)
    return getattr(found, name)

  def answers(self, name: str, report: Callable[[str], None] = lambda line: None) -> tuple[Answers | None, list[str]]:
    """Return the answers to the reviews of a split for a report, or None, and lines that say what is left out and why.

    Texts are read if the source has them at hand; they are never downloaded.
    """
    data, runtime, texts, notes = self.config.data, self.config.runtime, None, []
    try:
      split = self.read_split(name, report)
      source = sources.find(data, runtime.archive, runtime.cache_dir)
    except DataError as error:
      return None, [f"All that depends on reviews: {first_line(error)}."]
    if data.source != "imdb" or runtime.archive or sources.find_store([runtime.cache_dir]):
      try:
        splits = tokens.split(data, source.load(report))
        texts = splits.get(name, splits["test"])
        if not np.array_equal(texts.labels, split.labels):
          raise DataError(f"{source.name} has other reviews than the cache")
      except DataError as error:
        texts, notes = None, [f"Texts: {first_line(error)}."]
    name = "test" if data.validation == "test" and name == "validation" else name
    known: dict[str, Any] = {"step": self.step, "temperature": self.temperature, "vocabulary": self.vocabulary}
    if not self.program.own_model:
      known["explain"] = lambda texts: [explanation.to_html(each) for each in self.explain(texts)]
    return Answers(split=name, encoded=split, logits=self.logits(split), reviews=texts, **known), notes

  def evaluate(self, split: tokens.TokenSplit) -> Evaluation:
    """Return the metrics over encoded reviews."""
    return self.program.task.evaluate(self.logits(split), split.labels, self.temperature)


class Ensemble:
  """Several classifiers, which answer with the mean of their probabilities. Their settings and vocabularies may differ.

  Attributes:
    classifiers: the members, at least one.
    classes: names of the classes, in the order of the probabilities.
  """

  def __init__(self, classifiers: Sequence[Classifier]):
    """Raise UsageError if the classes of the members differ."""
    self.classifiers, self.classes = tuple(classifiers), classifiers[0].classes
    for each in self.classifiers:
      if each.classes != self.classes:
        known, others = ", ".join(self.classes), ", ".join(each.classes)
        raise UsageError(f"{each.config.run_dir}: its classes are {others}, but those of the first run are {known}.")

  def predict(self, texts: Sequence[str]) -> np.ndarray:
    """Return the name of the most probable class of each text, str[n]; raise as `predict_proba` does."""
    return np.array(self.classes)[self.predict_proba(texts).argmax(axis=1)]

  def predict_proba(self, texts: Sequence[str]) -> np.ndarray:
    """Return the mean probability of each class, f32[n, classes]; raise as that of `Classifier` does."""
    return np.mean([each.predict_proba(texts) for each in self.classifiers], axis=0)

  def answers(
    self, texts: Sequence[str], *, threshold: float | None = None, abstain_below: float = 0.0
  ) -> list[dict[str, Any]]:
    """Return the class, the probabilities by class and the number of known words that were read, for each text.

    With a `threshold`, of two classes, the second is the answer from this probability on, instead of the most probable.
    The class is None if all probabilities are below `abstain_below`, as it is without a known word.
    """
    splits = [each.encode(texts) for each in self.classifiers]
    found = np.mean([each.predict_proba(one) for each, one in zip(self.classifiers, splits, strict=True)], axis=0)
    known = np.max([split.lengths for split in splits], axis=0)
    chosen = found.argmax(axis=1) if threshold is None else (found[:, 1] >= threshold).astype(int)
    is_clear = (known > 0) & (found.max(axis=1, initial=0) >= abstain_below)
    return [
      {
        "class": self.classes[place] if clear else None,
        "probabilities": dict(zip(self.classes, row, strict=True)),
        "known_words": count,
      }
      for place, clear, row, count in zip(chosen, is_clear, found.tolist(), known.tolist(), strict=True)
    ]

  def evaluate(self, splits: Sequence[tokens.TokenSplit]) -> Evaluation:
    """Return the metrics over reviews that each member's own vocabulary has encoded; `seeds` has those of each member.

    Raises DataError if the labels of the splits differ, so they are not of the same reviews.
    """
    pairs, task = list(zip(self.classifiers, splits, strict=True)), self.classifiers[0].program.task
    for each, split in pairs:
      if not np.array_equal(split.labels, splits[0].labels):
        raise DataError(f"{each.config.run_dir}: the reviews of this split are not those of the first run.")
    logits = [task.ensemble(each.logits(split)) / each.temperature for each, split in pairs]
    return task.evaluate(np.stack(logits), splits[0].labels)


def _is_temperature(value: Any) -> TypeGuard[float]:
  return type(value) is float and 0 < value < 100
