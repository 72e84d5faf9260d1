"""A run that is stopped in any way continues as if it had not been."""

import contextlib
import os
import signal
from collections.abc import Iterator

import pytest
from reliability.sandbox import checkpoints_of
from training.tiny import assert_close_end, assert_same_end, change, lines, tiny

import imdb_jax
from imdb_jax import evaluation
from imdb_jax.config import Config
from imdb_jax.processes import Interrupted
from imdb_jax.store import files
from imdb_jax.store.checkpoints import Checkpoints
from imdb_jax.training.loop import _Trainer
from imdb_jax.training.metrics import Recorder

pytestmark = pytest.mark.usefixtures("shared_programs")

repeats_torture = pytest.mark.slow


@contextlib.contextmanager
def signal_before(owner: object, name: str, number: signal.Signals, at_call: int = 1) -> Iterator[list[None]]:
  """Send this process a signal just before some call of a function; yield a list with an item per call so far."""
  function, calls = getattr(owner, name), []

  def interrupted(*arguments, **settings):
    calls.append(None)
    if len(calls) == at_call:
      os.kill(os.getpid(), number)
    return function(*arguments, **settings)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(owner, name, interrupted)
    yield calls


@contextlib.contextmanager
def death_in(owner: object, name: str) -> Iterator[None]:
  """End a run like a kill when it calls a function."""

  def die(*arguments, **settings):
    raise KeyboardInterrupt

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(owner, name, die)
    with pytest.raises(KeyboardInterrupt):
      yield


def train_until_stopped(config: Config) -> Interrupted:
  with pytest.raises(Interrupted) as stop:
    imdb_jax.fit(config)
  return stop.value


@pytest.mark.parametrize("step", [0, 1, 2, 4, 8, *(pytest.param(step, marks=repeats_torture) for step in (3, 5, 6, 7))])
def test_a_signal_at_any_step(whole, step, tmp_path):
  config = tiny(tmp_path / "run")
  # Step 0 is during compilation.
  moment = (Recorder, "record_steps") if step else (_Trainer, "_compile")
  with signal_before(*moment, signal.SIGINT, at_call=max(step, 1)):
    stop = train_until_stopped(config)
  assert (stop.signal, stop.step) == (signal.SIGINT, step)
  imdb_jax.fit(config)
  assert_same_end(whole, config)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["gru", "rnn"])
def test_other_cells_resume_within_an_epoch(cell, tmp_path):
  undisturbed, config = (change(tiny(tmp_path / name), "model", cell=cell) for name in ("undisturbed", "stopped"))
  imdb_jax.fit(undisturbed)
  with signal_before(Recorder, "record_steps", signal.SIGINT, at_call=2):
    assert train_until_stopped(config).step == 2
  imdb_jax.fit(config)
  assert_same_end(undisturbed, config)


def test_a_signal_between_two_epochs(whole, tmp_path):
  config = tiny(tmp_path / "run")
  with signal_before(Recorder, "record_epoch", signal.SIGTERM):
    assert train_until_stopped(config).step == 4
  assert checkpoints_of(config.run_dir).find(4).score is not None, "its evaluation is not lost"
  imdb_jax.fit(config)
  assert_same_end(whole, config)


@pytest.mark.parametrize("settings", [{"save_every_steps": 1}, {"save_every_seconds": 1e-9}, {"save_every_steps": 3}])
def test_saves_within_an_epoch_change_nothing_and_limit_what_is_lost(whole, settings, tmp_path):
  config = change(tiny(tmp_path / "run"), "runtime", **settings)
  with death_in(evaluation, "evaluate"):
    imdb_jax.fit(config)
  # The fourth step is saved at the end of the epoch, after its evaluation.
  assert checkpoints_of(config.run_dir).steps()[-1] == 3
  imdb_jax.fit(config)
  assert_same_end(whole, config)


def test_a_stop_during_evaluation_evaluates_again_and_keeps_the_best(whole, tmp_path):
  config, best_step = tiny(tmp_path / "run"), imdb_jax.Classifier.load(whole.run_dir).step
  num_epochs = best_step // 4
  with signal_before(evaluation, "evaluate", signal.SIGTERM, at_call=num_epochs) as evaluations:
    assert train_until_stopped(config).step == best_step
  assert len(evaluations) == num_epochs
  assert len([line for line in lines(config.run_dir) if line["kind"] == "epoch"]) == num_epochs - 1
  imdb_jax.fit(config)
  assert_same_end(whole, config)
  assert imdb_jax.Classifier.load(config.run_dir).step == best_step


def test_a_stop_at_the_start_of_an_epoch_keeps_the_score_of_the_one_before(whole, tmp_path):
  config = tiny(tmp_path / "run")
  with signal_before(Recorder, "start_epoch", signal.SIGTERM, at_call=2):
    assert train_until_stopped(config).step == 4
  assert checkpoints_of(config.run_dir).find(4).score is not None
  imdb_jax.fit(config)
  assert_same_end(whole, config)


def test_a_stop_during_evaluation_then_a_kill_before_its_epoch_is_saved(whole, tmp_path):
  config = tiny(tmp_path / "run")
  with signal_before(evaluation, "evaluate", signal.SIGTERM):
    train_until_stopped(config)
  with death_in(files, "write_manifest"):
    imdb_jax.fit(config)
  imdb_jax.fit(config)
  assert_same_end(whole, config)


@pytest.mark.slow
@pytest.mark.parametrize("route", [(4, 1, 4), (1, 4, 1)], ids=str)
def test_a_run_continues_on_another_number_of_devices(whole, route, tmp_path):
  """A batch of 10 takes 12 rows on four devices. Both stops are within one of the two epochs of four steps."""
  config = tiny(tmp_path / "run")
  for num_devices, step, done in zip(route, (2, 7), (0, 2), strict=False):
    with signal_before(Recorder, "record_steps", signal.SIGTERM, at_call=step - done):
      assert train_until_stopped(change(config, "runtime", num_devices=num_devices)).step == step
  imdb_jax.fit(change(config, "runtime", num_devices=route[-1]))
  assert_close_end(whole.run_dir, config.run_dir)


@pytest.mark.parametrize("steps_per_dispatch", [3, 8])
def test_the_number_of_steps_per_dispatch_changes_nothing(whole, steps_per_dispatch, tmp_path):
  """The last dispatch of an epoch of four steps has fewer."""
  config = change(tiny(tmp_path / "run"), "runtime", steps_per_dispatch=steps_per_dispatch)
  imdb_jax.fit(config)
  assert_close_end(whole.run_dir, config.run_dir)


def test_a_dispatch_ends_where_a_save_is_due(whole, tmp_path, monkeypatch):
  config = change(tiny(tmp_path / "run"), "runtime", steps_per_dispatch=8, save_every_steps=2)
  steps, save = [], Checkpoints.save
  with monkeypatch.context() as patch:
    patch.setattr(Checkpoints, "save", lambda self, saved, state: steps.append(saved.step) or save(self, saved, state))
    imdb_jax.fit(config)
  assert steps == [2, 4, 6, 8]
  assert_close_end(whole.run_dir, config.run_dir)


def test_a_resumed_run_does_not_save_its_step_again(whole, tmp_path, monkeypatch):
  config = change(tiny(tmp_path / "run"), "runtime", save_every_steps=1)
  with signal_before(Recorder, "flush", signal.SIGTERM, at_call=2):
    stopped = train_until_stopped(config)
  steps, save = [], Checkpoints.save
  monkeypatch.setattr(
    Checkpoints, "save", lambda self, saved, state: steps.append(saved.step) or save(self, saved, state)
  )
  imdb_jax.fit(config)
  assert steps[0] == stopped.step + 1
  assert_same_end(whole, config)


def test_a_signal_is_handled_after_the_dispatch(tmp_path):
  """And resuming after it changes no bit."""
  undisturbed, config = (
    change(tiny(tmp_path / name), "runtime", steps_per_dispatch=3) for name in ("undisturbed", "stopped")
  )
  imdb_jax.fit(undisturbed)
  with signal_before(Recorder, "record_steps", signal.SIGTERM):
    assert train_until_stopped(config).step == 3
  imdb_jax.fit(config)
  assert_same_end(undisturbed, config)


@pytest.mark.slow
@pytest.mark.parametrize("num_devices", [1, 2])
def test_the_same_command_gives_the_same_bits(num_devices, tmp_path):
  first, second = (change(tiny(tmp_path / name), "runtime", num_devices=num_devices) for name in ("first", "second"))
  imdb_jax.fit(first)
  imdb_jax.fit(second)
  assert_same_end(first, second)
