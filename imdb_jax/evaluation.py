"""Predictions and exact metrics over a split: every review counts once, however the last batch is padded."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import numpy as np

from imdb_jax import devices
from imdb_jax.data import batches
from imdb_jax.data.tokens import TokenSplit
from imdb_jax.errors import printable
from imdb_jax.program import Program


def predict(
  program: Program,
  params: Any,
  split: TokenSplit,
  batch_size: int,
  on_progress: Callable[[int], None] = lambda num_reviews: None,
  output: Literal["logits", "features"] = "logits",
) -> np.ndarray:
  """Return the logits of n reviews, f32[seeds, n, head_size], or the inputs of the head, f32[seeds, n, features].

  `on_progress` is called after each batch with the number of reviews done.
  """
  compute, width = program.predict, program.task.head_size
  if output == "features":
    compute, width = program.features, params["dense"]["kernel"].shape[1]
  outputs = np.zeros((program.config.training.num_seeds, len(split), width), np.float32)
  params, size, done = program.prepare(params), devices.padded_size(batch_size, program.mesh), 0
  started = (
    (rows, compute(params, *devices.put(split.batch(rows, size), devices.over_rows(program.mesh))))
    for rows in batches.prediction_batches(split.lengths, batch_size=size)
  )
  # A batch is read after the next one has started, so the devices never wait.
  pairs: Iterator[Any] = itertools.pairwise(itertools.chain(started, [None]))
  for (rows, values), _ in pairs:
    outputs[:, rows] = jax.device_get(values)[:, : len(rows)]
    done += len(rows)
    on_progress(done)
  return outputs


def evaluate(
  program: Program,
  params: Any,
  split: TokenSplit,
  batch_size: int,
  on_progress: Callable[[int], None] = lambda num_reviews: None,
) -> tuple[Any, np.ndarray]:
  """Return the metrics over a split and the logits; see `predict`."""
  logits = predict(program, params, split, batch_size, on_progress)
  return program.task.evaluate(logits, split.labels), logits


def lines(figures: dict[str, Any]) -> list[str]:
  """Return one line of name and value for each figure, and one for each class; see `Metrics`."""
  shown = {name if "," in name else name.replace("_", " "): value for name, value in figures.items()}
  rows = {name: value for name, value in shown.items() if not isinstance(value, list)}
  for each in figures.get("by_class", []):
    shown = ", ".join(f"{name} {each[name]:.4f}" for name in ("precision", "recall", "f1"))
    rows[f"class {printable(each['class'])}"] = f"{shown} ({each['num_reviews']:,} reviews)"
  width = max(map(len, rows))
  forms = {float: ".4f", int: ","}
  return [f"{name:<{width}} {value:{forms.get(type(value), '')}}" for name, value in rows.items()]
