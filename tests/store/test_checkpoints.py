"""A step exists whole or not at all, and the newest and the best steps are kept."""

import dataclasses
import errno
import functools
import os
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from imdb_jax import processes
from imdb_jax.errors import CheckpointError
from imdb_jax.store import arrays, files
from imdb_jax.store.checkpoints import Checkpoints, Saved


@dataclasses.dataclass(frozen=True)
class Run:
  run_dir: Path
  checkpoints: Checkpoints
  state: dict[str, Any]
  abstract: dict[str, Any]

  def save(self, step: int, state: Any = None, score: float | None = None) -> None:
    saved = Saved(step=step, progress={"seconds": 1.5}, score=score)
    self.checkpoints.save(saved, self.state if state is None else state)

  def state_with_nan(self) -> dict[str, Any]:
    return self.state | {"params": {"bias": self.state["params"]["bias"] * np.nan}}

  def folders(self) -> list[str]:
    return sorted(path.name for path in (self.run_dir / "checkpoints").iterdir())


@pytest.fixture
def run(tmp_path):
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  state = {"params": {"bias": np.arange(3, dtype=np.float32)[None]}, "step": np.array([4], np.int32)}
  state = jax.device_put(state, place)
  abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state)
  checkpoints = Checkpoints(tmp_path / "run", abstract, read_only=False)
  yield Run(tmp_path / "run", checkpoints, state, abstract)
  checkpoints.close()


def test_a_saved_step_is_restored_with_its_facts(run):
  assert run.checkpoints.is_empty()
  run.save(4, score=0.75)
  assert not run.checkpoints.is_empty()
  for checkpoints in (run.checkpoints, Checkpoints(run.run_dir, run.abstract, read_only=True)):
    saved, state = checkpoints.restore(4)
    assert saved == Saved(step=4, progress={"seconds": 1.5}, score=0.75)
    jax.tree.map(np.testing.assert_array_equal, state, run.state)


def test_facts_of_an_existing_step_are_replaced(run):
  run.save(4)
  run.save(4, state=run.state_with_nan(), score=0.5)
  saved, state = run.checkpoints.restore(4)
  assert saved.score == 0.5
  jax.tree.map(np.testing.assert_array_equal, state, run.state)


def test_values_that_are_not_finite_are_refused(run):
  run.save(4, run.state_with_nan())
  with pytest.raises(CheckpointError, match="not finite"):
    run.checkpoints.restore(4)
  with pytest.raises(CheckpointError, match="not finite"):
    run.checkpoints.restore("latest")
  assert run.folders() == ["4"], "it may be looked at"


def test_a_step_of_another_shape_is_damage_and_the_array_named(run):
  run.save(4)
  bias = jax.ShapeDtypeStruct((1, 5), np.float32, sharding=run.abstract["step"].sharding)
  for changed, problem in (
    ({"params": {"bias": bias}}, r"params\.bias/0\.0 has 12 bytes, but config and vocabulary require 20"),
    ({"opt_state": bias}, r"opt_state/\.zarray is missing, which config and vocabulary require"),
  ):
    checkpoints = Checkpoints(run.run_dir, run.abstract | changed, read_only=False)
    for restore in (functools.partial(checkpoints.restore, which) for which in ("latest", "best")):
      with pytest.raises(CheckpointError, match=f"step 4: {problem}"):
        restore()
  assert run.folders() == ["4"]


@pytest.mark.parametrize(
  "facts",
  [
    '{"score": 1.0}',
    '{"progress": [], "score": 1.0}',
    '{"progress": {}, "score": "1"}',
    '{"progress": {}, "score": 1' + "0" * 400 + "}",
    '{"progress": {}, "score": 1e999}',
  ],
)
def test_a_manifest_with_other_facts_is_damage(run, facts, caplog):
  run.save(4)
  path = run.run_dir / "manifests" / "4.json"
  listed = path.read_text().partition('"files"')[2]
  path.write_text(f'{{"facts": {facts}, "files"{listed}')
  assert Checkpoints(run.run_dir, run.abstract, read_only=True).steps() == []
  assert "damaged and not used: step 4: its manifest lacks progress or score" in caplog.text


def test_the_manifest_of_a_removed_step_goes_first(run, monkeypatch):
  """Otherwise a kill in between would leave the manifest of half a step, which counts as damage."""
  remove, removed = files.remove, []

  def checked(path):
    if path.parent.name == "checkpoints":
      assert not (run.run_dir / "manifests" / f"{path.name}.json").exists()
      removed.append(path.name)
    remove(path)

  monkeypatch.setattr(files, "remove", checked)
  for step in range(1, 5):
    run.save(step)
  assert removed == ["1", "2"]


@pytest.mark.parametrize(
  ("scores", "kept"), [([0.7, 0.9, 0.8, None, None], [2, 4, 5]), ([None, None, 0.9, 0.8, 0.7], [3, 4, 5])]
)
def test_the_best_step_is_kept_and_one_without_score_is_never_best(run, scores, kept):
  for step, score in enumerate(scores, start=1):
    run.save(step, score=score)
  for checkpoints in (run.checkpoints, Checkpoints(run.run_dir, run.abstract, read_only=True)):
    assert checkpoints.steps() == kept
    assert checkpoints.find("best").step == kept[0]
    assert checkpoints.find("latest").step == 5


def test_of_equal_scores_the_first_is_best_and_is_kept(run):
  for step in range(1, 5):
    run.save(step, score=0.5)
  assert run.checkpoints.steps() == [1, 3, 4]
  assert run.checkpoints.find("best").step == 1


def test_a_missing_step_is_refused_and_the_others_listed(run):
  with pytest.raises(CheckpointError, match="none has been saved yet"):
    run.checkpoints.find("latest")
  run.save(3)
  run.save(4)
  with pytest.raises(CheckpointError, match="no step 5; there are 3, 4"):
    run.checkpoints.find(5)


def test_a_reader_refuses_a_folder_without_checkpoints_and_leaves_no_trace(tmp_path):
  with pytest.raises(CheckpointError, match="Is this a run directory"):
    Checkpoints(tmp_path / "run", {}, read_only=True)
  assert not (tmp_path / "run").exists()


def test_what_an_interrupted_save_left_is_removed_by_a_writer_alone(run):
  run.save(4)
  (run.run_dir / "checkpoints" / "5").mkdir()
  (run.run_dir / "checkpoints" / "6.orbax-checkpoint-tmp").mkdir()
  assert Checkpoints(run.run_dir, run.abstract, read_only=True).steps() == [4]
  assert run.folders() == ["4", "5", "6.orbax-checkpoint-tmp"]
  assert Checkpoints(run.run_dir, run.abstract, read_only=False).steps() == [4]
  assert run.folders() == ["4"]


def test_processes_that_see_other_steps_do_not_train(run, monkeypatch):
  compared = []
  monkeypatch.setattr(processes, "require_equal", compared.append)
  for step in (4, 5):
    run.save(step)
  Checkpoints(run.run_dir, run.abstract, read_only=False)
  assert [*compared[0].values()] == [[4, 5]]


@pytest.mark.parametrize(
  ("free", "message"),
  [
    ({"f_bavail": 2, "f_files": 100, "f_favail": 90}, r"8,192 bytes are free, 32,784 are needed"),
    ({"f_bavail": 100, "f_files": 100, "f_favail": 7}, r"7 files are free, 8 are needed"),
  ],
)
def test_a_save_that_would_not_fit_is_not_started(run, free, message, monkeypatch):
  run.save(4)
  monkeypatch.setattr(os, "statvfs", lambda folder: types.SimpleNamespace(f_frsize=4096, **free))
  with pytest.raises(CheckpointError, match=rf"{message}\. Intact steps: 4"):
    run.save(5)
  assert run.folders() == ["4"]


def test_a_file_system_that_does_not_count_files_is_not_full(run, monkeypatch):
  disk = types.SimpleNamespace(f_frsize=4096, f_bavail=100, f_files=0, f_favail=0)
  monkeypatch.setattr(os, "statvfs", lambda folder: disk)
  run.save(4)
  assert run.folders() == ["4"]


@pytest.mark.parametrize("gone", ["checkpoints", "checkpoints/4", "manifests/4.json", "manifests"])
def test_a_save_after_others_were_removed_fails_and_names_what_is_left(run, gone):
  for step in (3, 4):
    run.save(step)
  files.remove(run.run_dir / gone)
  left = "3" if "4" in gone else "none"
  with pytest.raises(CheckpointError, match=rf"{gone}\S* has been removed\. Intact steps: {left}\."):
    run.save(5)


@pytest.mark.parametrize(("steps", "gone"), [((4,), ["manifests"]), ((4, 5), ["manifests/4.json", "manifests/5.json"])])
@pytest.mark.parametrize("read_only", [True, False])
def test_removed_manifests_are_named_and_nothing_starts_again(run, steps, gone, read_only):
  for step in steps:
    run.save(step)
  for name in gone:
    files.remove(run.run_dir / name)
  with pytest.raises(CheckpointError, match=r"manifests: has no manifest of the saved steps 4.*Put the manifests back"):
    Checkpoints(run.run_dir, run.abstract, read_only=read_only)
  assert run.folders() == list(map(str, steps))


def test_an_interrupted_first_save_leaves_a_run_without_steps(run):
  run.save(4)
  files.remove(run.run_dir / "manifests/4.json")
  assert Checkpoints(run.run_dir, run.abstract, read_only=False).is_empty()
  assert run.folders() == []


def test_a_failed_removal_of_an_old_step_names_the_saved_one(run, monkeypatch):
  for step in (4, 5):
    run.save(step)

  remove = files.remove

  def fail(path):
    if path.name == "4":
      raise OSError(errno.EIO, "Input/output error")
    remove(path)

  monkeypatch.setattr(files, "remove", fail)
  with pytest.raises(CheckpointError, match=r"Step 6 is saved in .*, but an older step could not be removed: .*output"):
    run.save(6)
  assert Checkpoints(run.run_dir, run.abstract, read_only=True).steps() == [5, 6]


def test_an_intact_step_that_cannot_be_read_now_stays_where_it_is(run, monkeypatch):
  """The cause may be too many open files, or memory, or another process."""
  for step in (4, 5):
    run.save(step)

  def fail(*args, **kwargs):
    raise OSError(errno.EMFILE, "Too many open files")

  with monkeypatch.context() as patch:
    patch.setattr(arrays, "restore", fail)
    with pytest.raises(CheckpointError, match=r"/5: the checkpoint cannot be restored: .*Too many open files"):
      run.checkpoints.restore("latest")
  assert not (run.run_dir / "damaged").exists()
  assert run.checkpoints.restore("latest")[0].step == 5
