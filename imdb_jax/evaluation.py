"""Exact metrics over a split: every review counts once, however the last batch is padded."""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import numpy as np
import scipy.stats
from jax.sharding import Mesh

from imdb_jax import sharding
from imdb_jax.data import batches
from imdb_jax.data.tokens import TokenSplit

PredictStep = Callable[[dict, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
  """How predictions compare with labels. A ratio without a denominator (no positive predicted, say) is 0."""

  num_reviews: int
  loss: float
  accuracy: float
  precision: float
  recall: float
  f1: float
  roc_auc: float
  true_negatives: int
  false_positives: int
  false_negatives: int
  true_positives: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnsembleEvaluation(Evaluation):
  """Of the averaged probabilities of several seeds, and of each."""

  seeds: list[Evaluation]


def predict_logits(
  predict_step: PredictStep, params: dict, split: TokenSplit, mesh: Mesh, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields (rows, logits f32[rows] or f32[seeds, rows]) batch by batch.

  A batch is read after the next is dispatched, so devices never wait.
  """
  size = sharding.padded_batch_size(batch_size, mesh)
  pending = None
  for rows in batches.prediction_batches(split.lengths, batch_size=size):
    examples = sharding.put(split.gather(rows, size), sharding.over_reviews(mesh))
    dispatched = predict_step(params, examples["tokens"], examples["lengths"])
    if pending is not None:
      yield pending[0], jax.device_get(pending[1])[..., : len(pending[0])]
    pending = rows, dispatched
  if pending is not None:
    yield pending[0], jax.device_get(pending[1])[..., : len(pending[0])]


def evaluate(
  predict_step: PredictStep,
  params: dict,
  split: TokenSplit,
  mesh: Mesh,
  batch_size: int,
  on_progress: Callable[[int], None] = lambda num_reviews: None,
  num_seeds: int = 1,
) -> Evaluation:
  """Metrics over every review of a split; an `EnsembleEvaluation` where there are several seeds.

  Args:
    predict_step: from `steps.make_predict_step`.
    params: of the model.
    split: n reviews.
    mesh: devices to use.
    batch_size: reviews per step.
    on_progress: gets the number of reviews done after each batch.
    num_seeds: of params and predict_step.
  """
  logits = np.zeros((num_seeds, len(split)), np.float32)
  done = 0
  for rows, values in predict_logits(predict_step, params, split, mesh, batch_size):
    logits[:, rows] = values
    done += len(rows)
    on_progress(done)
  seeds = [summarize(of_seed, split.labels) for of_seed in logits]
  if num_seeds == 1:
    return seeds[0]
  return EnsembleEvaluation(**vars(summarize(average(logits), split.labels)), seeds=seeds)


def average(logits: np.ndarray) -> np.ndarray:
  """The logit f64[n] of the mean of the probabilities that logits [seeds, n] stand for.

  From the logarithms of p and of 1 - p, both of which are exact however certain a model is.
  """
  x = logits.astype(np.float64)
  log_p, log_not_p = -np.logaddexp(0, -x), -np.logaddexp(0, x)
  return np.logaddexp.reduce(log_p) - np.logaddexp.reduce(log_not_p)


def summarize(logits: np.ndarray, labels: np.ndarray) -> Evaluation:
  """Metrics of logits f32[n] against labels int[n]; a logit above 0 predicts a positive review."""
  x, is_positive = logits.astype(np.float64), labels == 1
  losses = np.logaddexp(0, x) - x * is_positive
  predicted = x > 0
  tp, fp = int(np.sum(predicted & is_positive)), int(np.sum(predicted & ~is_positive))
  fn, tn = int(np.sum(~predicted & is_positive)), int(np.sum(~predicted & ~is_positive))
  return Evaluation(
    num_reviews=len(x),
    loss=float(np.mean(losses)),
    accuracy=_ratio(tp + tn, len(x)),
    precision=_ratio(tp, tp + fp),
    recall=_ratio(tp, tp + fn),
    f1=_ratio(2 * tp, 2 * tp + fp + fn),
    roc_auc=_roc_auc(x, is_positive),
    true_negatives=tn,
    false_positives=fp,
    false_negatives=fn,
    true_positives=tp,
  )


def _ratio(part: int, whole: int) -> float:
  return part / whole if whole else 0.0


def _roc_auc(scores: np.ndarray, is_positive: np.ndarray) -> float:
  """The Mann-Whitney statistic: how often a positive review scores above a negative one, ties counted half."""
  num_positive = int(np.sum(is_positive))
  num_pairs = num_positive * (len(scores) - num_positive)
  rank_sum = float(np.sum(scipy.stats.rankdata(scores)[is_positive]))
  return (rank_sum - num_positive * (num_positive + 1) / 2) / num_pairs if num_pairs else 0.0
