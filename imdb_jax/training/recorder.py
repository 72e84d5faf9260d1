"""Metrics from the device to the run directory.

The metrics of some steps are read after the next ones are dispatched, so the device never waits for the host. Nothing
else in the training loop reads a device value. It also keeps at most two dispatches under way: jaxlib 0.10.2 stands
still for good where several CPU devices, which meet to sum gradients, have more than 32.
"""

import contextlib
import csv
import json
import math
import os
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np

from imdb_jax.errors import CheckpointError, DivergenceError, UsageError
from imdb_jax.evaluation import EnsembleEvaluation, Evaluation
from imdb_jax.training.console import Console

EPOCH_FIELDS: tuple[str, ...] = (
    "epoch", "step", "loss", "accuracy", "val_loss", "val_accuracy", "seconds", "evaluation_seconds"
)  # fmt: skip

# Non-finite steps in a row that are skipped at most: after them nothing will mend by itself.
_MOST_SKIPPED = 10
_MAX_BYTES = 2**28


class Sums:
  """Weighted sums, f64[] or f64[seeds], that become means when they are asked for."""

  def __init__(self, loss: Any = 0.0, correct: Any = 0.0, weight: Any = 0.0):
    self.loss, self.correct, self.weight = (np.asarray(value, np.float64) for value in (loss, correct, weight))

  def add(self, metrics: dict[str, np.ndarray]) -> None:
    self.loss = self.loss + metrics["loss"]
    self.correct = self.correct + metrics["correct"]
    self.weight = self.weight + metrics["weight"]

  def of_seeds(self) -> dict[str, np.ndarray]:
    """Means of each seed; not a number where every step was skipped."""
    with np.errstate(invalid="ignore"):
      return {"loss": self.loss / self.weight, "accuracy": self.correct / self.weight}

  def means(self) -> dict[str, float]:
    """Over the seeds too."""
    return {name: float(values.mean()) for name, values in self.of_seeds().items()}

  def to_dict(self) -> dict[str, Any]:
    return {"loss": self.loss.tolist(), "correct": self.correct.tolist(), "weight": self.weight.tolist()}


class Recorder:
  """Writes `metrics.jsonl` and `history.csv` and feeds the console."""

  def __init__(
    self,
    run_dir: Path,
    console: Console,
    *,
    seeds: range,
    log_every: int,
    steps_per_epoch: int,
    step: int,
    finished_epochs: int,
    is_writer: bool,
    skips_non_finite: bool,
    num_skipped: np.ndarray,
  ):
    """Continues the files of a run: what they hold beyond its checkpoint goes.

    Args:
      run_dir: of the run.
      console: to show metrics on.
      seeds: of the run.
      log_every: steps between two lines.
      steps_per_epoch: of the run.
      step: of the checkpoint.
      finished_epochs: evaluated epochs that the checkpoint holds.
      is_writer: whether this process writes the files.
      skips_non_finite: whether steps that are not finite are left out, instead of ending the run.
      num_skipped: how many of them in a row lie just before `step`, of each seed.

    Raises:
      CheckpointError: they do not hold the epochs before `step`.
    """
    self._seeds, self._skips_non_finite, self._num_skipped = seeds, skips_non_finite, num_skipped
    self._path, self._console = run_dir / "metrics.jsonl", console
    self._log_every, self._steps_per_epoch = log_every, steps_per_epoch
    kept = [
      line
      for line in read_metrics(run_dir)
      if line["step"] <= (step if line["kind"] == "step" else finished_epochs * steps_per_epoch)
    ]
    self.history = [line for line in kept if line["kind"] == "epoch"]
    if len(self.history) != finished_epochs:
      raise CheckpointError(
        f"{self._path}: holds {len(self.history)} epochs of {finished_epochs} before step {step:,}."
      )
    self._file: TextIO | None = None
    if is_writer:
      rewritten = self._path.with_suffix(".jsonl.new")
      rewritten.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
      rewritten.replace(self._path)
      self._file = self._path.open("a", encoding="utf-8")
    self._pending: tuple[range, dict[str, jax.Array]] | None = None
    self._epoch = 0
    self._seen_here = 0.0
    self._epoch_sums, self._window_sums = Sums(), Sums()

  def start_epoch(self, epoch: int, progress: dict[str, Any] | None = None) -> None:
    """Begins an epoch, or continues one with the `progress()` that was saved within it."""
    self._epoch, self._seen_here = epoch, 0.0
    saved = progress or {"epoch_sums": {}, "window_sums": {}}
    self._epoch_sums, self._window_sums = Sums(**saved["epoch_sums"]), Sums(**saved["window_sums"])

  def progress(self) -> dict[str, Any]:
    """What a checkpoint must hold to continue within an epoch. Call `flush` first."""
    return {"epoch_sums": self._epoch_sums.to_dict(), "window_sums": self._window_sums.to_dict()}

  def record_steps(self, numbers: range, metrics: dict[str, jax.Array]) -> None:
    """Takes the metrics of the steps just dispatched, and reads those of the ones before.

    Args:
      numbers: of the steps, from 1.
      metrics: from `steps.make_train_steps`.
    """
    previous, self._pending = self._pending, (numbers, metrics)
    if previous is not None:
      self._read(*previous)

  def flush(self) -> None:
    """Reads what is still on the device."""
    if self._pending is not None:
      pending, self._pending = self._pending, None
      self._read(*pending)

  def _read(self, numbers: range, metrics: dict[str, jax.Array]) -> None:
    values = {name: np.asarray(value, np.float64) for name, value in jax.device_get(metrics).items()}
    for i, number in enumerate(numbers):
      self._add(number, {name: value[i] for name, value in values.items()})

  def _add(self, step: int, values: dict[str, np.ndarray]) -> None:
    is_finite = values["is_finite"] > 0
    self._num_skipped = (self._num_skipped + 1) * ~is_finite
    if not is_finite.all():
      self._refuse(step, values["loss"])
      values = {name: np.where(is_finite, value, 0) for name, value in values.items()}
    self._epoch_sums.add(values)
    self._window_sums.add(values)
    self._seen_here += float(values["weight"].sum())
    done = step - (self._epoch - 1) * self._steps_per_epoch
    is_logged = step % self._log_every == 0 or done == self._steps_per_epoch
    if is_logged:
      self._write({"kind": "step", "epoch": self._epoch, "step": step, **self._window_sums.means()})
      self._window_sums = Sums()
    self._console.show_step(done, self._epoch_sums.means(), int(self._seen_here), is_logged=is_logged)

  def _refuse(self, step: int, losses: np.ndarray) -> None:
    """Raises:
    DivergenceError: non-finite steps are not to be skipped, or there are too many of a seed in a row.
    """
    if not self._skips_non_finite:
      raise DivergenceError(f"Step {step:,} is not finite ({self._causes(losses, 1)}).")
    if np.any(self._num_skipped >= _MOST_SKIPPED):
      causes = self._causes(losses, _MOST_SKIPPED)
      raise DivergenceError(f"Steps {step - _MOST_SKIPPED + 1:,} to {step:,} are not finite (the last: {causes}).")
    self._console.line(f"Step {step:,} is not finite ({self._causes(losses, 1)}): its update was skipped")

  def _causes(self, losses: np.ndarray, num_skipped: int) -> str:
    """What is not finite of the seeds that have so many steps in a row behind them."""
    causes = []
    for seed, skipped, loss in zip(self._seeds, self._num_skipped.flat, losses.flat, strict=True):
      if skipped >= num_skipped:
        of_seed = f"seed {seed}: " if len(self._seeds) > 1 else ""
        causes.append(of_seed + ("its gradients" if math.isfinite(loss) else f"its loss is {loss}"))
    return "; ".join(causes)

  def record_epoch(self, step: int, result: Evaluation, *, seconds: float, evaluation_seconds: float) -> dict[str, Any]:
    """Writes the line of a finished epoch and returns it.

    With several seeds its values are their means, and those of each seed and the accuracy of the ensemble follow.
    """
    results = result.seeds if isinstance(result, EnsembleEvaluation) else [result]
    line = {
      "kind": "epoch",
      "epoch": self._epoch,
      "step": step,
      **self._epoch_sums.means(),
      "val_loss": float(np.mean([result.loss for result in results])),
      "val_accuracy": float(np.mean([result.accuracy for result in results])),
      "seconds": round(seconds, 3),
      "evaluation_seconds": round(evaluation_seconds, 3),
    }
    if isinstance(result, EnsembleEvaluation):
      means = self._epoch_sums.of_seeds()
      line["seeds"] = [
        {"seed": seed, "loss": loss, "accuracy": accuracy, "val_loss": each.loss, "val_accuracy": each.accuracy}
        for seed, loss, accuracy, each in zip(
          self._seeds, means["loss"].tolist(), means["accuracy"].tolist(), result.seeds, strict=True
        )
      ]
      line["ensemble_accuracy"] = result.accuracy
    self.history.append(line)
    self._write(line)
    return line

  def _write(self, line: dict[str, Any]) -> None:
    if self._file is not None:
      self._file.write(json.dumps(line) + "\n")
      self._file.flush()

  def sync(self) -> None:
    """Has the lines survive a power cut: a checkpoint must not know of epochs that its metrics lack."""
    if self._file is not None:
      os.fsync(self._file.fileno())

  def close(self) -> None:
    if self._file is not None:
      # What could not be written has been said where it was tried.
      with contextlib.suppress(OSError):
        self._file.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
  """The lines of a run's `metrics.jsonl`; a last line that was cut off by a crash is left out."""
  path = run_dir / "metrics.jsonl"
  if not path.exists():
    return []
  try:
    if path.stat().st_size > _MAX_BYTES:
      raise ValueError(f"larger than {_MAX_BYTES:,} bytes")
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    metrics = [json.loads(line) for line in lines]
    if not all(line["kind"] in ("step", "epoch") and type(line["step"]) is int for line in metrics):
      raise ValueError("a line is neither of a step nor of an epoch")
  except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
    raise UsageError(f"{path}: not readable: {error}") from error
  return metrics


def write_history(run_dir: Path, history: list[dict[str, Any]]) -> None:
  """One row an epoch, for spreadsheets; with several seeds also their ranges and the accuracy of the ensemble."""
  rows = [{name: line[name] for name in EPOCH_FIELDS} | _of_several_seeds(line) for line in history]
  with (run_dir / "history.csv").open("w", encoding="utf-8", newline="") as file:
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)


def _of_several_seeds(line: dict[str, Any]) -> dict[str, float]:
  if "seeds" not in line:
    return {}
  columns = {}
  for name in ("loss", "accuracy", "val_loss", "val_accuracy"):
    values = [of_seed[name] for of_seed in line["seeds"]]
    columns |= {f"{name}_min": min(values), f"{name}_max": max(values)}
  return columns | {"ensemble_accuracy": line["ensemble_accuracy"]}
