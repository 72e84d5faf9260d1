"""A small run that can be started, disturbed and compared with an undisturbed one."""

import contextlib
import functools
import hashlib
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import keystr, tree_leaves_with_path
from reliability.processes import Process, Server

from imdb_jax import devices
from imdb_jax.config import Config
from imdb_jax.program import Program, TrainState
from imdb_jax.store import run_directory
from imdb_jax.store.checkpoints import Checkpoints

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "train.py"
# A second of training, with frequent saves and evaluations that are long enough for a signal to hit them.
TRAIN = ("--data", "sample", "--platform", "cpu", "--num-devices", "1", "--sequence-length", "24", "--limit", "400")
TRAIN += ("--embedding-size", "8", "--hidden-size", "8", "--vocabulary-size", "200", "--batch-size", "8")
TRAIN += ("--epochs", "3", "--save-every-steps", "10", "--log-every", "7", "--evaluation-batch-size", "2")
# Two processes wait for each other at each save and during evaluations, which takes time.
OF_TWO = ("--save-every-steps", "20", "--evaluation-batch-size", "16", "--num-processes", "2")
# The run has 150 steps, with a line every seven steps and at the end of an epoch.
LAST_LINE_BUT_ONE = 147
# Seconds after which a command counts as hanging.
HANGS = 120


class Failure(Exception):
  """A trial had the wrong outcome."""


def require(condition: bool, message: str) -> None:
  """Raise Failure unless a condition holds."""
  if not condition:
    raise Failure(message)


class Sandbox:
  """A folder for all trials, with the results of undisturbed runs of one process and of two.

  The undisturbed runs use fresh interpreters; all others are forks.
  """

  def __init__(self, folder: Path):
    self.folder = folder
    self.whole, self._two = folder / "whole", folder / "two"
    # The server imports while the first run compiles.
    self._server = Server()
    _run_fresh([self._command(self.whole)])
    self._end, self._end_of_two = end_of(self.whole), ""
    started = time.monotonic()
    # From now on the compiled programs are in the cache.
    self.require_end(folder / "forked")
    self.seconds = time.monotonic() - started

  def close(self) -> None:
    """Stop the server."""
    self._server.close()

  def _command(self, run_dir: Path, *arguments: str) -> list[str]:
    return [*TRAIN, "--run-dir", str(run_dir), "--cache-dir", str(self.folder / "cache"), *arguments]

  def started(self, run_dir: Path, *arguments: str) -> contextlib.AbstractContextManager[list[Process]]:
    """Start or resume a run; kill it at the end of the context if it has not ended."""
    return self._started([self._command(run_dir, *arguments)])

  def two_started(self, run_dir: Path) -> contextlib.AbstractContextManager[list[Process]]:
    """Start or resume a run of two processes, as `started` does."""
    return self._started(_commands_of_two(self._command(run_dir)))

  @contextlib.contextmanager
  def _started(self, commands: list[list[str]]) -> Iterator[list[Process]]:
    with contextlib.ExitStack() as stack:
      starts = (self._server.start(SCRIPT, command, self.folder) for command in commands)
      yield [stack.enter_context(contextlib.closing(process)) for process in starts]

  def copy_of_whole(self, folder: Path) -> Path:
    """Copy the undisturbed run into a folder."""
    return Path(shutil.copytree(self.whole, folder / "run"))

  def require_end(self, run_dir: Path, *arguments: str) -> None:
    """Start or resume a run, and raise Failure unless it ends like the undisturbed one."""
    with self.started(run_dir, *arguments) as (process,):
      require(finish(process) == 0, f"the run cannot be resumed, exit {process.returncode}: {process.stderr}")
    require(end_of(run_dir) == self._end, "the resumed run ends differently")

  def require_end_of_two(self, run_dir: Path) -> None:
    """Do the same as `require_end` with two processes."""
    if not self._end_of_two:
      _run_fresh(_commands_of_two(self._command(self._two)))
      self._end_of_two = end_of(self._two)
    with self.two_started(run_dir) as processes:
      codes = [finish(process) for process in processes]
      errors = [process.stderr for process in processes]
    require(codes == [0, 0], f"the run of two processes cannot be resumed, exits {codes}: {errors}")
    require(end_of(run_dir) == self._end_of_two, "the resumed run of two processes ends differently")


def _commands_of_two(command: list[str]) -> list[list[str]]:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{probe.getsockname()[1]}"
  shared = [*command, *OF_TWO, "--coordinator-address", address]
  return [[*shared, "--process-id", str(rank)] for rank in range(2)]


def _run_fresh(commands: list[list[str]]) -> None:
  pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
  processes = [subprocess.Popen([sys.executable, str(SCRIPT), *command], text=True, **pipes) for command in commands]
  errors = [process.communicate(timeout=HANGS)[1] for process in processes]
  require(not any(process.returncode for process in processes), f"an undisturbed run fails: {errors}")


def finish(process: Process, seconds: float = HANGS) -> int:
  """Wait for the end of a process and return its exit code."""
  try:
    code = process.wait(seconds)
  except TimeoutError:
    raise Failure(f"hangs for {seconds} s") from None
  require("Traceback" not in process.stderr, f"a traceback: {process.stderr}")
  return code


def end_of(run_dir: Path) -> str:
  """Return the SHA-256 of the arrays of the newest checkpoint and of all metrics except times."""
  digest = hashlib.sha256()
  for path, leaf in sorted(((keystr(path), leaf) for path, leaf in tree_leaves_with_path(newest_state(run_dir)[1]))):
    digest.update(path.encode() + np.asarray(leaf).tobytes())
  for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
    kept = {name: value for name, value in json.loads(line).items() if "seconds" not in name}
    digest.update(json.dumps(kept).encode())
  return digest.hexdigest()


@functools.cache
def _abstract_state(config: Config) -> TrainState:
  return Program(config, Mesh(np.array(jax.devices("cpu")[:1]), (devices.AXIS,))).abstract_state()


# Orbax restores one checkpoint at a time.
_RESTORING = threading.Lock()


def newest_state(run_dir: Path) -> tuple[int, TrainState]:
  """Return the step and the state of the newest usable checkpoint."""
  config = run_directory.load_config(run_dir)
  with _RESTORING, contextlib.closing(Checkpoints(run_dir, read_only=True)) as checkpoints:
    saved, state = checkpoints.restore("latest", _abstract_state(config))
  return saved.step, state


def last_line(run_dir: Path) -> int:
  """Return the step of the last line of metrics.jsonl; -1 if there is none."""
  path = run_dir / "metrics.jsonl"
  lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
  return json.loads(lines[-1])["step"] if lines else -1
