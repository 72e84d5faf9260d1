"""A trainer whose files are moved, removed or replaced ends in one line, instead of training for nothing."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from training.tiny import tiny

import imdb_jax
from imdb_jax.errors import UsageError
from imdb_jax.store import run_directory
from imdb_jax.training import loop
from imdb_jax.training.metrics import Recorder

pytestmark = pytest.mark.usefixtures("shared_programs")


def replace(path: Path) -> None:
  shutil.copy(path, path.with_name("copy"))
  path.with_name("copy").replace(path)


CHANGES: dict[str, tuple[str, Callable[[Path], object]]] = {
  "metrics removed": ("metrics.jsonl", Path.unlink),
  "metrics replaced": ("metrics.jsonl", replace),
  "lock removed": ("lock", Path.unlink),
  "lock replaced": ("lock", replace),
  "all removed": ("lock", lambda path: shutil.rmtree(path.parent)),
  "all moved": ("lock", lambda path: path.parent.rename(path.parent.parent / "elsewhere")),
}


@pytest.mark.parametrize(
  ("name", "change", "is_stopped"),
  [*((*each, False) for each in CHANGES.values()), (*CHANGES["all removed"], True)],
  ids=[*CHANGES, "all removed, then SIGTERM"],
)
def test_files_that_go_during_training_end_it_at_the_next_save(name, change, is_stopped, tmp_path, monkeypatch):
  config, record_steps = tiny(tmp_path / "run"), Recorder.record_steps

  def changing(recorder, steps, sums):
    # Within the second epoch, after a save.
    if steps[0] == 6:
      change(config.run_dir / name)
      if is_stopped:
        os.kill(os.getpid(), signal.SIGTERM)
    record_steps(recorder, steps, sums)

  monkeypatch.setattr(Recorder, "record_steps", changing)
  with pytest.raises(UsageError, match=rf"{name}: was moved, removed or replaced during training") as caught:
    imdb_jax.fit(config)
  assert len(str(caught.value).splitlines()) == 1
  assert {path.name for path in tmp_path.glob("*/checkpoints/*")} <= {"4"}, "no further step is saved"


def test_a_second_trainer_that_finds_no_lock_ends_the_first(tmp_path, monkeypatch):
  config, record_steps, second = tiny(tmp_path / "run"), Recorder.record_steps, []

  def start_another(recorder, steps, sums):
    if steps[0] == 6 and not second:
      (config.run_dir / "lock").unlink()
      second.append(run_directory.opened(config))
      second[0].__enter__()
    record_steps(recorder, steps, sums)

  monkeypatch.setattr(Recorder, "record_steps", start_another)
  with pytest.raises(UsageError, match="lock: was moved, removed or replaced"):
    imdb_jax.fit(config)
  with pytest.raises(UsageError, match="another trainer is using it"):
    imdb_jax.fit(config)
  second[0].__exit__(None, None, None)
  imdb_jax.fit(config)


def test_processes_with_other_versions_of_the_code_are_told_apart(tmp_path, monkeypatch):
  """They would train silently to another result."""
  package = shutil.copytree(Path(run_directory.__file__).parents[1], tmp_path / "imdb_jax")
  versions = run_directory.versions()
  monkeypatch.setattr(run_directory, "__file__", str(package / "store" / "run_directory.py"))
  assert run_directory.versions() == versions
  with (package / "model.py").open("a") as file:
    file.write("\n")
  differing = {name for name, version in run_directory.versions().items() if version != versions[name]}
  assert differing == {"imdb_jax code"}


def test_processes_compare_their_versions(tmp_path, monkeypatch):
  compared = []

  def compare(settings):
    compared.append(settings)
    raise UsageError("differ")

  monkeypatch.setattr(loop.processes, "require_equal", compare)
  with pytest.raises(UsageError, match="differ"):
    imdb_jax.fit(tiny(tmp_path / "run"))
  assert compared[0] | run_directory.versions() == compared[0]
  assert {"--seed", "python", "jax", "imdb_jax", "imdb_jax code"} <= compared[0].keys()
