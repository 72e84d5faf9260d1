"""Labelled texts of one's own as reviews for training and testing."""

import collections
import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

from imdb_jax.data import tables
from imdb_jax.data.reviews import LeftOut, Reviews, canonical
from imdb_jax.errors import DataError

# Share of the texts that are for testing if there are no test texts.
TEST_SHARE = 0.2


def split(
  read: Mapping[str, tuple[Sequence[tables.Row], LeftOut]], report: Callable[[str], None], name: str
) -> dict[str, Reviews]:
  """Return the reviews of "train" and "test", in canonical order. `name` is that of the training texts in messages.

  Without test rows, about `TEST_SHARE` of the rows are for testing. A hash of the text decides, or of the group, so
  that further rows move none from one side to the other. Rows of the same text or group are on the same side. If
  further rows join two groups, by a text in both, one of them may move.

  Raises:
    DataError: there are fewer than two classes, or too few rows of one.
  """
  if "train" not in read or not read.keys() <= {"train", "test"}:
    raise DataError(f"data: must have the key train, and may have test, not {', '.join(map(repr, read))}.")
  (train, left_out), (test, more_left_out) = read["train"], read.get("test", (None, {}))
  counts = collections.Counter(row.label for row in train)
  classes = tuple(sorted(counts, key=_order))
  if len(classes) == 1:
    raise DataError(f"{name}: all {len(train):,} labels are {classes[0]!r:.80}: at least two classes are needed.")
  for row in train:
    if counts[row.label] == 1:
      counted = f"{len(classes):,} classes in {len(train):,} rows"
      raise DataError(f"{name}: {row.place}: the class {row.label!r:.80} has no other row ({counted}); add one.")
  found = dataclasses.replace(numbered(train, classes, _hashes(train)), left_out=left_out | more_left_out)
  if test is not None:
    if common := len({row.text for row in train} & {row.text for row in test}):
      report(f"Note: {common:,} different texts are both for training and for testing.")
    return {"train": found, "test": numbered(test, classes, name="test texts")}
  is_test = np.asarray(found.groups) < np.uint64(TEST_SHARE * 2**64)
  sides = {"train": found.take(np.flatnonzero(~is_test)), "test": found.take(np.flatnonzero(is_test))}
  remedy = "add more, or choose yourself by --test-data."
  for number, label in enumerate(classes):
    if number not in sides["train"].labels:
      raise DataError(f"{name}: all rows of class {label!r:.80} are for testing: {remedy}")
  if not len(sides["test"]):
    raise DataError(f"{name}: none of the {len(train):,} rows is for testing: {remedy}")
  return sides


def _order(name: str) -> tuple[float, str]:
  return (float(name) if re.fullmatch(r"-?[0-9]{1,15}(\.[0-9]{1,15})?", name) else float("inf"), name)


def numbered(
  rows: Sequence[tables.Row], classes: tuple[str, ...], groups: np.ndarray | None = None, name: str = ""
) -> Reviews:
  """Return rows as reviews, in canonical order; raise DataError, with this name, if a label is not a class."""
  numbers = {name: number for number, name in enumerate(classes)}
  for row in rows:
    if row.label not in numbers:
      raise DataError(f"{name}, {row.place}: the label {row.label!r:.80} is not a class of the training texts.")
  return canonical([row.text for row in rows], [numbers[row.label] for row in rows], groups, classes)


def _hashes(rows: Sequence[tables.Row]) -> np.ndarray:
  """Return u64[n]. Rows have the same if they share a text or a group, or are linked by others that do."""
  numbers: dict[tuple[str, str], int] = {}
  text_numbers = [numbers.setdefault(("text", row.text), len(numbers)) for row in rows]
  others = [numbers.setdefault(("group", row.group), len(numbers)) if row.group else -1 for row in rows]
  texts, groups = np.array(text_numbers), np.array(others)
  hashes = np.array(
    [int.from_bytes(hashlib.sha256(value.encode()).digest()[:8]) for _, value in numbers], dtype=np.uint64
  )
  is_grouped = groups >= 0
  # A group keeps its place when it gets further texts.
  hashes[texts[is_grouped]] = np.iinfo(np.uint64).max
  edges = (np.ones(is_grouped.sum()), (texts[is_grouped], groups[is_grouped]))
  graph = sparse.coo_matrix(edges, shape=(len(numbers),) * 2)
  count, linked = csgraph.connected_components(graph, directed=False)
  smallest = np.full(count, np.iinfo(np.uint64).max)
  np.minimum.at(smallest, linked, hashes)
  return smallest[linked[texts]]
