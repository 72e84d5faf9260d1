"""Bounded reads, atomic writes of small files, and manifests of folders.

Links are never followed. All functions raise OSError if a file is missing, not a regular file, or cannot be written,
and the reading ones ValueError if its content is too large or malformed.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from imdb_jax.errors import reraise_as

MAX_JSON_BYTES = 2**20
# A checkpoint has fewer than a hundred.
_MAX_FILES = 1000


def open_regular(path: Path) -> io.BufferedReader:
  """Open a regular file for reading."""
  # O_NONBLOCK: opening a pipe would otherwise wait for its writer.
  file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")
  if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
    file.close()
    raise OSError(f"{path.name} is not a regular file")
  return file


def read_bytes(path: Path, max_bytes: int = MAX_JSON_BYTES) -> bytes:
  """Return the content of a file of at most `max_bytes`."""
  with open_regular(path) as file:
    content = file.read(max_bytes + 1)
  if len(content) > max_bytes:
    raise ValueError(f"{path.name} is larger than {max_bytes:,} bytes")
  return content


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
  """Return the value of a JSON file in UTF-8 of at most `max_bytes`."""
  with reraise_as(ValueError, f"{path.name} is nested too deeply", RecursionError):
    return json.loads(read_bytes(path, max_bytes).decode())


def sha256(path: Path) -> str:
  """Return the SHA-256 of a regular file, in hex."""
  with open_regular(path) as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def write(path: Path, text: str) -> None:
  """Write a file that survives a power cut: readers see the old content or the new, never a part."""
  with aside(path) as unfinished, unfinished.open("x", encoding="utf-8", newline="") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  sync(path.parent)


@contextlib.contextmanager
def aside(path: Path) -> Iterator[Path]:
  """Yield the name of a file to create, which is renamed to `path` at the end, or removed after an error.

  A pipe or link at `path` is replaced and not written through. Open the file for exclusive creation, so that neither is
  a link that appears under the other name.
  """
  unfinished = path.with_name(path.name + ".new")
  remove(unfinished)
  try:
    yield unfinished
    unfinished.replace(path)
  finally:
    unfinished.unlink(missing_ok=True)


def sync(path: Path) -> None:
  """Flush a file, or the names in a folder, to the disk, so that they survive a power cut."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
  """Write a value as indented JSON, as `write` does."""
  write(path, json.dumps(value, indent=1) + "\n")


def remove(path: Path) -> None:
  """Remove a file, a link or a whole folder; do nothing if the path is missing."""
  if path.is_dir() and not path.is_symlink():
    with reraise_as(OSError, f"{path} is nested too deeply", RecursionError):
      shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)


def walk(folder: Path) -> dict[str, int]:
  """Return the size of each file below a folder by its relative name; refuse links, devices and very many files."""
  if not stat.S_ISDIR(folder.lstat().st_mode):
    raise OSError(f"{folder} is not a folder")
  sizes, folders = {}, [""]
  # Grows while it is walked through.
  for prefix in folders:
    with os.scandir(folder / prefix) as entries:
      for entry in entries:
        status, name = entry.stat(follow_symlinks=False), prefix + entry.name
        if stat.S_ISDIR(status.st_mode):
          folders.append(name + "/")
        elif stat.S_ISREG(status.st_mode):
          sizes[name] = status.st_size
        else:
          raise OSError(f"{name} is a link or a device, not a file")
        if len(sizes) + len(folders) > _MAX_FILES:
          raise ValueError(f"{folder} holds more than {_MAX_FILES:,} files")
  return sizes


def write_manifest(folder: Path, path: Path, facts: dict[str, Any]) -> None:
  """Flush a folder to the disk, then write its manifest to `path`, atomically: sizes, SHA-256, and facts in JSON.

  Orbax stores no checksums of its arrays, accepts half-copied folders, and follows links. A manifest detects all three.
  """
  listed = {name: _entry(folder / name, size) for name, size in walk(folder).items()}
  # Orbax flushes few of its files.
  for written in (*folder.rglob("*"), folder, folder.parent):
    sync(written)
  write_json(path, {"facts": facts, "files": listed})


def check_manifest(folder: Path, path: Path) -> dict[str, Any]:
  """Return a manifest's facts; raise OSError or ValueError, which say how, if it is damaged or the folder differs."""
  match read_json(path):
    case {"facts": dict(facts), "files": dict(expected)}:
      found = walk(folder)
    case _:
      raise ValueError(f"its manifest {path.name} is damaged")
  for name in sorted(expected.keys() | found.keys()):
    if name not in found:
      raise ValueError(f"{name} is missing")
    if name not in expected:
      raise ValueError(f"{name} is not listed in the manifest")
    if expected[name] != _entry(folder / name, found[name]):
      raise ValueError(f"{name} has changed: its size or SHA-256 differs")
  return facts


def _entry(path: Path, size: int) -> dict[str, Any]:
  return {"size": size, "sha256": sha256(path)}
