"""Token arrays of the reviews: encoded from a source once, then read from a cache."""

import dataclasses
import functools
import hashlib
import itertools
import json
import mmap
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import filelock
import numpy as np

from imdb_jax.config import DataConfig
from imdb_jax.data import batches, tables
from imdb_jax.data.reviews import CLASSES, LeftOut, Reviews, content, named
from imdb_jax.data.sources import Source
from imdb_jax.data.splits import numbered
from imdb_jax.data.tokenizer import Vocabulary
from imdb_jax.errors import DataError, UsageError, first_line, reraise_as
from imdb_jax.store import files

# Version of the cache. It is part of the names of the entries, so entries of other versions are ignored.
_FORMAT = 6
# Of the tokens of a split, and of a manifest. Larger entries are made again each time.
_MAX_BYTES, _MAX_MANIFEST = 2**33, 2**23
# Larger splits are read from the file while they are used. Should it be truncated then, the kernel ends the process.
_MAX_MEMORY = 2**28
_HOLD_OUT_SEED = 0
# Words per sequence of a language model, and the most sequences that it is validated on.
_SEQUENCE, _MAX_VALIDATION = 129, 500
_SPLITS = ("train", "validation", "test")
_FIELDS = ("tokens", "lengths", "labels")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenSplit:
  """Encoded reviews of one split.

  Attributes:
    tokens: int16[n, t] (int32 for a large vocabulary), padded at the front with 0.
    lengths: int32[n], real positions.
    labels: int32[n], places in the classes.
  """

  tokens: np.ndarray
  lengths: np.ndarray
  labels: np.ndarray

  def __len__(self) -> int:
    return len(self.labels)

  def batch(self, rows: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens [size, t] and lengths [size] of at most `size` rows; the remaining rows are empty."""
    tokens = np.zeros((size, self.tokens.shape[1]), self.tokens.dtype)
    lengths = np.zeros(size, np.int32)
    tokens[: len(rows)], lengths[: len(rows)] = self.tokens[rows], self.lengths[rows]
    return tokens, lengths


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenData:
  """Everything that training and evaluation read. Unless a part is held out, `validation` is `test`.

  Attributes:
    classes: names of the labels 0, 1, ...
    left_out: rows of the source that are in no split.
  """

  train: TokenSplit
  validation: TokenSplit
  test: TokenSplit
  vocabulary: Vocabulary
  classes: tuple[str, ...] = CLASSES
  left_out: LeftOut = dataclasses.field(default_factory=dict)

  @property
  def summary(self) -> str:
    """The numbers of rows and classes, for a person."""
    rows = f"{len(self.train):,} train, {len(self.validation):,} validation, {len(self.test):,} test"
    return f"{rows}, {len(self.classes):,} classes"

  @property
  def counts(self) -> dict[str, int]:
    """The number of training rows of each class, in the order of the labels."""
    return {name: int(np.sum(self.train.labels == label)) for label, name in enumerate(self.classes)}

  def arrays(self) -> dict[str, np.ndarray]:
    """Return all arrays by their names, such as "train.tokens"."""
    return {f"{name}.{field}": getattr(getattr(self, name), field) for name in _SPLITS for field in _FIELDS}

  @functools.cached_property
  def digest(self) -> str:
    """SHA-256 of arrays and vocabulary, in hex. It depends on reviews and settings, not on where they come from."""
    digest = hashlib.sha256(self.vocabulary.json.encode() + named(self.classes))
    for name, array in self.arrays().items():
      digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
      digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def hold_out(reviews: Reviews, fraction: float) -> tuple[Reviews, Reviews]:
  """Split reviews by groups into the rest and about `fraction` of them; raise DataError if the groups are unknown."""
  if reviews.groups is None:
    raise DataError(
      "--validation split requires the film of each review, which this source does not have: "
      "use --archive with the official archive."
    )
  if reviews.groups.dtype == np.uint64:
    # Hashes. Their higher bits have decided what is for testing.
    is_held = reviews.groups % np.uint64(2**32) < np.uint64(fraction * 2**32)
  else:
    groups, counts = np.unique(reviews.groups, return_counts=True)
    order = batches.shuffled(len(groups), seed=_HOLD_OUT_SEED, epoch=0)
    num_held = int(np.searchsorted(np.cumsum(counts[order]), fraction * len(reviews))) + 1
    is_held = np.isin(reviews.groups, groups[order[:num_held]])
  return reviews.take(np.flatnonzero(~is_held)), reviews.take(np.flatnonzero(is_held))


def split(config: DataConfig, reviews: dict[str, Reviews]) -> dict[str, Reviews]:
  """Return the reviews of "train", "test" and, if a part is held out, "validation".

  Raises DataError if that part's groups are unknown, and UsageError if a split has no reviews left.
  """
  splits = {"train": reviews["train"], "test": reviews["test"]}
  if config.validation == "split":
    splits["train"], splits["validation"] = hold_out(splits["train"], config.validation_fraction)
  splits = {name: each.take(range(min(config.limit or len(each), len(each)))) for name, each in splits.items()}
  if not all(len(each) for each in splits.values()):
    raise UsageError("A split has no reviews left: raise --limit or change --validation-fraction.")
  return splits


def encode(config: DataConfig, reviews: dict[str, Reviews]) -> TokenData:
  """Fit the vocabulary on the training reviews alone and encode every split; raise as `split` does."""
  splits = split(config, reviews)
  train = splits.pop("train")
  vocabulary, tokens, lengths = Vocabulary.fit(train.texts, config)
  encoded = {name: _encode(each, vocabulary) for name, each in splits.items()}
  encoded["train"] = TokenSplit(tokens=tokens, lengths=lengths, labels=train.labels)
  encoded.setdefault("validation", encoded["test"])
  return TokenData(**encoded, vocabulary=vocabulary, classes=train.classes, left_out=train.left_out)


def read(path: Path, vocabulary: Vocabulary, classes: tuple[str, ...], report: Callable[[str], None]) -> TokenSplit:
  """Return the encoded texts of a labelled file or folder; raise DataError as `tables.read`, or for another class."""
  rows, left_out = tables.read(path, vocabulary.config)
  tables.report_left_out(left_out, report)
  return _encode(numbered(rows, classes, name=str(path)), vocabulary)


def _encode(reviews: Reviews, vocabulary: Vocabulary) -> TokenSplit:
  tokens, lengths = vocabulary.encode(reviews.texts)
  return TokenSplit(tokens=tokens, lengths=lengths, labels=reviews.labels)


def load(
  source: Source, config: DataConfig, *, cache_dir: Path, report: Callable[[str], None] = lambda line: None
) -> TokenData:
  """Return the encoded reviews of a source, from the cache if possible.

  One process at a time reads the source and fills the cache; the others wait for it. `report` gets a line before slow
  work, and one of the rows left out.

  Raises:
    DataError: the reviews are missing or damaged, lack the groups for a held-out part, or cannot be cached.
    UsageError: a split has no reviews left.
  """
  if (fingerprint := source.fingerprint()) is None:
    data = encode(config, source.load(report))
  else:
    entry = _entry(cache_dir, config, fingerprint)
    data = _read_intact(entry, config, lambda line: None)
    if data is None:
      with reraise_as(DataError, f"--cache-dir {cache_dir}: cannot be written"), _locked(cache_dir, report):
        # Another process may have filled the cache meanwhile.
        data = _read_intact(entry, config, report) or _fill(entry, source, config, cache_dir, report)
  tables.report_left_out(data.left_out, report)
  return data


def load_unlabelled(source: Source, vocabulary: Vocabulary, report: Callable[[str], None]) -> np.ndarray:
  """Return the unlabelled reviews of a source as int[n, t], or raise DataError. Only the start of a run needs them."""
  report(f"Reading the unlabelled reviews from {source.name}")
  found = source.load_unlabelled(report)
  texts = found["unsupervised"].texts[: vocabulary.config.limit] if found else ()
  if not texts:
    raise DataError(
      f"--unlabelled: {source.name} has no unlabelled texts, unlike the official archive: name a file of your own by "
      "--unlabelled-data, or see --no-unlabelled."
    )
  if count := len({*texts} & {*found["test"].texts}):
    report(f"Warning: {count:,} of the {len(texts):,} unlabelled texts are also test texts; see --no-unlabelled.")
  return vocabulary.encode(texts)[0]


def sequences(data: TokenData, *unlabelled: np.ndarray) -> TokenData:
  """Return the texts of each split, one after the other, as sequences of 129 words: the data of a language model.

  Texts int[n, t] that are `unlabelled` are for training, too. An id of 0 begins each text, words at the end that fill
  no sequence are left out, and all labels are 0. Raises UsageError if a split has fewer words.
  """

  def cut(tokens: np.ndarray, most: int | None = None) -> TokenSplit:
    starts = np.zeros((len(tokens), 1), tokens.dtype)
    words = np.concatenate([starts, tokens], axis=1)[np.concatenate([starts == 0, tokens > 0], axis=1)]
    found = words[: len(words) - len(words) % _SEQUENCE].reshape(-1, _SEQUENCE)[:most]
    if not len(found):
      raise UsageError(f"--objective next_word: a split has fewer than {_SEQUENCE} words.")
    lengths = np.full(len(found), _SEQUENCE, np.int32)
    return TokenSplit(tokens=found, lengths=lengths, labels=np.zeros_like(lengths))

  validation = cut(data.validation.tokens, _MAX_VALIDATION)
  train = cut(np.concatenate([data.train.tokens, *unlabelled]))
  return dataclasses.replace(data, train=train, validation=validation, test=validation)


def _locked(cache_dir: Path, report: Callable[[str], None]) -> filelock.AcquireReturnProxy:
  """Let one process at a time fill the cache. The lock ends with its process."""
  cache_dir.mkdir(parents=True, exist_ok=True)
  lock = filelock.FileLock(cache_dir / "tokens.lock")
  try:
    return lock.acquire(blocking=False)
  except filelock.Timeout:
    report("Waiting for another process to read the reviews")
    return lock.acquire()


def _entry(cache_dir: Path, config: DataConfig, fingerprint: str) -> Path:
  key = json.dumps([_FORMAT, fingerprint, dataclasses.asdict(config)], sort_keys=True)
  return cache_dir / "tokens" / hashlib.sha256(key.encode()).hexdigest()[:16]


def _fill(entry: Path, source: Source, config: DataConfig, cache_dir: Path, report: Callable[[str], None]) -> TokenData:
  report(f"Reading the reviews from {source.name} (once; then cached)")
  reviews = source.load(report)
  report("Encoding the reviews (once; then cached)")
  data = encode(config, reviews)
  if source.content not in (None, content(reviews)):
    report("Note: these are not the texts of the official IMDB reviews.")
  # Equal texts from all sources share one entry; the entry of a source is a link to it.
  shared = _entry(cache_dir, config, f"{content(reviews)}{data.left_out or ''}")
  _write(shared, data, {"settings": dataclasses.asdict(config), "content": content(reviews)})
  if entry not in (shared, _entry(cache_dir, config, str(source.content))):
    files.remove(entry)
    entry.symlink_to(shared.name)
  # From the file: texts and arrays need no memory any more.
  return _read_intact(shared, config, report) or data


def _write(entry: Path, data: TokenData, facts: dict[str, Any]) -> None:
  """Write an entry elsewhere and rename it, so that readers see a complete entry or none."""
  names = [name for name in _SPLITS if name != "validation" or data.validation is not data.test]
  entry.parent.mkdir(exist_ok=True)
  with tempfile.TemporaryDirectory(dir=entry.parent, prefix=".making-") as making:
    unfinished = Path(making) / entry.name
    unfinished.mkdir()
    # Bytes alone, without a header that could lie about them: the config and the rows say what they are.
    with (unfinished / "arrays").open("xb") as file:
      for name, field in itertools.product(names, _FIELDS):
        getattr(getattr(data, name), field).tofile(file)
    files.write(unfinished / "vocab.json", data.vocabulary.json)
    rows = {name: len(getattr(data, name)) for name in names}
    facts |= {"rows": rows, "classes": data.classes, "left_out": data.left_out, "digest": data.digest}
    files.write_json(unfinished / "manifest.json", facts)
    files.remove(entry)
    unfinished.replace(entry)


def _read_intact(entry: Path, config: DataConfig, report: Callable[[str], None]) -> TokenData | None:
  """Read an entry; return None if it is missing, and also if it is damaged, which is reported."""
  if not os.path.lexists(entry):
    return None
  try:
    return _read(entry, config)
  # NumPy and json raise errors without a common base class.
  except Exception as error:
    report(f"The cached arrays in {entry} are damaged ({first_line(error)}); they are made again.")
    return None


def _read(entry: Path, config: DataConfig) -> TokenData:
  if entry.is_symlink():
    # The link of a source names another entry. A path to somewhere else is no name, and raises ValueError.
    entry = entry.with_name(str(entry.readlink()))
    if entry.is_symlink():
      raise ValueError("a link to a link")
  vocabulary = Vocabulary.load(entry / "vocab.json", config)
  manifest = files.read_json(entry / "manifest.json", _MAX_MANIFEST)
  left_out = {line: list(places) for line, places in manifest["left_out"].items()}
  if len(left_out) > 2 or not all(map(str.isprintable, itertools.chain(left_out, *left_out.values()))):
    raise ValueError("the list of rows left out cannot be right")
  with files.open_regular(entry / "arrays") as file:
    names = [name for name in _SPLITS if name in manifest["rows"]]
    splits = {name: _read_split(file, manifest["rows"][name], vocabulary) for name in names}
    classes = tuple(manifest["classes"])
    if file.read(1):
      raise ValueError("the arrays are too long")
    if any(not 0 <= label < len(classes) for split in splits.values() for label in np.unique(split.labels)):
      raise ValueError("a label is not a class")
  splits.setdefault("validation", splits["test"])
  data = TokenData(**splits, vocabulary=vocabulary, classes=classes, left_out=left_out)
  if data.digest != manifest["digest"]:
    raise ValueError("the content does not match the manifest")
  return data


def _read_split(file: IO[bytes], rows: Any, vocabulary: Vocabulary) -> TokenSplit:
  # Before memory is allocated. A sparse file may claim any size.
  config = vocabulary.config
  size = rows * config.sequence_length * np.dtype(vocabulary.dtype).itemsize if type(rows) is int else 0
  if not 0 < size <= min(_MAX_BYTES, os.fstat(file.fileno()).st_size) or rows > tables.MAX_ROWS:
    raise ValueError("an impossible number of reviews")
  # If the file ends too soon, all of these raise ValueError.
  if size > _MAX_MEMORY:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    flat = np.frombuffer(mapped, vocabulary.dtype, rows * config.sequence_length, file.tell())
    file.seek(size, os.SEEK_CUR)
  else:
    mapped, flat = None, np.fromfile(file, vocabulary.dtype, rows * config.sequence_length)
  tokens = flat.reshape(rows, config.sequence_length)
  lengths, labels = np.fromfile(file, np.int32, 2 * rows).reshape(2, rows)
  if tokens.min() < 0 or tokens.max() >= config.vocabulary_size:
    raise ValueError("a token is not an id")
  # In parts: for all rows at once, NumPy would copy the tokens.
  counts = [np.count_nonzero(part, axis=1) for part in np.array_split(tokens, 1 + rows // 10_000)]
  if not np.array_equal(lengths, np.concatenate(counts)):
    raise ValueError("a length is wrong")
  if mapped:
    # From now on, batches read single rows. The kernel would read far more around each of them.
    mapped.madvise(mmap.MADV_RANDOM)
  return TokenSplit(tokens=tokens, lengths=lengths, labels=labels)
