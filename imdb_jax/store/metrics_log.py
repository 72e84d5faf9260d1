"""The metrics of a run: metrics.jsonl, with one line every few steps and one per epoch, and history.csv."""

import contextlib
import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from imdb_jax.errors import CheckpointError, UsageError
from imdb_jax.store import files

METRICS = ("loss", "accuracy", "val_loss", "val_accuracy")
# Fields of an epoch's line. It also has `seeds`, a list of the seeds' own METRICS.
EPOCH_FIELDS = ("epoch", "step", *METRICS, "seconds", "evaluation_seconds")
# Enough for an epoch's line with 1,024 seeds, the most that a run may have.
_MAX_LINE_BYTES = 2**20

Line = dict[str, Any]


def read_history(run_dir: Path) -> list[Line]:
  """Return the lines of the finished epochs of a run, or raise UsageError if metrics.jsonl is damaged."""
  return [line for _, line in _read(run_dir / "metrics.jsonl") if line["kind"] == "epoch"]


def _read(path: Path) -> Iterator[tuple[int, Line]]:
  """Yield each line and the offset at which it ends, leaving out a last line that a crash cut off."""
  try:
    file = files.open_regular(path)
  except FileNotFoundError:
    return
  except OSError as error:
    raise UsageError(f"{path}: not readable: {error}") from error
  end, epoch = 0, 0
  with file:
    while (text := file.readline(_MAX_LINE_BYTES)).endswith(b"\n"):
      end += len(text)
      try:
        line = json.loads(text)
        if not _is_valid(line) or (line["kind"] == "epoch" and line["epoch"] != epoch + 1):
          raise ValueError("not a line of metrics")
      except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not readable: line ending at byte {end:,}: {error}") from error
      epoch += line["kind"] == "epoch"
      yield end, line
  if len(text) == _MAX_LINE_BYTES:
    raise UsageError(f"{path}: not readable: has a line of more than {_MAX_LINE_BYTES:,} bytes.")


def _is_valid(line: Any) -> bool:
  if not isinstance(line, dict) or type(line.get("step")) is not int:
    return False
  if line.get("kind") == "step":
    return True
  seeds = line.get("seeds")
  return (
    line.get("kind") == "epoch"
    and all(_is_number(line.get(name)) for name in EPOCH_FIELDS)
    and isinstance(seeds, list)
    and len(seeds) > 0
    and all(isinstance(seed, dict) and all(_is_number(seed.get(name)) for name in ("seed", *METRICS)) for seed in seeds)
  )


def _is_number(value: Any) -> bool:
  return type(value) in (int, float)


class MetricsLog:
  """The open metrics.jsonl of a run in progress. `history` has the lines of the epochs."""

  def __init__(self, run_dir: Path, *, step: int, num_epochs: int, is_writer: bool):
    """Continue the log of a run after a checkpoint of `step` steps and `num_epochs` epochs; drop the lines beyond.

    Raises:
      CheckpointError: the log lacks epochs before the checkpoint.
      UsageError: the log is damaged.
    """
    self.history: list[Line] = []
    path, end = run_dir / "metrics.jsonl", 0
    for line_end, line in _read(path):
      is_epoch = line["kind"] == "epoch"
      if line["epoch"] > num_epochs if is_epoch else line["step"] > step:
        break
      end = line_end
      if is_epoch:
        self.history.append(line)
    if len(self.history) != num_epochs:
      raise CheckpointError(f"{path}: holds {len(self.history)} of the {num_epochs} epochs before step {step:,}.")
    self._file = None
    if is_writer:
      self._file = path.open("ab")
      self._file.truncate(end)

  def write(self, line: Line) -> None:
    """Append a line."""
    if line["kind"] == "epoch":
      self.history.append(line)
    if self._file is not None:
      self._file.write(json.dumps(line).encode() + b"\n")
      self._file.flush()

  def sync(self) -> None:
    """Flush the lines to the disk, so that they survive a power cut. Call it before saving a checkpoint."""
    if self._file is not None:
      os.fsync(self._file.fileno())

  def close(self) -> None:
    """Close the file."""
    if self._file is not None:
      # A failed write has been reported by `write`.
      with contextlib.suppress(OSError):
        self._file.close()


def write_csv(run_dir: Path, history: list[Line]) -> None:
  """Write history.csv: one row per epoch, with the minimum and maximum of each metric over the seeds."""
  with (run_dir / "history.csv").open("w", encoding="utf-8", newline="") as file:
    ranges = [f"{name}_{end}" for name in METRICS for end in ("min", "max")]
    writer = csv.DictWriter(file, [*EPOCH_FIELDS, *ranges])
    writer.writeheader()
    for line in history:
      row = {name: line[name] for name in EPOCH_FIELDS}
      for name in METRICS:
        values = [seed[name] for seed in line["seeds"]]
        row |= {f"{name}_min": min(values), f"{name}_max": max(values)}
      writer.writerow(row)
