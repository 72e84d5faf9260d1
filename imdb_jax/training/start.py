"""The parameters that a new run starts from: drawn at random, computed, read from a file, or those of another run."""

import contextlib
import hashlib
import signal
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from imdb_jax import processes
from imdb_jax.config import Config
from imdb_jax.data import ngrams, sources, tokens, word_vectors
from imdb_jax.data.tokenizer import PADDING_ID, Vocabulary
from imdb_jax.errors import UsageError
from imdb_jax.program import Program, TrainState
from imdb_jax.store import run_directory
from imdb_jax.store.checkpoints import Checkpoints, Saved
from imdb_jax.training import skipgram
from imdb_jax.training.console import Console
from imdb_jax.validation import flag


def check(config: Config) -> None:
  """Raise UsageError if the run that `--init-from` names does not fit these settings, or is missing and required."""
  run_dir = config.runtime.init_from
  if config.preset == "pretrained" and run_dir is None:
    raise UsageError("--preset pretrained: requires --init-from RUN, a language model that imdb-jax pretrain trains.")
  theirs = run_directory.load_config(run_dir).model if run_dir else config.model
  if run_dir is not None:
    run_directory.check(run_dir)
  for name in ("embedding_size", "cell", "hidden_size", "directions"):
    wanted, found = getattr(config.model, name), getattr(theirs, name)
    if wanted != found:
      raise UsageError(f"{flag(name)} {wanted}: the run of --init-from {run_dir} has {found}.")


def data(config: Config, source: sources.Source, console: Console) -> tokens.TokenData:
  """Return the encoded reviews; for a language model, sequences of their words. Raises as `tokens.load` does."""
  loaded = tokens.load(source, config.data, cache_dir=config.runtime.cache_dir, report=console.line)
  if config.training.objective == "label":
    return loaded
  more = [tokens.load_unlabelled(source, loaded.vocabulary, console.line)] if config.model.unlabelled else []
  return tokens.sequences(loaded, *more)


def first(
  program: Program, data: tokens.TokenData, source: sources.Source, console: Console, stop: processes.StopRequest
) -> tuple[Saved, TrainState, dict[str, Any]]:
  """Return step 0, the state from which every seed starts, and facts about it for provenance.json.

  Layers are drawn at random unless the settings say otherwise. From another run come the layers of its first seed, at
  its best step, or at the last one of a language model. Words that it does not know keep the vectors with which the
  first seed would start.

  Raises:
    UsageError: a file or run that the settings name is missing or damaged, or does not fit.
    CheckpointError: the run of `--init-from` has no usable checkpoint.
    DataError: the source has no unlabelled reviews, which `--unlabelled` requires.
    Interrupted: a signal arrived; there was nothing to save.
  """
  started, facts = time.perf_counter(), {}
  params = _fitted(program, data, source, console, stop)
  if program.config.runtime.init_from is not None:
    carried, facts = _carried(program, data, params, program.config.runtime.init_from, console)
    params |= carried
  # The first epoch's time includes this.
  return Saved(step=0, progress={"seconds": time.perf_counter() - started}, score=None), program.init(params), facts


def _carried(
  program: Program, data: tokens.TokenData, fitted: dict[str, Any], run_dir: Path, console: Console
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Return the layers that come from another run, and facts about it."""
  check(program.config)
  config, words = run_directory.load_config(run_dir), data.vocabulary.words
  known = {word: id for id, word in enumerate(Vocabulary.load(run_dir / "vocab.json", config.data).words, 1)}
  classes = tuple(run_directory.load_classes(run_dir))
  abstract = Program(config, program.mesh, classes=classes).abstract_state()
  with contextlib.closing(Checkpoints(run_dir, abstract, read_only=True)) as checkpoints:
    # The validation reviews of a language model are test reviews by default, and must choose nothing.
    saved, state = checkpoints.restore("latest" if config.training.objective == "next_word" else "best")
  trees = jax.device_get((program.init(fitted).params, state.params))
  ours, theirs = jax.tree.map(lambda leaf: leaf[0], trees)
  # The other run's ids of our ids 0, 1, ...; -1 for words that it does not know.
  ids = np.array([PADDING_ID, *(known.get(word, -1) for word in words)])
  vectors = np.array(ours.pop("embedding")["embedding"])
  vectors[np.flatnonzero(ids >= 0)] = theirs["embedding"]["embedding"][ids[ids >= 0]]
  # Phrases are listed by the ids of their words.
  ours.pop("ngrams", None)
  shapes = jax.tree.map(np.shape, (ours, theirs))
  can_decide = classes == data.classes and shapes[0].get("dense") == shapes[1].get("dense")
  carried = {name: theirs[name] for name in ours if name in theirs and (name != "dense" or can_decide)}
  layers = ", ".join([*carried, *(f"not {name}" for name in ours.keys() - carried.keys())])
  num_known = np.count_nonzero(ids > 0)
  console.line(f"From {run_dir}, step {saved.step:,}: {num_known:,} of {len(words):,} word vectors, {layers}")
  carried["embedding"] = {"embedding": vectors}
  digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(carried))).hexdigest()
  return carried, {"init_from": {"run_dir": str(run_dir), "step": saved.step, "sha256": digest}}


def _fitted(
  program: Program, data: tokens.TokenData, source: sources.Source, console: Console, stop: processes.StopRequest
) -> dict[str, Any]:
  """Return the parameters that are computed before the first step, by layer."""

  def on_progress(line: str | None) -> None:
    if line:
      console.line(line)
    if number := processes.largest([stop.signal or 0])[0]:
      console.line("No step is lost; the word vectors will be computed again.")
      raise processes.Interrupted(signal.Signals(number), 0)

  config = program.config
  model, train, path, fitted = config.model, data.train, config.runtime.word_vectors, {}
  if model.embedding in ("svd", "skipgram"):
    texts, sizes = train.tokens, (config.data.vocabulary_size, model.embedding_size)
    # A language model learns from them, too.
    if model.unlabelled and config.training.objective == "label":
      texts = np.concatenate([texts, tokens.load_unlabelled(source, data.vocabulary, console.line)])
    console.line(f"Computing word vectors from {len(texts):,} reviews")
    is_svd = model.embedding == "svd"
    vectors = word_vectors.svd(texts, *sizes) if is_svd else skipgram.fit(texts, *sizes, on_progress)
    fitted["embedding"] = {"embedding": vectors}
  if model.embedding == "file":
    if path is None:
      raise UsageError("--embedding file: requires --word-vectors FILE.")
    console.line(f"Reading word vectors from {path}")
    vectors = word_vectors.read(path, data.vocabulary.words, config.data.vocabulary_size, model.embedding_size)
    fitted["embedding"] = {"embedding": vectors}
    console.line(f"The file has {np.count_nonzero(vectors.any(axis=1)):,} of {len(data.vocabulary.words):,} words")
  if model.ngrams:
    console.line("Fitting the linear model of n-grams")
    loss_weights = program.task.loss_weights(train.labels, config.training.class_weights)
    fitted["ngrams"] = ngrams.fit(train.tokens, train.labels, model.ngrams, len(data.classes), loss_weights)
  return fitted
