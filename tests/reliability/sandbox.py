"""A small run that can be started, disturbed and compared with one that nothing disturbed."""

import contextlib
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
from typing import Any

import jax
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path
from reliability.processes import Process, Server

from imdb_jax import run_directory, state
from imdb_jax.checkpoint import Checkpoints
from imdb_jax.model import SentimentLSTM

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "train.py"
# A run of about a second of training, with a save every few steps and an evaluation that a signal can hit.
TRAIN = ("--data", "sample", "--platform", "cpu", "--num-devices", "1", "--sequence-length", "24", "--limit", "400")
TRAIN += ("--embedding-size", "8", "--hidden-size", "8", "--vocabulary-size", "200", "--batch-size", "8")
TRAIN += ("--epochs", "3", "--save-every-steps", "10", "--log-every", "7", "--evaluation-batch-size", "2")
# Processes that meet at each save and each batch of an evaluation take their time for it.
OF_TWO = ("--save-every-steps", "20", "--evaluation-batch-size", "16", "--num-processes", "2")
# Of 150 steps, with a line every seven and at an epoch's end.
LAST_LINE_BUT_ONE = 147
# Seconds after which a command counts as hanging.
HANGS = 120


class Failure(Exception):
  """What a trial should not have shown."""


def require(fulfilled: bool, what: str) -> None:
  if not fulfilled:
    raise Failure(what)


class Sandbox:
  """A folder for everything, with the ends of runs that nothing disturbed, of one process and of two.

  These are runs of fresh interpreters; all others are forks.
  """

  def __init__(self, folder: Path):
    self.folder = folder
    self.whole, self._two = folder / "whole", folder / "two"
    # It imports while the first run compiles.
    self._server = Server()
    _run_fresh([self._command(self.whole)])
    self._end, self._end_of_two = end_of(self.whole), ""
    started = time.monotonic()
    # From now on XLA's programs are in the cache.
    self.require_end(folder / "forked")
    self.seconds = time.monotonic() - started

  def close(self) -> None:
    self._server.close()

  def _command(self, run_dir: Path, *arguments: str) -> list[str]:
    return [*TRAIN, "--run-dir", str(run_dir), "--cache-dir", str(self.folder / "cache"), *arguments]

  def started(self, run_dir: Path, *arguments: str) -> contextlib.AbstractContextManager[list[Process]]:
    return self._started([self._command(run_dir, *arguments)])

  def two_started(self, run_dir: Path) -> contextlib.AbstractContextManager[list[Process]]:
    return self._started(_commands_of_two(self._command(run_dir)))

  @contextlib.contextmanager
  def _started(self, commands: list[list[str]]) -> Iterator[list[Process]]:
    with contextlib.ExitStack() as stack:
      starts = (self._server.start(SCRIPT, command, self.folder) for command in commands)
      yield [stack.enter_context(contextlib.closing(process)) for process in starts]

  def copy_of_whole(self, folder: Path) -> Path:
    return Path(shutil.copytree(self.whole, folder / "run"))

  def require_end(self, run_dir: Path, *arguments: str) -> None:
    """Starts or resumes a run, which must end like the one that nothing disturbed."""
    with self.started(run_dir, *arguments) as (process,):
      require(finish(process) == 0, f"the run cannot be resumed, exit {process.returncode}: {process.stderr}")
    require(end_of(run_dir) == self._end, "the resumed run ends differently")

  def require_end_of_two(self, run_dir: Path) -> None:
    if not self._end_of_two:
      _run_fresh(_commands_of_two(self._command(self._two)))
      self._end_of_two = end_of(self._two)
    with self.two_started(run_dir) as processes:
      codes = [finish(process) for process in processes]
      errors = [process.stderr for process in processes]
    require(codes == [0, 0], f"the run of two cannot be resumed, exits {codes}: {errors}")
    require(end_of(run_dir) == self._end_of_two, "the resumed run of two ends differently")


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
  require(not any(process.returncode for process in processes), f"a run that nothing disturbs fails: {errors}")


def finish(process: Process, seconds: float = HANGS) -> int:
  """Waits for its end, and returns its exit code."""
  try:
    code = process.wait(seconds)
  except TimeoutError:
    raise Failure(f"hangs for {seconds} s") from None
  require("Traceback" not in process.stderr, f"a traceback: {process.stderr}")
  return code


def end_of(run_dir: Path) -> str:
  """SHA-256 of the arrays of the newest checkpoint and of all metrics but times."""
  digest = hashlib.sha256()
  for path, leaf in sorted(((keystr(path), leaf) for path, leaf in tree_leaves_with_path(newest_state(run_dir)[1]))):
    digest.update(path.encode() + np.asarray(leaf).tobytes())
  for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
    kept = {name: value for name, value in json.loads(line).items() if "seconds" not in name}
    digest.update(json.dumps(kept).encode())
  return digest.hexdigest()


_RESTORING = threading.Lock()


def newest_state(run_dir: Path) -> tuple[int, Any]:
  """Step and state of the newest checkpoint that can be used."""
  config = run_directory.load_config(run_dir)
  mesh = jax.make_mesh((1,), ("data",), devices=jax.devices("cpu")[:1])
  model, optimizer = SentimentLSTM.of_run(config), state.make_optimizer(config.optimizer, 1)
  abstract = state.abstract(model, optimizer, mesh, config.training.num_seeds)
  with _RESTORING:
    checkpoints = Checkpoints(run_dir, read_only=True)
    try:
      saved = checkpoints.find("latest")
      return saved.step, checkpoints.restore(saved, abstract)
    finally:
      checkpoints.close()


def last_line(run_dir: Path) -> int:
  """The step of the last line of metrics.jsonl; -1 where there is none."""
  path = run_dir / "metrics.jsonl"
  lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
  return json.loads(lines[-1])["step"] if lines else -1
