"""Labelled reviews, in an order that depends on nothing but their texts."""

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

NEGATIVE, POSITIVE, UNLABELLED = 0, 1, -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reviews:
  """Reviews of one split.

  Attributes:
    texts: n reviews.
    labels: int32[n]; 0 negative, 1 positive, -1 unlabelled.
    films: int32[n], equal where two reviews are of the same film; None where the source does not tell.
  """

  texts: tuple[str, ...]
  labels: np.ndarray
  films: np.ndarray | None = None

  def __len__(self) -> int:
    return len(self.texts)

  def take(self, rows: Iterable[int]) -> "Reviews":
    """The reviews at `rows`, in that order."""
    rows = np.asarray(list(rows), np.int64)
    return Reviews(
      texts=tuple(self.texts[row] for row in rows),
      labels=self.labels[rows],
      films=None if self.films is None else self.films[rows],
    )


def canonical(texts: Sequence[str], labels: Sequence[int], films: Sequence[int] | None = None) -> Reviews:
  """Sorts reviews by the SHA-256 of their text, then by label and film.

  Every source of the same corpus — the official archive, a repack, a folder, a record store in its own hashed
  order — thus gives the same sequence, hence the same vocabulary, ids and batches. The order is also as good as
  a shuffle, so the first n reviews are a fair sample of all.
  """
  digests = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in texts]
  order = sorted(range(len(texts)), key=lambda i: (digests[i], labels[i], films[i] if films is not None else 0))
  return Reviews(
    texts=tuple(texts),
    labels=np.asarray(labels, np.int32),
    films=None if films is None else np.asarray(films, np.int32),
  ).take(order)


def content_digest(reviews: Reviews) -> str:
  """SHA-256 over texts and labels in order: two sources with the same digest hold the same reviews."""
  digest = hashlib.sha256()
  for text, label in zip(reviews.texts, reviews.labels, strict=True):
    encoded = text.encode("utf-8", "surrogatepass")
    digest.update(f"{label} {len(encoded)}\n".encode())
    digest.update(encoded)
  return digest.hexdigest()
