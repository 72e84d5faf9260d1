"""Ctrl-C and a scheduler's SIGTERM: finish the step, save, leave."""

import signal
import threading


class StopRequest:
  """While entered, the first SIGINT or SIGTERM only sets `signal`; a second one ends the process at once.

  The second is the kernel's: Python would not look at it before a computation ends. What is ignored already stays so: a
  shell has commands in the background ignore Ctrl-C.
  """

  def __init__(self):
    self.signal: signal.Signals | None = None
    self._previous = {}

  def __enter__(self) -> "StopRequest":
    # Python lets only the main thread handle signals; elsewhere its owner decides.
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGINT, signal.SIGTERM):
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
      signal.signal(each, signal.SIG_DFL)


class Interrupted(Exception):
  """Training stopped on a signal after saving.

  Attributes:
    signal: which.
    step: the saved step.
  """

  def __init__(self, number: signal.Signals, step: int):
    super().__init__(f"{number.name}: saved step {step}")
    self.signal, self.step = number, step
