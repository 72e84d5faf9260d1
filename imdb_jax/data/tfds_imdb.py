"""The `imdb_reviews` record store of tensorflow-datasets, written and read without TensorFlow.

Layout, features, labels and splits are those of the stock builder, so that either builder reads the ArrayRecord stores
of the other. The stock builder requires TensorFlow to unpack the archive, and drops the films. Here `metadata.json`,
which tfds provides for such facts, holds them.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import textwrap
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import absl.logging
import numpy as np
import tensorflow_datasets as tfds

from imdb_jax.data import archive as archive_reader
from imdb_jax.data import imdb
from imdb_jax.data.reviews import Reviews, canonical
from imdb_jax.errors import DataError

# Enough rows to keep every shard busy, but few enough that the raw records of a split are never in memory at once.
_BATCH_SIZE = 5_000


# Not registered: elsewhere in the process, `tfds.load("imdb_reviews")` must still find the stock builder.
class ImdbReviews(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Large Movie Review Dataset, from reviews in memory."""

  name = "imdb_reviews"
  VERSION = tfds.core.Version("1.0.0")
  BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="plain_text", description="Plain text")]  # noqa: RUF012

  def __init__(self, *, splits: Mapping[str, Reviews] | None = None, **kwargs: Any):
    self._splits = splits or {}
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    known = {name: split.groups for name, split in self._splits.items() if split.groups is not None}
    films = {name: _sealed(self._splits[name], groups.tolist()) for name, groups in known.items()}
    return tfds.core.DatasetInfo(
      builder=self,
      description="Large Movie Review Dataset: film reviews, 25,000 to train on and 25,000 to test on.",
      features=tfds.features.FeaturesDict(
        {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(names=["neg", "pos"])}
      ),
      supervised_keys=("text", "label"),
      homepage="http://ai.stanford.edu/~amaas/data/sentiment/",
      citation="Maas et al. (2011): Learning Word Vectors for Sentiment Analysis. ACL.",
      metadata=tfds.core.MetadataDict(films),
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
    # tfds refuses a split without examples.
    return {name: self._generate_examples(split) for name, split in self._splits.items() if len(split)}

  def _generate_examples(self, split: Reviews) -> Iterator[tuple[int, dict[str, Any]]]:
    for row, (text, label) in enumerate(zip(split.texts, split.labels.tolist(), strict=True)):
      yield row, {"text": text, "label": label}


def prepare(data_dir: Path, archive: Path, *, expected: Mapping[str, int] = imdb.COUNTS) -> Path:
  """Write the record store of an archive's reviews below a root of tfds stores, unless it exists; return its folder.

  `expected` is as for `archive.read_archive`. Raises DataError if the archive is missing or damaged, or the store
  cannot be written; no part of it is left.
  """
  splits = archive_reader.read_archive(archive, imdb.SPLITS, expected=expected)
  with _quiet(f"cannot write a record store in {data_dir}", "use another data directory"):
    builder = ImdbReviews(splits=splits, data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare()
  return Path(builder.data_dir)


def read_store(
  path: Path, splits: Collection[str] = imdb.LABELLED_SPLITS, *, expected: Mapping[str, int] = imdb.COUNTS
) -> dict[str, Reviews]:
  """Read reviews from a folder `imdb_reviews/plain_text/1.0.0`, as `archive.read_archive` does from an archive.

  `groups` is None in a store of the stock builder. Raises DataError if the store is damaged, incomplete or in a format
  that only TensorFlow reads.
  """
  path = path.absolute()
  with _quiet(f"cannot read the record store {path}", "delete it to have it prepared again, or use --archive"):
    if not (path / "dataset_info.json").is_file():
      raise FileNotFoundError("it has no dataset_info.json")
    builder = ImdbReviews(data_dir=path.parents[2])
    if Path(builder.data_dir) != path:
      raise ValueError("it is not a directory imdb_reviews/plain_text/1.0.0")
    file_format = builder.info.file_format and builder.info.file_format.value
    if file_format != "array_record":
      raise ValueError(f"it has the format {file_format}, which only TensorFlow reads")
    found = {name: _read_split(builder, name) for name in splits}
    kinds = {kind: (found[name], label) for kind, (name, label) in imdb.KINDS.items() if name in found}
    counts = {kind: int(np.sum(split.labels == label)) for kind, (split, label) in kinds.items()}
    imdb.check_counts(counts, {kind: expected.get(kind, 0) for kind in kinds})
    metadata = builder.info.metadata or {}
    return {name: _with_films(split, metadata[name]) if name in metadata else split for name, split in found.items()}


def _read_split(builder: ImdbReviews, name: str) -> Reviews:
  texts, labels = [], []
  # The decorator of as_data_source hides its parameters from type checkers.
  source: Any = builder.as_data_source(split=name) if name in builder.info.splits else []  # pyright: ignore[reportCallIssue]
  for start in range(0, len(source), _BATCH_SIZE):
    for example in source.__getitems__(range(start, min(start + _BATCH_SIZE, len(source)))):
      texts.append(example["text"].decode("utf-8", "replace"))
      labels.append(int(example["label"]))
  return canonical(texts, labels)


def _with_films(split: Reviews, sealed: dict[str, Any]) -> Reviews:
  films = sealed["films"]
  if sealed != _sealed(split, films):
    raise ValueError("its metadata.json does not hold the films of its reviews")
  return dataclasses.replace(split, groups=np.asarray(films, np.int32))


def _sealed(split: Reviews, films: list[int]) -> dict[str, Any]:
  """Return films with a hash of reviews and films. With films of other reviews, held-out parts would share films."""
  return {"films": films, "sha256": hashlib.sha256(json.dumps([split.digest, films]).encode()).hexdigest()}


@contextlib.contextmanager
def _quiet(fault: str, remedy: str) -> Iterator[None]:
  """Turn every error of tfds into a DataError of one line, and keep tfds from printing, logging and warning."""
  verbosity = absl.logging.get_verbosity()
  absl.logging.set_verbosity(absl.logging.ERROR)
  tfds.disable_progress_bar()
  try:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
      warnings.simplefilter("ignore")
      yield
  # tfds, protobuf and the C++ reader of ArrayRecord raise errors without a common base class.
  except Exception as error:
    # tfds puts whole examples into its messages.
    reason = textwrap.shorten(str(error), 300) or type(error).__name__
    raise DataError(f"{fault}: {reason}; {remedy}") from error
  finally:
    absl.logging.set_verbosity(verbosity)
