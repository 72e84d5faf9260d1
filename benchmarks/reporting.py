"""Tables and figures of the benchmarks.

`python benchmarks/reporting.py RESULTS.json [FIGURE]` shows a result file again. FIGURE is a PNG file, or for
cost_curves.py a folder.
"""

import argparse
import itertools
import json
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

import systems
from rich.console import Console
from rich.table import Table

Results = dict[str, Any]
Row = dict[str, Any]

_TIMES = ("ms/step={ms_per_step:.2f}", "min - max={ms_per_step_min:.2f} - {ms_per_step_max:.2f}")
# Title and columns: a column is its name, or its name and format.
_TABLES = {
  "epoch_time": (
    "Time of a training step",
    *("system", "work", "computes", *_TIMES, "s/epoch={seconds_per_epoch:.1f}", "compile s={compile_seconds:.1f}"),
    *("memory MB={peak_memory_mb:.0f}", "to ours={ratio_to_ours:.2f}×", "of ceiling={share_of_ceiling:.0%}"),
  ),
  "time_to_accuracy": (
    "Training to a test accuracy",
    *("system", "reached={reached} of {seeds}", "training s={at_least}{training_seconds}"),
    *("evaluation s={at_least}{evaluation_seconds}", "compile s={compile_seconds}", "last accuracy={last_accuracy}"),
    "to fast={at_least}{ratio_to_fast:.1f}×",
  ),
  "cost_curves": (
    "Time of a training step by its sizes",
    *("axis", "value", "system", *_TIMES, "ceiling ms={ceiling_ms:.2f}"),
  ),
  "recurrence": (
    "The recurrence alone",
    *("rows={batch_size}", "positions={num_steps}", "units={hidden_size}", "gradients", "system"),
    *("recurrent dropout={recurrent_dropout}", "ms={ms_per_step:.3f}", _TIMES[1], "floor ms={floor_ms:.3f}"),
  ),
  "own_data": (
    "Texts of one's own, from CSV files",
    *("data", "system", "seeds", "accuracy={accuracy:.4f}", "std={accuracy_std:.4f}", "train s={train_seconds:.1f}"),
    *("of it fitting={fit_seconds:.1f}", "texts/s={texts_per_second:,.0f}", "MB to train={train_memory_mb:,.0f}"),
    "MB to predict={predict_memory_mb:,.0f}",
  ),
  "breakdown": ("A training step and its parts", "part", *_TIMES, "of the step={share:.0%}"),
}
_CEILING = "Ceiling: the step's matrix products at the speed of a large float32 product, {sgemm_gflops:.0f} GFLOP/s."
_NOTES = {
  "epoch_time": "Medians of {windows} windows; {steps_per_epoch} steps per epoch. to ours: time divided by that of "
  f"ours-chunked. {_CEILING}",
  "time_to_accuracy": "Target: {target:.2%}. Means ± standard deviations over the seeds, up to the epoch that reaches "
  "it; ≥: some runs do not, and count as a whole. to fast: training time divided by that of fast.",
  "cost_curves": f"Medians of {{windows}} windows. {_CEILING}",
  "recurrence": "Medians of {windows} windows. Floor: a GPU kernel that reads the recurrent weights at every position.",
  "own_data": "Accuracy: mean and standard deviation over the seeds, after the last epoch; all else: medians. "
  "train s: the whole command, with imports and compilation. texts/s: after a first call, in one process.",
  "breakdown": "Medians of {windows} windows.",
}
_COLORS = {"article": "#1f77b4", "masked": "#2ca02c", "less": "#7f7f7f"}
_LABELS = {"length": "positions of a review", "batch": "reviews per step", "hidden_size": "LSTM units"}
_LABELS |= {"devices": "devices", "batch_size": "rows", "num_steps": "positions"}
_LABELS |= {"ceiling_ms": "ceiling (sgemm)", "floor_ms": "floor of a GPU kernel"}


def _benchmark(results: Results) -> str:
  return Path(shlex.split(results["machine"]["command"])[1]).stem


def _rows(results: Results) -> list[Row]:
  """Return the rows of the results, with the fields of the table's columns."""
  if "ms" not in results:
    rows = results["points"] if "points" in results else results["rows"]
    return list(map(_mean_cells, rows)) if "target" in results else rows
  medians = {part: statistics.median(ms) for part, ms in results["ms"].items()}
  return [
    {"part": part, "ms_per_step": medians[part], "ms_per_step_min": min(ms), "ms_per_step_max": max(ms)}
    | {"share": medians[part] / medians["step"], "problem": None}
    for part, ms in results["ms"].items()
  ]


def _mean_cells(row: Row) -> Row:
  """Return a row of time_to_accuracy.py with mean ± standard deviation as text."""
  at_least = "≥ " if row["reached"] < row["seeds"] else ""
  cells = {"at_least": at_least}
  for name in ("training_seconds", "evaluation_seconds", "compile_seconds", "last_accuracy"):
    spread, form = row[name] or {"mean": None, "std": None}, ".4f" if name == "last_accuracy" else ".1f"
    cells[name] = _cell(f"{{mean:{form}}}", spread) + _cell(f" ± {{std:{form}}}", spread)
  return row | cells


def _cell(form: str, row: Row) -> str:
  try:
    return form.format_map(row)
  except TypeError:
    # None has no format such as .1f.
    return ""


def problems(results: Results) -> dict[str, str]:
  """Return why there are no figures, by system."""
  rows = [*_rows(results), {"system": "sgemm", "problem": results["machine"].get("sgemm_problem")}]
  names = ("data", "system", "axis", "value")
  return {" ".join(str(row[name]) for name in names if name in row): row["problem"] for row in rows if row["problem"]}


def show(results: Results) -> None:
  """Print the table, and below it the problems, the notes and the machine."""
  (title, *columns), machine = _TABLES[_benchmark(results)], results["machine"]
  table, forms = Table(title=title, title_justify="left"), []
  for column in columns:
    header, _, form = column.partition("=")
    table.add_column(header, justify="right" if form else "left", no_wrap=header == "system")
    forms.append(form or f"{{{header}}}")
  for row in _rows(results):
    if row.get("ms_per_step") or row.get("seeds"):
      table.add_row(*(_cell(form, row) for form in forms))
  console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
  console.print(table)
  versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
  for line in (
    *(f"{name}: {problem}." for name, problem in problems(results).items()),
    *(f"{name}: {text}." for name, text in results.get("works", {}).items()),
    _cell(_NOTES[_benchmark(results)], results | machine),
    f"Machine: {machine['processor']}, {machine['cores']} cores; matrix products in {machine['precision']}.",
    f"Versions: {versions}. Data: {machine['data']}.",
  ):
    console.print(line, markup=False, soft_wrap=True)


def plot(results: Results, output: Path) -> None:
  """Draw the figure to a PNG file; for cost_curves.py, `output` is a folder for one file per axis."""
  from matplotlib.figure import Figure

  name, machine = _benchmark(results), results["machine"]
  title = f"{machine['processor']}, {machine['cores']} cores, {machine['precision']}"
  draw = {"epoch_time": _draw_bars, "time_to_accuracy": _draw_accuracies, "recurrence": _draw_panels}
  figures = {output: results}
  if name == "cost_curves":
    axes = dict.fromkeys(row["axis"] for row in results["points"])
    figures = {output / f"{axis}.png": results | {"axis": axis} for axis in axes}
  for file, content in figures.items():
    figure = Figure(layout="constrained")
    draw.get(name, _draw_axis)(figure, content, title)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120, format="png")
    print(f"Wrote {file}", file=sys.stderr)


def _draw_bars(figure: Any, results: Results, title: str) -> None:
  """Draw a bar per system, the fastest on top, with whiskers from the fastest to the slowest window."""
  from matplotlib.patches import Patch

  rows = sorted(results["rows"], key=lambda row: row["ms_per_step"] or float("inf"))
  figure.set_size_inches(11, 1.8 + 0.48 * len(rows))
  axes = figure.subplots()
  longest = max((row["ms_per_step_max"] or 0 for row in rows), default=0) or 1
  for position, row in enumerate(rows):
    median = row["ms_per_step"]
    if median is None:
      axes.text(longest * 0.01, position, row["problem"], va="center", style="italic", color="#666666")
      continue
    spread = [[median - row["ms_per_step_min"]], [row["ms_per_step_max"] - median]]
    axes.barh(position, median, color=_COLORS[row["work"]], alpha=1 if row["system"] in systems.OURS else 0.5)
    axes.errorbar(median, position, xerr=spread, color="black", capsize=3, linewidth=1)
    label = _cell("{ms_per_step:.1f} ms/step, {seconds_per_epoch:.0f} s/epoch", row)
    label += _cell(", {share_of_ceiling:.0%} of the ceiling", row)
    axes.text(row["ms_per_step_max"] + longest * 0.012, position, label, va="center", fontsize=9)
  axes.set_yticks(range(len(rows)), [row["system"] for row in rows])
  for label in axes.get_yticklabels():
    label.set_fontweight("bold" if label.get_text() in systems.OURS else "normal")
  # A row without a bar does not widen the axis.
  axes.set(ylim=(len(rows) - 0.5, -0.5), xlim=(0, longest * 1.55), axisbelow=True)
  axes.set_xlabel("ms/step: median of the windows; whiskers: fastest and slowest window (bold: ours)")
  axes.grid(axis="x", alpha=0.3)
  sizes = "batch {batch_size}, {sequence_length} positions, {embedding_size} inputs, {hidden_size} units"
  axes.set_title(f"Training step of an LSTM: {sizes.format_map(results['machine']['sizes'])}\n{title}", fontsize=11)
  used = {row["work"] for row in rows}
  patches = [Patch(color=_COLORS[name], label=text) for name, text in results["works"].items() if name in used]
  axes.legend(handles=patches, loc="upper right", fontsize=9)


def _draw_accuracies(figure: Any, results: Results, title: str) -> None:
  """Draw a line per run and a dot per epoch."""
  from matplotlib.ticker import PercentFormatter

  figure.set_size_inches(10, 5.5)
  axes = figure.subplots()
  for index, row in enumerate(results["rows"]):
    runs = [run["epochs"] for run in results["runs"] if run["system"] == row["system"] and run["epochs"]]
    for number, epochs in enumerate(runs):
      seconds = list(itertools.accumulate(epoch["training_seconds"] for epoch in epochs))
      label = None if number else f"{row['system']} ({len(runs)} seed{'s' if len(runs) > 1 else ''})"
      style = {"marker": "o", "markersize": 4, "linewidth": 1.2, "color": f"C{index}", "label": label}
      axes.plot(seconds, [epoch["test_accuracy"] for epoch in epochs], **style)
  axes.axhline(results["target"], color="black", linestyle=":", label=f"target, {results['target']:.2%}")
  axes.set_xscale("log")
  _label_log(axes.xaxis)
  axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
  axes.grid(which="both", alpha=0.3)
  axes.legend(loc="lower right")
  axes.set(xlabel="seconds of training, without evaluation and compilation", ylabel="test accuracy")
  axes.set_title(f"Test accuracy after each epoch\n{title}", fontsize=11)


def _draw_axis(figure: Any, results: Results, title: str) -> None:
  figure.set_size_inches(7.5, 5)
  axes, axis = figure.subplots(), results["axis"]
  _draw_curves(axes, [row for row in results["points"] if row["axis"] == axis], "value", "ceiling_ms")
  axes.set(xlabel=_LABELS[axis], ylabel="ms/step")
  axes.set_title(title, fontsize=11)
  axes.legend()


def _draw_panels(figure: Any, results: Results, title: str) -> None:
  """Draw a panel per axis and direction; systems without recurrent dropout are dashed."""
  figure.set_size_inches(16, 9)
  base = systems.RECURRENCE_SIZES
  panels = figure.subplots(2, len(base), sharey="row")
  for axes, (gradients, axis) in zip(panels.flat, itertools.product((False, True), base), strict=True):
    wanted = {name: value for name, value in base.items() if name != axis} | {"gradients": gradients}
    _draw_curves(axes, [row for row in results["rows"] if wanted.items() <= row.items()], axis, "floor_ms")
    axes.set(xlabel=_LABELS[axis], ylabel=f"ms, {'forward and backward' if gradients else 'forward'}")
  panels[0][0].legend(fontsize=8)
  sizes = "LSTM of 32 rows, 400 positions and 128 units, one size varied"
  figure.suptitle(f"{sizes}\n{results['machine']['device']}; {title}")


def _draw_curves(axes: Any, rows: list[Row], x: str, bound: str) -> None:
  """Draw the medians of each system by field `x`, with whiskers from minimum to maximum, and the lower bound."""
  for index, system in enumerate(dict.fromkeys(row["system"] for row in rows)):
    own = sorted((row for row in rows if row["system"] == system and not row["problem"]), key=lambda row: row[x])
    if own:
      medians = [row["ms_per_step"] for row in own]
      below = [row["ms_per_step"] - row["ms_per_step_min"] for row in own]
      above = [row["ms_per_step_max"] - row["ms_per_step"] for row in own]
      style = {"linestyle": "-" if own[0].get("recurrent_dropout", True) else "--", "color": f"C{index}"}
      axes.errorbar([row[x] for row in own], medians, [below, above], marker="o", capsize=3, label=system, **style)
  bounds = sorted({(row[x], row[bound]) for row in rows if row[bound] is not None})
  if bounds:
    axes.plot(*zip(*bounds, strict=True), color="black", linestyle=":", label=_LABELS[bound])
  axes.set(xscale="log", yscale="log")
  ticks = sorted({row[x] for row in rows})
  axes.set_xticks(ticks, [str(tick) for tick in ticks])
  axes.set_xticks([], minor=True)
  _label_log(axes.yaxis)
  axes.grid(which="both", alpha=0.3)


def _label_log(axis: Any) -> None:
  """Label a logarithmic axis with plain numbers, also between powers of ten if it is short."""
  from matplotlib.ticker import LogFormatter

  axis.set_major_formatter(LogFormatter())
  axis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description="Show the results of a benchmark again, and redraw its figure.")
  parser.add_argument("results", type=Path, help="JSON file of a benchmark.")
  parser.add_argument("figure", type=Path, nargs="?", help="Image to write; a folder for cost_curves.")
  given = parser.parse_args()
  saved = json.loads(given.results.read_text(encoding="utf-8"))
  show(saved)
  if given.figure:
    plot(saved, given.figure)
