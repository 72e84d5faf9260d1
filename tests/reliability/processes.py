"""Commands as forks of a server that has imported JAX and the package, but has not started JAX.

The imports take longer than most of what a trial does with a process. A fork compiles, computes, handles signals and
exits by itself, and shares no state with the other forks. One byte of shared memory tells the trial what its process is
doing.
"""

import json
import mmap
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MOMENTS = ("start", "compile", "step", "evaluation", "save", "end")
_MOST_BYTES = 2**16


class Server:
  """A process that starts commands until it is closed."""

  def __init__(self):
    self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
      # A process with threads cannot be forked.
      environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
      command = [sys.executable, __file__, str(theirs.fileno())]
      self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL)

  def start(self, script: Path, arguments: Sequence[str], cwd: Path) -> "Process":
    """Start a script with arguments in a folder."""
    return Process(self._requests, {"script": str(script), "arguments": arguments, "cwd": str(cwd)})

  def close(self) -> None:
    """Stop the server; commands in progress continue."""
    self._requests.close()
    self._process.wait()


class Process:
  """A command in progress."""

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
    return self.returncode

  def send_signal(self, number: signal.Signals) -> None:
    """Send a signal to the command, unless it has ended."""
    # No other process gets its number before `close`.
    if self.returncode is None:
      os.kill(self.pid, number)

  def close(self) -> None:
    """Kill the command if it is still running, and release its files."""
    self.send_signal(signal.SIGKILL)
    self.wait(60)
    self._keeper.close()
    for file in self._files:
      file.close()


def _mark(moments: mmap.mmap) -> None:
  """Make the parts of a run write to `moments` when they start, and restore the previous moment when they end."""
  from imdb_jax import evaluation
  from imdb_jax.store.checkpoints import Checkpoints
  from imdb_jax.training import loop, report

  def marked(moment: int, function):
    def call(*arguments, **settings):
      before, moments[0] = moments[0], moment
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
    ("end", report, "write"),
    ("end", report, "show"),
  ]
  for name, owner, function in parts:
    setattr(owner, function, marked(MOMENTS.index(name), getattr(owner, function)))


def _become(command: dict[str, Any], fds: list[int]) -> None:
  """Run a script as Python itself would."""
  stdout, stderr, moments = fds
  os.dup2(stdout, 1)
  os.dup2(stderr, 2)
  os.chdir(command["cwd"])
  _mark(mmap.mmap(moments, 1))
  sys.argv = [command["script"], *command["arguments"]]
  runpy.run_path(command["script"], run_name="__main__")


def _keep(command: dict[str, Any], fds: list[int]) -> None:
  """Fork a command and send its process id, then its exit code. Only the command returns, at its end."""
  *own, parent = fds
  signal.signal(signal.SIGCHLD, signal.SIG_DFL)
  pid = os.fork()
  if not pid:
    os.close(parent)
    _become(command, own)
    return
  with socket.socket(fileno=parent) as keeper:
    keeper.send(str(pid).encode())
    ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert ended is not None
    code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
    keeper.send(str(code).encode())
    # Keep the process id reserved until the other side no longer needs it.
    keeper.recv(1)
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
