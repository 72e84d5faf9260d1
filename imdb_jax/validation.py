"""Frozen dataclasses whose fields declare their documentation and range, and are checked on construction."""

import contextlib
import dataclasses
import math
import numbers
import os
import types
import typing
from pathlib import Path
from typing import Any, Literal

from imdb_jax.errors import UsageError

_TYPE_NAMES = {
  bool: "True or False",
  int: "a whole number",
  float: "a number",
  str: "a text",
  Path: "a path of at most 3,000 bytes in UTF-8 (set PYTHONUTF8=1 if the locale is another)",
  types.NoneType: "None",
}


def setting(default: Any, doc: str, **bounds: float) -> Any:
  """Declare a field of a settings dataclass, with a default value or a function that returns it.

  `doc` is one line for `--help`; `bounds` is the allowed range of a number, as ge, gt, le or lt.
  """
  metadata = {"doc": doc, "bounds": bounds}
  if callable(default):
    return dataclasses.field(default_factory=default, metadata=metadata)
  return dataclasses.field(default=default, metadata=metadata)


def flag(name: str) -> str:
  """Return the command-line flag of a field."""
  return "--" + {"source": "data"}.get(name, name).replace("_", "-")


def options(hint: Any) -> tuple[Any, ...]:
  """Return the members of a union, or the type itself."""
  return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


class Settings:
  """Base class of frozen dataclasses whose fields are checked against their types and ranges.

  NumPy numbers and path strings are converted.

  Raises:
    UsageError: a value has the wrong type or is out of range; names the flag and the allowed values.
  """

  def __post_init__(self):
    hints = typing.get_type_hints(type(self))
    for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
      kinds, bounds = options(hints[field.name]), field.metadata.get("bounds", {})
      value = _convert(getattr(self, field.name), kinds)
      object.__setattr__(self, field.name, value)
      if not any(_fits(value, kind, bounds) for kind in kinds):
        allowed = " or ".join(_describe(kind, bounds) for kind in kinds)
        raise UsageError(f"{flag(field.name)} {value!r:.80}: must be {allowed}.")


def _convert(value: Any, kinds: tuple[Any, ...]) -> Any:
  if isinstance(value, str | Path) and Path in kinds:
    # Shells leave the ~ of --cache-dir=~/x alone. Path.expanduser would raise for a folder named ~x.
    return Path(os.path.expanduser(value))  # noqa: PTH111
  # JSON knows only Python's own numbers.
  if isinstance(value, numbers.Integral) and type(value) is not bool:
    value = int(value)
  if isinstance(value, numbers.Real) and float in kinds and type(value) is not bool:
    # An integer may be too large for a float.
    with contextlib.suppress(OverflowError):
      return float(value)
  return value


def _fits(value: Any, kind: Any, bounds: dict[str, float]) -> bool:
  if typing.get_origin(kind) is Literal:
    return isinstance(value, str) and value in typing.get_args(kind)
  if kind not in (int, float):
    return isinstance(value, kind) and (kind is not Path or _is_understood(value))
  # isinstance takes True for an int. The strict comparison refuses infinity and NaN.
  return (
    type(value) is kind
    and bounds.get("ge", -math.inf) <= value <= bounds.get("le", math.inf)
    and bounds.get("gt", -math.inf) < value < bounds.get("lt", math.inf)
  )


def _is_understood(path: Path) -> bool:
  """Return whether all libraries can use a path: JAX and Orbax write only below UTF-8 names, and append to them."""
  try:
    name = os.fsencode(path)
    return name.decode() == str(path) and b"\0" not in name and len(name) <= 3_000
  except UnicodeError:
    return False


def _describe(kind: Any, bounds: dict[str, float]) -> str:
  """Describe the allowed values, for an error message."""
  if typing.get_origin(kind) is Literal:
    return f"one of {', '.join(typing.get_args(kind))}"
  name = _TYPE_NAMES.get(kind, getattr(kind, "__name__", ""))
  if kind not in (int, float) or not bounds:
    return name
  if bounds.keys() == {"ge", "le"}:
    return f"{name} from {bounds['ge']:,} to {bounds['le']:,}"
  words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
  return f"{name} {' and '.join(f'{words[bound]} {limit}' for bound, limit in bounds.items())}"
