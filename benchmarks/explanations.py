"""Measure whether contributions of words are faithful: what deleting the words of a review does to the logit.

    python benchmarks/explanations.py RUN_DIR ... --archive PATH [--figure FILE]

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

SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
TABLE_SHARE, NUM_DRAWS = 0.1, 5
Scores = list[np.ndarray]


def logits_of(classifier: Classifier, split: TokenSplit) -> np.ndarray:
  """Return the logit of the second class of each review, f64[n]."""
  return classifier.program.task.ensemble(classifier.logits(split))[:, 0] / classifier.temperature


def contributions(classifier: Classifier, texts: list[str]) -> tuple[Scores, list[Any]]:
  """Return the contributions of the words that were read of each text, and the explanations."""
  found = classifier.explain(texts)
  values = [[word.contribution for word in each.words if word.contribution is not None] for each in found]
  return [np.array(each) for each in values], found


def gradient_norms(classifier: Classifier, split: TokenSplit) -> Scores:
  """Return the norm of the gradient of the network's logits by each word vector, summed over the seeds."""
  program, model = classifier.program, classifier.program.model

  def logit(inputs, params, lengths):
    def apply(module, inputs, lengths):
      return module.head(module.encode(inputs, lengths))

    found: Any = model.apply({"params": params}, inputs, lengths, method=apply)
    return found.sum()

  @jax.jit
  def norms(params, tokens, lengths):
    gradients = jax.grad(logit)(params["embedding"]["embedding"][tokens], params, lengths)
    return jax.numpy.linalg.norm(gradients, axis=2)

  found = np.zeros(split.tokens.shape)
  for seed in range(program.config.training.num_seeds):
    params = jax.tree.map(lambda leaf, seed=seed: leaf[seed], classifier.params)
    for start in range(0, len(split), 50):
      rows = np.arange(start, min(start + 50, len(split)))
      found[rows] += norms(params, *split.batch(rows, 50))[: len(rows)]
  return [row[len(row) - length :] for row, length in zip(found, split.lengths, strict=True)]


def occlusion(classifier: Classifier, split: TokenSplit, before: np.ndarray) -> Scores:
  """Return by how much the logit falls without each word."""
  found = []
  for row in range(len(split)):
    length = split.lengths[row]
    left_out = without(select(split, np.full(length, row)), [np.array([place]) for place in range(length)])
    found.append(before[row] - logits_of(classifier, left_out))
  return found


def select(split: TokenSplit, rows: np.ndarray) -> TokenSplit:
  return dataclasses.replace(split, **{name: value[rows] for name, value in vars(split).items()})


def without(split: TokenSplit, places: Scores) -> TokenSplit:
  """Return reviews without the words at some places; 0 is the first word."""
  tokens = np.zeros_like(split.tokens)
  for row, (length, deleted) in enumerate(zip(split.lengths, places, strict=True)):
    left = np.delete(split.tokens[row, split.tokens.shape[1] - length :], deleted)
    tokens[row, len(tokens[row]) - len(left) :] = left
  return dataclasses.replace(split, tokens=tokens, lengths=np.count_nonzero(tokens, axis=1).astype(np.int32))


def fall(classifier: Classifier, split: TokenSplit, before: np.ndarray, scores: Scores, share: float) -> np.ndarray:
  """Return by how much the logit of the answer falls without the words of the highest scores."""
  places = [np.argsort(-each, kind="stable")[: math.ceil(share * len(each))] for each in scores]
  return np.sign(before) * (before - logits_of(classifier, without(split, places)))


def deletion(classifier: Classifier, split: TokenSplit, before: np.ndarray, methods: dict[str, list[Scores]]) -> Any:
  """Return figures of each method: mean fall by share of the words, and of the share in the table also its spread."""
  result = {}
  for name, draws in methods.items():
    falls = {
      share: np.mean([fall(classifier, split, before, each, share) for each in draws], axis=0) for share in SHARES
    }
    main = [fall(classifier, split, before, each, TABLE_SHARE) for each in draws]
    result[name] = {
      "fall": {share: float(values.mean()) for share, values in falls.items()},
      "fall_std_error": float(falls[TABLE_SHARE].std() / math.sqrt(len(split))),
      "changed_answers": float(np.mean([values > np.abs(before) for values in main])),
    }
  return result


def correlation(ours: Scores, others: Scores) -> dict[str, float]:
  """Return quantiles over the reviews of the rank correlation between two scores of the same words."""
  found: list[Any] = [stats.spearmanr(*pair)[0] for pair in zip(ours, others, strict=True) if len(pair[0]) > 2]
  return dict(zip(("low", "median", "high"), np.quantile(found, (0.1, 0.5, 0.9)).tolist(), strict=True))


def measure(classifier: Classifier, texts: list[str], num_occluded: int) -> dict[str, Any]:
  """Return all figures of a run."""
  split, rng = classifier.encode(texts), np.random.default_rng(0)
  before = logits_of(classifier, split)
  classifier.explain(texts[:1])
  started = time.perf_counter()
  signed, explanations = contributions(classifier, texts)
  seconds = time.perf_counter() - started
  answers = np.sign(before)
  methods = {
    "contribution": [[sign * each for sign, each in zip(answers, signed, strict=True)]],
    "gradient norm": [gradient_norms(classifier, split)],
    "random": [[rng.random(len(each)) for each in signed] for _ in range(NUM_DRAWS)],
  }
  few = np.arange(min(num_occluded, len(split)))
  left_out = occlusion(classifier, select(split, few), before[few])
  few_methods = {name: [each[: len(few)] for each in draws] for name, draws in methods.items()}
  few_methods["occlusion"] = [[sign * each for sign, each in zip(answers, left_out, strict=False)]]
  random = Classifier(classifier.program, classifier.vocabulary, classifier.program.init().params, step=0)
  magnitudes = [[np.abs(each) for each in scores] for scores in (signed, contributions(random, texts)[0])]
  return {
    "run": f"{classifier.config.preset}, step {classifier.step:,}",
    "num_reviews": len(texts),
    "seconds_per_100": 100 * seconds / len(texts),
    "largest_error": max(each.error for each in explanations),
    "largest_change": max(each.change for each in explanations),
    "deletion": deletion(classifier, split, before, methods),
    "num_occluded": len(few),
    "deletion_occluded": deletion(classifier, select(split, few), before[few], few_methods),
    "correlation_with_occlusion": correlation(signed[: len(few)], left_out),
    "correlation_with_random_model": correlation(*magnitudes),
  }


def plot(results: list[dict[str, Any]], output: Path) -> None:
  from matplotlib.figure import Figure

  figure = Figure((5 * len(results), 4), layout="constrained")
  for axes, result in zip(figure.subplots(1, len(results), squeeze=False)[0], results, strict=True):
    for (name, each), style in zip(result["deletion"].items(), ("o-", "s--", "^:"), strict=True):
      axes.plot([100 * share for share in SHARES], list(each["fall"].values()), style, label=name)
    axes.set(title=result["run"], xlabel="% of the words deleted", ylabel="fall of the answer's logit")
    axes.legend()
  figure.savefig(output, dpi=120)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("run_dirs", nargs="+", type=Path)
  parser.add_argument("--archive", type=Path)
  parser.add_argument("--num-reviews", type=int, default=500)
  parser.add_argument("--num-occluded", type=int, default=200)
  parser.add_argument("--figure", type=Path)
  given = parser.parse_args()
  results, runtime = [], RuntimeConfig(platform="cpu")
  for run_dir in given.run_dirs:
    classifier = Classifier.load(run_dir, runtime=runtime)
    texts = sources.find(classifier.config.data, given.archive, default_cache_dir()).load(print)["test"].texts
    rows = np.random.default_rng(0).permutation(len(texts))[: given.num_reviews]
    results.append(measure(classifier, [texts[row] for row in rows], given.num_occluded))
    print(json.dumps(results[-1], indent=1), flush=True)
  if given.figure:
    plot(results, given.figure)


if __name__ == "__main__":
  main()
