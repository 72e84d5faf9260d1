"""Word vectors to start from: computed from the reviews, or read from a file."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse
from scipy.sparse import linalg

from imdb_jax.errors import UsageError, reraise_as

# A vector of 65,536 numbers, the most that a config permits, with 15 characters each.
_MAX_LINE_BYTES = 2**20
# Neighbours up to this distance count, the nearer the more.
_WINDOW = 5
# Counts of neighbours are raised to this power, so that rare ones weigh less.
_SMOOTHING = 0.75
# Root mean square of the result.
_SCALE = 0.3
# The iterative algorithm cannot find all singular values. A small matrix need not be sparse.
_DENSE_SIZE = 256


def svd(tokens: np.ndarray, vocabulary_size: int, embedding_size: int) -> np.ndarray:
  """Return a vector for each id, from which words occur close to each other; 0 for words without neighbours.

  It is the singular value decomposition of the positive pointwise mutual information: Levy, Goldberg and Dagan 2015,
  "Improving Distributional Similarity with Lessons Learned from Word Embeddings".

  Args:
    tokens: int[n, t], padded at the front with 0.
    vocabulary_size: v, upper bound of the ids.
    embedding_size: e. A vocabulary with fewer words leaves the remaining numbers 0.

  Returns:
    f32[v, e].
  """
  counts = sparse.csr_matrix((vocabulary_size, vocabulary_size))
  for distance in range(1, _WINDOW + 1):
    words, neighbours = tokens[:, :-distance].ravel(), tokens[:, distance:].ravel()
    # Padding is at the front, so it comes first in every pair that has any.
    is_pair = words > 0
    pairs = words[is_pair].astype(np.int32), neighbours[is_pair].astype(np.int32)
    weights = np.full(len(pairs[0]), (_WINDOW + 1 - distance) / _WINDOW)
    counts += sparse.coo_matrix((weights, pairs), shape=counts.shape).tocsr()
  counts = (counts + counts.T).tocoo()
  of_words = np.bincount(counts.row, counts.data, minlength=vocabulary_size)
  of_neighbours = of_words**_SMOOTHING
  total = of_neighbours.sum()
  information = np.log(counts.data * total / (of_words[counts.row] * of_neighbours[counts.col]))
  positive = information > 0
  matrix = sparse.csr_matrix((information[positive], (counts.row[positive], counts.col[positive])), shape=counts.shape)
  vectors = np.zeros((vocabulary_size, embedding_size), np.float32)
  if not matrix.nnz:
    return vectors
  left: Any
  if vocabulary_size <= _DENSE_SIZE:
    left, values, _ = np.linalg.svd(matrix.toarray())
  else:
    # The start is fixed, so that every call returns the same vectors.
    left, values, _ = linalg.svds(matrix, k=min(embedding_size, vocabulary_size - 1), v0=np.ones(vocabulary_size))
    left, values = left[:, ::-1], values[::-1]
  left = (left * np.sqrt(values))[:, :embedding_size]
  # The sign of a column is arbitrary.
  left *= np.sign(left[np.abs(left).argmax(axis=0), np.arange(left.shape[1])])
  vectors[1:, : left.shape[1]] = normalized(left)[1:]
  return vectors


def normalized(vectors: np.ndarray) -> np.ndarray:
  """Return vectors [v, e] scaled to a root mean square of 0.3, not counting the row of padding."""
  return vectors * (_SCALE / np.sqrt(np.mean(vectors[1:] ** 2)))


def read(path: Path, words: Sequence[str], vocabulary_size: int, embedding_size: int) -> np.ndarray:
  """Return a vector for each id from a text file as of word2vec, GloVe or fastText: a word and its numbers per line.

  A first line with the number of words and the size is skipped. The file may be larger than the memory. The vectors are
  f32[v, e] for `vocabulary_size` v and `embedding_size` e, of the words of ids 1, 2, ...; 0 for padding and for words
  that the file lacks.

  Raises:
    UsageError: the file cannot be read, a line has another size, a number is not finite, or a word of the vocabulary
      occurs twice, or none at all.
  """
  ids = {word.encode(): id for id, word in enumerate(words, 1)}
  vectors, found = np.zeros((vocabulary_size, embedding_size), np.float32), set()
  with reraise_as(UsageError, f"--word-vectors {path}", (OSError, ValueError)), path.open("rb") as file:
    for number in itertools.count(1):
      line = file.readline(_MAX_LINE_BYTES)
      if not line:
        break
      if number == 1 and len(line.split()) == 2:
        continue
      word, *numbers = line.rstrip().rsplit(b" ", embedding_size)
      # Some words contain spaces, but hardly the first ones.
      is_longer = number <= 2 and b" " in word
      if is_longer or len(numbers) != embedding_size or len(line) == _MAX_LINE_BYTES:
        raise ValueError(f"line {number:,} is not a word and {embedding_size} numbers; see --embedding-size")
      id = ids.get(word)
      if id is None:
        continue
      if id in found:
        raise ValueError(f"line {number:,}: the word {word.decode()!r} occurs twice")
      vector = np.array(numbers, float)
      if not (np.abs(vector) <= np.finfo(np.float32).max).all():
        raise ValueError(f"line {number:,}: a number is not finite")
      vectors[id] = vector
      found.add(id)
  if not found:
    raise UsageError(f"--word-vectors {path}: has none of the {len(ids):,} words of the vocabulary.")
  return vectors
