"""A run that stops in whatever way goes on as if it had not."""

import dataclasses
import errno
import logging
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from training.tiny import assert_close_end, final_state, tiny, without_times

import imdb_jax
from imdb_jax import checkpoint, evaluation, manifest, steps
from imdb_jax.checkpoint import Checkpoints
from imdb_jax.config import Config
from imdb_jax.errors import CheckpointError, DivergenceError, UsageError
from imdb_jax.training.recorder import Recorder
from imdb_jax.training.signals import Interrupted


def with_runtime(config: Config, **settings) -> Config:
  return dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, **settings))


def assert_same_end(one: Config, other: Config) -> None:
  """Bit for bit, but for times."""
  assert without_times(one.run_dir) == without_times(other.run_dir)
  expected, found = final_state(one.run_dir), final_state(other.run_dir)
  assert expected.keys() == found.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Config:
  """A run that nothing disturbed."""
  config = tiny(tmp_path_factory.mktemp("runs") / "whole")
  imdb_jax.fit(config)
  return config


@pytest.mark.parametrize("step", range(9))
def test_a_signal_at_any_step(whole, step, tmp_path, monkeypatch):
  config = tiny(tmp_path / "run")
  if step == 0:
    make_train_step = steps.make_train_step
    # While it compiles.
    monkeypatch.setattr(
      steps, "make_train_step", lambda *args: os.kill(os.getpid(), signal.SIGINT) or make_train_step(*args)
    )
  else:
    record_steps = Recorder.record_steps

    def interrupted(recorder, numbers, metrics):
      if step in numbers:
        os.kill(os.getpid(), signal.SIGINT)
      record_steps(recorder, numbers, metrics)

    monkeypatch.setattr(Recorder, "record_steps", interrupted)
  with pytest.raises(Interrupted) as stop:
    imdb_jax.fit(config)
  assert stop.value.signal == signal.SIGINT
  assert stop.value.step == step
  monkeypatch.undo()
  imdb_jax.fit(config)
  assert_same_end(whole, config)


def test_a_signal_between_two_epochs(whole, tmp_path, monkeypatch):
  config = tiny(tmp_path / "run")
  record_epoch = Recorder.record_epoch

  def interrupted(*arguments, **settings):
    os.kill(os.getpid(), signal.SIGTERM)
    return record_epoch(*arguments, **settings)

  with monkeypatch.context() as patch:
    patch.setattr(Recorder, "record_epoch", interrupted)
    with pytest.raises(Interrupted) as stop:
      imdb_jax.fit(config)
  assert stop.value.step == 4
  assert Checkpoints(config.run_dir, read_only=True).find(4).val_accuracy is not None, "its evaluation is not lost"
  imdb_jax.fit(config)
  assert_same_end(whole, config)


@pytest.mark.parametrize("setting", [{"save_every_steps": 1}, {"save_every_seconds": 1e-9}, {"save_every_steps": 3}])
def test_saves_within_an_epoch_change_nothing_and_bound_what_is_lost(whole, setting, tmp_path, monkeypatch):
  config = with_runtime(tiny(tmp_path / "run"), **setting)
  with monkeypatch.context() as patch:
    patch.setattr(evaluation, "evaluate", _die)
    with pytest.raises(KeyboardInterrupt):
      imdb_jax.fit(config)
  # Not the fourth step: the epoch's end saves that one, once it is evaluated.
  assert Checkpoints(config.run_dir, read_only=True).steps()[-1] == 3
  imdb_jax.fit(config)
  assert_same_end(whole, config)


def _flip(path: Path) -> None:
  changed = bytearray(path.read_bytes())
  changed[len(changed) // 2] ^= 1
  path.write_bytes(changed)


def _largest(step: Path) -> Path:
  return max((path for path in step.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def _link(path: Path) -> None:
  path.rename(path.parent.parent.parent / "elsewhere")
  path.symlink_to(path.parent.parent.parent / "elsewhere")


DAMAGE = {
  "flipped": lambda step: _flip(_largest(step)),
  "truncated": lambda step: os.truncate(_largest(step), 10),
  "removed": lambda step: _largest(step).unlink(),
  "linked": lambda step: _link(_largest(step)),
  "its manifest": lambda step: _flip(step.parent.parent / "manifests" / f"{step.name}.json"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_step_is_named_and_the_one_before_is_used(whole, damage, tmp_path, caplog):
  config = tiny(tmp_path / "run")
  imdb_jax.fit(config)
  damage(config.run_dir / "checkpoints" / "8")

  with caplog.at_level(logging.WARNING):
    classifier = imdb_jax.Classifier.load(config.run_dir, step="latest")
  assert classifier.step == 4
  assert "checkpoints/8: damaged and not used" in caplog.text
  assert (config.run_dir / "checkpoints" / "8").exists(), "a reader changes nothing"
  with pytest.raises(CheckpointError, match="8: damaged"):
    imdb_jax.Classifier.load(config.run_dir, step=8)

  imdb_jax.fit(config)
  assert_same_end(whole, config)
  assert [path.name for path in (config.run_dir / "damaged").iterdir()] == ["8-1"], "nothing is thrown away"


@pytest.mark.parametrize("is_read_first", [False, True])
def test_a_reader_looks_again_when_the_trainer_removes_what_it_found(whole, is_read_first, tmp_path, monkeypatch):
  run_dir = Path(shutil.copytree(whole.run_dir, tmp_path / "run"))
  restore = Checkpoints.restore

  def remove_and_restore(checkpoints, saved, abstract):
    read = restore(checkpoints, saved, abstract) if is_read_first else None
    (run_dir / "manifests" / f"{saved.step}.json").unlink()
    shutil.rmtree(run_dir / "checkpoints" / str(saved.step))
    monkeypatch.setattr(Checkpoints, "restore", restore)
    return read or restore(checkpoints, saved, abstract)

  monkeypatch.setattr(Checkpoints, "restore", remove_and_restore)
  assert imdb_jax.Classifier.load(run_dir, step="latest").step == 4
  monkeypatch.setattr(Checkpoints, "restore", remove_and_restore)
  with pytest.raises(CheckpointError, match="none has been saved yet"):
    imdb_jax.Classifier.load(run_dir, step=4)


def test_a_step_that_is_removed_while_a_reader_looks_is_not_damaged(whole, tmp_path, monkeypatch, caplog):
  run_dir = Path(shutil.copytree(whole.run_dir, tmp_path / "run"))
  problem = manifest.problem

  def remove_and_look(folder, path):
    if folder.name == "8":
      path.unlink()
    return problem(folder, path)

  monkeypatch.setattr(manifest, "problem", remove_and_look)
  assert Checkpoints(run_dir, read_only=True).steps() == [4]
  assert not caplog.text


def test_without_any_good_step_all_are_named_and_nothing_starts_anew(tmp_path):
  config = tiny(tmp_path / "run")
  imdb_jax.fit(config)
  for step in (4, 8):
    _flip(_largest(config.run_dir / "checkpoints" / str(step)))
  before = (config.run_dir / "metrics.jsonl").read_bytes()
  for _ in range(2):
    with pytest.raises(CheckpointError, match=r"(?s)step 4: .* altered.*step 8: .* altered"):
      imdb_jax.fit(config)
  assert (config.run_dir / "metrics.jsonl").read_bytes() == before


def _die(*arguments, **settings) -> None:
  """As a kill at this moment."""
  raise KeyboardInterrupt


@pytest.mark.parametrize("call", range(1, 5))
@pytest.mark.parametrize(
  ("owner", "name"), [(manifest, "write"), (checkpoint, "_remove"), (checkpoint.ocp.Checkpointer, "save")]
)
def test_a_kill_within_a_save_loses_nothing_that_was_saved(whole, owner, name, call, tmp_path, monkeypatch):
  config = with_runtime(tiny(tmp_path / "run"), save_every_steps=1)
  real, calls = getattr(owner, name), []

  def dying(*arguments, **settings):
    calls.append(arguments)
    return (_die if len(calls) == call else real)(*arguments, **settings)

  with monkeypatch.context() as patch:
    patch.setattr(owner, name, dying)
    with pytest.raises(KeyboardInterrupt):
      imdb_jax.fit(config)
  imdb_jax.fit(config)
  assert_same_end(whole, config)
  assert not (config.run_dir / "damaged").exists(), "a kill damages nothing"


def test_a_stop_in_an_evaluation_then_a_kill_before_its_epoch_is_saved(whole, tmp_path, monkeypatch):
  config = tiny(tmp_path / "run")
  evaluate = evaluation.evaluate

  def stopped(*arguments):
    os.kill(os.getpid(), signal.SIGTERM)
    return evaluate(*arguments)

  with monkeypatch.context() as patch:
    patch.setattr(evaluation, "evaluate", stopped)
    with pytest.raises(Interrupted):
      imdb_jax.fit(config)
  with monkeypatch.context() as patch:
    patch.setattr(manifest, "write", _die)
    with pytest.raises(KeyboardInterrupt):
      imdb_jax.fit(config)
  imdb_jax.fit(config)
  assert_same_end(whole, config)


def test_a_full_disk_fails_the_run_and_leaves_the_older_steps(whole, tmp_path, monkeypatch):
  config = tiny(tmp_path / "run")
  real = manifest.write

  def full(folder, path, facts):
    if folder.name == "8":
      raise OSError(errno.ENOSPC, "No space left on device")
    real(folder, path, facts)

  with monkeypatch.context() as patch:
    patch.setattr(manifest, "write", full)
    with pytest.raises(CheckpointError, match=r"Step 8 could not be saved in .*checkpoints.*No space left"):
      imdb_jax.fit(config)
  assert imdb_jax.Classifier.load(config.run_dir, step="latest").step == 4
  imdb_jax.fit(config)
  assert_same_end(whole, config)


def test_metrics_that_lack_an_epoch_are_refused(tmp_path):
  config = tiny(tmp_path / "run")
  imdb_jax.fit(config)
  (config.run_dir / "metrics.jsonl").write_text("")
  with pytest.raises(CheckpointError, match="holds 0 epochs of 2 before step 8"):
    imdb_jax.fit(config)


@pytest.mark.parametrize(
  "text", ["null\n", "[]\n", '{"kind": "epoch"}\n', "{" * 10**5 + "\n", '{"kind": "step", "step": "4"}\n']
)
def test_metrics_that_are_none_are_named(text, tmp_path):
  config = tiny(tmp_path / "run")
  imdb_jax.fit(config)
  (config.run_dir / "metrics.jsonl").write_text(text + "\n")
  with pytest.raises(UsageError, match=r"metrics\.jsonl: not readable"):
    imdb_jax.fit(config)


def test_a_kill_while_lines_are_dropped_loses_none(tmp_path, monkeypatch):
  config = tiny(tmp_path / "run")
  imdb_jax.fit(config)
  before = (config.run_dir / "metrics.jsonl").read_bytes()
  write_text = Path.write_text

  def cut(path, text, **settings):
    write_text(path, text[:10], **settings)
    _die()

  monkeypatch.setattr(Path, "write_text", cut)
  with pytest.raises(KeyboardInterrupt):
    imdb_jax.fit(config)
  assert (config.run_dir / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("cut_after", range(3))
def test_a_run_directory_that_was_not_laid_whole_is_laid_anew(whole, cut_after, tmp_path, monkeypatch):
  config = tiny(tmp_path / "run")
  replace, moves = Path.replace, []

  def cut(path, target):
    if path.parent.name == ".laying":
      if len(moves) == cut_after:
        raise OSError(errno.ENOSPC, "No space left on device")
      moves.append(target)
    return replace(path, target)

  with monkeypatch.context() as patch:
    patch.setattr(Path, "replace", cut)
    with pytest.raises(UsageError, match="No space left"):
      imdb_jax.fit(config)
  imdb_jax.fit(config)
  assert_same_end(whole, config)


def test_metrics_for_which_there_is_no_room_end_the_run_in_one_line(whole, tmp_path, monkeypatch):
  config = tiny(tmp_path / "run")
  with monkeypatch.context() as patch:
    patch.setattr(Recorder, "_write", lambda *args: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(UsageError, match=r"--run-dir .*No space left.*intact"):
      imdb_jax.fit(config)
  imdb_jax.fit(config)
  assert_same_end(whole, config)


def test_divergence_names_the_step_and_the_last_good_checkpoint(tmp_path, monkeypatch):
  config = tiny(tmp_path / "run")
  record_steps = Recorder.record_steps

  def poisoned(recorder, numbers, metrics):
    record_steps(recorder, numbers, metrics if 6 not in numbers else metrics | {"is_finite": np.zeros(1)})

  monkeypatch.setattr(Recorder, "record_steps", poisoned)
  with pytest.raises(DivergenceError, match=r"Step 6 .*its gradients.*last good checkpoint is step 4.*non-finite"):
    imdb_jax.fit(config)
  assert Checkpoints(config.run_dir, read_only=True).steps() == [4]


@pytest.mark.parametrize("route", [(4, 1, 4), (1, 4, 1)], ids=str)
def test_a_run_goes_on_with_other_devices(whole, route, tmp_path, monkeypatch):
  """A batch of 10 takes 12 rows on four devices. The stops lie within the two epochs of four steps."""
  config = tiny(tmp_path / "run")
  record_steps = Recorder.record_steps

  def interrupted(recorder, numbers, metrics):
    if numbers[-1] in (2, 7):
      os.kill(os.getpid(), signal.SIGTERM)
    record_steps(recorder, numbers, metrics)

  monkeypatch.setattr(Recorder, "record_steps", interrupted)
  for num_devices, step in zip(route, (2, 7), strict=False):
    with pytest.raises(Interrupted) as stop:
      imdb_jax.fit(with_runtime(config, num_devices=num_devices))
    assert stop.value.step == step
  imdb_jax.fit(with_runtime(config, num_devices=route[-1]))
  assert_close_end(whole.run_dir, config.run_dir)


@pytest.mark.parametrize("steps_per_dispatch", [3, 8])
def test_how_many_steps_a_dispatch_has_changes_nothing(whole, steps_per_dispatch, tmp_path):
  """The last one of an epoch of four steps has fewer."""
  config = with_runtime(tiny(tmp_path / "run"), steps_per_dispatch=steps_per_dispatch)
  imdb_jax.fit(config)
  assert_close_end(whole.run_dir, config.run_dir)


def test_a_dispatch_ends_where_a_save_is_due(whole, tmp_path, monkeypatch):
  config = with_runtime(tiny(tmp_path / "run"), steps_per_dispatch=8, save_every_steps=2)
  saved = []
  save = Checkpoints.save
  with monkeypatch.context() as patch:
    patch.setattr(Checkpoints, "save", lambda self, step, *args: saved.append(step) or save(self, step, *args))
    imdb_jax.fit(config)
  assert saved == [2, 4, 6, 8]
  assert_close_end(whole.run_dir, config.run_dir)


def test_a_signal_is_heeded_after_the_dispatch(tmp_path, monkeypatch):
  """And to go on after it changes no bit."""
  undisturbed, config = (
    with_runtime(tiny(tmp_path / name), steps_per_dispatch=3) for name in ("undisturbed", "stopped")
  )
  imdb_jax.fit(undisturbed)
  record_steps = Recorder.record_steps

  def interrupted(recorder, numbers, metrics):
    if 2 in numbers:
      os.kill(os.getpid(), signal.SIGTERM)
    record_steps(recorder, numbers, metrics)

  with monkeypatch.context() as patch:
    patch.setattr(Recorder, "record_steps", interrupted)
    with pytest.raises(Interrupted) as stop:
      imdb_jax.fit(config)
  assert stop.value.step == 3
  imdb_jax.fit(config)
  assert_same_end(undisturbed, config)


@pytest.mark.parametrize("num_devices", [1, 2])
def test_the_same_command_gives_the_same_bits(num_devices, tmp_path):
  first, second = (with_runtime(tiny(tmp_path / name), num_devices=num_devices) for name in ("first", "second"))
  imdb_jax.fit(first)
  imdb_jax.fit(second)
  assert_same_end(first, second)
