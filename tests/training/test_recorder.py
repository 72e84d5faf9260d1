"""Metrics on their way from the device."""

import numpy as np

from imdb_jax.training.console import Console
from imdb_jax.training.recorder import Recorder


class Watched:
  """A value on a device that remembers whether it was read."""

  def __init__(self, value: float):
    self.value, self.is_read = value, False

  def __array__(self, dtype=None, copy=None):
    self.is_read = True
    return np.asarray(self.value, dtype)


def test_metrics_are_read_one_step_late(tmp_path):
  console = Console(is_quiet=True)
  console.start_epoch(1, 1, num_steps=2, done=0)
  recorder = Recorder(tmp_path, console, log_every=1, steps_per_epoch=2, step=0, is_writer=True)
  recorder.start_epoch(1)
  steps = [{"loss": Watched(4.0), "correct": Watched(1.0), "weight": Watched(2.0)} for _ in range(2)]
  recorder.record_step(1, steps[0])
  assert not steps[0]["loss"].is_read
  recorder.record_step(2, steps[1])
  assert steps[0]["loss"].is_read
  assert not steps[1]["loss"].is_read
  recorder.flush()
  assert steps[1]["loss"].is_read
  recorder.close()
