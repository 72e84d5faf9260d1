"""Labelled reviews, in an order that depends only on their texts."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

NEGATIVE, POSITIVE, UNLABELLED = 0, 1, -1
# Names of the labels 0 and 1.
CLASSES = ("negative", "positive")
# Places of the rows without a text, by a line that names their file and counts them.
LeftOut = dict[str, list[str]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reviews:
  """Reviews of one split.

  Attributes:
    texts: n reviews.
    labels: int32[n], places in `classes`; -1 unlabelled.
    groups: int32[n], or None if unknown. A held-out part shares no group with the rest. In IMDB, a group is a film.
      Those of own texts are hashes, uint64[n].
    classes: names of the labels 0, 1, ...
    stars: int32[n], the ratings from 1 to 10 by which IMDB's reviews were labelled, or None if unknown.
    left_out: rows of the source, in all of its files, that are in no split. Only the training reviews have them.
  """

  texts: tuple[str, ...]
  labels: np.ndarray
  groups: np.ndarray | None = None
  classes: tuple[str, ...] = CLASSES
  stars: np.ndarray | None = None
  left_out: LeftOut = dataclasses.field(default_factory=dict)

  def __len__(self) -> int:
    return len(self.texts)

  @functools.cached_property
  def digest(self) -> str:
    """SHA-256 of texts, labels and names of the labels in order, in hex."""
    digest = hashlib.sha256(named(self.classes))
    for text, label in zip(self.texts, self.labels, strict=True):
      encoded = text.encode("utf-8", "surrogatepass")
      digest.update(f"{label} {len(encoded)}\n".encode() + encoded)
    return digest.hexdigest()

  def occur_in(self, others: "Reviews") -> np.ndarray:
    """Return which reviews have a text that other reviews have, too, bool[n]."""
    texts = set(others.texts)
    return np.array([text in texts for text in self.texts], bool)

  def take(self, rows: Iterable[int]) -> "Reviews":
    """Return the reviews at `rows`, in that order."""
    rows = np.asarray(list(rows), np.int64)
    groups, stars = (None if each is None else each[rows] for each in (self.groups, self.stars))
    texts = tuple(self.texts[row] for row in rows)
    return dataclasses.replace(self, texts=texts, labels=self.labels[rows], groups=groups, stars=stars)


def named(classes: Sequence[str]) -> bytes:
  """Return bytes that identify the names of the labels; none for those of IMDB, whose digests are published."""
  return b"" if tuple(classes) == CLASSES else json.dumps(list(classes)).encode()


def canonical(
  texts: Sequence[str],
  labels: Sequence[int],
  groups: Sequence[int] | np.ndarray | None = None,
  classes: tuple[str, ...] = CLASSES,
  *,
  stars: np.ndarray | None = None,
) -> Reviews:
  """Sort reviews by the SHA-256 of their text, then by label and group.

  Every copy of a corpus (official archive, repacked archive, folder, record store) thus gives the same vocabulary, ids
  and batches. The order is as good as a shuffle: the first n reviews are a fair sample.
  """
  digests = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in texts]
  order = sorted(range(len(texts)), key=lambda i: (digests[i], labels[i], 0 if groups is None else groups[i]))
  array = groups if groups is None or isinstance(groups, np.ndarray) else np.asarray(groups, np.int32)
  numbers = np.asarray(labels, np.int32)
  return Reviews(texts=tuple(texts), labels=numbers, groups=array, classes=classes, stars=stars).take(order)


def content(splits: Mapping[str, Reviews]) -> str:
  """Return a text that identifies the texts and labels of "train" and "test"."""
  return f"{splits['train'].digest} {splits['test'].digest}"
