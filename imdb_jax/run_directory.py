"""A run's folder: self-contained, never overwritten in silence.

config.json      every setting that defines the result
vocab.json       the words
provenance.json  versions, devices, the digests of data and words
metrics.jsonl    a line every few steps and one an epoch
history.csv, history.png, report.md
checkpoints/, manifests/, damaged/     see `imdb_jax.checkpoint`
lock             held by the trainer that is at work
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from imdb_jax.config import Config, RuntimeConfig, differing_fields
from imdb_jax.data.tokenizer import Vocabulary
from imdb_jax.errors import DataError, UsageError

_PACKAGES = ("imdb_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_MAX_JSON_BYTES = 2**20
_LOCK = "lock"
# There while a new run's files are being written: if nothing else is beside it, that was cut short.
_LAYING = ".laying"
_LAID = ("vocab.json", "provenance.json", "config.json")


def _read_json(path: Path) -> Any:
  try:
    if path.stat().st_size > _MAX_JSON_BYTES:
      raise ValueError(f"larger than {_MAX_JSON_BYTES:,} bytes")
    return json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError) as error:
    raise UsageError(f"{path}: not readable: {error}") from error


def _names(run_dir: Path) -> set[str]:
  """What a folder holds; nothing where there is none.

  Raises:
    UsageError: it cannot be read, or holds anything but files and folders: through a link files outside of it could be
      overwritten, and a pipe would be waited for.
  """
  try:
    entries = list(run_dir.iterdir()) if run_dir.exists() else []
  except OSError as error:
    raise UsageError(f"{run_dir}: cannot be read: {error}") from error
  odd = [path.name for path in entries if path.is_symlink() or not (path.is_file() or path.is_dir())]
  if odd:
    raise UsageError(f"{run_dir}: holds links or devices ({', '.join(sorted(odd))}), which are not followed.")
  return {path.name for path in entries}


def load_config(run_dir: Path, runtime: RuntimeConfig | None = None) -> Config:
  """The settings of a run.

  Raises:
    UsageError: the folder holds no run, or its config is not one of this program, or it holds a link.
  """
  _names(run_dir)
  if not (run_dir / "config.json").is_file():
    raise UsageError(f"{run_dir}: not the folder of a run: it has no config.json.")
  settings = _read_json(run_dir / "config.json")
  try:
    return Config.from_dict(settings, runtime)
  except UsageError as error:
    raise UsageError(f"{run_dir / 'config.json'}: {error}") from error


def load_vocabulary(run_dir: Path) -> Vocabulary:
  """The words of a run.

  Raises:
    UsageError: the file is not a vocabulary, or not the one that the run was trained with.
  """
  vocabulary = Vocabulary.load(run_dir / "vocab.json")
  if _sha256(vocabulary) != _digest(run_dir, "vocabulary_sha256"):
    raise UsageError(f"{run_dir / 'vocab.json'}: is not the vocabulary that this run was trained with.")
  return vocabulary


def _sha256(vocabulary: Vocabulary) -> str:
  return hashlib.sha256(vocabulary.to_json().encode()).hexdigest()


def _digest(run_dir: Path, name: str) -> str:
  provenance = _read_json(run_dir / "provenance.json")
  if not isinstance(provenance, dict) or not isinstance(provenance.get(name), str):
    raise UsageError(f"{run_dir / 'provenance.json'}: has no {name}.")
  return provenance[name]


def check(config: Config) -> bool:
  """Whether `config.run_dir` holds this very run already; False for a folder that is absent or empty.

  Raises:
    UsageError: the folder holds something else, or a run of other settings.
  """
  run_dir = config.run_dir
  names = _names(run_dir)
  if names <= {_LOCK} or (_LAYING in names and names <= {_LOCK, _LAYING, *_LAID}):
    return False
  if not (run_dir / "config.json").is_file():
    raise UsageError(f"--run-dir {run_dir}: holds something that is not a run; nothing was touched. Name another.")
  differing = differing_fields(load_config(run_dir), config)
  if differing:
    raise UsageError(
      f"--run-dir {run_dir}: holds a run of other settings ({'; '.join(differing)}); "
      "nothing was touched. Repeat its settings to resume it, or name another folder."
    )
  return True


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
  """Keeps other trainers out of a run; the folder is made if it is absent.

  The lock is the kernel's: however its owner ends, it ends with it.

  Raises:
    UsageError: another trainer is at work there, or the folder cannot be written.
  """
  try:
    run_dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run_dir / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
  except OSError as error:
    raise UsageError(f"--run-dir {run_dir}: cannot be written: {error}") from error
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    os.close(descriptor)
    is_held = isinstance(error, BlockingIOError)
    reason = "another trainer is at work there; name another folder" if is_held else f"cannot be locked: {error}"
    raise UsageError(f"--run-dir {run_dir}: {reason}.") from error
  try:
    yield
  finally:
    os.close(descriptor)


def create(config: Config, vocabulary: Vocabulary, digest: str, mesh: Mesh) -> None:
  """Lays the folder of a new run. One whose laying was cut short counts as empty.

  Raises:
    UsageError: the folder cannot be written.
  """
  provenance = {
    "data_digest": digest,
    "vocabulary_sha256": _sha256(vocabulary),
    "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    "python": platform.python_version(),
    "devices": [device.device_kind for device in mesh.devices.flat],
  }
  run_dir = config.run_dir
  files = {
    "vocab.json": vocabulary.to_json(),
    "provenance.json": json.dumps(provenance, indent=2) + "\n",
    "config.json": json.dumps(config.to_dict(), indent=2) + "\n",
  }
  laying = run_dir / _LAYING
  try:
    if laying.exists():
      shutil.rmtree(laying)
    laying.mkdir(parents=True)
    for name, text in files.items():
      with (laying / name).open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    for name in files:
      (laying / name).replace(run_dir / name)
    laying.rmdir()
  except OSError as error:
    raise UsageError(f"--run-dir {run_dir}: cannot be written: {error}") from error


def check_data(run_dir: Path, digest: str) -> None:
  """Refuses data other than what the run was trained on.

  Raises:
    DataError: the digests differ.
  """
  if _digest(run_dir, "data_digest") != digest:
    raise DataError(f"{run_dir}: the reviews differ from those that this run was trained on. See --archive.")
