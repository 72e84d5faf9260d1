"""Reports of a run: the header, the closing lines, and history.csv, history.png and report.md."""

import statistics
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from imdb_jax import plots
from imdb_jax.config import NAMED_SOURCES, Config
from imdb_jax.data import batches
from imdb_jax.data.reviews import CLASSES
from imdb_jax.data.tokens import TokenData
from imdb_jax.errors import printable
from imdb_jax.program import Program
from imdb_jax.store import files, metrics_log
from imdb_jax.store.metrics_log import METRICS, Line
from imdb_jax.training.console import Console, decimal

_COLUMNS = ("epoch", *METRICS, "seconds", "evaluation_seconds")
_CHOSEN_ON = {
  "test": "chosen on the test reviews, as in the article, which flatters",
  "split": "chosen on reviews held out of training",
}


def start_facts(program: Program, step: int) -> dict[str, Any]:
  """Return what provenance.json records of a start of the trainer."""
  return {
    "step": step,
    "devices": f"{program.mesh.size} x {program.mesh.devices.flat[0].device_kind}",
    "processes": jax.process_count(),
    "implementation": program.choice.name,
    "precision": program.precision,
  }


def show_header(program: Program, data: TokenData, step: int, console: Console) -> None:
  """Print what will be trained, on what and how."""
  config, seeds = program.config, program.config.training.seeds
  facts, platform = start_facts(program, step), program.mesh.devices.flat[0].platform
  num_available = len(jax.devices(platform))
  limited = f" of {num_available}" if program.mesh.size < num_available else ""
  num_parameters = sum(leaf.size for leaf in jax.tree.leaves(program.abstract_state().params)) // len(seeds)
  num_steps = batches.num_batches(len(data.train), config.training.batch_size)
  own = {} if data.classes == CLASSES and config.data.source in NAMED_SOURCES else _describe(config, data)
  console.header(
    {
      "Preset": config.preset,
      "Seeds": f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}: {len(seeds)} models, one ensemble",
      "Devices": f"{facts['devices']} ({platform}){limited}, {facts['processes']} process(es)",
      "Recurrence": f"{program.choice.name} ({program.choice.reason})",
      "Precision": f"matrix products in {program.precision}",
      "Parameters": f"{num_parameters:,}",
      **own,
      "Examples": f"{len(data.train):,} train, {len(data.validation):,} validation ({config.data.validation})",
      "Steps": f"{num_steps:,} per epoch, {config.training.epochs} epoch(s)",
      "Run": f"{config.run_dir} ({f'resumed at step {step:,}' if step else 'new'})",
    }
  )


def _describe(config: Config, data: TokenData) -> dict[str, str]:
  """Return rows of the header about own texts: the classes, and how the test texts were chosen."""
  counts = np.bincount(data.train.labels, minlength=len(data.classes)).tolist()
  shown = [f"{printable(name)} {count:,}" for name, count in zip(data.classes, counts, strict=True)]
  more = f" and {len(shown) - 10:,} more" if len(shown) > 10 else ""
  group = config.data.group_column
  chosen = config.data.test_data or f"{len(data.test):,}"
  if config.data.test_data is None and config.data.source != "python":
    chosen += f", by the hash of column {group!r}" if group else ", by the hash of the text"
  return {"Texts": config.data.source, "Classes": ", ".join(shown[:10]) + more, "Test texts": printable(chosen)}


def epoch_line(line: Line, num_epochs: int) -> str:
  """Return an epoch in one line."""
  values = "  ".join(f"{name} {decimal(line[name])}" for name in METRICS)
  times = f"{line['seconds']:.1f} s training, {line['evaluation_seconds']:.1f} s evaluation"
  return f"Epoch {line['epoch']}/{num_epochs}  {values}  {times}"


def best_epoch(history: list[Line]) -> Line:
  """Return the epoch with the highest validation accuracy, the first of equals: that of the best checkpoint."""
  return max(history, key=lambda line: line["val_accuracy"])


def early_end(history: list[Line], patience: int | None) -> Line | None:
  """Return the epoch after which early stopping ends a run, if it does: none is better in the `patience` before it."""
  best = history[:1]
  for line in history if patience is not None else []:
    if line["val_accuracy"] > best[0]["val_accuracy"]:
      best = [line]
    elif line["epoch"] - best[0]["epoch"] == patience:
      return line
  return None


def _early_end_line(config: Config, history: list[Line]) -> str:
  """Return why a run ended before its last epoch; an empty text if it did not."""
  training, best = config.training, best_epoch(history)
  if training.early_stopping is None or len(history) == training.epochs:
    return ""
  ended = f"Stopped early, after epoch {len(history)} of {training.epochs}"
  return f"{ended}: none was better than epoch {best['epoch']} (--early-stopping {training.early_stopping}).\n"


def _val_accuracy(line: Line) -> str:
  """Return the validation accuracy; with several seeds, also their mean and sample standard deviation."""
  shown = f"val_accuracy {line['val_accuracy']:.4f}"
  values = [seed["val_accuracy"] for seed in line["seeds"]]
  if len(values) == 1:
    return shown
  spread = f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"
  return f"{shown} (ensemble), {spread} (seeds, n = {len(values)}, from {min(values):.4f} to {max(values):.4f})"


def show(config: Config, history: list[Line], console: Console) -> None:
  """Print the last and the best epoch; the lines of all epochs have been printed already."""
  best, last = best_epoch(history), history[-1]
  console.line(f"{_early_end_line(config, history)}Last epoch: {_val_accuracy(last)}")
  console.line(f"Best epoch {best['epoch']}: {_val_accuracy(best)} ({_CHOSEN_ON[config.data.validation]})")


def _cell(name: str, value: Any) -> str:
  if name in METRICS:
    return decimal(value)
  return f"{value:.1f}" if isinstance(value, float) else str(value)


def _markdown_table(columns: Sequence[str], lines: list[Line]) -> str:
  cells = [[_cell(name, line[name]) for name in columns] for line in lines]
  return "\n".join(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *cells))


def write(config: Config, history: list[Line]) -> None:
  """Write history.csv, history.png and report.md into the run directory."""
  metrics_log.write_csv(config.run_dir, history)
  plots.plot_history(history, config.run_dir.resolve().name, config.run_dir / "history.png")
  best, last = best_epoch(history), history[-1]
  total = sum(line["seconds"] + line["evaluation_seconds"] for line in history)
  settings = ", ".join(f"{name} {value}" for section in config.settings().values() for name, value in section.items())
  text = f"""# Run `{config.run_dir.name}`, preset {config.preset}

{_early_end_line(config, history)}Last epoch: {_val_accuracy(last)}.
Best epoch: {best["epoch"]}, {_val_accuracy(best)} ({_CHOSEN_ON[config.data.validation]}).
Training and evaluation: {total:.0f} s, without compilation and saves.

{_markdown_table(_COLUMNS, history)}

Training metrics are means over the seeds; validation metrics are those of the ensemble. The seeds after the last epoch:

{_markdown_table(("seed", *METRICS), last["seeds"])}

![Accuracy and loss](history.png)

Settings: {settings}. Versions, devices and the digest of the data are in `provenance.json`.
"""
  files.write(config.run_dir / "report.md", text)
