"""A few of each of the trials of `make torture`, and checks that the trials notice what they should."""

import contextlib
import random
import signal
import time
from collections.abc import Iterator

import pytest
import torture
from reliability import trials
from reliability.mutations import mutate
from reliability.sandbox import Failure, Sandbox, finish, last_line, newest_state
from training.tiny import assert_close_end

from imdb_jax.errors import CheckpointError, PlatformError
from imdb_jax.store.checkpoints import Checkpoints

COUNTS = torture.Options(
  kills=1, signals=1, damages=20, disk_full=1, process_stops=1, process_kills=1, mutations=200, seed=1
)
# Each takes many seconds, or repeats what others do.
SLOW = ("disk_full", "process_stops", "process_kills")


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory) -> Iterator[Sandbox]:
  with contextlib.closing(Sandbox(tmp_path_factory.mktemp("torture"))) as sandbox:
    yield sandbox


@pytest.mark.parametrize(
  "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in trials.TRIALS]
)
def test_nothing_is_lost(sandbox, name):
  try:
    outcome = torture.run_trials(sandbox, COUNTS, name)
  except PermissionError as error:
    pytest.skip(f"a tmpfs cannot be mounted: {error}")
  assert outcome.count == getattr(COUNTS, name)
  assert not outcome.failures
  assert bool(outcome.moments) == (name not in ("damages", "disk_full"))


def test_no_damaged_file_is_used(sandbox):
  outcome = torture.run_mutations(sandbox, COUNTS)
  assert outcome.count == COUNTS.mutations
  assert not outcome.failures


def test_undetected_damage_is_a_failure(sandbox, monkeypatch):
  newest = max(int(path.name) for path in (sandbox.whole / "checkpoints").iterdir())
  monkeypatch.setattr(trials, "newest_state", lambda run_dir: (newest, None))
  outcome = torture.run_trials(sandbox, COUNTS, "damages")
  assert len(outcome.failures) == outcome.count


def test_a_different_end_is_a_failure(sandbox, tmp_path, monkeypatch):
  run_dir = sandbox.copy_of_whole(tmp_path)
  sandbox.require_end(run_dir)
  metrics = run_dir / "metrics.jsonl"
  text = metrics.read_text()
  metrics.write_text(text.replace('"accuracy": 0.', '"accuracy": 0.1', 1))
  with pytest.raises(Failure, match="ends differently"):
    sandbox.require_end(run_dir)
  metrics.write_text(text)
  # The step before the newest one has another state.
  find = Checkpoints.find
  monkeypatch.setattr(Checkpoints, "find", lambda self, which: find(self, self.steps()[-2]))
  with pytest.raises(Failure, match="ends differently"):
    sandbox.require_end(run_dir)


@pytest.mark.parametrize(
  "number", [signal.SIGKILL, signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_forked_command_receives_signals_and_reports_what_it_is_doing(sandbox, tmp_path, number):
  with sandbox.started(tmp_path / "run") as (process,):
    deadline = time.monotonic() + 60
    while process.moment != "step":
      assert time.monotonic() < deadline
      time.sleep(0.001)
    process.send_signal(number)
    assert process.wait(60) == {signal.SIGINT: 130, signal.SIGTERM: 143}.get(number, -number)
    assert "Compiled in" in process.stdout
    assert ("Saved step" in process.stderr) == (number != signal.SIGKILL)


@pytest.mark.slow
def test_a_run_continues_with_another_number_of_processes(sandbox, tmp_path):
  run_dir, at = tmp_path / "run", -1
  for start in (sandbox.started, sandbox.two_started):
    with start(run_dir) as processes:
      while last_line(run_dir) < at + 7:
        time.sleep(0.001)
      processes[-1].send_signal(signal.SIGTERM)
      assert [finish(process) for process in processes] == [143] * len(processes)
    at, _ = newest_state(run_dir)
    assert at % 50, "within an epoch"
  with sandbox.started(run_dir) as (process,):
    assert finish(process) == 0
  assert_close_end(sandbox.whole, run_dir)


@pytest.mark.slow
def test_a_coordinator_whose_partner_is_killed_exits_with_its_own_code(sandbox, tmp_path):
  with sandbox.two_started(tmp_path / "run") as (coordinator, other):
    while last_line(tmp_path / "run") < 0:
      time.sleep(0.01)
    other.send_signal(signal.SIGKILL)
    assert finish(coordinator, trials.LEFT_ALONE) in (CheckpointError.exit_code, PlatformError.exit_code)
    assert len(coordinator.stderr.splitlines()) == 1


def test_a_mutation_changes_something():
  content = bytes(range(256)) * 4
  changed = [mutate(content, random.Random(seed)) for seed in range(100)]
  assert sum(one != content for one in changed) > 95
