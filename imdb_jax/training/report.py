"""The header of a run, the facts that it records, and the lines that it prints while it trains."""

from typing import Any

import jax
import numpy as np

from imdb_jax.config import NAMED_SOURCES, Config
from imdb_jax.data import batches
from imdb_jax.data.reviews import CLASSES
from imdb_jax.data.tokens import TokenData
from imdb_jax.errors import printable
from imdb_jax.program import Program
from imdb_jax.store.metrics_log import METRICS, Line, decimal
from imdb_jax.training.console import Console


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


def early_end(history: list[Line], patience: int | None) -> Line | None:
  """Return the epoch after which early stopping ends a run, if it does: none is better in the `patience` before it."""
  best = history[:1]
  for line in history if patience is not None else []:
    if line["val_accuracy"] > best[0]["val_accuracy"]:
      best = [line]
    elif line["epoch"] - best[0]["epoch"] == patience:
      return line
  return None
