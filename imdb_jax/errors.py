"""Errors that end a command, with one line for people and an exit code for scripts."""

import contextlib
from collections.abc import Iterator
from typing import Any


def first_line(error: BaseException) -> str:
  """Return the first line of an error's message, without a full stop; its type if it has no message.

  A long line loses its middle: it often begins with what failed, and ends with the reason.
  """
  line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
  return line if len(line) <= 300 else f"{line[:145]} ... {line[-150:]}"


def printable(text: str) -> str:
  """Return a text as one line without control characters, which could change what a terminal shows."""
  return "".join(letter if letter.isprintable() else " " for letter in text)


@contextlib.contextmanager
def reraise_as(kind: type[Exception], subject: str, caught: Any = OSError, advice: str = "") -> Iterator[None]:
  """Raise what a block raises as another kind of error, whose one line has the subject, the reason and advice."""
  try:
    yield
  except caught as error:
    raise kind(f"{subject}: {getattr(error, 'strerror', None) or first_line(error)}. {advice}".rstrip()) from error


class ImdbJaxError(Exception):
  """Base class of errors whose message is meant for people."""

  exit_code = 1


class UsageError(ImdbJaxError):
  """A flag, a setting or an input file is wrong."""

  exit_code = 2


class DataError(ImdbJaxError):
  """The reviews are missing, damaged or different from those expected."""

  exit_code = 3


class CheckpointError(ImdbJaxError):
  """No checkpoint of a run can be used."""

  exit_code = 4


class DivergenceError(ImdbJaxError):
  """A loss, gradient or parameter is not finite."""

  exit_code = 5


class PlatformError(ImdbJaxError):
  """The requested platform, devices or processes are not available."""

  exit_code = 6
