"""The learning task: size of the head, loss and metrics."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import optimize, special

from imdb_jax.data.reviews import CLASSES
from imdb_jax.errors import UsageError, printable

# Bins of the calibration error, from 0 to 1.
_NUM_BINS = 15
_NUM_RESAMPLES = 2000
# Standard deviation of the prior of a temperature's logarithm.
_LOG_TEMPERATURE_STD = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metrics:
  """Predictions compared with labels. A ratio with denominator 0 (no positive predicted, say) is 0.

  For two classes, precision, recall and F1 are those of the second one. For more, they are means over the classes, and
  `confusion_matrix` has a row per label and a column per prediction.

  `calibration_error` tells by how much confidence and accuracy differ: the expected calibration error of Guo et al.
  2017, equation 3, with 15 bins of equal width. `accuracy_interval` is from `bootstrap_interval`.
  """

  num_reviews: int
  loss: float
  calibration_error: float
  accuracy: float
  accuracy_interval: list[float]
  precision: float
  recall: float
  f1: float
  roc_auc: float | None = None
  true_negatives: int | None = None
  false_positives: int | None = None
  false_negatives: int | None = None
  true_positives: int | None = None
  confusion_matrix: list[list[int]] | None = None
  by_class: list[dict[str, Any]] | None = None

  def figures(self) -> dict[str, Any]:
    """Return those that are defined for the number of classes, by name."""
    return {name: value for name, value in vars(self).items() if value is not None and name != "seeds"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation(Metrics):
  """Metrics of the ensemble, which averages the probabilities of its seeds or runs, and of each of these."""

  seeds: list[Metrics] = dataclasses.field(default_factory=list)


class Classification:
  """Classification into two classes, with one logit (positive means the second), or into more, with one logit each.

  Seeds answer with their mean probability, whose logits are divided by a temperature: 1, or one that `calibrate` has
  chosen.

  Attributes:
    classes: names of the k classes.
    head_size: logits per review: h is 1 for two classes, else k.
    monitor: the metric by which the best checkpoint is chosen; higher is better.
  """

  monitor = "accuracy"

  def __init__(self, classes: tuple[str, ...] = CLASSES):
    self.classes = classes
    self.head_size = 1 if len(classes) == 2 else len(classes)

  def loss_weights(self, labels: np.ndarray, wanted: str) -> np.ndarray:
    """Return weights f64[n] of the losses of training reviews with labels int[n].

    They are 1 for "none"; for "balanced", in inverse proportion to the size of the class, with a mean of 1; or given by
    class, as in "spam=3,ham=0.5", and 1 for others. Raises UsageError for anything else, or an unknown class.
    """
    if wanted == "none":
      return np.ones(len(labels))
    if wanted == "balanced":
      counts = np.bincount(labels, minlength=len(self.classes))
      return len(labels) / (np.count_nonzero(counts) * counts[labels])
    weights = np.ones(len(self.classes))
    for part in wanted.split(","):
      name, _, weight = part.rpartition("=")
      if name not in self.classes or not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", weight):
        known = ", ".join(map(printable, self.classes[:10]))
        raise UsageError(
          f"--class-weights {wanted!r:.80}: must be none, balanced, or NAME=WEIGHT,... with weights from 0 to 999,999 "
          f"and names of classes ({known}{', ...' if len(self.classes) > 10 else ''})."
        )
      weights[self.classes.index(name)] = float(weight)
    return weights[labels]

  def sums(
    self, logits: jax.Array, labels: jax.Array, weights: jax.Array, loss_weights: jax.Array
  ) -> dict[str, jax.Array]:
    """Return sums over a batch, f32[] each: loss (cross-entropy), correct, weight; dividing by the last gives means.

    The logits are f32[b, h] and the labels i32[b]. A review whose entry in `weights`, f32[b], is 0 changes nothing.
    `loss_weights`, f32[b], are further weights of the losses.
    """
    if self.head_size == 1:
      losses = optax.sigmoid_binary_cross_entropy(logits[:, 0], labels.astype(jnp.float32))
      is_correct = (logits[:, 0] > 0) == (labels > 0)
    else:
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
      is_correct = jnp.argmax(logits, axis=1) == labels
    return {
      "loss": jnp.sum(losses * loss_weights * weights),
      "correct": jnp.sum(jnp.where(is_correct, weights, 0)),
      "weight": jnp.sum(weights),
    }

  def ensemble(self, logits: np.ndarray) -> np.ndarray:
    """Return the logits f64[n, h] of the mean probability over the seeds, from logits [seeds, n, h].

    It averages in log space, which is exact however certain a model is. Of several classes, the logits are log
    probabilities.
    """
    x = logits.astype(np.float64)
    if self.head_size > 1:
      return special.logsumexp(special.log_softmax(x, axis=2), axis=0) - np.log(len(x))
    return special.logsumexp(special.log_expit(x), axis=0) - special.logsumexp(special.log_expit(-x), axis=0)

  def probabilities(self, logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Return the probability of each class, f32[n, k], from logits [seeds, n, h]."""
    return self._probabilities(self.ensemble(logits) / temperature).astype(np.float32)

  def traced_log_odds(self, logits: jax.Array, temperature: jax.Array, labels: jax.Array) -> jax.Array:
    """Return log p - log (1 - p), f32[n], for the probability p of each label i32[n]."""
    x = self.traced_ensemble(logits) / temperature
    is_label = jnp.arange(len(self.classes))[None] == labels[:, None]
    return jnp.sum(jnp.where(is_label, x, 0), axis=1) - jax.nn.logsumexp(jnp.where(is_label, -jnp.inf, x), axis=1)

  def traced_ensemble(self, logits: jax.Array) -> jax.Array:
    """Return logits f32[n, k] of the mean probability over the seeds."""
    if self.head_size == 1:
      logits = jnp.concatenate([jnp.zeros_like(logits), logits], axis=2)
    return jax.nn.logsumexp(jax.nn.log_softmax(logits), axis=0)

  def calibrate(self, logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the temperature that minimises the loss on reviews that the model was not trained on (Guo et al. 2017).

    The logarithm of the temperature has a normal prior around 0, which only a few reviews cannot outweigh: if all
    answers are right, the loss alone would demand full certainty. It is from 1/20 to 20. Arguments as for `evaluate`.
    """
    x = self.ensemble(logits)

    def loss(log: float) -> float:
      return self._loss(x * np.exp(-log), labels) + (log / _LOG_TEMPERATURE_STD) ** 2 / (2 * len(labels))

    found: Any = optimize.minimize_scalar(loss, bounds=(-np.log(20), np.log(20)), method="bounded")
    return float(np.exp(found.x))

  def evaluate(self, logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> Evaluation:
    """Return the metrics of logits [seeds, n, h] against labels int[n]; those of single seeds without temperature."""
    seeds = [self._metrics(seed.astype(np.float64), labels) for seed in logits]
    return Evaluation(**vars(self._metrics(self.ensemble(logits) / temperature, labels)), seeds=seeds)

  def _probabilities(self, x: np.ndarray) -> np.ndarray:
    """Return probabilities f64[n, k] of logits f64[n, h]."""
    return special.expit(np.concatenate([-x, x], axis=1)) if self.head_size == 1 else special.softmax(x, axis=1)

  def _loss(self, x: np.ndarray, labels: np.ndarray) -> float:
    if self.head_size == 1:
      return float(-np.mean(special.log_expit(np.where(labels == 1, x[:, 0], -x[:, 0]))))
    return float(-np.mean(special.log_softmax(x, axis=1)[np.arange(len(x)), labels]))

  def _metrics(self, x: np.ndarray, labels: np.ndarray) -> Metrics:
    size, confidence = len(self.classes), self._probabilities(x).max(axis=1)
    predicted = x[:, 0] > 0 if self.head_size == 1 else x.argmax(axis=1)
    mean, accuracy, shares = reliability(confidence, predicted == labels)
    matrix = np.bincount(size * labels + predicted, minlength=size**2).reshape(size, size)
    hits, found, actual = matrix.diagonal(), matrix.sum(axis=0), matrix.sum(axis=1)
    ratios = {"precision": _ratio(hits, found), "recall": _ratio(hits, actual), "f1": _ratio(2 * hits, found + actual)}
    common: Any = {
      "num_reviews": len(labels),
      "loss": self._loss(x, labels),
      "calibration_error": float(shares @ np.abs(mean - accuracy)),
      "accuracy": float(hits.sum() / len(labels)),
      "accuracy_interval": bootstrap_interval(predicted == labels),
    }
    if self.head_size == 1:
      names = ("true_negatives", "false_positives", "false_negatives", "true_positives")
      common |= zip(names, matrix.ravel().tolist(), strict=True)
      common |= {name: float(each[1]) for name, each in ratios.items()}
      roc_auc = _roc_auc(x[labels == 1, 0], x[labels != 1, 0])
      return Metrics(**common, roc_auc=roc_auc)
    columns = [self.classes, actual.tolist(), *(each.tolist() for each in ratios.values())]
    by_class = [dict(zip(("class", "num_reviews", *ratios), row, strict=True)) for row in zip(*columns, strict=True)]
    common |= {name: float(each.mean()) for name, each in ratios.items()}
    return Metrics(**common, confusion_matrix=matrix.tolist(), by_class=by_class)


def bootstrap_interval(values: np.ndarray) -> list[float]:
  """Return a 95% interval of the mean of f64[n], from resamples of the reviews (percentile bootstrap, fixed seed)."""
  # Few values are distinct. How often a resample has each of them is multinomial, which is quick to draw.
  distinct, counts = np.unique(values, return_counts=True)
  drawn = np.random.default_rng(0).multinomial(len(values), counts / len(values), size=_NUM_RESAMPLES)
  return np.quantile(drawn @ distinct / len(values), (0.025, 0.975)).tolist()


def reliability(confidence: np.ndarray, is_correct: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Return mean confidence, accuracy and share of each of 15 bins that has reviews (Guo et al. 2017, figure 1)."""
  # A bin includes its upper end.
  bins = np.ceil(confidence * _NUM_BINS).astype(np.int64)
  used, counts = np.unique(bins, return_counts=True)
  mean, accuracy = (np.bincount(bins, values)[used] / counts for values in (confidence, is_correct))
  return mean, accuracy, counts / len(bins)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
  return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)


def _roc_auc(positive: np.ndarray, negative: np.ndarray) -> float:
  """Return the Mann-Whitney statistic: how often a positive review scores above a negative one; ties count half."""
  ordered = np.sort(negative)
  below, up_to = (np.searchsorted(ordered, positive, side) for side in ("left", "right"))
  num_pairs = len(positive) * len(negative)
  return float(np.sum(below + up_to)) / 2 / num_pairs if num_pairs else 0.0
