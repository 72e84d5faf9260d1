"""Finished runs: the page about one, or the page that compares several on the same reviews, for `imdb-jax report`."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from imdb_jax.comparison import table
from imdb_jax.comparison.results import Result
from imdb_jax.errors import DataError, UsageError, printable, reraise_as
from imdb_jax.prediction import Classifier
from imdb_jax.report import page
from imdb_jax.store import files, metrics_log


def write(
  classifiers: Sequence[Classifier],
  split: str,
  report: Callable[[str], None],
  output: Path | None = None,
  figures_dir: Path | None = None,
) -> Path:
  """Write the page about a step of a run, or of several, on a split of their reviews; return its path.

  Raises:
    UsageError: several runs have more than two classes, or a file cannot be written.
    DataError: reviews to compare runs on are not at hand, or differ.
  """
  first, *others = classifiers
  if not others:
    answers, notes = first.answers(split, report)
    return page.write(first.config, first.program.task, answers, notes, output, figures_dir)
  if len(first.classes) > 2:
    raise UsageError(f"{first.config.run_dir}: runs with more than two classes are reported one by one.")
  found, results = [], {}
  for each in classifiers:
    run_dir = each.config.run_dir
    answers, notes = each.answers(split, report)
    if answers is None:
      raise DataError(f"{run_dir}: {notes[0]}")
    found.append(answers)
    if not np.array_equal(answers.encoded.labels, found[0].encoded.labels):
      raise DataError(f"{run_dir}: the reviews of this split are not those of the first run.")
    history, name = metrics_log.read(run_dir)[0], printable(run_dir.resolve().name)
    results[printable(str(run_dir)) if name in results else name] = [
      Result(
        logits=(each.program.task.ensemble(answers.logits)[:, 0] / answers.temperature).tolist(),
        num_parameters=each.num_parameters,
        train_seconds=sum(line["seconds"] for line in history),
        val_accuracy=[line["val_accuracy"] for line in history],
      )
    ]
  reference, labels = next(iter(results)), found[0].encoded.labels
  is_copy = np.zeros(len(labels), bool)
  rows = [table.summarise(name, each, labels, results[reference], is_copy) for name, each in results.items()]
  steps = ", ".join(f"{name}: {answers.step:,}" for name, answers in zip(results, found, strict=True))
  note = (
    f"{len(labels):,} {split} reviews, answered by these steps of the runs: {steps}. vs {reference}: difference of "
    "accuracy in points, and its 95% interval (paired bootstrap over the reviews). Train: seconds."
  )
  context = {"title": f"{len(results)} runs", "notes": [note], "failures": {}, "reference": reference}
  output = output or Path("comparison.html")
  with reraise_as(UsageError, f"--output {output}: cannot be written"):
    files.write(output, table.page(rows, results, labels, lambda row: page.excerpt(found[0], row), **context))
  return output
