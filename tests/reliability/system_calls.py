"""The system calls with which a save changes files, in all threads, and how to kill a process or fail at one of them.

strace can do that instead of executing a system call. It counts the calls of each thread separately, and
tensorstore's threads share their work differently in each run. But all calls on one path come from one thread, so name,
path and number identify a call.
"""

import contextlib
import dataclasses
import functools
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from reliability.processes import Process
from reliability.sandbox import (
  EVERY,
  HANGS,
  Sandbox,
  newest_visible,
  require,
  require_tool,
  visible_steps,
  wait_at_most,
)

_NAMES = ("openat", "mkdir", "rename", "unlink", "unlinkat", "rmdir", "write", "writev", "pwrite64", "fsync")
_RECORDING = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Call:
  """A system call of a save.

  Attributes:
    name: "fsync", for example.
    path: file, or folder of the file, below the run directory; {new} is the saved step, and {old} the removed one.
    number: which of the thread's calls on this path, from 1.
  """

  name: str
  path: str
  number: int


def _wait_for_pause(process: Process) -> None:
  """Wait until a process stops itself before a save."""
  deadline = time.monotonic() + HANGS
  while not process.is_stopped():
    require(process.returncode is None and time.monotonic() < deadline, f"there is no save: {process.stderr}")
    wait_at_most(process, 0.002)


@contextlib.contextmanager
def _traced(process: Process, *options: str) -> Iterator[None]:
  """Attach strace to a stopped process, and let the process continue."""
  require_tool("strace")
  command = ["strace", "-f", "-p", str(process.pid), *options]
  with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"LC_ALL": "C"}) as strace:
    assert strace.stderr is not None
    try:
      line = strace.stderr.readline()
      if " attached" not in line:
        raise PermissionError(line.strip())
      process.send_signal(signal.SIGCONT)
      yield
    finally:
      process.kill()
      # It lists new threads, and ends with the process.
      strace.stderr.read()


@contextlib.contextmanager
def injected(effect: str, call: Call, process: Process, run_dir: Path) -> Iterator[None]:
  """Replace a call of a save by an effect of strace, in a process that stops itself before the save.

  The process is killed at the end of the context. If the effect is an error, later calls on the same path fail too.
  """
  _wait_for_pause(process)
  steps = visible_steps(run_dir)
  path = run_dir / call.path.format(new=steps[-1] + EVERY, old=steps[0])
  injection = f"inject={call.name}:{effect}:when={call.number}+"
  with _traced(process, "-o", os.devnull, "-P", str(path), "-e", f"trace={call.name}", "-e", injection):
    yield


def kill_at(call: Call, process: Process, run_dir: Path) -> bool:
  """Kill a process that stops itself before a save just before a call of this save; return whether it came to that."""
  with injected("signal=SIGKILL", call, process, run_dir):
    _wait_for_end_of_save(process)
    return process.returncode == -signal.SIGKILL


def _wait_for_end_of_save(process: Process) -> None:
  while process.returncode is None and process.moment == "save":
    wait_at_most(process, 0.005)


@functools.cache
def _record(sandbox: Sandbox) -> tuple[Path, list[Call]]:
  folder = Path(tempfile.mkdtemp(dir=sandbox.folder))
  run_dir, begun, record = folder / "recorded" / "run", folder / "begun", folder / "record"
  run_dir.parent.mkdir()
  with sandbox.started(run_dir) as (process,):
    # From the third save on, each save removes a step.
    while newest_visible(run_dir) < 3 * EVERY:
      require(process.returncode is None, f"there is no third save: {process.stderr}")
      wait_at_most(process, 0.001)
  shutil.copytree(run_dir, begun)
  options = ("-y", "-s", "0", "-o", str(record), "-e", f"trace={','.join(_NAMES)}")
  with sandbox.started(run_dir, pause=True) as (process,):
    _wait_for_pause(process)
    steps = visible_steps(run_dir)
    with _traced(process, *options):
      _wait_for_end_of_save(process)
  names = {str(steps[-1] + EVERY): "{new}", str(steps[0]): "{old}"}
  numbers, calls = Counter(), {}
  for line in record.read_text(encoding="utf-8").splitlines():
    match = re.match(rf"(\d+) +(\w+)\(.*?{re.escape(str(run_dir))}/([^\">]*)", line)
    if match is None or (match[2] == "openat" and "O_CREAT" not in line):
      continue
    thread, name, path = match.groups()
    numbers[match.groups()] += 1
    path = re.sub(r"(?<=^checkpoints/)\d+|(?<=^manifests/)\d+", lambda step: names.get(step[0], step[0]), path)
    calls[Call(name, path, numbers[thread, name, match[3]])] = None
  return begun, [*calls]


def of_a_save(sandbox: Sandbox) -> tuple[Path, list[Call]]:
  """Return a run before a save that removes a step, and the system calls of such a save, in order."""
  with _RECORDING:
    return _record(sandbox)
