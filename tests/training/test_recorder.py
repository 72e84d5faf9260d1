"""Metrics on their way from the device."""

import numpy as np
import pytest

from imdb_jax.errors import DivergenceError
from imdb_jax.evaluation import EnsembleEvaluation, summarize
from imdb_jax.training.console import Console
from imdb_jax.training.recorder import Recorder, read_metrics


class Watched:
  """A value on a device that remembers whether it was read."""

  def __init__(self, value: list[float] | list[list[float]]):
    self.value, self.is_read = value, False

  def __array__(self, dtype=None, copy=None):
    self.is_read = True
    return np.asarray(self.value, dtype)


NEW = {"seeds": range(1), "finished_epochs": 0, "is_writer": True, "skips_non_finite": False, "num_skipped": 0}


GOOD = {"loss": 4.0, "correct": 1.0, "weight": 2.0, "is_finite": 1.0}
# Of steps that are not made.
NOTHING = dict.fromkeys(GOOD, 0.0)


def watched(steps: list[dict]) -> dict[str, Watched]:
  return {name: Watched([values[name] for values in steps]) for name in GOOD}


def test_metrics_are_read_one_dispatch_late_and_step_by_step(tmp_path):
  console = Console(is_quiet=True)
  console.start_epoch(1, 1, num_steps=3, done=0)
  recorder = Recorder(tmp_path, console, log_every=1, steps_per_epoch=3, step=0, **NEW)
  recorder.start_epoch(1)
  first, second = watched([GOOD, GOOD | {"loss": 2.0}]), watched([GOOD | {"loss": 1.0}, NOTHING])
  recorder.record_steps(range(1, 3), first)
  assert not first["loss"].is_read
  recorder.record_steps(range(3, 4), second)
  assert first["loss"].is_read
  assert not second["loss"].is_read
  recorder.flush()
  assert second["loss"].is_read
  recorder.close()
  assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(1, 2.0), (2, 1.0), (3, 0.5)]


def record(
  tmp_path, steps: list[dict], *, skips: bool, num_skipped: int = 0, num_seeds: int = 1, per_dispatch: int = 1
) -> dict:
  """The line of an epoch of these steps."""
  console = Console(is_quiet=True)
  console.start_epoch(1, 1, num_steps=len(steps), done=0)
  recorder = Recorder(
    tmp_path,
    console,
    log_every=100,
    steps_per_epoch=len(steps),
    step=0,
    **NEW | {"skips_non_finite": skips, "num_skipped": num_skipped, "seeds": range(3, 3 + num_seeds)},
  )
  try:
    recorder.start_epoch(1)
    for start in range(0, len(steps), per_dispatch):
      some = steps[start : start + per_dispatch]
      recorder.record_steps(range(start + 1, start + len(some) + 1), watched(some))
    recorder.flush()
    result = summarize(np.zeros(1), np.zeros(1))
    if num_seeds > 1:
      result = EnsembleEvaluation(**vars(result), seeds=[result] * num_seeds)
    return recorder.record_epoch(len(steps), result, seconds=0, evaluation_seconds=0)
  finally:
    recorder.close()


@pytest.mark.parametrize("per_dispatch", [1, 2])
@pytest.mark.parametrize("bad", [{"loss": np.nan, "is_finite": 0.0}, {"is_finite": 0.0}])
def test_a_step_that_is_not_finite_stops_or_is_left_out(bad, per_dispatch, tmp_path):
  with pytest.raises(DivergenceError, match="Step 2 is not finite"):
    record(tmp_path, [GOOD, GOOD | bad, GOOD], skips=False, per_dispatch=per_dispatch)
  line = record(tmp_path / ".", [GOOD, GOOD | bad, GOOD], skips=True, per_dispatch=per_dispatch)
  assert (line["loss"], line["accuracy"]) == (2, 0.5)


def test_ten_skipped_steps_in_a_row_are_too_many(tmp_path):
  bad = GOOD | {"loss": np.nan, "is_finite": 0.0}
  record(tmp_path, [*[bad] * 9, GOOD, *[bad] * 9], skips=True)
  with pytest.raises(DivergenceError, match="Steps 2 to 11 are not finite"):
    record(tmp_path, [GOOD, *[bad] * 10], skips=True)
  with pytest.raises(DivergenceError, match="Steps -8 to 1 are not finite"):
    record(tmp_path, [bad], skips=True, num_skipped=9)


ALL_GOOD = {name: [value, value] for name, value in GOOD.items()}
SECOND_BAD = ALL_GOOD | {"loss": [4.0, np.nan], "is_finite": [1.0, 0.0]}


def test_a_seed_that_is_not_finite_is_named_and_left_out_alone(tmp_path, capsys):
  with pytest.raises(DivergenceError, match=r"^Step 2 is not finite \(seed 4: its loss is nan\)"):
    record(tmp_path, [ALL_GOOD, SECOND_BAD], skips=False, num_seeds=2)
  line = record(tmp_path, [ALL_GOOD, SECOND_BAD, ALL_GOOD | {"loss": [1.0, 0.0]}], skips=True, num_seeds=2)
  # Of 6 reviews and of 4.
  assert [of_seed["loss"] for of_seed in line["seeds"]] == [9 / 6, 4 / 4]
  assert [of_seed["seed"] for of_seed in line["seeds"]] == [3, 4]
  assert line["loss"] == (9 / 6 + 4 / 4) / 2


def test_skipped_steps_in_a_row_are_those_of_one_seed(tmp_path):
  first_bad = ALL_GOOD | {"is_finite": [0.0, 1.0]}
  record(tmp_path, [*[first_bad] * 9, *[SECOND_BAD] * 9], skips=True, num_seeds=2)
  with pytest.raises(DivergenceError, match=r"Steps 2 to 11 are not finite \(the last: seed 4: its loss is nan\)"):
    record(
      tmp_path,
      [first_bad, *[SECOND_BAD] * 9, ALL_GOOD | {"is_finite": [0.0, 0.0], "loss": [0.0, np.nan]}],
      skips=True,
      num_seeds=2,
    )
