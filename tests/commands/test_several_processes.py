"""Training in two processes."""

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

# Each test starts two processes that compile and train.
pytestmark = pytest.mark.slow

TRAIN = ROOT / "scripts" / "train.py"


def train_in_two(
  server: Server, run_dir: Path, *of_second: str | Path, second: Path = TRAIN, of_both: tuple[str, ...] = ()
) -> list[Result]:
  """Train in two processes, with additional arguments of both and of the second."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{probe.getsockname()[1]}"
  shared = (*TINY, *of_both, "--run-dir", str(run_dir))
  shared += ("--coordinator-address", address, "--num-processes", "2", "--process-id")
  commands = [str(TRAIN), *shared, "0"], [str(second), *shared, "1", *map(str, of_second)]
  with contextlib.ExitStack() as stack:
    starts = (server.start(command, run_dir.parent, {}) for command in commands)
    processes = [stack.enter_context(contextlib.closing(process)) for process in starts]
    return [(process.wait(120), process.stdout, process.stderr) for process in processes]


def test_two_processes_train_as_one(server, trained, tmp_path, call):
  results = train_in_two(server, tmp_path / "two")
  assert [result[0] for result in results] == [0, 0], results
  # Gloo, which carries JAX's messages between CPUs, writes lines of its own to standard output.
  assert all(line.startswith("[Gloo]") for line in results[1][1].splitlines()), "only the first process writes"
  for two, one in zip(history(tmp_path / "two"), history(trained), strict=True):
    assert two.pop("kind") == one.pop("kind")
    (of_two,), (of_one,) = two.pop("seeds", [{}]), one.pop("seeds", [{}])
    assert two == pytest.approx(one, rel=1e-4)
    assert of_two == pytest.approx(of_one, rel=1e-4)
  code, stdout, _ = call("evaluate", tmp_path / "two", "--platform", "cpu", "--json", "--step", "latest")
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
