"""Kills during saves, damaged checkpoints and metrics, and full disks."""

import errno
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from reliability.sandbox import checkpoints_of
from training.tiny import assert_same_end, change, tiny

import imdb_jax
from imdb_jax.config import Config
from imdb_jax.errors import CheckpointError, DivergenceError, UsageError
from imdb_jax.store import files
from imdb_jax.store.checkpoints import Checkpoints
from imdb_jax.store.metrics_log import MetricsLog
from imdb_jax.training.metrics import Recorder

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("shared_programs")]


@pytest.fixture
def finished(whole, tmp_path) -> Config:
  """A copy of the undisturbed run, to damage."""
  return tiny(Path(shutil.copytree(whole.run_dir, tmp_path / "run")))


def flip(path: Path) -> None:
  """Change a bit of a file."""
  changed = bytearray(path.read_bytes())
  changed[len(changed) // 2] ^= 1
  path.write_bytes(changed)


def largest(step: Path) -> Path:
  """Return the largest file of a checkpoint."""
  return max((path for path in step.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def replace_by_link(path: Path) -> None:
  """Move a file elsewhere and put a link to it in its place."""
  path.rename(path.parent.parent.parent / "elsewhere")
  path.symlink_to(path.parent.parent.parent / "elsewhere")


DAMAGE: dict[str, Callable[[Path], None]] = {
  "flipped": lambda step: flip(largest(step)),
  "truncated": lambda step: os.truncate(largest(step), 10),
  "removed": lambda step: largest(step).unlink(),
  "linked": lambda step: replace_by_link(largest(step)),
  "manifest": lambda step: flip(step.parent.parent / "manifests" / f"{step.name}.json"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_step_is_named_and_the_one_before_is_used(whole, finished, damage, caplog):
  damage(finished.run_dir / "checkpoints" / "8")
  with caplog.at_level(logging.WARNING):
    classifier = imdb_jax.Classifier.load(finished.run_dir, step="latest")
  assert classifier.step == 4
  assert "checkpoints: damaged and not used: step 8: " in caplog.text
  assert (finished.run_dir / "checkpoints" / "8").exists(), "a reader changes nothing"
  with pytest.raises(CheckpointError, match="8: damaged"):
    imdb_jax.Classifier.load(finished.run_dir, step=8)

  imdb_jax.fit(finished)
  assert_same_end(whole, finished)
  assert [path.name for path in (finished.run_dir / "damaged").iterdir()] == ["8-1"], "nothing is thrown away"


def test_without_any_usable_step_all_are_named_and_training_does_not_start_again(finished):
  for step in (4, 8):
    flip(largest(finished.run_dir / "checkpoints" / str(step)))
  before = (finished.run_dir / "metrics.jsonl").read_bytes()
  for _ in range(2):
    with pytest.raises(CheckpointError, match=r"(?s)step 4: .* changed.*step 8: .* changed"):
      imdb_jax.fit(finished)
  assert (finished.run_dir / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("is_read_first", [False, True])
def test_a_reader_looks_again_when_the_trainer_removes_the_step_that_it_found(finished, is_read_first, monkeypatch):
  restore, run_dir = Checkpoints._restore, finished.run_dir

  def remove_and_restore(checkpoints, step):
    read = restore(checkpoints, step) if is_read_first else None
    (run_dir / "manifests" / f"{step}.json").unlink()
    shutil.rmtree(run_dir / "checkpoints" / str(step))
    monkeypatch.setattr(Checkpoints, "_restore", restore)
    return read or restore(checkpoints, step)

  monkeypatch.setattr(Checkpoints, "_restore", remove_and_restore)
  assert imdb_jax.Classifier.load(run_dir, step="latest").step == 4
  monkeypatch.setattr(Checkpoints, "_restore", remove_and_restore)
  with pytest.raises(CheckpointError, match="none has been saved yet"):
    imdb_jax.Classifier.load(run_dir, step=4)


def test_a_step_that_is_removed_while_a_reader_checks_it_is_not_damaged(finished, monkeypatch, caplog):
  check = files.check_manifest

  def remove_and_check(folder, path):
    if folder.name == "8":
      path.unlink()
    return check(folder, path)

  monkeypatch.setattr(files, "check_manifest", remove_and_check)
  assert checkpoints_of(finished.run_dir).steps() == [4]
  assert not caplog.text


@pytest.mark.parametrize("call", [1, 2, 3, 4])
@pytest.mark.parametrize(("owner", "name"), [(files, "write_manifest"), (files, "remove"), (ocp.Checkpointer, "save")])
def test_a_kill_during_a_save_loses_nothing_that_was_saved(whole, owner, name, call, tmp_path, monkeypatch):
  config = change(tiny(tmp_path / "run"), "runtime", save_every_steps=1)
  real, calls = getattr(owner, name), []

  def dying(*arguments, **settings):
    # `files.remove` also serves the small files of the run.
    if any(isinstance(each, Path) and each.parent.name == "checkpoints" for each in arguments):
      calls.append(arguments)
      if len(calls) == call:
        raise KeyboardInterrupt
    return real(*arguments, **settings)

  with monkeypatch.context() as patch:
    patch.setattr(owner, name, dying)
    with pytest.raises(KeyboardInterrupt):
      imdb_jax.fit(config)
  imdb_jax.fit(config)
  assert_same_end(whole, config)
  assert not (config.run_dir / "damaged").exists(), "a kill damages nothing"


@pytest.mark.parametrize("num_written", range(3))
def test_a_run_directory_whose_creation_was_interrupted_is_created_again(whole, num_written, tmp_path, monkeypatch):
  config = tiny(tmp_path / "run")
  replace, written = Path.replace, []

  def interrupted(path, target):
    if len(written) == num_written:
      raise OSError(errno.ENOSPC, "No space left on device")
    written.append(target)
    return replace(path, target)

  with monkeypatch.context() as patch:
    patch.setattr(Path, "replace", interrupted)
    with pytest.raises(UsageError, match="No space left"):
      imdb_jax.fit(config)
  assert not (config.run_dir / "config.json").exists()
  imdb_jax.fit(config)
  assert_same_end(whole, config)


def test_a_full_disk_ends_the_run_and_leaves_the_older_steps(whole, tmp_path, monkeypatch):
  config = tiny(tmp_path / "run")
  write = files.write_manifest

  def full(folder, path, facts):
    if folder.name == "8":
      raise OSError(errno.ENOSPC, "No space left on device")
    write(folder, path, facts)

  with monkeypatch.context() as patch:
    patch.setattr(files, "write_manifest", full)
    with pytest.raises(CheckpointError, match=r"Step 8 could not be saved in .*checkpoints.*No space left"):
      imdb_jax.fit(config)
  assert imdb_jax.Classifier.load(config.run_dir, step="latest").step == 4
  imdb_jax.fit(config)
  assert_same_end(whole, config)


def test_metrics_that_do_not_fit_on_the_disk_end_the_run_in_one_line(whole, tmp_path, monkeypatch):
  config = tiny(tmp_path / "run")

  def full(log, line):
    raise OSError(errno.ENOSPC, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr(MetricsLog, "write", full)
    with pytest.raises(UsageError, match=r"--run-dir .*No space left.*not touched"):
      imdb_jax.fit(config)
  imdb_jax.fit(config)
  assert_same_end(whole, config)


def test_metrics_that_lack_an_epoch_are_refused(finished):
  (finished.run_dir / "metrics.jsonl").write_text("")
  with pytest.raises(CheckpointError, match="holds 0 of the 2 epochs before step 8"):
    imdb_jax.fit(finished)


@pytest.mark.parametrize(
  "text", ["null\n", "[]\n", '{"kind": "epoch"}\n', "{" * 10**5 + "\n", '{"kind": "step", "step": "4"}\n']
)
def test_a_file_that_does_not_hold_metrics_is_refused(finished, text):
  (finished.run_dir / "metrics.jsonl").write_text(text)
  with pytest.raises(UsageError, match=r"metrics\.jsonl: not readable"):
    imdb_jax.fit(finished)


def test_divergence_names_the_step_and_the_last_good_checkpoint(tmp_path, monkeypatch):
  config = tiny(tmp_path / "run")
  record_steps = Recorder.record_steps

  def poisoned(recorder, steps, sums):
    record_steps(recorder, steps, sums if 6 not in steps else sums | {"is_finite": np.zeros((1, 1))})

  monkeypatch.setattr(Recorder, "record_steps", poisoned)
  with pytest.raises(DivergenceError, match=r"Step 6 .*gradients.*last good checkpoint is step 4.*clip-norm"):
    imdb_jax.fit(config)
  assert checkpoints_of(config.run_dir).steps() == [4]
