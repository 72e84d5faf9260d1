"""A few of each of the trials of `make torture`, and checks that the trials notice what they should."""

import contextlib
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torture
from reliability import trials
from reliability.forgery import forge
from reliability.mutations import mutate
from reliability.sandbox import (
  LEFT_ALONE,
  Bounds,
  Failure,
  Sandbox,
  finish,
  last_line,
  newest_state,
  require_bounded,
  snapshot,
)
from reliability.watch import untouched
from training.tiny import assert_close_end

from imdb_jax.errors import CheckpointError, PlatformError
from imdb_jax.store import files
from imdb_jax.store.checkpoints import Checkpoints

COUNTS = torture.Options(
  kills=1,
  save_kills=1,
  signals=1,
  damages=20,
  lies=2,
  disk_full=1,
  failed_writes=1,
  power_cuts=2,
  process_stops=1,
  process_kills=1,
  mutations=200,
  seed=8,
)
# They start many commands, and repeat for whole runs what tests of single modules state.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
  made = tempfile.TemporaryDirectory(dir=torture.scratch())
  with made as folder, contextlib.closing(Sandbox(Path(folder))) as sandbox:
    yield sandbox


@pytest.fixture
def folder(sandbox) -> Path:
  return Path(tempfile.mkdtemp(dir=sandbox.folder))


@pytest.mark.parametrize("name", trials.TRIALS)
def test_nothing_is_lost(sandbox, name):
  try:
    outcome = torture.run_trials(sandbox, COUNTS, name)
  except PermissionError as error:
    pytest.skip(f"not permitted here: {error}")
  assert outcome.count == getattr(COUNTS, name)
  assert not outcome.failures
  assert outcome.hits or name in ("damages", "disk_full")


def test_no_damaged_file_is_used(sandbox):
  outcome = torture.run_mutations(sandbox, COUNTS)
  assert outcome.count == COUNTS.mutations
  assert not outcome.failures


def test_undetected_damage_is_a_failure(sandbox, monkeypatch):
  newest = max(int(path.name) for path in (sandbox.whole / "checkpoints").iterdir())
  monkeypatch.setattr(trials, "newest_state", lambda run_dir: (newest, None))
  outcome = torture.run_trials(sandbox, COUNTS, "damages")
  assert len(outcome.failures) == outcome.count


def test_a_different_end_is_a_failure(sandbox, folder, monkeypatch):
  run_dir = sandbox.copy_of_whole(folder)
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


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_forked_command_receives_signals_and_reports_what_it_is_doing(sandbox, folder, number):
  with sandbox.started(folder / "run") as (process,):
    deadline = time.monotonic() + 60
    # The first step starts before the line about its compilation is printed.
    while not (process.moment == "step" and "Compiled in" in process.stdout):
      assert time.monotonic() < deadline
      time.sleep(0.001)
    process.send_signal(number)
    assert process.wait(60) == {signal.SIGINT: 130, signal.SIGTERM: 143}.get(number, -number)
    assert ("Saved step" in process.stderr) == (number != signal.SIGKILL)


def test_a_run_continues_with_another_number_of_processes(sandbox, folder):
  run_dir, at = folder / "run", -1
  for start in (sandbox.started, sandbox.two_started):
    # The processes agree on signals after every fourth dispatch.
    with start(run_dir, "--steps-per-dispatch", "2") as processes:
      while last_line(run_dir) < at + 7:
        time.sleep(0.001)
      processes[-1].send_signal(signal.SIGTERM)
      assert [finish(process) for process in processes] == [143] * len(processes)
    at, _ = newest_state(run_dir)
    assert at % 50, "within an epoch"
  with sandbox.started(run_dir) as (process,):
    assert finish(process) == 0
  assert_close_end(sandbox.whole, run_dir)


def test_a_coordinator_whose_partner_is_killed_exits_with_its_own_code(sandbox, folder):
  with sandbox.two_started(folder / "run") as (coordinator, other):
    while last_line(folder / "run") < 0:
      time.sleep(0.01)
    other.send_signal(signal.SIGKILL)
    assert finish(coordinator, LEFT_ALONE) in (CheckpointError.exit_code, PlatformError.exit_code)
    assert len(coordinator.stderr.splitlines()) == 1


def test_a_mutation_changes_something():
  content = bytes(range(256)) * 4
  changed = [mutate(content, random.Random(seed)) for seed in range(100)]
  assert sum(one != content for one in changed) > 95


@pytest.mark.parametrize(
  ("excess", "reason"),
  [
    ({}, None),
    ({"returncode": 1, "stderr": "error: x\nTraceback (most recent call last):"}, "a traceback"),
    ({"returncode": -signal.SIGSEGV}, "not an exit code"),
    ({"stderr": "warning\n" * 4}, "4 lines"),
    ({"peak_bytes": 2**30 + 101}, "MB of memory"),
    ({"seconds": 11.1}, "11 s"),
  ],
)
def test_what_exceeds_its_bounds_is_a_failure(excess, reason):
  honest: Any = SimpleNamespace(returncode=0, stderr="", peak_bytes=100, seconds=1.0)
  command: Any = SimpleNamespace(**vars(honest) | excess)
  with pytest.raises(Failure, match=reason) if reason else contextlib.nullcontext():
    require_bounded(command, Bounds.above(honest))


def test_a_change_outside_the_run_is_a_failure(sandbox, folder):
  with pytest.raises(Failure, match="outside the run"), sandbox.started(folder / "run"):
    (folder / "stray").touch()


def test_reading_a_watched_file_is_a_failure(tmp_path):
  secret = tmp_path / "secret"
  secret.touch()
  with untouched(tmp_path):
    secret.stat()
    list(tmp_path.iterdir())
  with pytest.raises(Failure, match="secret was opened"), untouched(tmp_path):
    secret.read_bytes()


def test_most_forgeries_agree_with_themselves(sandbox, folder):
  (folder / "outside").mkdir()
  (folder / "outside" / "secret").touch()
  num_agreeing = 0
  for seed in range(20):
    run_dir = Path(shutil.copytree(sandbox.whole, folder / str(seed)))
    forge(run_dir, random.Random(seed))
    assert snapshot(run_dir) != snapshot(sandbox.whole)
    with contextlib.suppress(OSError, ValueError):
      for path in (run_dir / "manifests").iterdir():
        files.check_manifest(run_dir / "checkpoints" / path.stem, path)
      num_agreeing += 1
  assert num_agreeing > 12
