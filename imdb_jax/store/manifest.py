"""Manifests: the files of a folder with their sizes and SHA-256, and some facts about them.

Orbax stores no checksums of its arrays, accepts half-copied folders, and follows links. A manifest detects all three.
"""

from pathlib import Path
from typing import Any

from imdb_jax.store import files


def write(folder: Path, path: Path, facts: dict[str, Any]) -> None:
  """Flush a folder to the disk, then write its manifest, with facts in JSON, to `path`, atomically."""
  listed = {name: _entry(folder / name, size) for name, size in files.walk(folder).items()}
  # Orbax flushes few of its files.
  for written in (*folder.rglob("*"), folder, folder.parent):
    files.sync(written)
  files.write_json(path, {"facts": facts, "files": listed})


def check(folder: Path, path: Path) -> dict[str, Any]:
  """Return the facts of the manifest at `path`; raise OSError or ValueError, which say how, if the folder differs."""
  match files.read_json(path):
    case {"facts": dict(facts), "files": dict(expected)}:
      found = files.walk(folder)
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
  return {"size": size, "sha256": files.sha256(path)}
