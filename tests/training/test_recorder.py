"""Metrics on their way from the device."""

import numpy as np
import pytest

from imdb_jax.errors import DivergenceError
from imdb_jax.training.console import Console
from imdb_jax.training.recorder import Recorder


class Watched:
  """A value on a device that remembers whether it was read."""

  def __init__(self, value: float):
    self.value, self.is_read = value, False

  def __array__(self, dtype=None, copy=None):
    self.is_read = True
    return np.asarray(self.value, dtype)


NEW = {"finished_epochs": 0, "is_writer": True, "skips_non_finite": False, "num_skipped": 0}


def test_metrics_are_read_one_step_late(tmp_path):
  console = Console(is_quiet=True)
  console.start_epoch(1, 1, num_steps=2, done=0)
  recorder = Recorder(tmp_path, console, log_every=1, steps_per_epoch=2, step=0, **NEW)
  recorder.start_epoch(1)
  steps = [
    {"loss": Watched(4.0), "correct": Watched(1.0), "weight": Watched(2.0), "is_finite": Watched(1.0)} for _ in range(2)
  ]
  recorder.record_step(1, steps[0])
  assert not steps[0]["loss"].is_read
  recorder.record_step(2, steps[1])
  assert steps[0]["loss"].is_read
  assert not steps[1]["loss"].is_read
  recorder.flush()
  assert steps[1]["loss"].is_read
  recorder.close()


GOOD = {"loss": 4.0, "correct": 1.0, "weight": 2.0, "is_finite": 1.0}


def record(tmp_path, steps: list[dict[str, float]], *, skips: bool, num_skipped: int = 0) -> dict[str, float]:
  """The line of an epoch of these steps."""
  console = Console(is_quiet=True)
  console.start_epoch(1, 1, num_steps=len(steps), done=0)
  recorder = Recorder(
    tmp_path,
    console,
    log_every=100,
    steps_per_epoch=len(steps),
    step=0,
    **NEW | {"skips_non_finite": skips, "num_skipped": num_skipped},
  )
  try:
    recorder.start_epoch(1)
    for step, values in enumerate(steps, 1):
      recorder.record_step(step, {name: Watched(value) for name, value in values.items()})
    recorder.flush()
    return recorder.record_epoch(len(steps), val_loss=0, val_accuracy=0, seconds=0, evaluation_seconds=0)
  finally:
    recorder.close()


@pytest.mark.parametrize("bad", [{"loss": np.nan, "is_finite": 0.0}, {"is_finite": 0.0}])
def test_a_step_that_is_not_finite_stops_or_is_left_out(bad, tmp_path):
  with pytest.raises(DivergenceError, match="Step 2 is not finite"):
    record(tmp_path, [GOOD, GOOD | bad, GOOD], skips=False)
  line = record(tmp_path / ".", [GOOD, GOOD | bad, GOOD], skips=True)
  assert (line["loss"], line["accuracy"]) == (2, 0.5)


def test_ten_skipped_steps_in_a_row_are_too_many(tmp_path):
  bad = GOOD | {"loss": np.nan, "is_finite": 0.0}
  record(tmp_path, [*[bad] * 9, GOOD, *[bad] * 9], skips=True)
  with pytest.raises(DivergenceError, match="Steps 2 to 11 are not finite"):
    record(tmp_path, [GOOD, *[bad] * 10], skips=True)
  with pytest.raises(DivergenceError, match="Steps -8 to 1 are not finite"):
    record(tmp_path, [bad], skips=True, num_skipped=9)
