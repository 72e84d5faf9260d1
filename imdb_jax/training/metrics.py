"""Metrics of a run in progress: from sums on the devices to means on the console and in metrics.jsonl.

The sums of a dispatch are read after the next one has started, so the devices never wait for the host. Nothing else in
the training loop reads a device value. So at most two dispatches are in flight. With more than 32, several CPU devices
of one process can deadlock (jaxlib 0.10.2): calls that wait for a free slot occupy the threads that a collective needs.
"""

import math
import time
from typing import Any

import jax
import numpy as np

from imdb_jax.config import Config
from imdb_jax.errors import CheckpointError, DivergenceError
from imdb_jax.store.metrics_log import MetricsLog
from imdb_jax.training.console import Console

# Weighted sums over reviews, f64[seeds] each: loss, correct and weight.
Sums = dict[str, np.ndarray]


def _sums(num_seeds: int, saved: dict[str, Any] | None = None) -> Sums:
  """Return the sums that a checkpoint has saved as lists, or zeros."""
  saved = saved or dict.fromkeys(("loss", "correct", "weight"), [0.0] * num_seeds)
  sums = {name: np.array(saved[name], np.float64) for name in ("loss", "correct", "weight")}
  # 1e50 is more than any number of float32 values adds up to.
  if any(each.shape != (num_seeds,) or not ((each >= 0) & (each < 1e50)).all() for each in sums.values()):
    raise ValueError(f"sums are not those of {num_seeds} seeds")
  return sums


def _seed_means(sums: Sums) -> dict[str, np.ndarray]:
  """Return loss and accuracy of each seed."""
  return {"loss": sums["loss"] / sums["weight"], "accuracy": sums["correct"] / sums["weight"]}


def _means(sums: Sums) -> dict[str, float]:
  """Return the means of loss and accuracy over the seeds."""
  return {name: float(values.mean()) for name, values in _seed_means(sums).items()}


class Recorder:
  """Sums of metrics that feed `console` and `log`. Reading a non-finite step raises DivergenceError."""

  def __init__(self, config: Config, console: Console, log: MetricsLog, progress: dict[str, Any], learning_rate: Any):
    """Continue from the `progress` of a checkpoint; {} for a new run. `learning_rate` is an `optimizer.schedule`."""
    self.console, self.log, self._config = console, log, config
    self._learning_rate: Any = learning_rate if callable(learning_rate) else lambda step: learning_rate
    self._seeds = config.training.seeds
    try:
      # Since the last epoch, and since the last line of metrics.
      self._epoch_sums, self._window_sums = (
        _sums(len(self._seeds), progress.get(name)) for name in ("epoch_sums", "window_sums")
      )
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
      raise CheckpointError(f"The checkpoint's progress is invalid: {error!r:.200}.") from error
    self._pending: tuple[range, dict[str, jax.Array]] = range(0), {}
    self._epoch, self._first_step, self._num_steps, self._num_reviews = 0, 0, 0, 0

  def start_epoch(self, epoch: int, step: int, num_steps: int) -> None:
    """Start or continue an epoch of `num_steps` steps, `step` steps into the run."""
    self._epoch, self._num_steps, self._num_reviews = epoch, num_steps, 0
    self._logged = time.time(), 0
    self._first_step = (epoch - 1) * num_steps
    self.console.start_epoch(epoch, self._config.training.epochs, num_steps=num_steps, done=step - self._first_step)

  def progress(self) -> dict[str, Any]:
    """Return what a checkpoint must hold to continue from here. Call `flush` first."""
    sums = {"epoch_sums": self._epoch_sums, "window_sums": self._window_sums}
    return {key: {name: values.tolist() for name, values in each.items()} for key, each in sums.items()}

  def record_steps(self, steps: range, sums: dict[str, jax.Array]) -> None:
    """Take the sums of the steps just dispatched, from `Program.train_steps`, and read those of the steps before."""
    previous, self._pending = self._pending, (steps, sums)
    self._read(*previous)

  def flush(self) -> None:
    """Read what is still on the devices."""
    pending, self._pending = self._pending, (range(0), {})
    self._read(*pending)

  def _read(self, steps: range, sums: dict[str, jax.Array]) -> None:
    values = {name: np.asarray(value, np.float64) for name, value in jax.device_get(sums).items()}
    for i, step in enumerate(steps):
      self._add(step, {name: value[:, i] for name, value in values.items()})

  def _add(self, step: int, values: dict[str, np.ndarray]) -> None:
    causes = [
      f"seed {seed}: {'gradients or parameters' if math.isfinite(loss) else f'the loss is {loss}'}"
      for seed, is_finite, loss in zip(self._seeds, values["is_finite"], values["loss"], strict=True)
      if not is_finite
    ]
    if causes:
      raise DivergenceError(f"Step {step:,} is not finite ({'; '.join(causes)}).")
    grad_norm = float(values["grad_norm"].mean())
    for sums in (self._epoch_sums, self._window_sums):
      for name in sums:
        sums[name] += values[name]
    self._num_reviews += int(values["weight"].sum())
    done = step - self._first_step
    is_logged = step % self._config.runtime.log_every == 0 or done == self._num_steps
    if is_logged:
      (before, num_before), now = self._logged, time.time()
      line = {"kind": "step", "epoch": self._epoch, "step": step, **_means(self._window_sums), "time": round(now, 3)}
      # As in the steps themselves, optax mixes types.
      with jax.numpy_dtype_promotion("standard"):
        line |= {"learning_rate": float(self._learning_rate(step - 1)), "grad_norm": grad_norm}
      line["reviews_per_second"] = round((self._num_reviews - num_before) / max(now - before, 1e-6), 1)
      self.log.write(line)
      self._logged = now, self._num_reviews
      self._window_sums = _sums(len(self._seeds))
    self.console.show_step(done, _means(self._epoch_sums), self._num_reviews, is_logged=is_logged)

  def record_epoch(self, step: int, result: Any, *, seconds: float, evaluation_seconds: float) -> dict[str, Any]:
    """Write the line of a finished epoch, whose `result` is of `task.evaluate`, start new sums, and return the line.

    Training metrics are means over the seeds. Validation metrics are those of the ensemble, which is what `Classifier`
    answers with. `seeds` has those of each seed.
    """
    means = _seed_means(self._epoch_sums)
    line = {
      "kind": "epoch",
      "epoch": self._epoch,
      "step": step,
      **_means(self._epoch_sums),
      "val_loss": result.loss,
      "val_accuracy": result.accuracy,
      "seconds": round(seconds, 3),
      "evaluation_seconds": round(evaluation_seconds, 3),
      "seeds": [
        {"seed": seed, "loss": loss, "accuracy": accuracy, "val_loss": each.loss, "val_accuracy": each.accuracy}
        for seed, loss, accuracy, each in zip(
          self._seeds, means["loss"].tolist(), means["accuracy"].tolist(), result.seeds, strict=True
        )
      ],
    }
    self.log.write(line)
    self._epoch_sums, self._window_sums = _sums(len(self._seeds)), _sums(len(self._seeds))
    return line
