"""A few of each of the trials of `make torture`, and that these notice what they are there for."""

import random
from pathlib import Path

import pytest
import torture

from imdb_jax.checkpoint import Checkpoints

COUNTS = torture.Options(
  kills=2, signals=2, damages=20, disk_full=1, process_stops=1, process_kills=1, mutations=200, seed=1
)


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory) -> torture.Sandbox:
  return torture.Sandbox(tmp_path_factory.mktemp("torture"))


@pytest.mark.parametrize(
  ("field", "trial", "at_once"), torture.TRIALS.values(), ids=[row[0] for row in torture.TRIALS.values()]
)
def test_nothing_is_lost(sandbox, field, trial, at_once):
  try:
    count, failures = torture.run_trials(sandbox, COUNTS, field, trial, at_once)
  except PermissionError as error:
    pytest.skip(f"a tmpfs cannot be mounted: {error}")
  assert count == getattr(COUNTS, field)
  assert not failures


def test_nothing_is_let_in(sandbox, tmp_path):
  count, failures = torture.mutations(sandbox, COUNTS, tmp_path / "mutations")
  assert count == COUNTS.mutations
  assert not failures


def test_damage_that_goes_unnoticed_is_a_failure(sandbox, monkeypatch):
  newest = max(int(path.name) for path in (sandbox.folder / "whole" / "checkpoints").iterdir())
  monkeypatch.setattr(torture, "newest_state", lambda run_dir: (newest, None))
  count, failures = torture.run_trials(sandbox, COUNTS, "damages", torture.damage, 1)
  assert len(failures) == count


def test_an_end_that_differs_is_a_failure(sandbox, tmp_path, monkeypatch):
  run_dir: Path = tmp_path / "run"
  assert sandbox.train(run_dir)[0] == 0
  assert torture.end_of(run_dir) == sandbox.end
  metrics = run_dir / "metrics.jsonl"
  text = metrics.read_text()
  metrics.write_text(text.replace('"accuracy": 0.', '"accuracy": 0.1', 1))
  assert torture.end_of(run_dir) != sandbox.end
  metrics.write_text(text)
  # The newest step but one is another state.
  find = Checkpoints.find
  monkeypatch.setattr(Checkpoints, "find", lambda self, which: find(self, self.steps()[-2]))
  assert torture.end_of(run_dir) != sandbox.end


def test_a_mutation_changes_something():
  content = bytes(range(256)) * 4
  changed = [torture.mutate(content, random.Random(seed)) for seed in range(100)]
  assert sum(one != content for one in changed) > 95
