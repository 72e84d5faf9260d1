"""Training in several processes."""

import contextlib
import json
import re
import signal
import socket
import time
from pathlib import Path

import pytest
from reliability.processes import Server
from running import ROOT, TINY, Result, assert_one_clear_line, history

# Each test starts processes that compile and train.
pytestmark = pytest.mark.slow

TRAIN = ROOT / "scripts" / "train.py"


def train_in_two(
  server: Server, run_dir: Path, *of_second: str | Path, second: Path = TRAIN, of_both: tuple[str, ...] = ()
) -> list[Result]:
  """Train in two processes, with additional arguments of both and of the second."""
  return train_in(server, run_dir, [[TRAIN, *of_both], [second, *of_both, *of_second]])


def train_in(server: Server, run_dir: Path, commands: list[list[str | Path]]) -> list[Result]:
  """Train in one process per script and its arguments."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{probe.getsockname()[1]}"
  shared = ("--run-dir", run_dir, "--coordinator-address", address, "--num-processes", len(commands), "--process-id")
  with contextlib.ExitStack() as stack:
    starts = (
      server.start([str(each) for each in (script, *TINY, *shared, rank, *more)], run_dir.parent, {})
      for rank, (script, *more) in enumerate(commands)
    )
    processes = [stack.enter_context(contextlib.closing(process)) for process in starts]
    return [(process.wait(120), process.stdout, process.stderr) for process in processes]


@pytest.mark.parametrize(("num_processes", "num_devices"), [(2, 1), (4, 1), (1, 16), (4, 4)])
def test_several_processes_and_devices_train_as_one(num_processes, num_devices, server, trained, tmp_path, call):
  command: list[str | Path] = [TRAIN, "--num-devices", str(num_devices)]
  results = train_in(server, tmp_path / "run", [command] * num_processes)
  assert [result[0] for result in results] == [0] * num_processes, results
  assert f"Devices     {num_processes * num_devices} x cpu (cpu), {num_processes} process(es)" in results[0][1]
  # Gloo, which carries JAX's messages between CPUs, writes lines of its own to standard output.
  others = "".join(stdout for _, stdout, _ in results[1:]).splitlines()
  assert all(line.startswith("[Gloo]") for line in others), "only the first process writes"
  for several, one in zip(history(tmp_path / "run"), history(trained), strict=True):
    assert several.pop("kind") == one.pop("kind")
    (of_several,), (of_one,) = several.pop("seeds", [{}]), one.pop("seeds", [{}])
    assert several == pytest.approx(one, rel=1e-4)
    assert of_several == pytest.approx(of_one, rel=1e-4)
  code, stdout, _ = call("evaluate", tmp_path / "run", "--platform", "cpu", "--json", "--step", "latest")
  assert code == 0
  assert json.loads(stdout)["loss"] == pytest.approx(history(trained)[-1]["val_loss"], rel=1e-4)


@pytest.mark.slow
def test_two_processes_start_from_another_run_and_stop_early_together(server, trained, tmp_path):
  flags = ("--init-from", str(trained), "--epochs", "9", "--early-stopping", "1", "--learning-rate", "1e-9")
  first, second = train_in_two(server, tmp_path / "two", of_both=flags)
  assert (first[0], second[0]) == (0, 0), (first, second)
  assert "199 of 199 word vectors, dense, lstm" in first[1]
  assert "Stopped early, after epoch 2 of 9" in first[1]
  assert [line["epoch"] for line in history(tmp_path / "two") if line["kind"] == "epoch"] == [1, 2]


def test_if_one_process_fails_the_other_leaves_too(server, tmp_path):
  first, second = train_in_two(server, tmp_path / "run", "--run-dir", tmp_path / "another")
  assert_one_clear_line(second, 2, "not the folder in which process 0 has created the run")
  assert_one_clear_line(first, 6, "Another process failed")
  for rank, (_, _, stderr) in enumerate((first, second)):
    assert re.match(rf"\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{{4}} \S+ process {rank}: error: ", stderr), stderr


@pytest.mark.parametrize(
  ("flags", "exit_code", "words"),
  [
    (("--seed", "7"), 2, "different values of --seed."),
    pytest.param(("--steps-per-dispatch", "4"), 2, "different values of --steps-per-dispatch.", marks=pytest.mark.slow),
    (("--num-devices", "2"), 6, "different numbers of devices (process 0: 1, process 1: 2)"),
  ],
)
def test_processes_that_would_wait_for_each_other_forever_are_refused(flags, exit_code, words, server, tmp_path):
  for result in train_in_two(server, tmp_path / "run", *flags):
    assert_one_clear_line(result, exit_code, words)


@pytest.mark.slow
def test_processes_with_different_versions_of_the_code_are_refused(server, tmp_path):
  """They would train silently to another result."""
  other = tmp_path / "other.py"
  other.write_text(
    "from imdb_jax import cli\n"
    "from imdb_jax.store import run_directory\n"
    "versions = run_directory.versions() | {'jax': '0.1', 'imdb_jax code': 'changed'}\n"
    "run_directory.versions = lambda: versions\n"
    "cli.run('train')\n"
  )
  for result in train_in_two(server, tmp_path / "run", second=other):
    assert_one_clear_line(result, 2, "different values of jax, imdb_jax code.")


def test_if_one_process_is_killed_before_training_the_other_leaves_in_one_line(server, tmp_path):
  killed = tmp_path / "killed.py"
  killed.write_text(
    "import os, signal\n"
    "from imdb_jax import cli\n"
    "from imdb_jax.data import tokens\n"
    "tokens.load = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)\n"
    "cli.run('train')\n"
  )
  started = time.perf_counter()
  first, second = train_in_two(server, tmp_path / "run", second=killed)
  assert second[0] == -signal.SIGKILL
  assert_one_clear_line(first, 6, "Another process has gone")
  assert time.perf_counter() - started < 40, "JAX would wait for a minute"
