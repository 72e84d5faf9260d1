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
from imdb_jax.config import Config, differing_fields
from imdb_jax.data.reviews import Reviews
from imdb_jax.data.tokenizer import Vocabulary
from imdb_jax.data.tokens import TokenSplit
from imdb_jax.errors import UsageError, printable, reraise_as
from imdb_jax.presets import PRESETS
from imdb_jax.report import numbers
from imdb_jax.store import files, metrics_log, run_directory
from imdb_jax.task import Classification, reliability
from imdb_jax.validation import flag

# The article's log (docs/article.md), and the best linear model of docs/comparison.md, on the 25,000 test reviews.
ARTICLE = {
  "loss": [0.4717, 0.4018, 0.3529, 0.3112, 0.2917, 0.2511, 0.1873, 0.1521, 0.1294, 0.1057],
  "accuracy": [0.7756, 0.8249, 0.8511, 0.8731, 0.8787, 0.8952, 0.9259, 0.9416, 0.9505, 0.9614],
  "val_loss": [0.3846, 0.3525, 0.3682, 0.3416, 0.3375, 0.2835, 0.2971, 0.3253, 0.3328, 0.3696],
  "val_accuracy": [0.8360, 0.8562, 0.8457, 0.8574, 0.8654, 0.8844, 0.8794, 0.8796, 0.8786, 0.8832],
}
_REFERENCES = {"Linear model (NB-SVM)": 0.9147, "The article (Keras LSTM)": ARTICLE["val_accuracy"][-1]}
_NUM_REVIEWS, MAX_TEXT = 20, 4000
_CHOSEN_ON = {
  "test": "chosen on the test reviews, as in the article, which flatters",
  "split": "chosen on reviews held out of training",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answers:
  """The answers of a step of a run to the reviews of a split.

  Attributes:
    step: training steps done.
    split: "test", "validation" or "train".
    encoded: n encoded reviews with labels.
    logits: f32[seeds, n, head_size], without temperature.
    temperature: by which the logits are divided.
    vocabulary: the words of the run.
    reviews: the same reviews as texts; None if they are not at hand.
    explain: returns HTML for each text, with its words coloured; None if the model is not at hand.
  """

  step: int
  split: str
  encoded: TokenSplit
  logits: np.ndarray
  temperature: float
  vocabulary: Vocabulary
  reviews: Reviews | None = None
  explain: Callable[[Sequence[str]], list[str]] | None = None


def write(
  config: Config,
  task: Classification,
  answers: Answers | None,
  notes: Sequence[str] = (),
  output: Path | None = None,
  figures_dir: Path | None = None,
) -> Path:
  """Write report.html and report.md into the directory of a run, or `output` alone; return the path of the page.

  Without answers, all that depends on them is left out. `notes` are lines that say what else is left out, and why.
  Into `figures_dir`, an existing folder, the figures are written as PNG and SVG. Raises UsageError if a file of the run
  is damaged, or cannot be written.
  """
  history, steps = metrics_log.read(config.run_dir)
  notes, figures = [*notes], _curves(config, history, steps)
  preset = PRESETS.get(config.preset, PRESETS["article"])
  context = {
    "config": config,
    "name": printable(config.run_dir.resolve().name),
    "history": history,
    "best": metrics_log.best_epoch(history) if history else None,
    "summary": summary(config, history),
    "chosen_on": _CHOSEN_ON[config.data.validation],
    "changes": differing_fields(preset, config),
    "command": _command(config, preset),
    "run_dir": shlex.quote(str(config.run_dir)),
    "provenance": run_directory.load_provenance(config.run_dir),
    "classes": task.classes,
    "notes": notes,
    "metrics": None,
  }
  context |= _answered(config, task, answers, figures, notes) if answers else {}
  target = output or config.run_dir / "report.html"
  with reraise_as(UsageError, f"{target}: cannot be written"):
    shown = {name: plots.svg(figure) for name, figure in figures.items()}
    files.write(target, render("run.html", **context, figures=shown))
    if output is None:
      files.write(config.run_dir / "report.md", render("run.md", **context))
      if history:
        plots.save(plots.history(history, config.run_dir.resolve().name), config.run_dir / "history.png")
    for name, figure in figures.items() if figures_dir else ():
      for suffix in ("png", "svg"):
        plots.save(figure, Path(str(figures_dir), f"{name}.{suffix}"))
  return target


def notebook(run_dir: Path) -> str:
  """Return table and curves of a run as HTML for a notebook."""
  config, (history, _) = run_directory.load_config(run_dir), metrics_log.read(run_dir)
  curves = plots.svg(plots.history(history)) if history else ""
  return render("notebook.html", history=history, curves=curves, summary=summary(config, history))


def render(template: str, **context: Any) -> str:
  """Return a page from a template of this folder. Values are escaped in .html."""
  import jinja2

  loader = jinja2.FileSystemLoader(Path(__file__).parent)
  environment = jinja2.Environment(
    loader=loader, autoescape=jinja2.select_autoescape(), undefined=jinja2.StrictUndefined
  )
  environment.trim_blocks = environment.lstrip_blocks = environment.keep_trailing_newline = True
  environment.filters |= {"printable": printable, "decimal": metrics_log.decimal}
  environment.filters["percent"] = lambda value, digits=2: f"{100 * value:.{digits}f}%"
  return environment.get_template(template).render(metrics_names=metrics_log.METRICS, **context)


def _val_accuracy(line: metrics_log.Line) -> str:
  """Return the validation accuracy; with several seeds, also their mean and sample standard deviation."""
  shown = f"val_accuracy {line['val_accuracy']:.4f}"
  values = [seed["val_accuracy"] for seed in line["seeds"]]
  if len(values) == 1:
    return shown
  spread = f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"
  return f"{shown} (ensemble), {spread} (seeds, n = {len(values)}, from {min(values):.4f} to {max(values):.4f})"


def summary(config: Config, history: list[metrics_log.Line]) -> list[str]:
  """Return lines about the last and the best epoch, and why a run ended before its last one; none without an epoch."""
  if not history:
    return []
  best, last, training = metrics_log.best_epoch(history), history[-1], config.training
  best_line = f"Best epoch {best['epoch']}: {_val_accuracy(best)} ({_CHOSEN_ON[config.data.validation]})"
  lines = [f"Last epoch: {_val_accuracy(last)}", best_line]
  if training.early_stopping is None or len(history) == training.epochs:
    return lines
  reason = f"none was better than epoch {best['epoch']} (--early-stopping {training.early_stopping})."
  return [f"Stopped early, after epoch {len(history)} of {training.epochs}: {reason}", *lines]


def _command(config: Config, preset: Config) -> str:
  """Return the command that trains a run again."""
  arguments = ["imdb-jax", "train", "--preset", preset.preset]
  for section, values in config.settings().items():
    for name, value in values.items():
      if value != preset.settings()[section][name]:
        if type(value) is bool:
          arguments.append(flag(name) if value else f"--no-{flag(name)[2:]}")
        else:
          arguments += [flag(name), str(value)]
  return shlex.join([*arguments, "--run-dir", str(config.run_dir)])


def _is_imdb(config: Config) -> bool:
  return config.data.source == "imdb" and config.data.limit is None


def _curves(config: Config, history: list[metrics_log.Line], steps: list[metrics_log.Line]) -> dict[str, Any]:
  """Return the figures by epoch and by step."""
  validation = {"test": "test", "split": "held-out reviews"}[config.data.validation]
  reference = ARTICLE if config.preset == "article" and _is_imdb(config) else {}
  names = ("accuracy", "loss") if history else ()
  found = {name: plots.history(history, "", validation, reference, [name]) for name in names}
  for name in ("loss", "learning_rate"):
    if points := [(line["step"], line[name]) for line in steps if name in line]:
      title = f"{name.replace('_', ' ').capitalize()} by step, training"
      found[f"{name}_by_step"] = plots.curves([("", *zip(*points, strict=True), plots.ACCENT)], title, "step", "")
  return found


def _answered(
  config: Config, task: Classification, answers: Answers, figures: dict[str, Any], notes: list[str]
) -> dict[str, Any]:
  """Return the values of the page that depend on answers; add their figures, and notes of what is left out."""
  reviews, lengths, labels = answers.reviews, answers.encoded.lengths, answers.encoded.labels
  temperatures = {"after temperature": answers.temperature, "before": 1.0}
  if answers.temperature == 1:
    temperatures = {"": 1.0}
  metrics = [task.evaluate(answers.logits, labels, each) for each in temperatures.values()]
  found = [task.probabilities(answers.logits, each).astype(np.float64) for each in temperatures.values()]
  probabilities, is_correct = found[0], found[0].argmax(axis=1) == labels
  _draw_scores(task, probabilities, labels, is_correct, figures, notes)
  curves = [
    (label, *reliability(each.max(axis=1), is_correct)[:2], style | {"marker": "o", "markersize": 4})
    for label, each, style in zip(temperatures, found, (plots.ACCENT, plots.OTHER), strict=False)
  ]
  figures["reliability"] = plots.curves(curves, "Reliability", "confidence", "accuracy", "diagonal")
  grouped = {"length": ("known words that the model reads", *numbers.in_ranges(lengths))}
  if reviews is None:
    notes.append("Texts: not at hand here. Reviews are shown as the words that the model reads.")
  else:
    counts = [len(answers.vocabulary.split(text)) for text in reviews.texts]
    grouped["dropped words"] = ("words unknown or cut off", *numbers.in_ranges(np.maximum(counts - lengths, 0)))
    if reviews.stars is not None:
      stars, groups = np.unique(reviews.stars, return_inverse=True)
      grouped["stars"] = ("stars that the reviewer gave", stars.tolist(), groups)
  if _is_imdb(config) and "stars" not in grouped:
    notes.append("Accuracy by stars: an aclImdb archive has them, see --archive.")
  for name, (xlabel, names, groups) in grouped.items():
    rows = numbers.accuracy_in_groups(is_correct, groups)
    figures[f"accuracy_by_{name.replace(' ', '_')}"] = plots.groups(names, rows, f"Accuracy by {name}", xlabel)
  ordered, wrong = np.sort(probabilities, axis=1), np.flatnonzero(~is_correct)
  mistakes = wrong[np.argsort(-ordered[wrong, -1], kind="stable")][:_NUM_REVIEWS]
  unsure = np.argsort(ordered[:, -1] - ordered[:, -2], kind="stable")[:_NUM_REVIEWS]
  return {
    "metrics": metrics[0],
    "uncalibrated": metrics[-1] if len(metrics) > 1 else None,
    "step": answers.step,
    "split": answers.split,
    "references": _REFERENCES if _is_imdb(config) and answers.split == "test" else {},
    "mistakes": _shown(task, answers, probabilities, mistakes),
    "unsure": _shown(task, answers, probabilities, unsure),
  }


def _draw_scores(
  task: Classification, scores: np.ndarray, labels: np.ndarray, is_correct: np.ndarray, figures: Any, notes: list[str]
) -> None:
  """Add the histogram of probabilities and, of two classes, the ROC and precision–recall curves."""
  if len(task.classes) > 2:
    parts, values, xlabel = {"wrong": ~is_correct, "right": is_correct}, scores.max(axis=1), "probability of the answer"
  else:
    names = [printable(name)[:20] for name in task.classes]
    parts, values = {name: labels == i for i, name in enumerate(names)}, scores[:, 1]
    xlabel = f"probability of {names[1]}"
  if len(task.classes) == 2 and 0 < labels.sum() < len(labels):
    curve = ("", *numbers.roc(values, labels == 1), plots.ACCENT)
    figures["roc"] = plots.curves([curve], "ROC", "false positive rate", "true positive rate", "diagonal")
    curve = ("", *numbers.precision_recall(values, labels == 1), plots.ACCENT)
    figures["precision_recall"] = plots.curves([curve], "Precision–recall", "recall", "precision", "unit")
  else:
    notes.append("ROC and precision–recall curves: they need two classes, with reviews of both.")
  figures["probabilities"] = plots.histogram({name: values[rows] for name, rows in parts.items()}, xlabel)


def excerpt(answers: Answers, row: int) -> str:
  """Return the text of a review, or else the known words that the model reads, up to a length for people."""
  if answers.reviews is not None:
    return printable(re.sub(r"<br ?/?>", " ", answers.reviews.texts[row][:MAX_TEXT]))
  ids = answers.encoded.tokens[row]
  return " ".join(answers.vocabulary.words[id - 1] for id in ids[ids > 0])[:MAX_TEXT]


def _shown(task: Classification, answers: Answers, probabilities: np.ndarray, rows: np.ndarray) -> list[dict[str, Any]]:
  """Return some reviews with label and answer."""
  texts = [excerpt(answers, row) for row in rows]
  coloured = answers.explain(texts) if answers.explain else [""] * len(texts)
  return [
    {
      "number": int(row),
      "label": task.classes[answers.encoded.labels[row]],
      "answer": task.classes[probabilities[row].argmax()],
      "probability": float(probabilities[row].max()),
      "text": text,
      "html": html,
    }
    for row, text, html in zip(rows, texts, coloured, strict=True)
  ]
