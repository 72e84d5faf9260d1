"""Whether a folder is as it was left: a list of its files with size and SHA-256, and what else belongs to it.

Orbax keeps no checksum of the bytes of its arrays, takes a half-copied folder for a whole one, and follows links.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_MAX_BYTES = 2**20


def write(folder: Path, path: Path, facts: dict[str, Any]) -> None:
  """Lists the files of a folder, with `facts` in JSON, in the manifest at `path`; it appears whole or not at all.

  Raises:
    OSError: it cannot be written, or a file of the folder is no regular one.
  """
  files = {name: {"size": size, "sha256": _sha256(folder / name)} for name, size in _walk(folder, "")}
  path.parent.mkdir(exist_ok=True)
  unfinished = path.with_suffix(".new")
  unfinished.unlink(missing_ok=True)
  # Exclusive: whatever is put there in the meantime is not written through.
  with unfinished.open("x", encoding="utf-8") as file:
    file.write(json.dumps({"facts": facts, "files": files}, indent=1) + "\n")
    file.flush()
    os.fsync(file.fileno())
  unfinished.replace(path)
  directory = os.open(path.parent, os.O_RDONLY)
  os.fsync(directory)
  os.close(directory)


def read(path: Path) -> dict[str, Any]:
  """The facts that were written with a manifest.

  Raises:
    ValueError, OSError: it is damaged or no regular file.
  """
  return _read(path)["facts"]


def problem(folder: Path, path: Path) -> str | None:
  """How a folder differs from its manifest at `path`; None if it does not. No file behind a link is opened."""
  try:
    expected = _read(path)["files"]
    found = dict(_walk(folder, ""))
    for name in sorted(expected.keys() | found.keys()):
      if name not in found:
        return f"{name} is missing"
      if name not in expected:
        return f"{name} does not belong to it"
      if found[name] != expected[name]["size"]:
        return f"{name} has {found[name]:,} bytes instead of {expected[name]['size']:,}"
    for name in found:
      if _sha256(folder / name) != expected[name]["sha256"]:
        return f"{name} has been altered: its SHA-256 differs"
  except (OSError, ValueError, RecursionError) as error:
    return str(error)
  return None


def _walk(folder: Path, prefix: str) -> Iterator[tuple[str, int]]:
  """Name and size of each file below a folder; raises OSError at anything but regular files and folders."""
  if not stat.S_ISDIR(folder.lstat().st_mode):
    raise OSError(f"{folder} is no folder")
  for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
    status, name = entry.stat(follow_symlinks=False), prefix + entry.name
    if stat.S_ISDIR(status.st_mode):
      yield from _walk(folder / entry.name, name + "/")
    elif stat.S_ISREG(status.st_mode):
      yield name, status.st_size
    else:
      raise OSError(f"{name} is a link or a device, not a file")


def _sha256(path: Path) -> str:
  with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path) -> dict[str, Any]:
  if not stat.S_ISREG(path.lstat().st_mode) or path.stat().st_size > _MAX_BYTES:
    raise ValueError(f"its manifest {path.name} is no file of at most {_MAX_BYTES:,} bytes")
  value = json.loads(path.read_text(encoding="utf-8"))
  is_whole = isinstance(value, dict) and value.keys() == {"facts", "files"}
  if (
    not is_whole
    or not isinstance(value["facts"], dict)
    or not isinstance(value["files"], dict)
    or not all(
      isinstance(file, dict)
      and file.keys() == {"size", "sha256"}
      and type(file["size"]) is int
      and isinstance(file["sha256"], str)
      for file in value["files"].values()
    )
  ):
    raise ValueError(f"its manifest {path.name} is damaged")
  return value
