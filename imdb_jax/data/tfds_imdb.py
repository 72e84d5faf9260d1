"""The `imdb_reviews` record store of tensorflow-datasets, written and read without TensorFlow.

Layout, features, labels and splits are those of the stock builder, so each side reads the other's ArrayRecord
stores. The stock builder itself needs TensorFlow to unpack the archive, and does not keep the films, for which tfds
has a place: `metadata.json`.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import pathlib
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import absl.logging
import numpy as np
import tensorflow_datasets as tfds

from imdb_jax import errors
from imdb_jax.data import archive as archive_lib
from imdb_jax.data import reviews

# Enough rows to keep every shard busy, few enough that the raw records of a split are never held at once.
_BATCH_SIZE = 5_000
_CITATION = """\
@inproceedings{maas-EtAl:2011:ACL-HLT2011,
  author    = {Maas, Andrew L. and Daly, Raymond E. and Pham, Peter T. and Huang, Dan and Ng, Andrew Y. and Potts, Christopher},
  title     = {Learning Word Vectors for Sentiment Analysis},
  booktitle = {Proceedings of the 49th Annual Meeting of the Association for Computational Linguistics},
  month     = {June},
  year      = {2011},
  pages     = {142--150},
  url       = {http://www.aclweb.org/anthology/P11-1015}
}
"""  # noqa: E501


# Not registered: `tfds.load("imdb_reviews")` elsewhere in the process must keep meaning the stock builder.
class ImdbReviews(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Large Movie Review Dataset, from reviews that are already in memory."""

  name = "imdb_reviews"
  VERSION = tfds.core.Version("1.0.0")
  BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="plain_text", description="Plain text")]  # noqa: RUF012

  def __init__(self, *, splits: Mapping[str, reviews.Reviews] | None = None, **kwargs: Any):
    """`splits` are what `download_and_prepare` writes; a builder that only reads needs none."""
    self._splits = splits or {}
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    known = {name: split.films for name, split in self._splits.items() if split.films is not None}
    films = {name: _sealed(self._splits[name], films.tolist()) for name, films in known.items()}
    return tfds.core.DatasetInfo(
      builder=self,
      description="Large Movie Review Dataset: film reviews, 25,000 to train on and 25,000 to test on.",
      features=tfds.features.FeaturesDict(
        {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(names=["neg", "pos"])}
      ),
      supervised_keys=("text", "label"),
      homepage="http://ai.stanford.edu/~amaas/data/sentiment/",
      citation=_CITATION,
      metadata=tfds.core.MetadataDict(films),
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
    del dl_manager  # nothing to download
    # tfds refuses a split without examples.
    return {name: self._generate_examples(split) for name, split in self._splits.items() if len(split)}

  def _generate_examples(self, split: reviews.Reviews) -> Iterator[tuple[int, dict[str, Any]]]:
    for row, (text, label) in enumerate(zip(split.texts, split.labels.tolist(), strict=True)):
      yield row, {"text": text, "label": label}


def prepare(
  data_dir: pathlib.Path, archive: pathlib.Path, *, expected: Mapping[str, int] = archive_lib.OFFICIAL_COUNTS
) -> pathlib.Path:
  """Writes the record store from a local archive, all or nothing; an existing store is kept as it is.

  Args:
    data_dir: the root of the tfds stores; the store is its `imdb_reviews/plain_text/1.0.0`.
    archive: what `archive.read_archive` takes, as is `expected`.

  Returns:
    The directory of the store.

  Raises:
    DataError: the archive is not what it should be, or the store cannot be written.
  """
  splits = archive_lib.read_archive(archive, expected=expected)
  with _quiet(), _clear_errors(f"cannot write a record store in {data_dir}", "name another data directory"):
    builder = ImdbReviews(splits=splits, data_dir=data_dir, file_format="array_record")
    store = pathlib.Path(builder.data_dir)
    try:
      builder.download_and_prepare()
    except OSError:
      # tfds renames the finished directory into place, which fails where another process was faster.
      if not (store / "dataset_info.json").is_file():
        raise
  return store


def read_store(
  path: pathlib.Path, *, expected: Mapping[str, int] = archive_lib.OFFICIAL_COUNTS
) -> dict[str, reviews.Reviews]:
  """Reads the record store at `path`, …/imdb_reviews/plain_text/1.0.0.

  Args:
    path: a store written by `prepare`, or by the stock builder with `file_format="array_record"`.
    expected: how many reviews of each kind the store must hold, as in `archive.read_archive`.

  Returns:
    The splits "train", "test" and "unsupervised", in canonical order. `films` is None in a store of the stock
    builder, or where `prepare` did not find them.

  Raises:
    DataError: the store is damaged, incomplete or in a format that only TensorFlow reads.
  """
  path = path.absolute()
  splits = {}
  remedy = "delete that directory to have it prepared anew, or give --archive"
  with _quiet(), _clear_errors(f"cannot read the record store {path}", remedy):
    if not (path / "dataset_info.json").is_file():
      raise FileNotFoundError("it has no dataset_info.json")
    builder = ImdbReviews(data_dir=path.parents[2])
    if pathlib.Path(builder.data_dir) != path:
      raise ValueError("it is not a directory imdb_reviews/plain_text/1.0.0")
    file_format = builder.info.file_format
    if file_format is None or file_format.value != "array_record":
      raise errors.DataError(
        f"the record store {path} is of format {file_format and file_format.value}, which only TensorFlow reads; "
        "name another data directory, or give --archive"
      )
    for name in ("train", "test", "unsupervised"):
      splits[name] = _read_split(builder, name)
    for kind, (name, label) in archive_lib.KINDS.items():
      count, wanted = int(np.sum(splits[name].labels == label)), expected.get(kind, 0)
      if count != wanted and (kind != "train/unsup" or count):
        raise errors.DataError(f"the record store {path} has {count:,} reviews {kind}, expected {wanted:,}; {remedy}")
    return {name: _with_films(split, name, builder.info.metadata) for name, split in splits.items()}


def _read_split(builder: ImdbReviews, name: str) -> reviews.Reviews:
  texts, labels = [], []
  # The decorator of as_data_source hides its parameters from type checkers.
  source: Any = builder.as_data_source(split=name) if name in builder.info.splits else []  # pyright: ignore[reportCallIssue]
  for start in range(0, len(source), _BATCH_SIZE):
    for example in source.__getitems__(range(start, min(start + _BATCH_SIZE, len(source)))):
      texts.append(example["text"].decode("utf-8", "replace"))
      labels.append(int(example["label"]))
  return reviews.canonical(texts, labels)


def _with_films(split: reviews.Reviews, name: str, metadata: Any) -> reviews.Reviews:
  if name not in metadata:
    return split
  films = metadata[name]["films"]
  if metadata[name] != _sealed(split, films):
    raise ValueError("its metadata.json does not hold the films of its reviews")
  return dataclasses.replace(split, films=np.asarray(films, np.int32))


def _sealed(split: reviews.Reviews, films: list[int]) -> dict[str, Any]:
  """The films of reviews in their order, with a hash of both: films of other reviews would tear films apart."""
  content = json.dumps([reviews.content_digest(split), films])
  return {"films": films, "sha256": hashlib.sha256(content.encode()).hexdigest()}


@contextlib.contextmanager
def _clear_errors(fault: str, remedy: str) -> Iterator[None]:
  try:
    yield
  except errors.DataError:
    raise
  # tfds, protobuf and the C++ reader of ArrayRecord document no common error.
  except Exception as error:
    # tfds puts whole examples into its messages.
    reason = textwrap.shorten(str(error), 300) or type(error).__name__
    raise errors.DataError(f"{fault}: {reason}; {remedy}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Keeps tfds from printing, drawing progress bars, logging and warning: what matters becomes an error."""
  verbosity = absl.logging.get_verbosity()
  absl.logging.set_verbosity(absl.logging.ERROR)
  tfds.disable_progress_bar()
  try:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
      warnings.simplefilter("ignore")
      yield
  finally:
    absl.logging.set_verbosity(verbosity)
