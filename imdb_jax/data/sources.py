"""Sources of reviews: a local archive, the official reviews, and the embedded sample."""

import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from imdb_jax.config import DataConfig
from imdb_jax.data import archive as archive_reader
from imdb_jax.data import imdb, sample, splits, tables
from imdb_jax.data.reviews import Reviews, canonical
from imdb_jax.errors import DataError, UsageError
from imdb_jax.store import files

# Folder of the record store below a root of tfds stores.
STORE = PurePath("imdb_reviews", "plain_text", "1.0.0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
  """Labelled texts from one place.

  Attributes:
    name: the place, for messages.
    content: what `reviews.content` should return for the texts; None if any texts are right.
    fingerprint: returns a text that changes with the reviews; None if loading them is as fast as reading a cache.
    load: returns the splits "train" and "test", in canonical order, or raises DataError. It calls its argument with a
      line before slow work.
    load_unlabelled: returns the splits "test" and "unsupervised", or nothing if the source has no unlabelled texts.
  """

  name: str
  load: Callable[[Callable[[str], None]], dict[str, Reviews]]
  content: str | None = None
  fingerprint: Callable[[], str | None] = lambda: None
  load_unlabelled: Callable[[Callable[[str], None]], dict[str, Reviews]] = lambda report: {}


def find(
  config: DataConfig, archive: Path | None, cache_dir: Path, given: Mapping[str, Sequence[Any]] | None = None
) -> Source:
  """Return the source that the settings select, without reading it.

  The IMDB reviews come from a local archive, or are downloaded into `cache_dir` and prepared there. Texts and labels
  from Python are `given` by "train" and "test".

  Raises:
    DataError: the settings are those of a run on texts from Python, but none are given.
    UsageError: there are test texts, but no training texts of the same kind.
  """
  for name, path in (("--test-data", config.test_data), ("--unlabelled-data", config.unlabelled_data)):
    if path is not None and config.source in ("imdb", "sample"):
      raise UsageError(f"{name} {path}: requires texts of your own, not --data {config.source}.")
  if config.source == "sample":
    return Source(name="the embedded sample", load=lambda report: sample.load())
  if archive is not None:
    return Source(
      name=str(archive),
      content=imdb.CONTENT,
      fingerprint=lambda: archive_reader.fingerprint(archive),
      load=lambda report: archive_reader.read_archive(archive),
      load_unlabelled=lambda report: archive_reader.read_archive(archive, ("test", "unsupervised")),
    )
  if config.source == "python":
    if given is None:
      raise DataError("The run was trained on texts given from Python: name texts to evaluate, as by --data FILE.")
    load = functools.partial(_load_given, given)
    more = functools.partial(_load_unlabelled, config, load)
    return Source(name="the given texts", load=load, load_unlabelled=more)
  if config.source != "imdb":
    load = functools.partial(_load_own, config)
    more = functools.partial(_load_unlabelled, config, load)
    fingerprint = functools.partial(_fingerprint, config)
    return Source(name=config.source, fingerprint=fingerprint, load=load, load_unlabelled=more)
  return Source(
    name="the prepared store, or the download",
    content=imdb.CONTENT,
    # Arrays of the official texts are right, whatever they were made from.
    fingerprint=lambda: imdb.CONTENT,
    load=functools.partial(_load_official, cache_dir, imdb.LABELLED_SPLITS),
    load_unlabelled=functools.partial(_load_official, cache_dir, ("test", "unsupervised")),
  )


def _paths(config: DataConfig) -> dict[str, Path]:
  paths = {"train": config.source, "test": config.test_data}
  return {name: Path(path) for name, path in paths.items() if path is not None}


def _fingerprint(config: DataConfig) -> str:
  return " ".join(map(tables.fingerprint, _paths(config).values()))


def _load_own(config: DataConfig, report: Callable[[str], None]) -> dict[str, Reviews]:
  before = _fingerprint(config)
  read = {name: tables.read(path, config) for name, path in _paths(config).items()}
  if _fingerprint(config) != before:
    raise DataError(f"{config.source}: has changed while it was read; wait until it is complete.")
  return splits.split(read, report, config.source)


def _load_given(given: Mapping[str, Sequence[Any]], report: Callable[[str], None]) -> dict[str, Reviews]:
  return splits.split({name: tables.from_python(given, name) for name in given}, report, "data")


def _load_unlabelled(config: DataConfig, load: Callable[..., Any], report: Callable[[str], None]) -> dict[str, Reviews]:
  del report
  if config.unlabelled_data is None:
    return {}
  texts = [text for text, _ in tables.records(Path(config.unlabelled_data), config.text_column)]
  # What `load` reports has been reported before.
  return {"test": load(lambda line: None)["test"], "unsupervised": canonical(texts, [0] * len(texts))}


def _load_official(cache_dir: Path, names: Sequence[str], report: Callable[[str], None]) -> dict[str, Reviews]:
  """Read the first record store in `cache_dir`, $TFDS_DATA_DIR or ~/tensorflow_datasets, or else download the archive.

  A download is kept in `cache_dir`, also as a record store if tensorflow-datasets and array-record are installed.
  """
  if not all(importlib.util.find_spec(name) for name in ("tensorflow_datasets", "array_record")):
    return archive_reader.read_archive(imdb.download(cache_dir / "downloads", report), names)
  # This import is slow.
  from imdb_jax.data import tfds_imdb

  # Path.expanduser would raise for a user without a home.
  shared = Path(os.path.expanduser(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"))  # noqa: PTH111
  store = find_store([cache_dir, shared])
  if store is None:
    store = tfds_imdb.prepare(cache_dir, imdb.download(cache_dir / "downloads", report))
  return tfds_imdb.read_store(store, names)


def find_store(roots: Sequence[Path]) -> Path | None:
  """Return the first ArrayRecord store below the roots of tfds stores, or None. Only TensorFlow reads other formats."""
  for path in (root / STORE for root in roots):
    try:
      info = files.read_json(path / "dataset_info.json")
    except (FileNotFoundError, NotADirectoryError):
      continue
    except (OSError, ValueError):
      return path  # `read_store` says what is wrong with it.
    if not isinstance(info, dict) or info.get("fileFormat") == "array_record":
      return path
  return None
