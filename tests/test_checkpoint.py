"""Steps come and go whole, and in the right order."""

import collections
import dataclasses
import errno
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from training.tiny import tiny

from imdb_jax import checkpoint, state
from imdb_jax.checkpoint import Checkpoints
from imdb_jax.errors import CheckpointError
from imdb_jax.model import SentimentLSTM
from imdb_jax.state import TrainState


@dataclasses.dataclass(frozen=True)
class Run:
  run_dir: Path
  checkpoints: Checkpoints
  made: TrainState
  abstract: TrainState

  def with_a_value_that_is_no_number(self) -> TrainState:
    dense = self.made.params["dense"]
    return dataclasses.replace(self.made, params=self.made.params | {"dense": dense | {"bias": dense["bias"] * np.nan}})


@pytest.fixture
def run(tmp_path):
  config = tiny(tmp_path / "run")
  mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
  model, optimizer = SentimentLSTM.of_run(config), state.make_optimizer(config.optimizer, 8)
  made, abstract = state.create(model, optimizer, 0, mesh), state.abstract(model, optimizer, mesh)
  checkpoints = Checkpoints(config.run_dir, read_only=False)
  yield Run(config.run_dir, checkpoints, made, abstract)
  checkpoints.close()


def test_values_that_are_no_numbers_are_refused(run):
  run.checkpoints.save(4, run.with_a_value_that_is_no_number(), {})
  with pytest.raises(CheckpointError, match="not finite"):
    run.checkpoints.restore(run.checkpoints.find(4), run.abstract)
  with pytest.raises(CheckpointError, match=r"no checkpoint can be used: step 4: .*not finite"):
    run.checkpoints.restore_latest(run.abstract)
  assert (run.run_dir / "checkpoints" / "4").exists(), "without a good step nothing is moved"


def test_a_step_that_cannot_be_used_is_passed_over_and_set_aside(run):
  run.checkpoints.save(4, run.made, {})
  run.checkpoints.save(5, run.with_a_value_that_is_no_number(), {})
  saved, _ = run.checkpoints.restore_latest(run.abstract)
  assert saved.step == 4
  assert [path.name for path in (run.run_dir / "damaged").iterdir()] == ["5-1"]
  assert {path.name for path in (run.run_dir / "damaged" / "5-1").iterdir()} == {"manifest.json", "checkpoint"}


def test_a_step_that_goes_loses_its_manifest_first(run, monkeypatch):
  """Else a kill in between would leave a manifest of half a step, which is damage."""
  remove, removed = checkpoint._remove, []

  def checked(path):
    assert not (run.run_dir / "manifests" / f"{path.name}.json").exists()
    removed.append(path.name)
    remove(path)

  monkeypatch.setattr(checkpoint, "_remove", checked)
  for step in range(1, 5):
    run.checkpoints.save(step, run.made, {})
  assert removed == ["1", "2"]


def test_the_best_step_stays_and_one_that_is_no_number_is_not_it(run):
  for step, val_accuracy in enumerate([0.7, 0.9, 0.8, float("nan"), None], start=1):
    run.checkpoints.save(step, run.made, {}, val_accuracy)
  for checkpoints in (run.checkpoints, Checkpoints(run.run_dir, read_only=True)):
    assert checkpoints.steps() == [2, 4, 5]
    assert checkpoints.find("best").step == 2


def test_processes_go_on_from_what_the_first_sees(run, monkeypatch):
  for step in (4, 5):
    run.checkpoints.save(step, run.made, {})
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda steps: np.array([4, -1]))
  run.checkpoints._agree()
  assert run.checkpoints.steps() == [4]
  monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda steps: np.array([4, 5]))
  with pytest.raises(CheckpointError, match="step 5 is not whole as process 0 sees it"):
    run.checkpoints._agree()


def test_without_room_nothing_is_begun(run, monkeypatch):
  run.checkpoints.save(4, run.made, {})
  usage = collections.namedtuple("usage", "free")
  monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(free=1000))
  with pytest.raises(CheckpointError, match=r"1,000 bytes are free.*Earlier steps are intact"):
    run.checkpoints.save(5, run.made, {})
  assert [path.name for path in (run.run_dir / "checkpoints").iterdir()] == ["4"]


def test_a_whole_step_that_cannot_be_read_now_stays_where_it_is(run, monkeypatch):
  """Nothing is wrong with it: files were short, or memory, or another process has gone."""
  for step in (4, 5):
    run.checkpoints.save(step, run.made, {})

  def fail(*args, **kwargs):
    raise OSError(errno.EMFILE, "Too many open files")

  with monkeypatch.context() as patch:
    patch.setattr(run.checkpoints._orbax, "restore", fail)
    with pytest.raises(CheckpointError, match=r"/5: the checkpoint cannot be restored: .*Too many open files"):
      run.checkpoints.restore_latest(run.abstract)
  assert not (run.run_dir / "damaged").exists()
  assert run.checkpoints.restore_latest(run.abstract)[0].step == 5
