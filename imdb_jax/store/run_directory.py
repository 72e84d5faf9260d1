"""The run directory: self-contained, and never overwritten silently.

config.json      all settings that define the result
vocab.json       the vocabulary
classes.json     number of training texts by class, in the order of the labels; a list of names in older runs, absent
                 in older runs on IMDB
left_out.txt     the rows of own texts that were left out, if any
provenance.json  digests of data and vocabulary; of each start of the trainer step, versions, devices, changed settings
metrics.jsonl    one line every few steps and one per epoch, see `imdb_jax.store.metrics_log`
history.csv, history.png, report.html, report.md
checkpoints/, manifests/, damaged/     see `imdb_jax.store.checkpoints`
lock             held by a running trainer

The functions raise UsageError if the folder is not a run directory, a file in it is damaged, or it cannot be written.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from imdb_jax.config import Config, RuntimeConfig, differing_fields
from imdb_jax.data.reviews import CLASSES
from imdb_jax.data.tokens import TokenData
from imdb_jax.errors import DataError, UsageError, reraise_as
from imdb_jax.store import files

_PACKAGES = ("imdb_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# The size of provenance.json is limited.
_MAX_STARTS = 1000
_LOCK = "lock"
# What a trainer writes in place. Its other files are written under another name and renamed.
_WRITTEN_IN_PLACE = (_LOCK, "metrics.jsonl")
# config.json is written last: a folder that holds only these is a new run whose creation was interrupted.
_FIRST = ("vocab.json", "classes.json", "left_out.txt", "provenance.json")
_BEFORE_CONFIG = {_LOCK, *_FIRST, *(f"{name}.new" for name in _FIRST), "config.json.new"}

# Files that a trainer holds open, by path.
Held = dict[Path, os.stat_result]


def names(run_dir: Path) -> set[str]:
  """Return the names in a folder, none if it is absent. Links are refused: they could lead out of the folder."""
  with reraise_as(UsageError, f"{run_dir}: cannot be read"):
    entries = list(run_dir.iterdir()) if run_dir.exists() else []
  odd = [path.name for path in entries if path.is_symlink() or not (path.is_file() or path.is_dir())]
  if odd:
    raise UsageError(f"{run_dir}: holds links or devices ({', '.join(sorted(odd))}), which are not followed.")
  return {path.name for path in entries}


def read_json(path: Path) -> Any:
  """Return the value of a JSON file in the folder."""
  with reraise_as(UsageError, f"{path}: not readable", (OSError, ValueError)):
    return files.read_json(path)


def load_config(run_dir: Path, runtime: RuntimeConfig | None = None) -> Config:
  """Return the settings of a run."""
  if "config.json" not in names(run_dir):
    raise UsageError(f"{run_dir}: not a run directory: it has no config.json.")
  value = read_json(run_dir / "config.json")
  with reraise_as(UsageError, f"{run_dir / 'config.json'}", UsageError):
    return Config.from_dict(value, runtime)


@contextlib.contextmanager
def opened(config: Config) -> Iterator[Held]:
  """Lock the run directory of a config for training, and yield the files that this process holds: the lock."""
  run_dir = config.run_dir
  # tensorstore takes a backslash for a slash, and Orbax a folder named gs: for a place in Google's storage.
  if "\\" in str(run_dir.absolute()) or "gs:" in run_dir.absolute().parts:
    raise UsageError(f"--run-dir {run_dir}: no folder of its path may be named gs: or have a backslash. Name another.")
  # Before the lock is created, so that a folder that is not a run stays untouched.
  _require_run_or_empty(run_dir)
  for path in (run_dir / name for name in _WRITTEN_IN_PLACE):
    if path.exists() and path.stat().st_nlink > 1:
      raise UsageError(f"{path}: has further hard links, which would change too. Train a copy of the folder.")
  with locked(run_dir):
    yield {run_dir / _LOCK: (run_dir / _LOCK).lstat()}


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
  """Lock a folder, which is created if it is absent, and removed again if nothing was written into it.

  The kernel releases the lock when the process exits.
  """
  was_absent = not run_dir.exists()
  lock = filelock.FileLock(run_dir / _LOCK, timeout=0)
  with reraise_as(UsageError, f"--run-dir {run_dir}: cannot be written"):
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
      lock.acquire()
    except filelock.Timeout as error:
      raise UsageError(f"--run-dir {run_dir}: another trainer is using it; name another folder.") from error
  try:
    yield
  finally:
    # While the lock is held. A process that opens the lock just before its removal notices that when it acquires it.
    if was_absent and names(run_dir) == {_LOCK}:
      files.remove(run_dir)
    lock.release()


def require_held(held: Held) -> None:
  """Raise UsageError if a file that this process holds has been removed or replaced: the run is another's now."""
  for path, status in held.items():
    if not path.exists() or not os.path.samestat(path.lstat(), status):
      raise UsageError(f"{path}: was moved, removed or replaced during training. No further step is saved.")


def _require_run_or_empty(run_dir: Path) -> set[str]:
  found = names(run_dir)
  if "config.json" not in found and found and not (_LOCK in found and found <= _BEFORE_CONFIG):
    raise UsageError(f"--run-dir {run_dir}: holds something that is not a run; nothing was touched. Name another.")
  return found


def exists(config: Config) -> bool:
  """Return whether the run directory of a config holds this run, maybe with fewer epochs; refuse other settings."""
  run_dir, wanted = config.run_dir, config.training
  if "config.json" not in _require_run_or_empty(run_dir):
    return False
  saved = load_config(run_dir)
  as_long = dataclasses.replace(wanted, epochs=saved.training.epochs, early_stopping=saved.training.early_stopping)
  if differing_fields(saved, dataclasses.replace(config, training=as_long)):
    raise UsageError(
      f"--run-dir {run_dir}: holds a run with other settings ({'; '.join(differing_fields(saved, config))}); "
      "nothing was touched. Repeat its settings to resume it, or name another folder."
    )
  problem = f"--epochs {wanted.epochs}: the run in {run_dir} has --epochs {saved.training.epochs}"
  if wanted.epochs < saved.training.epochs:
    raise UsageError(f"{problem}, which can only be raised.")
  if wanted.epochs > saved.training.epochs and config.optimizer.schedule == "one_cycle":
    raise UsageError(f"{problem}, over which --schedule one_cycle extends. Start a new run, maybe with --init-from.")
  return True


def create(config: Config, data: TokenData) -> None:
  """Write the files of a new run."""
  run_dir = config.run_dir
  with reraise_as(UsageError, f"--run-dir {run_dir}: cannot be written"):
    files.write(run_dir / "vocab.json", data.vocabulary.json)
    digests = {"data_digest": data.digest, "vocabulary_sha256": files.sha256(run_dir / "vocab.json")}
    files.write_json(run_dir / "classes.json", data.counts)
    # Of an interrupted start.
    (run_dir / "left_out.txt").unlink(missing_ok=True)
    if lines := [line for counted, places in data.left_out.items() for line in (counted, *places, "")]:
      files.write(run_dir / "left_out.txt", "\n".join(lines))
    files.write_json(run_dir / "provenance.json", {"data": data.summary, **digests, "starts": []})
    files.write_json(run_dir / "config.json", config.to_dict())


def load_classes(run_dir: Path) -> dict[str, float]:
  """Return the share of each class in the training texts, by name; equal shares for a run that has not saved them."""
  path = run_dir / "classes.json"
  value = read_json(path) if path.exists() else list(CLASSES)
  if isinstance(value, list) and all(isinstance(name, str) for name in value) and len({*value}) == len(value):
    value = dict.fromkeys(value, 1)
  if not isinstance(value, dict) or len(value) < 2 or not all(type(each) in (int, float) for each in value.values()):
    raise UsageError(f"{path}: must be the number of texts by class.")
  if not all(0 <= each < 1e12 for each in value.values()) or not any(value.values()):
    raise UsageError(f"{path}: a number of texts is impossible.")
  total = sum(value.values())
  return {name: each / total for name, each in value.items()}


def check(run_dir: Path, model: str | None = None, data: TokenData | None = None, precision: str | None = None) -> None:
  """Check that the vocabulary of a run is unchanged, and how it was trained: on these data and in this precision.

  `model` is the class of a Flax module; None for the network of the settings. Raises DataError if the data differ.
  """
  provenance = load_provenance(run_dir)
  with reraise_as(UsageError, f"{run_dir / 'vocab.json'}: not readable"):
    vocabulary_sha256 = files.sha256(run_dir / "vocab.json")
  if vocabulary_sha256 != provenance["vocabulary_sha256"]:
    raise UsageError(f"{run_dir / 'vocab.json'}: not the vocabulary that this run was trained with.")
  last = provenance["starts"][-1] if provenance["starts"] else {"model": model, "precision": precision}
  if last.get("model") != model:
    trained, given = (f"{name or 'the network of its settings'}" for name in (last.get("model"), model))
    raise UsageError(f"{run_dir}: was trained with {trained:.80}, not with {given}; see model= of imdb_jax.fit.")
  if data is not None and data.digest != provenance["data_digest"]:
    before, change = provenance.get("data") or data.summary, "texts or labels are others"
    if before != data.summary:
      change = f"they were {before}, and are {data.summary} now"
    raise DataError(
      f"{run_dir}: these are not the reviews that the run was trained on: {change}. See --data, --archive."
    )
  before = last.get("precision")
  if precision not in (None, before):
    raise UsageError(
      f"--run-dir {run_dir}: the run has computed matrix products in {before}, but would continue in {precision} on "
      "this device. Resume it on a device like the first, or start a new run with --matmul-precision float32."
    )


def load_provenance(run_dir: Path) -> dict[str, Any]:
  """Return the digests of data and vocabulary, and the starts of the trainer."""
  path = run_dir / "provenance.json"
  value = read_json(path)
  match value:
    case {"data_digest": str(), "vocabulary_sha256": str(), "starts": [*starts]}:
      if all(isinstance(start, dict) for start in starts):
        return value
  raise UsageError(f"{path}: must have data_digest, vocabulary_sha256 and starts, a list of JSON objects.")


def versions() -> dict[str, str]:
  """Return the versions of what decides the result of a run: Python, packages, and the code of imdb_jax itself."""
  package, code = Path(__file__).parents[1], hashlib.sha256()
  for path in sorted(package.rglob("*.py")):
    code.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
  found = {name: importlib.metadata.version(name) for name in _PACKAGES}
  return {"python": platform.python_version(), **found, "imdb_jax code": code.hexdigest()[:16]}


def record_start(config: Config, facts: dict[str, Any]) -> list[str]:
  """Add a start of the trainer to provenance.json: facts, versions, and how settings have changed since the last one.

  Changed settings are saved in config.json and returned, as by `differing_fields`.
  """
  run_dir, provenance = config.run_dir, load_provenance(config.run_dir)
  changed = differing_fields(load_config(run_dir), config)
  provenance["starts"].append({**facts, **({"changed": changed} if changed else {}), "versions": versions()})
  del provenance["starts"][1:-_MAX_STARTS]
  files.write_json(run_dir / "provenance.json", provenance)
  if changed:
    files.write_json(run_dir / "config.json", config.to_dict())
  return changed
