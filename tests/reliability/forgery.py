"""Forged run directories: one that the trainer wrote, changed by `forge` such that it still agrees with itself."""

import contextlib
import functools
import hashlib
import json
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SECRET = "the content of a file outside"
# Stands for brackets that json.dumps could not write.
_NESTED = "nested too deeply"
_HUGE = 2**31
_ODD_VALUES = (
  *(None, True, -1, 0, 1, 0.5, 2**31, 2**63, 10**400, 1e308, math.nan, math.inf, -math.inf),
  *("", "x", "../../../outside/secret", "/etc/passwd", "\ud800", "\x1b[2J\n", "9" * 5000, "x" * 10**6, _NESTED),
  *([], {}, [[]], [10**400], ["x"] * 200_000, {"..": {"..": 1}}),
)


def _read(path: Path) -> Any:
  return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, value: Any) -> None:
  nested = "[" * 100_000 + "]" * 100_000
  path.write_text(json.dumps(value).replace(json.dumps(_NESTED), nested), encoding="utf-8")


def _places(value: Any) -> list[tuple[Any, Any]]:
  """Return all objects and lists in a JSON value, each with its keys or indices."""
  keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
  return [place for key in keys for place in ((value, key), *_places(value[key]))]


def _change(value: Any, rng: random.Random) -> Any:
  """Replace, remove, add or move something in a JSON value."""
  places = _places(value)
  how = rng.randrange(10)
  if how == 0 or not places:
    return rng.choice(_ODD_VALUES)
  container, key = rng.choice(places)
  if how == 1:
    del container[key]
  elif how == 2 and isinstance(container, dict):
    container[rng.choice(["", "..", "x" * 10**5, "\ud800", "../../outside"])] = container[key]
  elif how == 3:
    other, at = rng.choice(places)
    container[key] = json.loads(json.dumps(other[at]))
  else:
    container[key] = rng.choice(_ODD_VALUES)
  return value


def _step(run_dir: Path, rng: random.Random) -> Path:
  *others, newest = sorted((run_dir / "checkpoints").iterdir(), key=lambda path: int(path.name))
  # The commands read the newest one.
  return newest if rng.random() < 0.9 else rng.choice([*others, newest])


def _array(run_dir: Path, rng: random.Random) -> Path:
  return rng.choice(sorted(path.parent for path in _step(run_dir, rng).glob("*/.zarray")))


def _make_huge(path: Path) -> None:
  path.unlink(missing_ok=True)
  with path.open("wb") as file:
    file.truncate(_HUGE)


def _put(path: Path, rng: random.Random) -> None:
  """Replace a path by something that is not a small file."""
  if path.is_dir():
    shutil.rmtree(path)
  path.unlink(missing_ok=True)
  how, secret = (
    rng.randrange(8),
    next(above / "outside" / "secret" for above in path.parents if (above / "outside").exists()),
  )
  if how == 0:
    _make_huge(path)
  elif how == 1:
    path.symlink_to(secret)
  elif how == 2:
    path.hardlink_to(secret)
  elif how == 3:
    os.mkfifo(path)
  elif how == 4:
    path.symlink_to("/dev/zero")
  elif how == 5:
    path.joinpath(*["d"] * 300).mkdir(parents=True)
  elif how == 6:
    path.mkdir()
    for number in range(3000):
      (path / str(number)).touch()
  else:
    path.symlink_to(path)


def _change_layout(run_dir: Path, rng: random.Random) -> None:
  """Give arrays another shape, type, order or encoding: one of them, or all of a step."""
  layouts = {
    "shape": ([2**30, 1], [2**46], [0], [-1], [1.5], [10**30], [2**30] * 32, "x"),
    "chunks": ([2**30, 1], [2**46, 1], [1], [0], [-1], [10**9, 8], [2**62] * 3),
    "dtype": ("|O", "<f8", ">f4", "<c16", "|b1", f"|S{10**9}", "<M8[ns]", [["a", "<f4"]], [["a", "|O"]], "bfloat16"),
    "compressor": ({"id": "blosc", "cname": "zstd"}, {"id": "zlib", "level": 1}, {"id": "pickle"}, {"id": 10**400}),
    "filters": ([{"id": "pickle"}], [{"id": "delta", "dtype": "<f4"}], [[]]),
    "fill_value": (0, math.nan, 1e400, "AAAA", [1]),
    "order": ("F", "X", 1),
    "dimension_separator": ("/", "../", ""),
    "zarr_format": (1, 3, 10**400),
  }
  arrays = [_array(run_dir, rng)]
  if rng.random() < 0.3:
    arrays = [path.parent for path in arrays[0].parent.glob("*/.zarray")]
  names = rng.sample(sorted(layouts), rng.choice([1, 1, 2]))
  layout = {name: rng.choice(layouts[name]) for name in names}
  if "shape" in layout and rng.random() < 0.5:
    layout["chunks"] = layout["shape"]
  for array in arrays:
    _write(array / ".zarray", _read(array / ".zarray") | layout)


def _change_chunk(run_dir: Path, rng: random.Random) -> None:
  """Change the values of an array, or their number."""
  array = _array(run_dir, rng)
  path = next(path for path in array.iterdir() if path.name != ".zarray")
  size, how = path.stat().st_size, rng.randrange(6)
  if how == 0:
    os.truncate(path, rng.randrange(size))
  elif how == 1:
    os.truncate(path, size + rng.choice([1, 4, 10**6]))
  elif how == 2:
    _make_huge(path)
  elif how == 3:
    path.write_bytes(rng.randbytes(size))
  elif how == 4:
    path.rename(array / rng.choice(["1.0", "0", "0.0.0.0", "c"]))
  else:
    path.write_bytes(np.full(size // 4, rng.choice([math.nan, math.inf, 3e38, -1e-40, 0]), np.float32).tobytes())


def _change_tree(run_dir: Path, rng: random.Random) -> None:
  """Tell Orbax to look for arrays elsewhere, or in another format."""
  folder = _step(run_dir, rng)
  tree = _read(folder / "_METADATA")
  how = rng.randrange(5)
  if how == 0:
    tree["use_ocdbt"] = True
    for place in rng.sample(["", "ocdbt.process_0"], rng.randint(1, 2)):
      (folder / place).mkdir(exist_ok=True)
      (folder / place / "manifest.ocdbt").write_bytes(b"\x0c\xdb\x3a\x2a" + rng.randbytes(200))
  elif how == 1:
    tree["use_zarr3"] = True
  elif how == 2:
    entry = rng.choice([*tree["tree_metadata"].values()])
    entry["key_metadata"] = [{"key": key, "key_type": 2} for key in ("..", "..", "..", "outside", "secret")]
  elif how == 3:
    entry = rng.choice([*tree["tree_metadata"].values()])
    entry["value_metadata"] = {"value_type": rng.choice(["str", "np.ndarray", "scalar", "None", "Dict"])}
  else:
    _change(tree, rng)
  _write(folder / "_METADATA", tree)


def _change_any_json(run_dir: Path, rng: random.Random) -> None:
  """Change one of the JSON files at random."""
  folder = _step(run_dir, rng)
  names = rng.choice([["_METADATA", "_CHECKPOINT_METADATA"], [f"{_array(run_dir, rng).name}/.zarray"]])
  path = folder / rng.choice(names)
  _write(path, _change(_read(path), rng))


def _add(run_dir: Path, rng: random.Random) -> None:
  """Add something to a folder, or replace a file of it."""
  folders = [run_dir, run_dir / "checkpoints", run_dir / "manifests", _step(run_dir, rng), _array(run_dir, rng)]
  folder = rng.choice(folders)
  names = [path.name for path in folder.iterdir()]
  names += ["extra", "160", "160.json", "damaged", "1" * 300 if folder is run_dir else "0.0.0.0", "history.csv.new"]
  name = rng.choice(names)
  _put(folder / name[:200], rng)


def _remove(run_dir: Path, rng: random.Random) -> None:
  """Remove a file or folder."""
  path = rng.choice(sorted(run_dir.rglob("*")))
  shutil.rmtree(path) if path.is_dir() else path.unlink()


def _change_manifest(run_dir: Path, rng: random.Random) -> None:
  """Change the facts about a step, or the list of its files."""
  path = rng.choice(sorted((run_dir / "manifests").iterdir()))
  content, how = _read(path), rng.randrange(6)
  if how == 0:
    content["facts"]["score"] = rng.choice([10**400, math.nan, math.inf, -1.0, 1e308, 2, "x", True])
  elif how == 1:
    content["facts"]["progress"] = _change(content["facts"]["progress"], rng)
  elif how == 2:
    content["files"]["../../../outside/secret"] = {
      "size": len(SECRET),
      "sha256": hashlib.sha256(SECRET.encode()).hexdigest(),
    }
  elif how == 3:
    for number in range(rng.choice([80, 5000])):
      shutil.copy(path, path.with_name(f"{1000 + number}.json"))
  elif how == 4:
    path.rename(
      path.with_name(rng.choice(["0.json", "-1.json", "999999999.json", "٣.json", "1e3.json", "9" * 30 + ".json"]))
    )
  else:
    content = _change(content, rng)
  _write(path, content)


def _change_vocabulary(run_dir: Path, rng: random.Random) -> None:
  """Give the vocabulary other words, sizes or fields."""
  path = run_dir / "vocab.json"
  content, how = _read(path), rng.randrange(6)
  if how == 0:
    content["words"] = [str(number) for number in range(200_000)]
    content["size"] = rng.choice([content["size"], 200_001])
  elif how == 1:
    content["words"][rng.randrange(len(content["words"]))] = rng.choice(_ODD_VALUES)
  elif how == 2:
    content["size"] = rng.choice([1, 10**6, 10**400, -1, 200.0, content["size"] - 1])
  elif how == 3:
    content["words"] = rng.sample(content["words"], rng.randrange(len(content["words"])))
  elif how == 4:
    content["words"] *= 2
  else:
    content = _change(content, rng)
  _write(path, content)


def _change_config(run_dir: Path, rng: random.Random) -> None:
  """Change settings to others that are permitted, or to any value."""
  path = run_dir / "config.json"
  content = _read(path)
  largest = {
    "data": {
      "limit": 10**6,
      "vocabulary_size": 10**6,
      "sequence_length": 10**4,
      "source": "imdb",
      "validation": "split",
    },
    "model": {"embedding_size": 65_536, "hidden_size": 65_536, "pooling": "max", "dropout_masks": "per_gate"},
    "training": {"epochs": 10**5, "batch_size": 65_536, "num_seeds": 1024, "seed": 2**31 - 1, "bucket_by_length": True},
    "optimizer": {"learning_rate": 1e38, "epsilon": 1e-300, "schedule": "one_cycle"},
  }
  if rng.random() < 0.3:
    content = _change(content, rng)
  else:
    for section in rng.sample(sorted(largest), rng.randint(1, 2)):
      name = rng.choice(sorted(largest[section]))
      content[section][name] = largest[section][name]
  _write(path, content)


def _change_metrics(run_dir: Path, rng: random.Random) -> None:
  """Change, repeat, remove or add lines of metrics."""
  path = run_dir / "metrics.jsonl"
  lines = path.read_text(encoding="utf-8").splitlines()
  at, how = rng.randrange(len(lines)), rng.randrange(7)
  if how == 0:
    line = json.loads(lines[at])
    field = rng.choice([name for name, value in line.items() if isinstance(value, int | float)])
    line[field] = rng.choice([1e308, -1e308, math.nan, math.inf, 10**400, 2**63, -1, 0])
    lines[at] = json.dumps(line)
  elif how == 1:
    lines[at] = json.dumps(_change(json.loads(lines[at]), rng))
  elif how == 2:
    lines[at:at] = ["x" * rng.choice([10, 2**20, 2**24])]
  elif how == 3:
    lines *= rng.choice([2, 3000])
  elif how == 4:
    del lines[at]
  elif how == 5:
    rng.shuffle(lines)
  else:
    lines[at] = '{"kind": "epoch", "step": 19}'
  path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _change_provenance(run_dir: Path, rng: random.Random) -> None:
  """Change what is known about the starts of the trainer."""
  path = run_dir / "provenance.json"
  content, how = _read(path), rng.randrange(3)
  if how == 0:
    content["starts"] *= rng.choice([999, 10**5])
  elif how == 1:
    content["starts"][0][rng.choice(["precision", "step", "devices"])] = rng.choice(_ODD_VALUES)
  else:
    content = _change(content, rng)
  _write(path, content)


# The parts of a checkpoint are drawn more often.
_EDITS: tuple[Callable[[Path, random.Random], None], ...] = (
  *(_change_layout, _change_chunk, _change_tree, _change_any_json, _add, _remove) * 2,
  *(_change_vocabulary, _change_config, _change_metrics, _change_provenance, _change_manifest),
)


@functools.lru_cache(8)
def _digest_of_zeros(size: int) -> str:
  digest = hashlib.sha256()
  for _ in range(size // 2**20):
    digest.update(bytes(2**20))
  return digest.hexdigest()


def _digest(path: Path) -> str:
  return _digest_of_zeros(_HUGE) if path.stat().st_size == _HUGE else hashlib.sha256(path.read_bytes()).hexdigest()


def _renew(path: Path, key: str, value: Any) -> None:
  """Set a value in a JSON file, unless the file has been forged such that it cannot hold one."""
  if not path.is_symlink() and path.is_file() and path.stat().st_nlink == 1 and path.stat().st_size < _HUGE:
    with contextlib.suppress(RecursionError, TypeError, ValueError):
      _write(path, _read(path) | {key: value})


def _renew_digests(run_dir: Path) -> None:
  """Make manifests and provenance agree with the files, as far as these are files."""
  for folder in (run_dir / "checkpoints").glob("[0-9]*"):
    found = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    listed = {str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": _digest(path)} for path in found}
    _renew(run_dir / "manifests" / f"{folder.name}.json", "files", listed)
  if (run_dir / "vocab.json").is_file():
    _renew(run_dir / "provenance.json", "vocabulary_sha256", _digest(run_dir / "vocab.json"))


def forge(run_dir: Path, rng: random.Random) -> str:
  """Change a run directory in one way and renew all digests; return what was changed.

  Links lead to the file `outside/secret` beside the run directory.
  """
  edit = rng.choice(_EDITS)
  edit(run_dir, rng)
  # A change to the manifests must not be undone.
  if edit is not _change_manifest:
    _renew_digests(run_dir)
  return edit.__name__.strip("_").replace("_", " ")
