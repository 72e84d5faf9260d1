"""Token arrays of the reviews: encoded from a source once, then read from a cache."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from imdb_jax.config import DataConfig
from imdb_jax.data import batches
from imdb_jax.data.reviews import Reviews, content
from imdb_jax.data.sources import Source
from imdb_jax.data.tokenizer import Vocabulary
from imdb_jax.errors import DataError, UsageError
from imdb_jax.store import files

# Version of the cache. It is part of the names of the entries, so entries of other versions are ignored.
_FORMAT = 3
# The largest arrays that a config allows, 50,000 reviews of 10,000 int32 tokens, have 2.0e9 bytes.
_MAX_ARRAYS_BYTES = 2**31
_HOLD_OUT_SEED = 0
_SPLITS = ("train", "validation", "test")
_FIELDS = ("tokens", "lengths", "labels")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenSplit:
  """Encoded reviews of one split.

  Attributes:
    tokens: int16[n, t] (int32 for a large vocabulary), padded at the front with 0.
    lengths: int32[n], real positions.
    labels: int32[n], 0 or 1.
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
  """Everything that training and evaluation read. Unless a part is held out, `validation` is `test`."""

  train: TokenSplit
  validation: TokenSplit
  test: TokenSplit
  vocabulary: Vocabulary

  @classmethod
  def of(cls, splits: dict[str, TokenSplit], vocabulary: Vocabulary) -> "TokenData":
    """Create token data; the test split also serves as a missing validation split."""
    return cls(**{"validation": splits["test"]} | splits, vocabulary=vocabulary)

  def arrays(self) -> dict[str, np.ndarray]:
    """Return all arrays by their names, such as "train.tokens"."""
    return {f"{name}.{field}": getattr(getattr(self, name), field) for name in _SPLITS for field in _FIELDS}

  @functools.cached_property
  def digest(self) -> str:
    """SHA-256 of arrays and vocabulary, in hex. It depends on reviews and settings, not on where they come from."""
    digest = hashlib.sha256(self.vocabulary.json.encode())
    for name, array in self.arrays().items():
      digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
      digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def hold_out(reviews: Reviews, fraction: float) -> tuple[Reviews, Reviews]:
  """Split reviews into the rest and about `fraction` of them; no group is on both sides.

  Raises:
    DataError: the groups are unknown.
  """
  if reviews.groups is None:
    raise DataError(
      "--validation split requires the film of each review, which this source does not have: "
      "use --archive with the official archive."
    )
  groups, counts = np.unique(reviews.groups, return_counts=True)
  order = batches.shuffled(len(groups), seed=_HOLD_OUT_SEED, epoch=0)
  num_held = int(np.searchsorted(np.cumsum(counts[order]), fraction * len(reviews))) + 1
  is_held = np.isin(reviews.groups, groups[order[:num_held]])
  return reviews.take(np.flatnonzero(~is_held)), reviews.take(np.flatnonzero(is_held))


def encode(config: DataConfig, reviews: dict[str, Reviews]) -> TokenData:
  """Fit the vocabulary on the training reviews alone and encode every split.

  Raises:
    DataError: a part must be held out, but the groups are unknown.
    UsageError: a split has no reviews left.
  """
  splits = {"train": reviews["train"], "test": reviews["test"]}
  if config.validation == "split":
    splits["train"], splits["validation"] = hold_out(splits["train"], config.validation_fraction)
  splits = {name: split.take(range(min(config.limit or len(split), len(split)))) for name, split in splits.items()}
  if not all(len(split) for split in splits.values()):
    raise UsageError("A split has no reviews left: raise --limit or change --validation-fraction.")

  texts = splits["train"].texts
  vocabulary = Vocabulary.fit(texts, size=config.vocabulary_size, strip_html=config.strip_html)
  encoded = {}
  for name, split in splits.items():
    tokens, lengths = vocabulary.encode(split.texts, config.sequence_length)
    encoded[name] = TokenSplit(tokens=tokens, lengths=lengths, labels=split.labels)
  return TokenData.of(encoded, vocabulary)


def load(
  source: Source, config: DataConfig, *, cache_dir: Path, report: Callable[[str], None] = lambda line: None
) -> TokenData:
  """Return the encoded reviews of a source, from the cache if possible.

  One process at a time reads the source and fills the cache; the others wait for it.

  Args:
    source: reviews, from `sources.find`.
    config: which reviews to use and how to encode them.
    cache_dir: folder of the cache.
    report: called with a line before slow work.

  Raises:
    DataError: the reviews are missing or damaged, lack the groups for a held-out part, or cannot be cached.
    UsageError: a split has no reviews left.
  """
  fingerprint = source.fingerprint()
  if fingerprint is None:
    return encode(config, source.load(report))
  entry = _entry(cache_dir, config, fingerprint)
  data = _read_intact(entry, lambda line: None)
  if data is not None:
    return data
  try:
    with _locked(cache_dir, report):
      # Another process may have filled the cache meanwhile.
      return _read_intact(entry, report) or _fill(entry, source, config, cache_dir, report)
  except OSError as error:
    raise DataError(f"--cache-dir {cache_dir}: cannot be written: {error}.") from error


@contextlib.contextmanager
def _locked(cache_dir: Path, report: Callable[[str], None]) -> Iterator[None]:
  """Let one process at a time fill the cache. The lock ends with its process."""
  cache_dir.mkdir(parents=True, exist_ok=True)
  lock = filelock.FileLock(cache_dir / "tokens.lock")
  try:
    held = lock.acquire(blocking=False)
  except filelock.Timeout:
    report("Waiting for another process to read the reviews")
    held = lock.acquire()
  with held:
    yield


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
  shared = _entry(cache_dir, config, content(reviews))
  _write(shared, data, {"settings": dataclasses.asdict(config), "content": content(reviews)})
  if entry not in (shared, _entry(cache_dir, config, str(source.content))):
    files.remove(entry)
    entry.symlink_to(shared.name)
  return data


def _write(entry: Path, data: TokenData, facts: dict[str, Any]) -> None:
  """Write an entry elsewhere and rename it, so that readers see a complete entry or none."""
  arrays: dict[str, Any] = data.arrays()
  if data.validation is data.test:
    arrays = {name: array for name, array in arrays.items() if not name.startswith("validation.")}
  entry.parent.mkdir(exist_ok=True)
  with tempfile.TemporaryDirectory(dir=entry.parent, prefix=".making-") as making:
    unfinished = Path(making) / entry.name
    unfinished.mkdir()
    np.savez(unfinished / "arrays.npz", **arrays)
    files.write(unfinished / "vocab.json", data.vocabulary.json)
    files.write_json(unfinished / "manifest.json", facts | {"digest": data.digest})
    files.remove(entry)
    unfinished.replace(entry)


def _read_intact(entry: Path, report: Callable[[str], None]) -> TokenData | None:
  """Read an entry; return None if it is missing, and also if it is damaged, which is reported."""
  if not os.path.lexists(entry):
    return None
  try:
    return _read(entry)
  # NumPy, zipfile and json raise errors without a common base class.
  except Exception as error:
    report(f"The cached arrays in {entry} are damaged ({error}); they are made again.")
    return None


def _read(entry: Path) -> TokenData:
  # NumPy leaves a file open that it has opened itself and that is no archive.
  with files.open_regular(entry / "arrays.npz") as file, np.load(file, allow_pickle=False) as archive:
    # A small file may unpack to any size.
    if sum(member.file_size for member in archive.zip.infolist()) > _MAX_ARRAYS_BYTES:
      raise ValueError(f"arrays.npz unpacks to more than {_MAX_ARRAYS_BYTES:,} bytes")
    arrays = dict(archive)
  names = [name for name in _SPLITS if f"{name}.tokens" in arrays]
  splits = {name: TokenSplit(**{field: arrays.pop(f"{name}.{field}") for field in _FIELDS}) for name in names}
  if arrays:
    raise ValueError(f"arrays.npz has the unknown array {min(arrays)}")
  data = TokenData.of(splits, Vocabulary.load(entry / "vocab.json"))
  if data.digest != files.read_json(entry / "manifest.json")["digest"]:
    raise ValueError("the content does not match the manifest")
  return data
