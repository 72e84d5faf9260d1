"""The table of a comparison: its rows, for a terminal, as Markdown and as JSON, with figures."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import special

from imdb_jax import plots
from imdb_jax.comparison.results import Result
from imdb_jax.config import Config
from imdb_jax.data.reviews import CLASSES, Reviews
from imdb_jax.errors import printable
from imdb_jax.report import page as report
from imdb_jax.store import files
from imdb_jax.task import Classification, bootstrap_interval
from imdb_jax.training.console import Console

# The row that the others are compared with.
REFERENCE = "lstm"
_NUM_DISAGREEMENTS = 20

Row = dict[str, Any]


def correctness(results: Sequence[Result], labels: np.ndarray) -> np.ndarray:
  """Return for each review the share of the models that are right, f64[n]."""
  return np.mean([(np.array(result.logits) > 0) == (labels == 1) for result in results], axis=0)


def summarise(
  name: str, results: Sequence[Result], labels: np.ndarray, reference: Sequence[Result], is_copy: np.ndarray
) -> Row:
  """Return a row of the table: means over one model or more, and the sample standard deviation of their accuracies.

  `is_copy`, bool[n], marks reviews that are also among the training reviews. None is what is not defined: a spread of
  one model, a difference without reference, loss and calibration error without probabilities, an accuracy over no
  reviews, and speed if there is nothing to compute.
  """
  logits = [np.array(result.logits) for result in results]
  metrics = Classification().evaluate(np.stack(logits)[:, :, None], labels).seeds
  accuracies = [each.accuracy for each in metrics]
  is_right = correctness(results, labels)
  differences = is_right - correctness(reference, labels) if reference else None
  has_probabilities = results[0].has_probabilities
  seconds = float(np.mean([result.predict_seconds for result in results]))
  return {
    "name": name,
    "accuracies": accuracies,
    "accuracy": float(np.mean(accuracies)),
    "accuracy_without_copies": None if is_copy.all() else float(is_right[~is_copy].mean()),
    "accuracy_std": float(np.std(accuracies, ddof=1)) if len(results) > 1 else None,
    "difference": None if differences is None else float(differences.mean()),
    "interval": None if differences is None else bootstrap_interval(differences),
    "train_seconds": float(np.mean([result.train_seconds for result in results])),
    "loss": float(np.mean([each.loss for each in metrics])) if has_probabilities else None,
    "calibration_error": float(np.mean([each.calibration_error for each in metrics])) if has_probabilities else None,
    "num_parameters": results[0].num_parameters,
    "reviews_per_second": len(labels) / seconds if seconds else None,
  }


def _number(value: float) -> str:
  """Format a number with three digits, or more in front of the decimal point."""
  _, size, unit = next(each for each in ((1e6, 1e6, "M"), (1e4, 1e3, "k"), (0, 1, "")) if value >= each[0])
  scaled = value / size
  return (f"{scaled:.3g}" if scaled < 999.5 else f"{scaled:.0f}") + unit


# Heading, field of a row that is None if the cell is empty, and form of the cell. From the most important to the least:
# a narrow terminal shows the first ones.
_COLUMNS: tuple[tuple[str, str, Callable[[Row], str]], ...] = (
  ("Model", "name", lambda row: row["name"]),
  ("n", "accuracies", lambda row: str(len(row["accuracies"]))),
  ("Acc. %", "accuracy", lambda row: f"{100 * row['accuracy']:.2f}"),
  ("±", "accuracy_std", lambda row: f"{100 * row['accuracy_std']:.2f}"),
  ("vs {}", "difference", lambda row: _difference(100 * row["difference"], *row["interval"])),
  ("Train", "train_seconds", lambda row: _number(row["train_seconds"])),
  ("Loss", "loss", lambda row: f"{row['loss']:.3f}"),
  ("ECE", "calibration_error", lambda row: f"{100 * row['calibration_error']:.1f}"),
  ("Params", "num_parameters", lambda row: _number(row["num_parameters"])),
  ("Rev/s", "reviews_per_second", lambda row: _number(row["reviews_per_second"])),
)


def _difference(points: float, low: float, high: float) -> str:
  return f"{points:+.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _cells(rows: Sequence[Row], reference: str = REFERENCE) -> list[list[str]]:
  columns = [each for each in _COLUMNS if any(row[each[1]] is not None for row in rows)] if rows else _COLUMNS
  shown = [["-" if row[field] is None else form(row) for _, field, form in columns] for row in rows]
  return [[heading.format(reference) for heading, _, _ in columns], *shown]


def lines(rows: Sequence[Row], failures: Mapping[str, Any], width: int | None = None) -> list[str]:
  """Return the table as lines of at most `width` characters, except those of failures."""
  cells = _cells(rows)
  sizes = [max(map(len, column)) for column in zip(*cells, strict=True)]
  ends = np.cumsum(sizes) + 2 * np.arange(len(sizes))
  # At least name and accuracy.
  num_shown = max(int(np.sum(ends <= (width or ends[-1]))), 3)
  padded = ([first.ljust(sizes[0]), *map(str.rjust, others, sizes[1:])] for first, *others in cells)
  found = ["  ".join(row[:num_shown]) for row in padded]
  found += [f"{name.ljust(sizes[0])}  failed: {printable(str(error))}" for name, error in failures.items()]
  hidden = ", ".join(cells[0][num_shown:])
  return [*found, f"Too narrow for {hidden}: see comparison.md"] if hidden else found


def write(
  config: Config,
  results: Mapping[str, Sequence[Result]],
  failures: Mapping[str, Exception],
  splits: Mapping[str, Reviews],
  console: Console,
) -> None:
  """Print the table of the rows' results and failures, and write it and its figures into the comparison's folder."""
  run_dir, reviews, reference = config.run_dir, splits["validation"], results.get(REFERENCE, ())
  is_copy = reviews.occur_in(splits["train"])
  rows = [summarise(row, each, reviews.labels, reference, is_copy) for row, each in results.items()]
  changes = [abs(row["accuracy_without_copies"] - row["accuracy"]) for row in rows if not is_copy.all()]
  machines = sorted({printable(result.computed_on) for each in results.values() for result in each})
  split = {"test": "test reviews", "split": "reviews held out of training"}[config.data.validation]
  notes = [
    f"{len(reviews):,} {split} of {config.data.source}, after the last epoch. Acc. %: mean accuracy and its "
    "standard deviation over n models, each with its own seed.",
    f"vs {REFERENCE}: difference of accuracy in points, and its 95% interval (paired bootstrap over the reviews). "
    "ECE: expected calibration error in %, 15 bins. An SVM has no probabilities.",
    "Train: seconds, with features, word vectors or a language model, without compilation. "
    "Rev/s: reviews per second from encoded reviews to logits.",
    f"{is_copy.sum():,} of these reviews are also among the training reviews, word for word. Without them, accuracies "
    f"change by up to {100 * max(changes, default=0):.2f} points (accuracy_without_copies in comparison.json).",
    *(f"Computed on {machine}." for machine in machines),
  ]
  console.line()
  for line in (*lines(rows, failures, console.width), "", *notes):
    console.line(line)
  summary = {"source": config.data.source, "split": config.data.validation, "reference": REFERENCE}
  summary |= {"num_reviews": len(reviews), "num_copies": int(is_copy.sum()), "rows": rows, "computed_on": machines}
  failed = {row: str(error) for row, error in failures.items()}
  files.write_json(run_dir / "comparison.json", summary | {"failures": failed})
  context = {"title": "Comparison of models", "notes": notes, "failures": failures, "reference": REFERENCE}
  files.write(run_dir / "comparison.md", report.render("comparison.md", cells=_cells(rows), **context))
  text = page(rows, results, reviews.labels, lambda row: printable(reviews.texts[row][: report.MAX_TEXT]), **context)
  files.write(run_dir / "comparison.html", text)
  console.line(f"\nWritten to {run_dir}: comparison.html, .md and .json")


def page(
  rows: Sequence[Row],
  results: Mapping[str, Sequence[Result]],
  labels: np.ndarray,
  excerpt: Callable[[int], str],
  **context: Any,
) -> str:
  """Return the page about models on the same reviews, whose texts `excerpt` returns.

  `context` has the title, the notes, the failures, and the name of the reference.
  """
  # There are ten colours. The next ten models have squares instead of circles, then triangles.
  styles = {name: {"color": f"C{place % 10}", "marker": "os^"[place // 10 % 3]} for place, name in enumerate(results)}
  timed = [row for row in rows if row["train_seconds"] > 0]
  points = [(row["name"], row["train_seconds"], 100 * row["accuracy"], styles[row["name"]]) for row in timed]
  learnt = {row: [each.val_accuracy for each in models] for row, models in results.items() if models[0].val_accuracy}
  means = {row: 100 * np.mean(each, axis=0) for row, each in learnt.items()}
  curves = [(row, range(1, len(mean) + 1), mean, styles[row]) for row, mean in means.items()]
  time, epochs = ("Accuracy and training time", "seconds to train"), ("Validation accuracy by epoch", "epoch")
  figures = [plots.curves(points, *time, "accuracy (%)", "log")] if points else []
  figures += [plots.curves(curves, *epochs, "accuracy (%)")] if curves else []
  return report.render(
    "comparison.html",
    **context,
    rows=rows,
    cells=_cells(rows, context["reference"]),
    num_reviews=len(labels),
    figures=[plots.svg(figure) for figure in figures],
    disagreements=disagreements(results, labels, excerpt) if len(results) > 1 else [],
  )


def disagreements(
  results: Mapping[str, Sequence[Result]], labels: np.ndarray, excerpt: Callable[[int], str]
) -> list[dict[str, Any]]:
  """Return the reviews on which the rows disagree most: whose probabilities of "positive" vary most over the rows."""
  means = {row: special.expit([result.logits for result in each]).mean(axis=0) for row, each in results.items()}
  is_right = {row: correctness(each, labels) > 0.5 for row, each in results.items()}
  order = np.argsort(-np.std([*means.values()], axis=0), kind="stable")[:_NUM_DISAGREEMENTS]
  return [
    {
      "number": index,
      "label": CLASSES[labels[index]],
      "answers": [(row, float(mean[index]), bool(is_right[row][index])) for row, mean in means.items()],
      "text": excerpt(index),
    }
    for index in order.tolist()
  ]
