"""A linear model of which words and short phrases a review contains: logistic regression on naive-Bayes ratios.

Wang and Manning 2012, "Baselines and Bigrams: Simple, Good Sentiment and Topic Classification", with logistic
regression in place of the support-vector machine. It is fitted in seconds, once, before the first step.

`keys_of` and `find` accept arrays of NumPy or of JAX, so that fitting and prediction share one definition.
"""

from typing import Any

import numpy as np
from scipy import optimize, sparse, special

# The n-grams that most training reviews contain have a weight. Held-out accuracy is the same with 2^16 to 2^19.
SIZE = 2**17
# Weight of the loss against the L2 penalty: scikit-learn's C.
_C = 0.3
# L-BFGS gains nothing on held-out reviews after this many steps.
_NUM_STEPS = 30
# Of more classes, the weights would fill the memory.
MAX_CLASSES = 100
# Reviews at a time, to save memory.
_CHUNK = 1000


def occurrences(tokens: Any, n: int) -> Any:
  """Return the n-grams of one to n words of tokens int[b, t], padded at the front with 0, by their last word.

  The result is u32[b, n t], a hash of each n-gram, first all of one word, then all of two and so on; 0 stands for none.
  """
  xp = tokens.__array_namespace__()
  words = tokens.astype(xp.uint32)
  key, found = xp.zeros_like(words), []
  for distance in range(n):
    earlier = xp.pad(words, ((0, 0), (distance, 0)))[:, : words.shape[1]]
    key = (key ^ earlier) * xp.uint32(0x9E3779B1)
    key = key ^ (key >> xp.uint32(15))
    # Padding is at the front, so the earliest word is the first to be missing.
    found.append(xp.where(earlier > 0, key, xp.uint32(0)))
  return xp.concatenate(found, axis=1)


def keys_of(tokens: Any, n: int) -> Any:
  """Return the n-grams of each review in ascending order and each once; otherwise as `occurrences`."""
  xp = tokens.__array_namespace__()
  keys = xp.sort(occurrences(tokens, n), axis=1)
  is_repeated = xp.pad(keys[:, 1:] == keys[:, :-1], ((0, 0), (1, 0)))
  return xp.where(is_repeated, xp.uint32(0), keys)


def find(listed: Any, keys: Any) -> tuple[Any, Any]:
  """Return the place of each key in the ascending list, and whether it is there. A key of 0 has a weight of 0."""
  place = listed.__array_namespace__().searchsorted(listed, keys, side="right") - 1
  return place, listed[place] == keys


def fit(
  tokens: np.ndarray, labels: np.ndarray, n: int, num_classes: int = 2, loss_weights: np.ndarray | float = 1.0
) -> dict[str, np.ndarray]:
  """Fit the model to training reviews.

  Args:
    tokens: int[r, t], padded at the front with 0.
    labels: int[r], below `num_classes`.
    n: number of words of the longest n-grams.
    num_classes: k. For more than two classes, there is one model per class, which tells it from all others.
    loss_weights: f[r], weights of the losses.

  Returns:
    keys u32[SIZE], in ascending order, after 0s if the reviews have fewer n-grams; weights f32[SIZE] or, for more than
    two classes, f32[SIZE, k]; bias f32[] or f32[k]. The logit of a review is the bias plus the weights of its n-grams,
    each counted once.
  """
  chunks = [keys_of(tokens[start : start + _CHUNK], n) for start in range(0, len(tokens), _CHUNK)]
  chunks = [(keys[keys > 0], np.count_nonzero(keys, axis=1)) for keys in chunks]
  keys, sizes = (np.concatenate(parts) for parts in zip(*chunks, strict=True))
  found, counts = np.unique(keys, return_counts=True)
  listed = np.sort(found[np.argsort(-counts, kind="stable")[:SIZE]])
  place, is_listed = find(listed, keys)
  rows = np.repeat(np.arange(len(tokens)), sizes)[is_listed]
  features = sparse.csr_matrix((np.ones(len(rows)), (rows, place[is_listed])), shape=(len(tokens), len(listed)))
  if num_classes == 2:
    weights, bias = _fit_one(features, labels == 1, loss_weights)
  else:
    models = [_fit_one(features, labels == label, loss_weights) for label in range(num_classes)]
    weights, bias = np.stack([each for each, _ in models], axis=1), np.stack([each for _, each in models])
  unused = SIZE - len(listed), 0
  return {
    "keys": np.pad(listed, unused),
    "weights": np.pad(weights, (unused, *[(0, 0)] * (weights.ndim - 1))),
    "bias": bias,
  }


def log_count_ratios(features: Any, is_positive: np.ndarray) -> np.ndarray:
  """Return the logarithm of how much more often positive reviews have each feature than others, f64[features]."""
  positive, negative = (1 + features.T @ (is_positive == wanted) for wanted in (True, False))
  return np.log(positive / positive.sum()) - np.log(negative / negative.sum())


def _fit_one(features: sparse.csr_matrix, is_positive: np.ndarray, loss_weights: np.ndarray | float) -> tuple[Any, Any]:
  """Fit the model that tells positive reviews from others; return weights f32[listed] and bias f32[]."""
  ratios = log_count_ratios(features, is_positive)
  signs = 2.0 * is_positive - 1

  def loss_and_slopes(parameters: np.ndarray) -> tuple[float, np.ndarray]:
    weights, bias = parameters[:-1], parameters[-1]
    margins = signs * (features @ (ratios * weights) + bias)
    slopes = -_C * loss_weights * signs * special.expit(-margins)
    loss = -_C * (loss_weights * special.log_expit(margins)).sum() + weights @ weights / 2
    return loss, np.append(ratios * (features.T @ slopes) + weights, slopes.sum())

  start, options = np.zeros(len(ratios) + 1), {"maxiter": _NUM_STEPS}
  parameters = optimize.minimize(loss_and_slopes, start, jac=True, method="L-BFGS-B", options=options).x
  return (ratios * parameters[:-1]).astype(np.float32), np.array(parameters[-1], np.float32)
