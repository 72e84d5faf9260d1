"""Manifests: the files of a folder with their sizes and SHA-256, and some facts about them.

Orbax stores no checksums of its arrays, accepts half-copied folders, and follows links. A manifest detects all three.
"""

from pathlib import Path
from typing import Any

from imdb_jax.store import files


def write(folder: Path, path: Path, facts: dict[str, Any]) -> None:
  """Flush a folder to the disk, then write its manifest, with facts in JSON, to `path`, atomically."""
  listed = {name: {"size": size, "sha256": files.sha256(folder / name)} for name, size in files.walk(folder).items()}
  # Orbax flushes few of its files.
  for written in (*folder.rglob("*"), folder, folder.parent):
    files.sync(written)
  files.write_json(path, {"facts": facts, "files": listed})


def check(folder: Path, path: Path) -> dict[str, Any]:
  """Return the facts of the manifest at `path`, if the folder agrees with it.

  Raises:
    OSError, ValueError: the folder differs from the manifest, or either is damaged; says how.
  """
  manifest = files.read_json(path)
  if not _is_manifest(manifest):
    raise ValueError(f"its manifest {path.name} is damaged")
  expected, found = manifest["files"], files.walk(folder)
  for name in sorted(expected.keys() | found.keys()):
    if name not in found:
      raise ValueError(f"{name} is missing")
    if name not in expected:
      raise ValueError(f"{name} is not listed in the manifest")
    if found[name] != expected[name]["size"]:
      raise ValueError(f"{name} has {found[name]:,} bytes instead of {expected[name]['size']:,}")
  for name in found:
    if files.sha256(folder / name) != expected[name]["sha256"]:
      raise ValueError(f"{name} has changed: its SHA-256 differs")
  return manifest["facts"]


def _is_manifest(value: Any) -> bool:
  is_object = isinstance(value, dict) and value.keys() == {"facts", "files"}
  return (
    is_object
    and isinstance(value["facts"], dict)
    and isinstance(value["files"], dict)
    and all(
      isinstance(file, dict)
      and file.keys() == {"size", "sha256"}
      and type(file["size"]) is int
      and isinstance(file["sha256"], str)
      for file in value["files"].values()
    )
  )
