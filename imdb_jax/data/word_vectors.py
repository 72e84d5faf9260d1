"""Word vectors from which words occur close to each other: positive pointwise mutual information, and its SVD.

Levy, Goldberg and Dagan 2015, "Improving Distributional Similarity with Lessons Learned from Word Embeddings".
"""

from typing import Any

import numpy as np
from scipy import sparse
from scipy.sparse import linalg

# Neighbours up to this distance count, the nearer the more.
_WINDOW = 5
# Counts of neighbours are raised to this power, so that rare ones weigh less.
_SMOOTHING = 0.75
# Root mean square of the result.
_SCALE = 0.3
# The iterative algorithm cannot find all singular values. A small matrix need not be sparse.
_DENSE_SIZE = 256


def svd(tokens: np.ndarray, vocabulary_size: int, embedding_size: int) -> np.ndarray:
  """Return a vector for each id; 0 for padding and for words that have no neighbours.

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
  vectors[1:, : left.shape[1]] = left[1:] * (_SCALE / np.sqrt(np.mean(left[1:] ** 2)))
  return vectors
