"""How a command ends: one line and an exit code for expected errors and for Ctrl-C."""

import contextlib
import io
import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from imdb_jax.errors import ImdbJaxError, PlatformError, first_line, printable

# Address space that JAX takes on two cores, with some reserve.
_MIN_BYTES = 2_000_000_000


class _Warnings(logging.Formatter):
  """A format for warnings, which may hold names that a stranger has chosen, in one line each."""

  def __init__(self, process: str):
    super().__init__()
    self._process = process

  def format(self, record: logging.LogRecord) -> str:
    return f"{_origin(self._process)}warning: {printable(super().format(record))}"


def _origin(process: str) -> str:
  """Return the time and a name of this process, to begin a line with; nothing without a name."""
  return process and f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {process}: "


def end(code: int, message: str, process: str = "") -> NoReturn:
  """Exit with a code, and with a message on standard error if that still exists."""
  try:
    print(f"{_origin(process)}{message}", file=sys.stderr, flush=True)
  except OSError:
    # The terminal has gone. Python would write to it once more at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
  sys.exit(code)


def _on_unraisable(failed: Any) -> None:
  # After a failed save, threads of tensorstore call Orbax, which no longer waits for them.
  if str(failed.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(failed)


@contextlib.contextmanager
def clear_errors(process: str = "") -> Iterator[None]:
  """Report expected errors as one line and an exit code; with a name of this process, if it is one of several."""
  handler = logging.StreamHandler()
  handler.setFormatter(_Warnings(process))
  logging.basicConfig(handlers=[handler], force=bool(process))
  sys.unraisablehook = _on_unraisable
  # Standard output may be closed from the start, as with `>&-`.
  sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115
  if isinstance(sys.stdout, io.TextIOWrapper):
    # Reviews and names may hold characters that its encoding lacks.
    sys.stdout.reconfigure(errors="replace")
  try:
    yield
    sys.stdout.flush()
  except ImdbJaxError as error:
    end(error.exit_code, f"error: {printable(str(error))}", process)
  except MemoryError as error:
    end(PlatformError.exit_code, f"error: Not enough memory: {first_line(error)}.", process)
  except KeyboardInterrupt:
    end(130, "Interrupted; there was nothing to save.", process)
  except BrokenPipeError:
    # The reader has gone, as in `predict.py ... | head`. Python would complain again at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  except OSError as error:
    end(1, f"error: {printable(str(error))}", process)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
  """Turn Ctrl-C into an exception, so that partial downloads and files are removed.

  Outside this context Ctrl-C ends the process at once: during an import of JAX, an exception may get lost or crash.
  """
  previous = signal.getsignal(signal.SIGINT)
  if previous == signal.SIG_DFL:
    signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, previous)


def require_memory() -> None:
  """Refuse a limit of memory with which JAX would abort or wait forever, while it is imported or later."""
  limit, _ = resource.getrlimit(resource.RLIMIT_AS)
  # It is -1 if there is no limit.
  if 0 <= limit < _MIN_BYTES:
    raise PlatformError(
      f"Not enough memory: JAX needs {_MIN_BYTES // 10**6:,} MB of address space, but the limit is "
      f"{limit // 10**6:,} MB. Raise it (ulimit -v)."
    )
