"""A small run that can be started, disturbed and compared with an undisturbed one."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

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

_SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
# Steps between two saves.
EVERY = 10
# A second of training, with frequent saves and evaluations that are long enough for a signal to hit them.
TRAIN = ("--data", "sample", "--platform", "cpu", "--num-devices", "1", "--sequence-length", "24", "--limit", "400")
TRAIN += ("--embedding-size", "8", "--hidden-size", "8", "--vocabulary-size", "200", "--batch-size", "8")
TRAIN += ("--epochs", "3", "--save-every-steps", str(EVERY), "--log-every", "7", "--evaluation-batch-size", "2")
# Two processes wait for each other at each save and during evaluations, which takes time.
OF_TWO = ("--save-every-steps", "20", "--evaluation-batch-size", "16", "--num-processes", "2")
# It writes a line every seven steps and at the end of an epoch.
NUM_STEPS, LAST_LINE_BUT_ONE = 150, 147
# Seconds after which a command counts as hanging.
HANGS = 120
# Seconds within which a process must exit after its partner was killed. It takes about seven.
LEFT_ALONE = 30
# The same if the partner may have been killed before they joined: a process waits a minute for others to join.
NEVER_JOINED = 90
# Arguments of the other commands.
_ARGUMENTS = {
  "evaluate": ("--platform", "cpu", "--json"),
  "predict": ("--platform", "cpu", "--json", "A masterpiece.", "A disaster \u2603."),
  "plot": (),
}


class Failure(Exception):
  """A trial had the wrong outcome."""


def require(condition: bool, message: str) -> None:
  """Raise Failure unless a condition holds."""
  if not condition:
    raise Failure(message)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounds:
  """Limits on a command, which hold also when the command or its files are attacked.

  Attributes:
    seconds, peak_bytes: time and memory.
    exits: its exit codes; negative after a signal.
  """

  seconds: float
  peak_bytes: int
  exits: frozenset[int] = frozenset({*range(7), 130, 143, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT})

  @classmethod
  def above(cls, honest: Process) -> "Bounds":
    """Return the bounds that follow from an undisturbed command."""
    return cls(seconds=honest.seconds + 10, peak_bytes=honest.peak_bytes + 2**30)


def require_bounded(process: Process, bounds: Bounds) -> None:
  """Raise Failure unless a command that has ended took little and said why in a few lines."""
  lines = process.stderr.splitlines()
  shown = f"exit {process.returncode}: {process.stderr[:600]}"
  require("Traceback" not in process.stderr, f"a traceback, {shown}")
  require(process.returncode in bounds.exits, f"not an exit code of ours, {shown}")
  # JAX aborts with a list of the threads.
  require(len(lines) <= 3 or process.returncode == -signal.SIGABRT, f"{len(lines)} lines on standard error, {shown}")
  require(process.peak_bytes <= bounds.peak_bytes, f"{process.peak_bytes // 10**6:,} MB of memory, {shown}")
  require(process.seconds <= bounds.seconds, f"{process.seconds:.0f} s, {shown}")


def snapshot(folder: Path, excluded: Sequence[str] = ()) -> dict[str, tuple[int, int]]:
  """Return size and time of change of everything in a folder, except some names in it."""
  status = {}
  for path in (path for top in folder.iterdir() if top.name not in excluded for path in (top, *top.rglob("*"))):
    found = path.lstat()
    status[str(path.relative_to(folder))] = (found.st_size, found.st_mtime_ns)
  return status


class Sandbox:
  """A folder for all trials, with the results of undisturbed runs of one process and of two.

  The undisturbed runs use fresh interpreters; all others are forks, with their run directory in a folder of a trial.
  At its end, each fork must have kept its bounds, and left that folder alone except for the run and a cache.
  """

  def __init__(self, folder: Path):
    self.folder = folder
    self.whole, self._forked, self._two = (folder / name for name in ("whole", "forked", "two"))
    self._environment = {"IMDB_JAX_CACHE": "", "XDG_CACHE_HOME": str(folder / "cache")}
    # The server imports while the first run compiles.
    self._server = Server()
    self._run_fresh([_command("train", self.whole)])
    self._end, self._end_of_two = end_of(self.whole), ""
    self._bounds: dict[str, Bounds] = {}
    self._measuring = threading.Lock()
    # From now on the compiled programs are in the cache.
    with contextlib.closing(self._server.start(_command("train", self._forked), folder, self._environment)) as process:
      require(finish(process) == 0, f"an undisturbed fork fails: {process.stderr}")
      require(end_of(self._forked) == self._end, "an undisturbed fork ends differently")
      self.seconds, self._bounds["train"] = process.seconds, Bounds.above(process)
    self._bounds["two"] = dataclasses.replace(
      self._bounds["train"], seconds=NEVER_JOINED + HANGS, exits=self._bounds["train"].exits | {-signal.SIGABRT}
    )

  def close(self) -> None:
    """Stop the server."""
    self._server.close()

  def _run_fresh(self, commands: list[list[str]]) -> None:
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    environment = os.environ | self._environment
    processes = [
      subprocess.Popen([sys.executable, *command], text=True, env=environment, **pipes) for command in commands
    ]
    errors = [process.communicate(timeout=HANGS)[1] for process in processes]
    require(not any(process.returncode for process in processes), f"an undisturbed run fails: {errors}")

  def started(
    self, run_dir: Path, *arguments: str, cache: Path | None = None, pause: bool = False
  ) -> contextlib.AbstractContextManager[list[Process]]:
    """Start or resume a run; kill it at the end of the context if it has not ended."""
    return self._started("train", [_command("train", run_dir, *arguments)], run_dir, cache=cache, pause=pause)

  def two_started(self, run_dir: Path, *arguments: str) -> contextlib.AbstractContextManager[list[Process]]:
    """Start or resume a run of two processes, as `started` does."""
    return self._started("two", _train_two(run_dir, *arguments), run_dir)

  @contextlib.contextmanager
  def _started(
    self, name: str, commands: list[list[str]], run_dir: Path, *, cache: Path | None = None, pause: bool = False
  ) -> Iterator[list[Process]]:
    around, own = run_dir.parent, (run_dir.name, "cache")
    before = snapshot(around, own)
    environment = self._environment | ({"XDG_CACHE_HOME": str(cache)} if cache else {})
    if name == "evaluate":
      # A forged config may name reviews that would be downloaded.
      environment |= {"https_proxy": "http://127.0.0.1:9"}
    with contextlib.ExitStack() as stack:
      started = (self._server.start(command, around, environment, pause=pause) for command in commands)
      processes = [stack.enter_context(contextlib.closing(process)) for process in started]
      yield processes
      for process in processes:
        process.kill()
        require_bounded(process, self._bounds[name])
    require(snapshot(around, own) == before, "something outside the run directory has changed")

  def ask(self, name: str, run_dir: Path) -> tuple[int, str, str]:
    """Run a command on a run to its end; return the exit code, standard output and standard error."""
    with self._measuring:
      if name not in self._bounds:
        command = _command(name, self._forked)
        with contextlib.closing(self._server.start(command, self.folder, self._environment)) as process:
          require(finish(process) == 0, f"{name} of an undisturbed run fails: {process.stderr}")
          self._bounds[name] = Bounds.above(process)
    with self._started(name, [_command(name, run_dir)], run_dir) as (process,):
      return finish(process), process.stdout, process.stderr

  def copy_of_whole(self, folder: Path) -> Path:
    """Copy the undisturbed run into a folder."""
    return Path(shutil.copytree(self.whole, folder / "run"))

  def require_end(self, run_dir: Path, *arguments: str, cache: Path | None = None) -> None:
    """Start or resume a run, and raise Failure unless it ends like the undisturbed one."""
    with self.started(run_dir, *arguments, cache=cache) as (process,):
      require(finish(process) == 0, f"the run cannot be resumed, exit {process.returncode}: {process.stderr}")
    require(end_of(run_dir) == self._end, "the resumed run ends differently")

  def require_end_of_two(self, run_dir: Path) -> None:
    """Do the same as `require_end` with two processes."""
    if not self._end_of_two:
      self._run_fresh(_train_two(self._two))
      self._end_of_two = end_of(self._two)
    with self.two_started(run_dir) as processes:
      codes = [finish(process) for process in processes]
      errors = [process.stderr for process in processes]
    require(codes == [0, 0], f"the run of two processes cannot be resumed, exits {codes}: {errors}")
    require(end_of(run_dir) == self._end_of_two, "the resumed run of two processes ends differently")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
  """One of `count` trials of a kind, which may draw from `rng` and write to `folder`."""

  sandbox: Sandbox
  folder: Path
  rng: random.Random
  number: int
  count: int


def _command(name: str, run_dir: Path, *arguments: str) -> list[str]:
  given = (*TRAIN, "--run-dir", str(run_dir)) if name == "train" else (str(run_dir), *_ARGUMENTS[name])
  return [str(_SCRIPTS / f"{name}.py"), *given, *arguments]


def _train_two(run_dir: Path, *arguments: str) -> list[list[str]]:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{probe.getsockname()[1]}"
  shared = _command("train", run_dir, *OF_TWO, *arguments, "--coordinator-address", address)
  return [[*shared, "--process-id", str(rank)] for rank in range(2)]


def require_tool(name: str) -> None:
  """Raise PermissionError if a program is missing."""
  if shutil.which(name) is None:
    raise PermissionError(f"{name} is missing")


def wait_at_most(process: Process, seconds: float) -> None:
  """Wait for the end of a process, or for some seconds."""
  with contextlib.suppress(TimeoutError):
    process.wait(seconds)


def finish(process: Process, seconds: float = HANGS) -> int:
  """Wait for the end of a process and return its exit code."""
  try:
    return process.wait(seconds)
  except TimeoutError:
    raise Failure(f"hangs for {seconds} s") from None


def end_of(run_dir: Path) -> str:
  """Return the SHA-256 of the arrays of the newest checkpoint and of all metrics except times."""
  digest = hashlib.sha256()
  for path, leaf in sorted(((keystr(path), leaf) for path, leaf in tree_leaves_with_path(newest_state(run_dir)[1]))):
    digest.update(path.encode() + np.asarray(leaf).tobytes())
  for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
    kept = {name: value for name, value in json.loads(line).items() if "second" not in name and name != "time"}
    digest.update(json.dumps(kept).encode())
  return digest.hexdigest()


@functools.cache
def _abstract_state(config: Config) -> TrainState:
  return Program(config, Mesh(np.array(jax.devices("cpu")[:1]), (devices.AXIS,))).abstract_state()


# Orbax restores one checkpoint at a time.
_RESTORING = threading.Lock()


def checkpoints_of(run_dir: Path) -> Checkpoints:
  """Return the checkpoints of a run, for reading."""
  return Checkpoints(run_dir, _abstract_state(run_directory.load_config(run_dir)), read_only=True)


def newest_state(run_dir: Path) -> tuple[int, TrainState]:
  """Return the step and the state of the newest usable checkpoint."""
  with _RESTORING, contextlib.closing(checkpoints_of(run_dir)) as checkpoints:
    saved, state = checkpoints.restore("latest")
  return saved.step, state


def visible_steps(run_dir: Path) -> list[int]:
  """Return the steps that have a manifest, in order, intact or not."""
  return sorted(int(path.stem) for path in (run_dir / "manifests").glob("*.json"))


def newest_visible(run_dir: Path) -> int:
  """Return the newest step that has a manifest; -1 if there is none."""
  return max(visible_steps(run_dir), default=-1)


def require_kept(run_dir: Path, promised: int) -> None:
  """Raise Failure unless a usable step is as new as a promised one."""
  if promised < 0:
    return
  with contextlib.closing(checkpoints_of(run_dir)) as checkpoints:
    newest = max(checkpoints.steps(), default=-1)
  require(newest >= promised, f"step {promised} was promised, but the newest usable one is {newest}")


def last_line(run_dir: Path) -> int:
  """Return the step of the last line of metrics.jsonl; -1 if there is none."""
  path = run_dir / "metrics.jsonl"
  lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
  return json.loads(lines[-1])["step"] if lines else -1
