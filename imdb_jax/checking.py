"""A look at labelled texts before training: sizes, classes, lengths, copies, unknown words, and what may go wrong."""

import math
import os
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from imdb_jax.config import Config
from imdb_jax.data import sources, tables, tokens
from imdb_jax.data.tokenizer import Vocabulary
from imdb_jax.errors import printable

_FEW_ROWS, _DOMINATING, _MANY_CUT, _MANY_UNKNOWN = 50, 0.8, 0.25, 0.25
# Operations that a core computes in a second, and seconds that a step takes besides: of `article` on two cores.
_OPERATIONS, _SECONDS_PER_STEP = 1.2e11, 0.007
_COLUMNS, _SHOWN_CLASSES = 60, 20


def check(config: Config) -> dict[str, Any]:
  """Return figures about the texts that these settings would train on, for JSON.

  `warnings` are lines for people. Lengths are numbers of known words. The training time is rough, and for a CPU.

  Raises:
    DataError: the texts cannot be trained on; says why and where.
    UsageError: a split has no reviews left.
  """
  data, notes = config.data, []
  source = sources.find(data, config.runtime.archive, config.runtime.cache_dir)
  splits = tokens.split(data, source.load(notes.append))
  train, test = splits["train"], splits["test"]
  tables.report_left_out(train.left_out, notes.append)
  vocabulary, *_ = Vocabulary.fit(train.texts, data)
  words = {name: _count_words(each.texts, vocabulary) for name, each in splits.items()}
  sums = {name: each.sum(axis=1).tolist() for name, each in words.items()}
  lengths = np.concatenate([known for _, known in words.values()])
  pairs = [(text, label) for each in splits.values() for text, label in zip(each.texts, each.labels, strict=True)]
  num_texts = len({text for text, _ in pairs})
  counts = [np.bincount(each.labels, minlength=len(each.classes)).tolist() for each in splits.values()]
  result: dict[str, Any] = {
    "rows": {name: len(each) for name, each in splits.items()},
    "left_out": train.left_out,
    "classes": {name: dict(zip(splits, each, strict=True)) for name, *each in zip(train.classes, *counts, strict=True)},
    "lengths": dict(zip(("median", "95%", "longest"), np.quantile(lengths, (0.5, 0.95, 1)).tolist(), strict=True)),
    "cut_share": float(np.mean(lengths > data.sequence_length)),
    "unknown_word_shares": {name: 1 - known / max(count, 1) for name, (count, known) in sums.items()},
    "texts_without_known_word": int(np.sum(lengths == 0)),
    "copies": len(pairs) - num_texts,
    "texts_with_several_labels": len({*pairs}) - num_texts,
    "test_texts_in_train": int(test.occur_in(train).sum()),
    "training_seconds": _training_seconds(config, words["train"][1]),
  }
  return result | {"warnings": notes + _warnings(config, result)}


def _count_words(texts: Sequence[str], vocabulary: Vocabulary) -> np.ndarray:
  """Return the numbers of words and of known words of each text, int[2, n]."""
  known = {*vocabulary.words}
  return np.array([(len(words), sum(word in known for word in words)) for words in map(vocabulary.split, texts)]).T


def _training_seconds(config: Config, lengths: np.ndarray) -> float:
  model, training = config.model, config.training
  positions = np.minimum(lengths, config.data.sequence_length) if model.mask_padding else config.data.sequence_length
  gates = {"lstm": 4, "gru": 3, "rnn": 1, "bag": 0}[model.cell]
  # Forward, and backward twice as many: a multiplication and an addition per weight.
  operations = 6 * gates * model.hidden_size * (model.embedding_size + model.hidden_size) * model.directions
  num_steps = math.ceil(len(lengths) / training.batch_size)
  computing = len(lengths) * float(np.mean(positions)) * operations / _OPERATIONS / (os.cpu_count() or 1)
  return training.epochs * training.num_seeds * (computing + num_steps * _SECONDS_PER_STEP)


def _warnings(config: Config, result: dict[str, Any]) -> list[str]:
  found, total = [], result["rows"]["train"]
  for name, numbers in result["classes"].items():
    shown, count = f"Class {printable(name)[:40]!r}", numbers["train"]
    if count < _FEW_ROWS:
      found.append(f"{shown} has {count:,} rows for training; {_FEW_ROWS} or more are better.")
    if count > _DOMINATING * total:
      found.append(f"{shown} has {count / total:.0%} of the rows: see --class-weights, and F1 rather than accuracy.")
    if not numbers["test"]:
      found.append(f"{shown} has no row for testing.")
  length, size, share = config.data.sequence_length, config.data.vocabulary_size, result["cut_share"]
  if share > _MANY_CUT:
    found.append(f"{share:.0%} of the texts have more than {length:,} known words; see --sequence-length.")
  if result["unknown_word_shares"]["train"] > _MANY_UNKNOWN:
    found.append(f"Many words are outside the vocabulary of {size:,}; see --vocabulary-size.")
  for name, problem in (
    ("texts_without_known_word", "texts have no known word."),
    ("texts_with_several_labels", "texts also occur with another label."),
    ("test_texts_in_train", "texts for testing are also for training, which flatters the accuracy."),
  ):
    if result[name]:
      found.append(f"{result[name]:,} {problem}")
  return found


def lines(config: Config, result: dict[str, Any]) -> list[str]:
  """Return the figures of `check` for people, in lines of at most 60 columns."""
  rows, lengths, classes = result["rows"], result["lengths"], [*result["classes"].items()]
  shown = {"Rows": ", ".join(f"{count:,} {name}" for name, count in rows.items()), "Classes": f"{len(classes):,}"}
  for name, numbers in sorted(classes, key=lambda each: -each[1]["train"])[:_SHOWN_CLASSES]:
    label = "  " + textwrap.shorten(printable(name), 20, placeholder="…")
    shown[label] = f"{numbers['train']:,} train ({numbers['train'] / rows['train']:.1%}), {numbers['test']:,} test"
  if len(classes) > _SHOWN_CLASSES:
    shown["  ..."] = f"and {len(classes) - _SHOWN_CLASSES:,} smaller ones"
  shown["Known words"] = ", ".join(f"{name} {value:,.0f}" for name, value in lengths.items())
  shown["Cut"] = f"{result['cut_share']:.1%} (beyond {config.data.sequence_length:,})"
  shown["Unknown words"] = ", ".join(f"{share:.1%} {name}" for name, share in result["unknown_word_shares"].items())
  shown["Copies"] = f"{result['copies']:,}; {result['test_texts_in_train']:,} test texts are in train"
  shown["Training"] = f"about {max(result['training_seconds'] / 60, 0.1):,.1f} minutes on this CPU"
  width = max(map(len, shown))
  found = [f"{name:<{width}} {value}" for name, value in shown.items()]
  for warning in result["warnings"]:
    found += textwrap.wrap(f"Warning: {printable(warning)}", _COLUMNS, subsequent_indent="  ")
  return found
