"""The learning task: size of the head, loss and metrics."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import optimize, special

# Bins of the calibration error, from 0 to 1. The confidence of the predicted class is never below 0.5.
_NUM_BINS = 15
_NUM_RESAMPLES = 2000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metrics:
  """Predictions compared with labels. A ratio with denominator 0 (no positive predicted, say) is 0.

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
  roc_auc: float
  true_negatives: int
  false_positives: int
  false_negatives: int
  true_positives: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation(Metrics):
  """Metrics of the ensemble, which averages the probabilities of its seeds or runs, and of each of these."""

  seeds: list[Metrics]


class Sentiment:
  """Binary classification with one logit: positive means a positive review.

  Seeds answer with their mean probability, whose logit is divided by a temperature: 1, or one that `calibrate` has
  chosen.

  Attributes:
    head_size: logits per review.
    monitor: the metric by which the best checkpoint is chosen; higher is better.
  """

  head_size = 1
  monitor = "accuracy"

  def sums(self, logits: jax.Array, labels: jax.Array, weights: jax.Array) -> dict[str, jax.Array]:
    """Return sums over a batch; dividing by `weight` gives means.

    Args:
      logits: f32[b, 1].
      labels: f32[b], 0 or 1.
      weights: f32[b]; a review of weight 0 changes nothing.

    Returns:
      f32[] each: loss (binary cross-entropy), correct, weight.
    """
    losses = optax.sigmoid_binary_cross_entropy(logits[:, 0], labels)
    is_correct = (logits[:, 0] > 0) == (labels > 0.5)
    return {
      "loss": jnp.sum(losses * weights),
      "correct": jnp.sum(jnp.where(is_correct, weights, 0)),
      "weight": jnp.sum(weights),
    }

  def ensemble(self, logits: np.ndarray) -> np.ndarray:
    """Return the logits f64[n, 1] of the mean probability over the seeds, from logits [seeds, n, 1].

    It averages in log space, which is exact however certain a model is.
    """
    x = logits.astype(np.float64)
    return special.logsumexp(special.log_expit(x), axis=0) - special.logsumexp(special.log_expit(-x), axis=0)

  def probabilities(self, logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Return the probability of each class, f32[n, 2], from logits [seeds, n, 1]."""
    x = self.ensemble(logits)[:, 0] / temperature
    return special.expit(np.stack([-x, x], axis=1)).astype(np.float32)

  def calibrate(self, logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the temperature that minimises the loss on reviews that the model was not trained on (Guo et al. 2017).

    It is from 1/20 to 20. Arguments as for `evaluate`.
    """
    x = np.where(labels == 1, 1, -1) * self.ensemble(logits)[:, 0]
    found = optimize.minimize_scalar(
      lambda log: -np.mean(special.log_expit(x * np.exp(-log))), bounds=(-np.log(20), np.log(20)), method="bounded"
    )
    return float(np.exp(found.x))

  def evaluate(self, logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> Evaluation:
    """Return the metrics of logits [seeds, n, 1] against labels int[n]; those of single seeds without temperature."""
    seeds = [_metrics(seed[:, 0].astype(np.float64), labels == 1) for seed in logits]
    return Evaluation(**vars(_metrics(self.ensemble(logits)[:, 0] / temperature, labels == 1)), seeds=seeds)


def bootstrap_interval(values: np.ndarray) -> list[float]:
  """Return a 95% interval of the mean of f64[n], from resamples of the reviews (percentile bootstrap, fixed seed)."""
  # Few values are distinct. How often a resample has each of them is multinomial, which is quick to draw.
  distinct, counts = np.unique(values, return_counts=True)
  drawn = np.random.default_rng(0).multinomial(len(values), counts / len(values), size=_NUM_RESAMPLES)
  return np.quantile(drawn @ distinct / len(values), (0.025, 0.975)).tolist()


def _metrics(logits: np.ndarray, is_positive: np.ndarray) -> Metrics:
  tn, fp, fn, tp = np.bincount(2 * is_positive + (logits > 0), minlength=4).tolist()
  return Metrics(
    num_reviews=len(logits),
    loss=float(np.mean(-special.log_expit(np.where(is_positive, logits, -logits)))),
    calibration_error=_calibration_error(logits, is_positive),
    accuracy=_ratio(tp + tn, len(logits)),
    accuracy_interval=bootstrap_interval((logits > 0) == is_positive),
    precision=_ratio(tp, tp + fp),
    recall=_ratio(tp, tp + fn),
    f1=_ratio(2 * tp, 2 * tp + fp + fn),
    roc_auc=_roc_auc(logits[is_positive], logits[~is_positive]),
    true_negatives=tn,
    false_positives=fp,
    false_negatives=fn,
    true_positives=tp,
  )


def _calibration_error(logits: np.ndarray, is_positive: np.ndarray) -> float:
  confidence, is_correct = special.expit(np.abs(logits)), (logits > 0) == is_positive
  # A bin includes its upper end.
  bins = np.ceil(confidence * _NUM_BINS).astype(np.int64)
  return float(np.abs(np.bincount(bins, is_correct - confidence)).sum() / len(logits))


def _ratio(part: float, whole: float) -> float:
  return part / whole if whole else 0.0


def _roc_auc(positive: np.ndarray, negative: np.ndarray) -> float:
  """Return the Mann-Whitney statistic: how often a positive review scores above a negative one; ties count half."""
  ordered = np.sort(negative)
  below, up_to = (np.searchsorted(ordered, positive, side) for side in ("left", "right"))
  return _ratio(float(np.sum(below + up_to)) / 2, len(positive) * len(negative))
