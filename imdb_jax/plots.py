"""Figures of runs. They need no display."""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from imdb_jax.errors import UsageError, printable

_FORMATS = (".png", ".pdf", ".svg")
_MAX_TITLE = 60
_TRAIN_COLOR, _VALIDATION_COLOR = "#1f77b4", "#d62728"


def plot_history(history: list[dict[str, Any]], title: str, output: Path) -> None:
  """Plot accuracy and loss by epoch, training against validation, with the range of the seeds.

  Args:
    history: one dict per epoch, see `store.metrics_log`.
    title: name of the run.
    output: PNG, PDF or SVG file to write.

  Raises:
    UsageError: the history is empty, `output` has another suffix, or is a link.
  """
  if not history:
    raise UsageError(f"{title}: no epoch has been finished yet.")
  figure = _figure(11, 4.5)
  for axes, name in zip(figure.subplots(1, 2), ("accuracy", "loss"), strict=True):
    _plot_metric(axes, history, name)
  has_seeds = len(history[0]["seeds"]) > 1
  shown = printable(title if len(title) <= _MAX_TITLE else f"{title[: _MAX_TITLE - 1]}…")
  # The name of a folder may hold dollar signs, which are not formulas.
  figure.suptitle(
    f"{shown}: {len(history)} epoch{'s' if len(history) != 1 else ''}"
    f"{', with the range of the seeds' if has_seeds else ''}",
    parse_math=False,
  )
  _save(figure, output)


def plot_accuracy_by_time(points: Sequence[tuple[str, float, float, float]], output: Path) -> None:
  """Plot accuracy against training time, one point per model; the legend has their names.

  Args:
    points: name, seconds above 0, accuracy, and its standard deviation or 0.
    output: file to write, as for `plot_history`.
  """
  from matplotlib.ticker import LogFormatter

  figure = _figure(8, 5)
  axes = figure.subplots()
  # The names in the legend have the order of the points, from top to bottom.
  for name, seconds, accuracy, spread in sorted(points, key=lambda point: -point[2]):
    axes.errorbar(seconds, 100 * accuracy, 100 * spread or None, fmt="o", capsize=4, label=name)
  axes.set(xscale="log", xlabel="seconds to train", ylabel="accuracy (%)", title="Accuracy and training time")
  axes.margins(x=0.15, y=0.15)
  axes.xaxis.set_major_formatter(lambda seconds, _: f"{seconds:g}")
  axes.xaxis.set_minor_formatter(LogFormatter())
  axes.grid(alpha=0.3)
  figure.legend(loc="outside right upper")
  _save(figure, output)


def plot_learning_curves(curves: Mapping[str, Sequence[Sequence[float]]], output: Path) -> None:
  """Plot validation accuracy by epoch, the models side by side, with the range of their seeds; the others in gray.

  Args:
    curves: by name, the accuracies after each epoch of each seed.
    output: file to write, as for `plot_history`.
  """
  from matplotlib.ticker import MaxNLocator

  num_columns = min(len(curves), 4)
  num_rows = math.ceil(len(curves) / num_columns)
  figure = _figure(max(2.8 * num_columns, 5), 3 * num_rows)
  figure.supylabel("validation accuracy (%)", fontsize="medium")
  grid = figure.subplots(num_rows, num_columns, sharey=True, squeeze=False).ravel()
  for axes, (name, seeds) in zip(grid, curves.items(), strict=False):
    for other in curves.values():
      mean = 100 * np.mean(other, axis=0)
      axes.plot(range(1, len(mean) + 1), mean, marker=".", color="0.85")
    mean, epochs = 100 * np.mean(seeds, axis=0), range(1, len(seeds[0]) + 1)
    axes.vlines(epochs, 100 * np.min(seeds, axis=0), 100 * np.max(seeds, axis=0), color=_VALIDATION_COLOR, alpha=0.4)
    axes.plot(epochs, mean, marker="o", markersize=4, color=_VALIDATION_COLOR)
    axes.set(title=name, xlabel="epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
  for axes in grid[len(curves) :]:
    axes.remove()
  _save(figure, output)


def _figure(width: float, height: float) -> Any:
  # matplotlib takes long to import, and training needs it only at the end.
  from matplotlib.figure import Figure

  return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, output: Path) -> None:
  """Write a figure; raise UsageError if the file has another suffix, or is a link."""
  if output.suffix.lower() not in _FORMATS:
    raise UsageError(f"{output}: its name must end in one of {', '.join(_FORMATS)}.")
  if output.is_symlink():
    raise UsageError(f"{output}: is a link, which is not followed.")
  unfinished = output.with_name(f"{output.name}.new")
  unfinished.unlink(missing_ok=True)
  # What is at `output` is replaced and not written through: it may be a pipe or linked to another file.
  with unfinished.open("xb") as file, warnings.catch_warnings():
    # The font lacks many letters that a name may have.
    warnings.filterwarnings("ignore", "Glyph", UserWarning)
    figure.savefig(file, format=output.suffix[1:].lower(), dpi=120)
  unfinished.replace(output)


def _plot_metric(axes: Any, history: list[dict[str, Any]], name: str) -> None:
  """Plot one metric by epoch, and mark the best validation value."""
  from matplotlib.ticker import MaxNLocator

  epochs = [line["epoch"] for line in history]
  for field, label, color in ((name, "training", _TRAIN_COLOR), (f"val_{name}", "validation", _VALIDATION_COLOR)):
    axes.plot(epochs, [line[field] for line in history], marker="o", color=color, label=label)
    if len(history[0]["seeds"]) > 1:
      seeds = [[seed[field] for seed in line["seeds"]] for line in history]
      low, high = list(map(min, seeds)), list(map(max, seeds))
      axes.fill_between(epochs, low, high, color=color, alpha=0.2, linewidth=0)
      if len(history) == 1:
        # The band of a single epoch has no width.
        axes.vlines(epochs, low, high, color=color, alpha=0.2, linewidth=12)
  best, offset = (max, 10) if name == "accuracy" else (min, -10)
  top = best(history, key=lambda line: line[f"val_{name}"])
  axes.annotate(
    f"{top[f'val_{name}']:.4f}",
    (top["epoch"], top[f"val_{name}"]),
    textcoords="offset points",
    xytext=(0, offset),
    ha="center",
    va="bottom" if offset > 0 else "top",
    color=_VALIDATION_COLOR,
    bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
  )
  axes.set(title=f"{name.capitalize()} by epoch", xlabel="epoch", ylabel=name)
  axes.margins(x=0.08, y=0.15)
  axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
  axes.grid(alpha=0.3)
  axes.legend(loc="best")
