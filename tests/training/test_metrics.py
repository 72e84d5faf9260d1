"""Sums from the devices become means, and steps that are not finite stop the run or are left out."""

from pathlib import Path

import numpy as np
import pytest
from training.tiny import change, tiny

from imdb_jax.errors import CheckpointError, DivergenceError
from imdb_jax.store.metrics_log import METRICS, MetricsLog
from imdb_jax.task import Classification, Evaluation
from imdb_jax.training.console import Console
from imdb_jax.training.metrics import Recorder

# The seed of the run; a second one is its successor.
SEED = 3
# A step of one seed, and what entries beyond the last step of a dispatch hold.
GOOD = {"loss": 4.0, "correct": 1.0, "weight": 2.0, "is_finite": 1.0, "grad_norm": 3.0}
NOTHING = dict.fromkeys(GOOD, 0.0)
BAD = GOOD | {"loss": np.nan, "is_finite": 0.0}


class Watched:
  """An array on a device that remembers whether it was read."""

  def __init__(self, value: list):
    self.value, self.is_read = value, False

  def __array__(self, dtype=None, copy=None):
    self.is_read = True
    return np.asarray(self.value, dtype)


def watched(*steps: dict | list[dict]) -> dict[str, Watched]:
  """Return the sums [seeds, steps] of a dispatch, from the sums of each step: a dict, or a list with one per seed."""
  by_step = [[step] if isinstance(step, dict) else step for step in steps]
  return {name: Watched([[seed[name] for seed in seeds] for seeds in zip(*by_step, strict=True)]) for name in GOOD}


class Run:
  """A recorder that writes metrics.jsonl in a folder."""

  def __init__(self, folder: Path, *, num_seeds: int = 1, log_every: int = 100):
    config = tiny(folder, epochs=3, seed=SEED, num_seeds=num_seeds)
    self.config, self.num_seeds = change(config, "runtime", log_every=log_every), num_seeds
    folder.mkdir(exist_ok=True)
    self.log = MetricsLog(self.config, step=0, num_epochs=0, held={})
    self.start({})

  def start(self, progress: dict) -> None:
    self.recorder = Recorder(self.config, Console(is_quiet=True), self.log, progress, 1e-3)

  def record(self, *steps: dict | list[dict], per_dispatch: int = 1) -> dict:
    """Return the line of an epoch of these steps, as it was written."""
    self.recorder.start_epoch(1, 0, len(steps))
    for start in range(0, len(steps), per_dispatch):
      some = steps[start : start + per_dispatch]
      self.recorder.record_steps(range(start + 1, start + len(some) + 1), watched(*some))
    self.recorder.flush()
    return self.recorder.record_epoch(len(steps), self.evaluation(), seconds=1.23456, evaluation_seconds=2)

  def evaluation(self) -> Evaluation:
    # The first seed is wrong about half of the reviews, the ensemble of both about none.
    logits = np.array([[-1, -1, 1, 1], [-9, 9, -9, 9]], np.float32)[: self.num_seeds, :, None]
    return Classification().evaluate(logits, np.array([0, 1, 0, 1]))


@pytest.fixture
def make_run(tmp_path):
  runs = []

  def make(**settings) -> Run:
    runs.append(Run(tmp_path / str(len(runs)), **settings))
    return runs[-1]

  yield make
  for run in runs:
    run.log.close()


def test_metrics_are_read_one_dispatch_late_and_step_by_step(make_run, monkeypatch):
  run, lines = make_run(log_every=1), []
  monkeypatch.setattr(run.log, "write", lines.append)
  run.recorder.start_epoch(1, 0, 3)
  first, second = watched(GOOD, GOOD | {"loss": 2.0}), watched(GOOD | {"loss": 1.0}, NOTHING)
  run.recorder.record_steps(range(1, 3), first)
  assert not first["loss"].is_read
  run.recorder.record_steps(range(3, 4), second)
  assert first["loss"].is_read
  assert not second["loss"].is_read
  run.recorder.flush()
  assert second["loss"].is_read
  assert [(line["step"], line["loss"]) for line in lines] == [(1, 2.0), (2, 1.0), (3, 0.5)]


def test_a_line_has_time_rate_norm_and_speed(make_run, monkeypatch):
  run, lines, now = make_run(num_seeds=2, log_every=2), [], iter([100.0, 100.5, 102.5])
  run.recorder._learning_rate = lambda num_done: 0.1 * num_done
  monkeypatch.setattr(run.log, "write", lines.append)
  monkeypatch.setattr("imdb_jax.training.metrics.time.time", lambda: next(now))
  run.record([GOOD, GOOD], [GOOD, GOOD | {"grad_norm": 5.0}], [GOOD, GOOD])
  # Two steps of two seeds with two reviews each in half a second, then one step in two seconds.
  fields = ("step", "time", "learning_rate", "grad_norm", "reviews_per_second")
  found = [tuple(line[name] for name in fields) for line in lines[:2]]
  assert found == [(2, 100.5, 0.1, 4.0, 16.0), (3, 102.5, 0.2, 3.0, 2.0)]


@pytest.mark.parametrize("per_dispatch", [1, 2])
@pytest.mark.parametrize("bad", [{"loss": np.nan, "is_finite": 0.0}, {"is_finite": 0.0}])
def test_a_step_that_is_not_finite_stops_the_run(bad, per_dispatch, make_run):
  with pytest.raises(DivergenceError, match="Step 2 is not finite"):
    make_run().record(GOOD, GOOD | bad, GOOD, per_dispatch=per_dispatch)


@pytest.mark.parametrize(("loss", "cause"), [(np.inf, "the loss is inf"), (4.0, "gradients or parameters")])
def test_the_cause_of_a_step_that_is_not_finite_is_named(loss, cause, make_run):
  with pytest.raises(DivergenceError, match=rf"^Step 1 is not finite \(seed 3: {cause}\)\.$"):
    make_run().record(GOOD | {"loss": loss, "is_finite": 0.0})


def test_only_the_seed_that_is_not_finite_is_named(make_run):
  with pytest.raises(DivergenceError, match=r"^Step 2 is not finite \(seed 4: the loss is nan\)"):
    make_run(num_seeds=2).record([GOOD, GOOD], [GOOD, BAD])


@pytest.mark.parametrize("num_seeds", [1, 2])
def test_an_epochs_line_has_the_ensembles_validation_and_the_seeds(num_seeds, make_run):
  run = make_run(num_seeds=num_seeds)
  line, result = run.record([GOOD] * num_seeds), run.evaluation()
  assert (line["kind"], line["epoch"], line["step"]) == ("epoch", 1, 1)
  assert (line["val_loss"], line["val_accuracy"]) == (result.loss, num_seeds / 2)
  assert (line["seconds"], line["evaluation_seconds"]) == (1.235, 2)
  assert len(line["seeds"]) == num_seeds
  for seed, values, each in zip(run.config.training.seeds, line["seeds"], result.seeds, strict=True):
    assert values == {"seed": seed, **dict(zip(METRICS, (2.0, 0.5, each.loss, each.accuracy), strict=True))}
  assert run.log.history == [line]


def test_windows_and_epochs_continue_from_a_checkpoint(make_run, monkeypatch):
  steps = [GOOD | {"loss": float(loss)} for loss in range(1, 7)]
  run, lines = make_run(log_every=4), []
  monkeypatch.setattr(run.log, "write", lines.append)
  monkeypatch.setattr("imdb_jax.training.metrics.time.time", lambda: 0.0)
  whole = run.record(*steps)
  whole_lines, lines[:] = list(lines), []
  assert [(line["step"], line["loss"]) for line in whole_lines] == [(4, 10 / 8), (6, 11 / 4), (6, 21 / 12)]

  run.recorder.start_epoch(1, 0, 6)
  run.recorder.record_steps(range(1, 4), watched(*steps[:3]))
  run.recorder.flush()
  run.start(run.recorder.progress())
  run.recorder.start_epoch(1, 3, 6)
  run.recorder.record_steps(range(4, 7), watched(*steps[3:]))
  run.recorder.flush()
  assert run.recorder.record_epoch(6, run.evaluation(), seconds=1.23456, evaluation_seconds=2) == whole
  for line in lines + whole_lines:
    line.pop("reviews_per_second", None)
  assert lines == whole_lines


@pytest.mark.parametrize(
  "progress",
  [
    {"epoch_sums": {"loss": [0.0], "correct": [0.0]}},
    {"epoch_sums": [1.0]},
    {"window_sums": {"loss": ["a"], "correct": [0.0], "weight": [0.0]}},
    {"window_sums": {"loss": [0.0, 0.0], "correct": [0.0, 0.0], "weight": [0.0, 0.0]}},
    {"epoch_sums": {"loss": [10**400], "correct": [0.0], "weight": [0.0]}},
    {"epoch_sums": {"loss": [1e60], "correct": [0.0], "weight": [0.0]}},
    {"epoch_sums": {"loss": [0.0], "correct": [-1.0], "weight": [0.0]}},
    {"epoch_sums": {"loss": [0.0], "correct": [0.0], "weight": [np.nan]}},
    {"epoch_sums": {"loss": ["long\n" * 10_000], "correct": [0.0], "weight": [0.0]}},
  ],
)
def test_progress_of_another_form_is_a_checkpoint_error(progress, make_run):
  with pytest.raises(CheckpointError, match="progress is invalid") as caught:
    make_run().start(progress)
  assert len(str(caught.value).splitlines()) == 1
  assert len(str(caught.value)) < 300
