"""Errors that end a command: one clear line each, and an exit code that a script can rely on."""


def first_line(error: BaseException) -> str:
  """What an error of another package says, short, without a full stop; its kind where it says nothing."""
  lines = str(error).strip().splitlines()
  return lines[0][:300].rstrip(".") if lines else type(error).__name__


class ImdbJaxError(Exception):
  """Base of the errors whose message is meant for the person at the console."""

  exit_code = 1


class UsageError(ImdbJaxError):
  """A flag, a setting or an input file is wrong."""

  exit_code = 2


class DataError(ImdbJaxError):
  """The reviews are missing, damaged or not what they should be."""

  exit_code = 3


class CheckpointError(ImdbJaxError):
  """No checkpoint of a run can be used."""

  exit_code = 4


class DivergenceError(ImdbJaxError):
  """The loss is no longer finite."""

  exit_code = 5


class PlatformError(ImdbJaxError):
  """The requested platform or devices are not available."""

  exit_code = 6
