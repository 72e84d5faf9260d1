"""Figures from the files of a run. Reads files only; needs no display."""

import csv
from pathlib import Path

from imdb_jax.errors import UsageError

_FORMATS = (".png", ".pdf", ".svg")
_LONGEST_NAME = 60
_TRAIN_COLOR, _VALIDATION_COLOR = "#1f77b4", "#d62728"


def _read_history(run_dir: Path) -> list[dict[str, float]]:
  path = run_dir / "history.csv"
  try:
    with path.open(encoding="utf-8", newline="") as file:
      rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
  except (FileNotFoundError, NotADirectoryError) as error:
    if not (run_dir / "config.json").is_file():
      raise UsageError(f"{run_dir}: not the folder of a run: it has no config.json.") from error
    rows = []
  except (OSError, ValueError, TypeError, csv.Error) as error:
    raise UsageError(f"{path}: no readable history of a run: {error}") from error
  if not rows:
    raise UsageError(f"{run_dir}: no epoch has been finished yet.")
  needed = ["accuracy", "val_accuracy", "loss", "val_loss"]
  if "ensemble_accuracy" in rows[0]:
    needed += [f"{name}_{end}" for name in needed for end in ("min", "max")]
  if missing := [name for name in ("epoch", *needed) if name not in rows[0]]:
    raise UsageError(f"{path}: has no column {', '.join(missing)}.")
  return rows


def plot_history(run_dir: Path, output: Path) -> None:
  """Draws accuracy and loss by epoch, training against validation.

  Args:
    run_dir: of the run.
    output: the file to write: a PNG, PDF or SVG, as its name ends.

  Raises:
    UsageError: the folder holds no run, or none with a finished epoch, or a damaged history; or `output` is a link, or
      its name ends otherwise.
  """
  if output.suffix.lower() not in _FORMATS:
    raise UsageError(f"{output}: its name should end in one of {', '.join(_FORMATS)}.")
  if output.is_symlink():
    raise UsageError(f"{output}: is a link, which is not followed.")
  # Imported here: it takes long, and training from a cache needs it only at the end.
  from matplotlib.figure import Figure
  from matplotlib.ticker import MaxNLocator

  rows = _read_history(run_dir)
  epochs, has_seeds = [row["epoch"] for row in rows], "ensemble_accuracy" in rows[0]
  figure = Figure(figsize=(11, 4.5), layout="constrained")
  for axes, name in zip(figure.subplots(1, 2), ("accuracy", "loss"), strict=True):
    for field, label, color in ((name, "training", _TRAIN_COLOR), (f"val_{name}", "validation", _VALIDATION_COLOR)):
      axes.plot(epochs, [row[field] for row in rows], marker="o", color=color, label=label)
      if has_seeds:
        low, high = ([row[f"{field}_{end}"] for row in rows] for end in ("min", "max"))
        axes.fill_between(epochs, low, high, color=color, alpha=0.2, linewidth=0)
        if len(rows) == 1:
          # The band over a single epoch has no width.
          axes.vlines(epochs, low, high, color=color, alpha=0.2, linewidth=12)
    best, offset = (max, 10) if name == "accuracy" else (min, -10)
    top = best(rows, key=lambda row: row[f"val_{name}"])
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
  of_seeds = ", mean of the seeds and their range" if has_seeds else ""
  run = run_dir.resolve().name
  run = run if len(run) <= _LONGEST_NAME else f"{run[: _LONGEST_NAME - 1]}…"
  # A folder's name is no formula, even with dollars in it.
  figure.suptitle(f"{run}: {len(rows)} epoch{'s' if len(rows) != 1 else ''}{of_seeds}", parse_math=False)
  figure.savefig(output, dpi=120)
