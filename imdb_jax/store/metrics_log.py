"""The metrics of a run: metrics.jsonl, with one line every few steps and one per epoch, and history.csv."""

import contextlib
import csv
import io
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from imdb_jax.config import Config
from imdb_jax.errors import CheckpointError, UsageError, reraise_as
from imdb_jax.store import files, run_directory

METRICS = ("loss", "accuracy", "val_loss", "val_accuracy")
_STEP_FIELDS = ("epoch", "step", "loss", "accuracy")
# Lines of steps have these since imdb_jax 0.5.
_MORE_STEP_FIELDS = ("time", "learning_rate", "grad_norm", "reviews_per_second")
# Fields of an epoch's line. It also has `seeds`, a list of the seeds' own METRICS.
EPOCH_FIELDS = ("epoch", "step", *METRICS, "seconds", "evaluation_seconds")
# Type and largest value of each number: steps are counted in int32, and losses are means of float32 values.
_RANGES = {
  **dict.fromkeys(("epoch", "step", "seed"), (int, 2**31)),
  **dict.fromkeys(("loss", "val_loss"), (float, 1e39)),
  **dict.fromkeys(("accuracy", "val_accuracy"), (float, 1)),
  **dict.fromkeys(("seconds", "evaluation_seconds", "time", "reviews_per_second"), (float, 1e10)),
  **dict.fromkeys(("learning_rate", "grad_norm"), (float, 1e39)),
}
# Enough for an epoch's line with 1,024 seeds, the most that a run may have.
_MAX_LINE_BYTES = 2**20
MAX_STEP_LINES = 2000

Line = dict[str, Any]


def read(run_dir: Path) -> tuple[list[Line], list[Line]]:
  """Return the lines of the finished epochs of a run, and up to `MAX_STEP_LINES` of the others, at equal distances.

  Raises UsageError if a file of the run is damaged.
  """
  config, history, steps, distance = run_directory.load_config(run_dir), [], [], 1
  num_steps = 0
  for _, line in _read(run_dir / "metrics.jsonl", config):
    if line["kind"] == "epoch":
      history.append(line)
      continue
    if num_steps % distance == 0:
      steps.append(line)
    num_steps += 1
    if len(steps) > MAX_STEP_LINES:
      # The file may be longer than the memory allows.
      steps, distance = steps[::2], 2 * distance
  return history, steps


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


def decimal(value: float) -> str:
  """Format a metric with four decimals, or with four digits if it is huge."""
  return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.4g}"


def _read(path: Path, config: Config) -> Iterator[tuple[int, Line]]:
  """Yield each line and the offset at which it ends, leaving out a last line that a crash cut off.

  However long the file is, it holds no more epochs and seeds than the config: few enough for the memory.
  """
  training = config.training
  if not os.path.lexists(path):
    return
  with reraise_as(UsageError, f"{path}: not readable"):
    file = files.open_regular(path)
  end, epoch = 0, 0
  with file:
    while (text := file.readline(_MAX_LINE_BYTES)).endswith(b"\n"):
      end += len(text)
      with reraise_as(UsageError, f"{path}: not readable: line ending at byte {end:,}", (ValueError, RecursionError)):
        line = json.loads(text)
        if not _is_valid(line, training.seeds):
          raise ValueError("not a line of metrics")
        if line["kind"] == "epoch" and (line["epoch"] != epoch + 1 or epoch == training.epochs):
          raise ValueError(f"not epoch {epoch + 1} of {training.epochs}")
      epoch += line["kind"] == "epoch"
      yield end, line
  if len(text) == _MAX_LINE_BYTES:
    raise UsageError(f"{path}: not readable: has a line of more than {_MAX_LINE_BYTES:,} bytes.")


def _is_valid(line: Any, seeds: range) -> bool:
  match line:
    case {"kind": "step", **numbers}:
      return _are_numbers(numbers, (*_STEP_FIELDS, *(_MORE_STEP_FIELDS if "time" in numbers else ())))
    case {"kind": "epoch", "seeds": [*of_seeds], **numbers}:
      are_numbers = all(_are_numbers(each, ("seed", *METRICS)) for each in of_seeds)
      return are_numbers and _are_numbers(numbers, EPOCH_FIELDS) and [each["seed"] for each in of_seeds] == [*seeds]
  return False


def _are_numbers(values: Any, names: Sequence[str]) -> bool:
  """Return whether an object has exactly these fields, with numbers in their ranges."""
  return isinstance(values, dict) and values.keys() == {*names} and all(map(_is_number, values.values(), values))


def _is_number(value: Any, name: str) -> bool:
  kind, most = _RANGES[name]
  # A mean over skipped steps alone is NaN, and the logits of a diverging model may overflow.
  may_be_odd = name != "val_accuracy"
  return type(value) in (int, kind) and (0 <= value <= most or (may_be_odd and not value < math.inf))


class MetricsLog:
  """The open metrics.jsonl of a run in progress. `history` has the lines of the epochs."""

  def __init__(self, config: Config, *, step: int, num_epochs: int, held: run_directory.Held | None):
    """Continue the log of a run after a checkpoint of `step` steps and `num_epochs` epochs; drop the lines beyond.

    The file is added to those that the trainer holds. `held` is None in a process that does not write.

    Raises:
      CheckpointError: the log lacks epochs before the checkpoint.
      UsageError: the log is damaged.
    """
    self.history: list[Line] = []
    path, end = config.run_dir / "metrics.jsonl", 0
    for line_end, line in _read(path, config):
      is_epoch = line["kind"] == "epoch"
      if line["epoch"] > num_epochs if is_epoch else line["step"] > step:
        break
      end = line_end
      if is_epoch:
        self.history.append(line)
    if len(self.history) != num_epochs:
      raise CheckpointError(f"{path}: holds {len(self.history)} of the {num_epochs} epochs before step {step:,}.")
    self._file, self._held, self._board = None, held, None
    if held is not None:
      if config.runtime.tensorboard:
        missing = "--tensorboard: tensorboardX is missing: pip install 'imdb_jax[tensorboard]'"
        with reraise_as(UsageError, missing, ImportError):
          import tensorboardX
        # Hides what another trainer has written from there on.
        self._board = tensorboardX.SummaryWriter(str(config.run_dir / "tensorboard"), purge_step=step + 1)
      self._file = path.open("ab")
      held[path] = os.fstat(self._file.fileno())
      self._file.truncate(end)

  def write(self, line: Line) -> None:
    """Append a line."""
    if line["kind"] == "epoch":
      self.history.append(line)
    if self._file is not None:
      self._file.write(json.dumps(line).encode() + b"\n")
      self._file.flush()
    if self._board is not None:
      for name in line.keys() - {"kind", "epoch", "step", "time", "seeds"}:
        self._board.add_scalar(f"{line['kind']}/{name}", line[name], line["step"])
      self._board.flush()

  def sync(self) -> None:
    """Flush the lines to the disk before a checkpoint is saved; raise UsageError if another trainer has the run."""
    if self._file is not None and self._held is not None:
      os.fsync(self._file.fileno())
      run_directory.require_held(self._held)

  def close(self) -> None:
    """Close the files."""
    if self._board is not None:
      self._board.close()
    if self._file is not None:
      # A failed write has been reported by `write`.
      with contextlib.suppress(OSError):
        self._file.close()


def write_csv(run_dir: Path, history: list[Line]) -> None:
  """Write history.csv: one row per epoch, with the minimum and maximum of each metric over the seeds."""
  table = io.StringIO()
  ranges = [f"{name}_{end}" for name in METRICS for end in ("min", "max")]
  writer = csv.DictWriter(table, [*EPOCH_FIELDS, *ranges])
  writer.writeheader()
  for line in history:
    row = {name: line[name] for name in EPOCH_FIELDS}
    for name in METRICS:
      values = [seed[name] for seed in line["seeds"]]
      row |= {f"{name}_min": min(values), f"{name}_max": max(values)}
    writer.writerow(row)
  files.write(run_dir / "history.csv", table.getvalue())
