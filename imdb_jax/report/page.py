"""The report of a run: report.html, one page without links to other files, and report.md, its text."""

import dataclasses
import re
import shlex
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from imdb_jax import plots
from imdb_jax.config import PRESETS, Config, differing_fields
from imdb_jax.data.tokenizer import Vocabulary, split_words
from imdb_jax.data.tokens import TokenSplit
from imdb_jax.errors import UsageError, printable
from imdb_jax.report import numbers
from imdb_jax.store import files, metrics_log, run_directory
from imdb_jax.store.metrics_log import METRICS, Line
from imdb_jax.task import NUM_BINS, Classification, Metrics
from imdb_jax.validation import flag

# The log of the article, docs/article.md, and the best linear model of docs/comparison.md, on the test reviews.
ARTICLE = {
  "loss": [0.4717, 0.4018, 0.3529, 0.3112, 0.2917, 0.2511, 0.1873, 0.1521, 0.1294, 0.1057],
  "accuracy": [0.7756, 0.8249, 0.8511, 0.8731, 0.8787, 0.8952, 0.9259, 0.9416, 0.9505, 0.9614],
  "val_loss": [0.3846, 0.3525, 0.3682, 0.3416, 0.3375, 0.2835, 0.2971, 0.3253, 0.3328, 0.3696],
  "val_accuracy": [0.8360, 0.8562, 0.8457, 0.8574, 0.8654, 0.8844, 0.8794, 0.8796, 0.8786, 0.8832],
}
LINEAR_ACCURACY = 0.9147
_NUM_REVIEWS, _EXCERPT, _MAX_CLASSES = 20, 4000, 20
_CHOSEN_ON = {
  "test": "chosen on the test reviews, as in the article, which flatters",
  "split": "chosen on reviews held out of training",
}

# Returns HTML for each text, with its words coloured by what they contribute.
Explain = Callable[[Sequence[str]], list[str]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answers:
  """The answers of a run's best step to the reviews of a split.

  Attributes:
    split: "test", "validation" or "train".
    reviews: n encoded reviews with labels.
    logits: f32[seeds, n, head_size], without temperature.
    temperature: by which the logits are divided.
    vocabulary: the words of the run.
    texts: the reviews as texts; None if they are not at hand.
    stars: int[n], the ratings from 1 to 10 that came with the reviews; None if unknown.
    explain: colours the words of texts; None if the model is not at hand.
  """

  split: str
  reviews: TokenSplit
  logits: np.ndarray
  temperature: float
  vocabulary: Vocabulary
  texts: Sequence[str] | None = None
  stars: np.ndarray | None = None
  explain: Explain | None = None


def write(
  config: Config,
  task: Classification,
  answers: Answers | None,
  *,
  notes: Sequence[str] = (),
  output: Path | None = None,
  figures_dir: Path | None = None,
) -> Path:
  """Write the report of a run and return its path: of report.html, with report.md beside it, or of `output` alone.

  Args:
    config: settings of the run, which has its directory.
    task: classes of the run.
    answers: what the run answers; None leaves out all that depends on it.
    notes: lines that say what is left out, and why.
    output: another file to write.
    figures_dir: existing folder for the figures as PNG and SVG; None for none.

  Raises:
    UsageError: a file of the run is damaged, or cannot be written.
  """
  history, steps = metrics_log.read(config.run_dir)
  figures, notes = _curves(config, history, steps), [*notes]
  found: dict[str, Any] = {"metrics": None}
  if answers is not None:
    found = _answered(config, task, answers, figures, notes)
  if not history:
    notes.append("The run has not finished an epoch, so there are no curves by epoch.")
  context = {"config": config, "name": printable(config.run_dir.resolve().name), "history": history, "notes": notes}
  context |= _origin(config, history) | found
  shown = {name: plots.svg(figure) for name, figure in figures.items()}
  target = output or config.run_dir / "report.html"
  try:
    files.write(target, render("run.html", **context, figures=shown))
    if output is None:
      files.write(config.run_dir / "report.md", render("run.md", **context, summary=summary(config, history)))
    for name, figure in figures.items() if figures_dir else ():
      for suffix in ("png", "svg"):
        plots.save(figure, figures_dir / f"{name}.{suffix}")
  except OSError as error:
    raise UsageError(f"{target}: cannot be written: {error}.") from error
  return target


def render(template: str, **context: Any) -> str:
  """Return a page from a template of this folder. Values are escaped in .html."""
  import jinja2

  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=jinja2.select_autoescape(),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
  )
  environment.filters |= {"percent": lambda value, digits=2: f"{100 * value:.{digits}f}%", "printable": printable}
  environment.filters |= {"decimal": metrics_log.decimal}
  return environment.get_template(template).render(metrics_names=METRICS, **context)


def val_accuracy(line: Line) -> str:
  """Return the validation accuracy; with several seeds, also their mean and sample standard deviation."""
  shown = f"val_accuracy {line['val_accuracy']:.4f}"
  values = [seed["val_accuracy"] for seed in line["seeds"]]
  if len(values) == 1:
    return shown
  spread = f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"
  return f"{shown} (ensemble), {spread} (seeds, n = {len(values)}, from {min(values):.4f} to {max(values):.4f})"


def summary(config: Config, history: list[Line]) -> list[str]:
  """Return lines about the last and the best epoch, and why a run ended before its last one; none without an epoch."""
  if not history:
    return []
  best, last, training = metrics_log.best_epoch(history), history[-1], config.training
  lines = [
    f"Last epoch: {val_accuracy(last)}",
    f"Best epoch {best['epoch']}: {val_accuracy(best)} ({_CHOSEN_ON[config.data.validation]})",
  ]
  if training.early_stopping is None or len(history) == training.epochs:
    return lines
  reason = f"none was better than epoch {best['epoch']} (--early-stopping {training.early_stopping})."
  return [f"Stopped early, after epoch {len(history)} of {training.epochs}: {reason}", *lines]


def _is_imdb(config: Config) -> bool:
  return config.data.source == "imdb" and config.data.limit is None


def _curves(config: Config, history: list[Line], steps: list[Line]) -> dict[str, Any]:
  """Return the figures by epoch and by step."""
  found: dict[str, Any] = {}
  validation = {"test": "test", "split": "held-out reviews"}[config.data.validation]
  reference = ARTICLE if config.preset == "article" and _is_imdb(config) else {}
  for name in ("accuracy", "loss") if history else ():
    found[name] = plots.metric(history, name, validation, reference)
  for name, title in (("loss", "Loss by step"), ("learning_rate", "Learning rate by step")):
    shown = [line for line in steps if name in line]
    if len(shown) > 1:
      curve = ("", [line["step"] for line in shown], [line[name] for line in shown], plots.ACCENT)
      found[f"{name}_by_step"] = plots.curves([curve], f"{title}, training", "step", "")
  return found


def _answered(
  config: Config, task: Classification, answers: Answers, figures: dict[str, Any], notes: list[str]
) -> dict[str, Any]:
  """Return the values of the page that depend on answers; add their figures, and notes of what is left out."""
  labels, reviews = answers.reviews.labels, answers.reviews
  metrics = task.evaluate(answers.logits, labels, answers.temperature)
  uncalibrated = task.evaluate(answers.logits, labels) if answers.temperature != 1 else None
  probabilities = task.probabilities(answers.logits, answers.temperature).astype(np.float64)
  is_correct = probabilities.argmax(axis=1) == labels
  _draw_scores(task, probabilities, labels, is_correct, figures, notes)
  before = task.probabilities(answers.logits).max(axis=1).astype(np.float64) if uncalibrated else None
  figures["reliability"] = _reliability(probabilities.max(axis=1), before, is_correct)
  grouped = {"length": ("Accuracy by length", "known words that the model reads", *numbers.in_ranges(reviews.lengths))}
  if answers.texts is None:
    notes.append("The texts were not at hand: reviews are shown as the words that the model reads.")
  else:
    counts = np.array([len(split_words(text, strip_html=config.data.strip_html)) for text in answers.texts])
    dropped = np.maximum(counts - reviews.lengths, 0)
    grouped["dropped"] = ("Accuracy by dropped words", "words unknown or cut off", *numbers.in_ranges(dropped))
  if answers.stars is not None:
    stars, groups = np.unique(answers.stars, return_inverse=True)
    grouped["stars"] = ("Accuracy by stars", "stars that the reviewer gave", stars.tolist(), groups)
  elif _is_imdb(config):
    notes.append("The stars were not at hand: they are in an aclImdb archive or folder, see --archive.")
  for name, (title, xlabel, names, groups) in grouped.items():
    figures[f"accuracy_by_{name}"] = plots.groups(names, numbers.accuracy_in_groups(is_correct, groups), title, xlabel)
  ordered, wrong = np.sort(probabilities, axis=1), np.flatnonzero(~is_correct)
  mistakes = wrong[np.argsort(-ordered[wrong, -1], kind="stable")][:_NUM_REVIEWS]
  unsure = np.argsort(ordered[:, -1] - ordered[:, -2], kind="stable")[:_NUM_REVIEWS]
  return {
    "metrics": metrics,
    "uncalibrated": uncalibrated,
    "split": answers.split,
    "references": _references(config, answers.split),
    "config_classes": task.classes,
    "confusion": _confusion(task, metrics),
    "mistakes": _shown(task, answers, probabilities, mistakes),
    "unsure": _shown(task, answers, probabilities, unsure),
  }


def _references(config: Config, split: str) -> list[tuple[str, float]]:
  if not _is_imdb(config) or split != "test":
    return []
  return [("Linear model (NB-SVM)", LINEAR_ACCURACY), ("The article (Keras LSTM)", ARTICLE["val_accuracy"][-1])]


def _draw_scores(
  task: Classification,
  probabilities: np.ndarray,
  labels: np.ndarray,
  is_correct: np.ndarray,
  figures: dict[str, Any],
  notes: list[str],
) -> None:
  """Add the histogram of probabilities and, of two classes, the ROC and precision–recall curves."""
  edges = np.linspace(0, 1, 41)
  if len(task.classes) > 2:
    parts = {"wrong": ~is_correct, "right": is_correct}
    values, xlabel = probabilities.max(axis=1), "probability of the answer"
    notes.append("ROC and precision–recall curves are those of two classes, so they are left out.")
  else:
    names = [printable(name)[:20] for name in task.classes]
    parts = {names[label]: labels == label for label in (0, 1)}
    values, xlabel = probabilities[:, 1], f"probability of {names[1]}"
    if 0 < labels.sum() < len(labels):
      chance = ("", [0, 1], [0, 1], plots.SOFT | {"linewidth": 1, "linestyle": ":"})
      curve = ("", *numbers.roc(values, labels == 1), plots.ACCENT)
      figures["roc"] = plots.curves([chance, curve], "ROC", "false positive rate", "true positive rate", is_unit=True)
      curve = ("", *numbers.precision_recall(values, labels == 1), plots.ACCENT)
      figures["precision_recall"] = plots.curves([curve], "Precision–recall", "recall", "precision", is_unit=True)
    else:
      notes.append("All reviews have the same label: ROC and precision–recall curves are not defined.")
  counts = {name: np.histogram(values[rows], edges)[0] for name, rows in parts.items()}
  figures["probabilities"] = plots.histogram(edges, counts, "Probabilities", xlabel)


def _reliability(confidence: np.ndarray, before: np.ndarray | None, is_correct: np.ndarray) -> Any:
  curves: list[plots.Curve] = [("", [0, 1], [0, 1], plots.SOFT | {"linewidth": 1, "linestyle": ":"})]
  if before is not None:
    style = plots.OTHER | {"marker": "o", "markersize": 3, "linewidth": 1}
    curves.append(("before temperature", *numbers.reliability(before, is_correct, NUM_BINS), style))
  style = plots.ACCENT | {"marker": "o", "markersize": 4}
  label = "after temperature" if before is not None else ""
  curves.append((label, *numbers.reliability(confidence, is_correct, NUM_BINS), style))
  return plots.curves(curves, "Reliability", "confidence", "accuracy", is_unit=True)


def _confusion(task: Classification, metrics: Metrics) -> list[list[int]] | None:
  """Return reviews by label and answer, or None for so many classes that nobody could read them."""
  found = metrics.confusion_matrix
  if len(task.classes) == 2:
    cells: Any = (metrics.true_negatives, metrics.false_positives, metrics.false_negatives, metrics.true_positives)
    found = [[*cells[:2]], [*cells[2:]]]
  return found if len(task.classes) <= _MAX_CLASSES else None


def _shown(task: Classification, answers: Answers, probabilities: np.ndarray, rows: np.ndarray) -> list[dict[str, Any]]:
  """Return some reviews with label and answer."""
  words = np.array(["", *answers.vocabulary.words], object)
  texts = [
    printable(re.sub(r"<br ?/?>", " ", answers.texts[row][: 2**14]))
    if answers.texts is not None
    else " ".join(words[answers.reviews.tokens[row][answers.reviews.tokens[row] > 0]])
    for row in rows
  ]
  coloured = answers.explain(texts) if answers.explain is not None else [None] * len(rows)
  return [
    {
      "number": int(row),
      "label": task.classes[answers.reviews.labels[row]],
      "answer": task.classes[probabilities[row].argmax()],
      "probability": float(probabilities[row].max()),
      "text": text[:_EXCERPT],
      "html": html,
    }
    for row, text, html in zip(rows, texts, coloured, strict=True)
  ]


def _origin(config: Config, history: list[Line]) -> dict[str, Any]:
  """Return what trained a run, and the commands to repeat and to use it."""
  provenance, preset = run_directory.load_provenance(config.run_dir), PRESETS.get(config.preset, PRESETS["article"])
  starts, run_dir = provenance["starts"], shlex.quote(str(config.run_dir))
  last = starts[-1] if starts else {}
  versions = last.get("versions", {})
  arguments = ["imdb-jax", "train", "--preset", preset.preset]
  for section, values in config.settings().items():
    for name, value in values.items():
      if value != preset.settings()[section][name]:
        arguments += (
          [flag(name) if value else f"--no-{flag(name)[2:]}"] if type(value) is bool else [flag(name), str(value)]
        )
  return {
    "seconds": sum(line["seconds"] for line in history),
    "evaluation_seconds": sum(line["evaluation_seconds"] for line in history),
    "best": metrics_log.best_epoch(history) if history else None,
    "chosen_on": _CHOSEN_ON[config.data.validation],
    "changes": differing_fields(preset, config),
    "devices": str(last.get("devices", "unknown"))[:80],
    "versions": {str(name)[:40]: str(each)[:40] for name, each in versions.items()} if type(versions) is dict else {},
    "digest": provenance["data_digest"][:80],
    "data": str(provenance.get("data", ""))[:200],
    "resumed_at": [str(start.get("step"))[:20] for start in starts[1:]],
    "repeat": f"{shlex.join(arguments)} --run-dir {run_dir}" if config.data.source != "python" else "",
    "use": f'imdb-jax predict {run_dir} "A text of yours."',
  }
