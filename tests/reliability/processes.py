"""Commands as forks of a server that has imported JAX and the package, but has not started JAX.

The imports take longer than most of what a trial does with a process. A fork compiles, computes, handles signals and
exits by itself, and shares no state with the other forks. One byte of shared memory tells the trial what its process is
doing. Time and peak memory of each fork are measured.
"""

import gc
import json
import mmap
import os
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MOMENTS = ("start", "compile", "step", "evaluation", "save", "end")
_MOST_BYTES = 2**16
# A command that exceeds its bounds must not take the whole machine. An honest one maps less than half of this.
_ADDRESS_SPACE = 2**33


class Server:
  """A process that starts commands until it is closed."""

  def __init__(self):
    self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
      # A process with threads cannot be forked.
      environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
      command = [sys.executable, __file__, str(theirs.fileno())]
      self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL)

  def start(
    self, arguments: Sequence[str], cwd: Path, environment: Mapping[str, str], *, pause: bool = False
  ) -> "Process":
    """Start a command.

    Args:
      arguments: a script and its arguments.
      cwd: folder to start it in.
      environment: variables that it gets besides those of this process.
      pause: make it stop itself by SIGSTOP before it saves a new step.
    """
    command = {"arguments": arguments, "cwd": str(cwd), "environment": environment, "pause": pause}
    return Process(self._requests, command)

  def close(self) -> None:
    """Stop the server; commands in progress continue until their `Process` is closed."""
    self._requests.close()
    self._process.wait()


class Process:
  """A command in progress.

  Attributes:
    pid: process id.
    returncode: exit code, negative if a signal ended the command; None before `wait` has seen the end.
    seconds, peak_bytes: time taken and most memory used, once the command has ended.
  """

  def __init__(self, requests: socket.socket, command: dict[str, Any]):
    # Standard output, standard error and the shared byte. They are read by position, because the offset is shared with
    # the process that writes.
    self._files = [tempfile.TemporaryFile() for _ in range(3)]  # noqa: SIM115
    self._files[2].write(b"\0")
    self._files[2].flush()
    self._keeper, theirs = socket.socketpair()
    with theirs:
      fds = [*(file.fileno() for file in self._files), theirs.fileno()]
      socket.send_fds(requests, [json.dumps(command).encode()], fds)
    self._keeper.settimeout(60)
    self.pid = int(self._keeper.recv(32))
    self.returncode: int | None = None
    self.seconds, self.peak_bytes = 0.0, 0

  def _content(self, index: int) -> str:
    fd = self._files[index].fileno()
    return os.pread(fd, os.fstat(fd).st_size, 0).decode(errors="replace")

  @property
  def stdout(self) -> str:
    """Standard output of the command so far."""
    return self._content(0)

  @property
  def stderr(self) -> str:
    """Standard error of the command so far."""
    return self._content(1)

  @property
  def moment(self) -> str:
    """The current or last activity of the command, one of MOMENTS."""
    return MOMENTS[ord(self._content(2))]

  def wait(self, seconds: float) -> int:
    """Wait for the end and return the exit code, which is negative if a signal ended the command.

    Raises:
      TimeoutError: the command is still running.
    """
    if self.returncode is None:
      self._keeper.settimeout(seconds)
      self.returncode = int(self._keeper.recv(32))
      # The process id may be given to another process from now on.
      self._keeper.settimeout(60)
      self._keeper.send(b"\0")
      self.seconds, self.peak_bytes = json.loads(self._keeper.recv(64))
    return self.returncode

  def send_signal(self, number: signal.Signals) -> None:
    """Send a signal to the command, unless it has ended."""
    # No other process gets its number before `wait` has seen the end.
    if self.returncode is None:
      os.kill(self.pid, number)

  def is_stopped(self) -> bool:
    """Return whether all threads of the command are stopped by SIGSTOP."""
    try:
      states = [(task / "stat").read_text() for task in Path(f"/proc/{self.pid}/task").iterdir()]
    except OSError:
      # A thread has just ended.
      return False
    return all(state.rpartition(")")[2].split()[0] == "T" for state in states)

  def kill(self) -> None:
    """Kill the command if it is still running."""
    self.send_signal(signal.SIGKILL)
    self.wait(60)

  def close(self) -> None:
    """Kill the command if it is still running, and release its files."""
    self.kill()
    self._keeper.close()
    for file in self._files:
      file.close()


def _mark(moments: mmap.mmap, *, pause: bool) -> None:
  """Make the parts of a run write to `moments` when they start, and restore the previous moment when they end."""
  from imdb_jax import evaluation
  from imdb_jax.report import page
  from imdb_jax.store.checkpoints import Checkpoints
  from imdb_jax.training import loop

  def marked(moment: int, function):
    def call(*arguments, **settings):
      nonlocal pause
      before, moments[0] = moments[0], moment
      # Saving a step again, for a signal, writes the manifest only.
      if pause and MOMENTS[moment] == "save" and arguments[1].step not in arguments[0].steps():
        pause = False
        os.kill(os.getpid(), signal.SIGSTOP)
      try:
        return function(*arguments, **settings)
      finally:
        moments[0] = moment if MOMENTS[moment] == "end" else before

    return call

  parts = [
    ("compile", loop._Trainer, "_compile"),
    ("step", loop._Trainer, "run"),
    ("evaluation", evaluation, "evaluate"),
    ("save", Checkpoints, "save"),
    ("end", page, "write"),
    ("end", page, "summary"),
  ]
  for name, owner, function in parts:
    setattr(owner, function, marked(MOMENTS.index(name), getattr(owner, function)))


def _become(command: dict[str, Any], fds: list[int]) -> None:
  """Run a script as Python itself would."""
  stdout, stderr, moments = fds
  os.dup2(stdout, 1)
  os.dup2(stderr, 2)
  os.chdir(command["cwd"])
  os.environ.update(command["environment"])
  resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
  _mark(mmap.mmap(moments, 1), pause=command["pause"])
  sys.argv = command["arguments"]
  runpy.run_path(sys.argv[0], run_name="__main__")


def _keep(command: dict[str, Any], fds: list[int]) -> None:
  """Fork a command and send its process id, exit code, time and memory. Only the command returns, at its end."""
  *own, parent = fds
  signal.signal(signal.SIGCHLD, signal.SIG_DFL)
  started = time.monotonic()
  pid = os.fork()
  if not pid:
    os.close(parent)
    _become(command, own)
    return
  with socket.socket(fileno=parent) as keeper:
    keeper.send(str(pid).encode())
    ended_or_left, _, _ = select.select([os.pidfd_open(pid), keeper], [], [])
    if keeper in ended_or_left:
      # The trial has been killed. Its command may be stopped, and would stay forever.
      os.kill(pid, signal.SIGKILL)
      os._exit(0)
    ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert ended is not None
    seconds = time.monotonic() - started
    code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
    keeper.send(str(code).encode())
    # Keep the process id reserved until the other side no longer needs it.
    keeper.recv(1)
    _, _, usage = os.wait4(pid, 0)
    keeper.send(json.dumps([seconds, usage.ru_maxrss * 1024]).encode())
  os._exit(0)


def _serve(requests: socket.socket) -> None:
  import matplotlib.pyplot  # noqa: F401

  import imdb_jax.cli
  import imdb_jax.training.loop  # noqa: F401

  num_threads = len(list(Path("/proc/self/task").iterdir()))
  if num_threads > 1:
    sys.exit(f"There are {num_threads} threads after the imports, which a fork would lack.")
  # As the scripts do.
  signal.signal(signal.SIGINT, signal.SIG_DFL)
  signal.signal(signal.SIGCHLD, signal.SIG_IGN)
  # The collector of a fork need not visit, and so copy, what the forks share.
  gc.freeze()
  while True:
    message, fds, _, _ = socket.recv_fds(requests, _MOST_BYTES, 4)
    if not message:
      return
    if not os.fork():
      requests.close()
      _keep(json.loads(message), fds)
      return
    for fd in fds:
      os.close(fd)


if __name__ == "__main__":
  _serve(socket.socket(fileno=int(sys.argv[1])))
