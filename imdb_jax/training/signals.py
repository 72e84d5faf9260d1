"""Ctrl-C, a scheduler's SIGTERM and the SIGHUP of a lost connection: finish the step, save, leave."""

import signal
import threading

_HEEDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequest:
  """While entered, the first signal only sets `signal`; a second SIGINT or SIGTERM ends the process at once.

  The second is the kernel's: Python would not look at it before a computation ends. What is ignored already stays so: a
  shell has commands in the background ignore Ctrl-C, and nohup has any command ignore SIGHUP.
  """

  def __init__(self):
    self.signal: signal.Signals | None = None
    self._previous = {}

  def __enter__(self) -> "StopRequest":
    # Python lets only the main thread handle signals; elsewhere its owner decides.
    if threading.current_thread() is threading.main_thread():
      for number in _HEEDED:
        if signal.getsignal(number) != signal.SIG_IGN:
          self._previous[number] = signal.signal(number, self._on_signal)
    return self

  def __exit__(self, *exception) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _on_signal(self, number, frame) -> None:
    del frame
    self.signal = signal.Signals(number)
    for each in self._previous:
      # Of one lost terminal both the shell and the kernel may tell.
      signal.signal(each, signal.SIG_IGN if each == signal.SIGHUP else signal.SIG_DFL)


class Interrupted(Exception):
  """Training stopped on a signal after saving.

  Attributes:
    signal: which.
    step: the saved step.
  """

  def __init__(self, number: signal.Signals, step: int):
    super().__init__(f"{number.name}: saved step {step}")
    self.signal, self.step = number, step
