"""Measure whether contributions of words are faithful: what deleting the words of a review does to the logit.

    python benchmarks/explanations.py RUN_DIR ... --archive PATH --figure docs/explain.png

Each run has two classes. The reviews are from the test split, the same for each run.
"""

import argparse
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from scipy import stats

from imdb_jax import Classifier
from imdb_jax.config import RuntimeConfig, default_cache_dir
from imdb_jax.data import sources
from imdb_jax.data.tokens import TokenSplit
from imdb_jax.explanation import Explanation

SHARES, TABLE_SHARE, NUM_DRAWS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5), 0.1, 5
# One array per review, a number per word that the model has read.
Scores = list[np.ndarray]


def logits_of(classifier: Classifier, split: TokenSplit) -> np.ndarray:
  """Return the logit of the second class of each review, f64[n]."""
  return classifier.program.task.ensemble(classifier.logits(split))[:, 0] / classifier.temperature


def values_of(found: list[Explanation]) -> Scores:
  return [np.array([word.contribution for word in each.words if word.contribution is not None]) for each in found]


def gradient_norms(classifier: Classifier, split: TokenSplit) -> Scores:
  """Return the norm of the gradient of the network's logit by each word vector, summed over the seeds."""
  program, found = classifier.program, np.zeros(split.tokens.shape)

  def logit(inputs, params, lengths):
    def apply(module, inputs, lengths):
      return module.head(module.encode(inputs, lengths))

    logits: Any = program.model.apply({"params": params}, inputs, lengths, method=apply)
    return logits.sum()

  @jax.jit
  def norms(params, tokens, lengths):
    gradients = jax.grad(logit)(params["embedding"]["embedding"][tokens], params, lengths)
    return jax.numpy.linalg.norm(gradients, axis=2)

  for seed in range(program.config.training.num_seeds):
    params = jax.tree.map(lambda leaf, seed=seed: leaf[seed], classifier.params)
    for rows in np.split(np.arange(len(split)), range(50, len(split), 50)):
      found[rows] += norms(params, *split.batch(rows, 50))[: len(rows)]
  return [row[len(row) - length :] for row, length in zip(found, split.lengths, strict=True)]


def occlusion(classifier: Classifier, split: TokenSplit, before: np.ndarray) -> Scores:
  """Return by how much the logit falls without each word."""
  found = []
  for row, length in enumerate(split.lengths):
    copies = select(split, np.full(length, row))
    found.append(before[row] - logits_of(classifier, without(copies, [np.array([i]) for i in range(length)])))
  return found


def select(split: TokenSplit, rows: np.ndarray) -> TokenSplit:
  return dataclasses.replace(split, **{name: value[rows] for name, value in vars(split).items()})


def without(split: TokenSplit, places: Scores) -> TokenSplit:
  """Return reviews without the words at some places; 0 is the first word."""
  tokens = np.zeros_like(split.tokens)
  for row, (length, deleted) in enumerate(zip(split.lengths, places, strict=True)):
    left = np.delete(split.tokens[row, tokens.shape[1] - length :], deleted)
    tokens[row, tokens.shape[1] - len(left) :] = left
  return dataclasses.replace(split, tokens=tokens, lengths=np.count_nonzero(tokens, axis=1).astype(np.int32))


def deletion(classifier: Classifier, split: TokenSplit, before: np.ndarray, draws: list[Scores]) -> dict[str, Any]:
  """Return by how much the logit of the answer falls without the words of the highest scores, a mean over draws."""
  result: dict[str, Any] = {"fall": {}}
  for share in SHARES:
    places = [[np.argsort(-each, kind="stable")[: math.ceil(share * len(each))] for each in scores] for scores in draws]
    after = [logits_of(classifier, without(split, each)) for each in places]
    falls = np.array([np.sign(before) * (before - each) for each in after])
    result["fall"][share] = float(falls.mean())
    if share == TABLE_SHARE:
      result["standard_error"] = float(falls.mean(axis=0).std() / math.sqrt(len(split)))
      result["changed_answers"] = float(np.mean(falls > np.abs(before)))
  return result


def correlation(ours: Scores, others: Scores) -> list[float]:
  """Return the 10%, 50% and 90% quantiles over the reviews of the rank correlation of two scores of the same words."""
  found: list[Any] = [stats.spearmanr(*pair)[0] for pair in zip(ours, others, strict=True) if len(pair[0]) > 2]
  return np.quantile(found, (0.1, 0.5, 0.9)).tolist()


def measure(classifier: Classifier, texts: list[str], num_occluded: int) -> dict[str, Any]:
  """Return all figures of a run."""
  split, rng = classifier.encode(texts), np.random.default_rng(0)
  before, few = logits_of(classifier, split), np.arange(min(num_occluded, len(split)))
  classifier.explain(texts[:1])
  started = time.perf_counter()
  explanations = classifier.explain(texts)
  seconds, ours = time.perf_counter() - started, values_of(explanations)
  left_out = occlusion(classifier, select(split, few), before[few])
  untrained = Classifier(classifier.program, classifier.vocabulary, classifier.program.init().params, step=0)
  random = values_of(untrained.explain(texts))
  signed, signed_left_out = (
    [sign * each for sign, each in zip(np.sign(before), scores, strict=False)] for scores in (ours, left_out)
  )
  methods = {"contribution": [signed], "gradient norm": [gradient_norms(classifier, split)]}
  methods["random"] = [[rng.random(len(each)) for each in ours] for _ in range(NUM_DRAWS)]
  some = {"contribution": [signed[: len(few)]], "occlusion": [signed_left_out]}
  return {
    "run": f"{classifier.config.preset}, step {classifier.step:,}",
    "num_reviews": len(texts),
    "seconds_per_100": 100 * seconds / len(texts),
    "largest_error": max(each.error for each in explanations),
    "not_exact": sum(each.change > 0.02 for each in explanations),
    "deletion": {name: deletion(classifier, split, before, draws) for name, draws in methods.items()},
    "num_occluded": len(few),
    "deletion_occluded": {
      name: deletion(classifier, select(split, few), before[few], draws) for name, draws in some.items()
    },
    "correlation_with_occlusion": correlation(ours[: len(few)], left_out),
    "correlation_with_untrained": correlation(ours, random),
    "correlation_of_magnitudes_with_untrained": correlation(*([*map(np.abs, each)] for each in (ours, random))),
  }


def plot(results: list[dict[str, Any]], output: Path) -> None:
  from matplotlib.figure import Figure

  figure = Figure((4.5 * len(results), 3.8), layout="constrained")
  for axes, result in zip(figure.subplots(1, len(results), squeeze=False)[0], results, strict=True):
    for (name, each), style in zip(result["deletion"].items(), ("o-", "s--", "^:"), strict=True):
      axes.plot([100 * share for share in SHARES], list(each["fall"].values()), style, label=name)
    axes.set(title=result["run"], xlabel="% of the words deleted", ylabel="fall of the answer's logit")
    axes.legend()
  figure.savefig(output, dpi=100)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("run_dirs", nargs="+", type=Path)
  parser.add_argument("--archive", type=Path)
  parser.add_argument("--num-reviews", type=int, default=500)
  parser.add_argument("--num-occluded", type=int, default=200)
  parser.add_argument("--figure", type=Path)
  given, results = parser.parse_args(), []
  for run_dir in given.run_dirs:
    classifier = Classifier.load(run_dir, runtime=RuntimeConfig(platform="cpu"))
    texts = sources.find(classifier.config.data, given.archive, default_cache_dir()).load(print)["test"].texts
    rows = np.random.default_rng(0).permutation(len(texts))[: given.num_reviews]
    results.append(measure(classifier, [texts[row] for row in rows], given.num_occluded))
    print(json.dumps(results[-1], indent=1), flush=True)
  if given.figure:
    plot(results, given.figure)


if __name__ == "__main__":
  main()
