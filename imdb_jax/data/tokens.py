"""Reviews to token arrays, and their cache: what training reads, with or without the reviews at hand."""

import dataclasses
import errno
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from imdb_jax.config import DataConfig
from imdb_jax.data import archive as archive_reader
from imdb_jax.data import batches, imdb, sample
from imdb_jax.data.reviews import Reviews, content_digest
from imdb_jax.data.tokenizer import Vocabulary
from imdb_jax.errors import DataError, UsageError

# Held-out parts of format 1 may share films with the rest.
_FORMATS = {"test": 1, "split": 2}
_MAX_MANIFEST_BYTES = 2**20
# The most that a config allows, 50,000 reviews of 10,000 int32 tokens, are 2.0e9 bytes.
_MAX_ARRAYS_BYTES = 2**31
_HOLD_OUT_SEED = 0
_SPLITS = ("train", "validation", "test")


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

  def gather(self, rows: np.ndarray, size: int) -> dict[str, np.ndarray]:
    """The rows of a batch as arrays of `size` rows; rows beyond the batch are empty and have weight 0."""
    num_rows = len(rows)
    tokens = np.zeros((size, self.tokens.shape[1]), self.tokens.dtype)
    lengths = np.zeros(size, np.int32)
    labels, weights = np.zeros(size, np.float32), np.zeros(size, np.float32)
    tokens[:num_rows] = self.tokens[rows]
    lengths[:num_rows], labels[:num_rows], weights[:num_rows] = self.lengths[rows], self.labels[rows], 1
    return {"tokens": tokens, "lengths": lengths, "labels": labels, "weights": weights}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenData:
  """All that training and evaluation read. With `validation="test"` validation and test are the same reviews."""

  train: TokenSplit
  validation: TokenSplit
  test: TokenSplit
  vocabulary: Vocabulary

  def digest(self) -> str:
    """SHA-256 of arrays and vocabulary: equal for equal reviews and settings, whatever they were read from."""
    digest = hashlib.sha256(self.vocabulary.to_json().encode())
    for name in _SPLITS:
      for field, array in _arrays(getattr(self, name)).items():
        digest.update(f"{name}.{field} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _arrays(split: TokenSplit) -> dict[str, np.ndarray]:
  return {field.name: getattr(split, field.name) for field in dataclasses.fields(split)}


def hold_out(reviews: Reviews, fraction: float) -> tuple[Reviews, Reviews]:
  """Splits reviews into the rest and about `fraction` of them, with no film on both sides.

  Raises:
    DataError: the films are not known.
  """
  if reviews.films is None:
    raise DataError(
      "--validation split needs to know which film a review is of, and this source does not tell: "
      "give --archive with the official archive"
    )
  names, counts = np.unique(reviews.films, return_counts=True)
  order = batches.shuffled(len(names), seed=_HOLD_OUT_SEED, epoch=0)
  num_held = int(np.searchsorted(np.cumsum(counts[order]), fraction * len(reviews))) + 1
  held = np.isin(reviews.films, names[order[:num_held]])
  return reviews.take(np.flatnonzero(~held)), reviews.take(np.flatnonzero(held))


def encode(config: DataConfig, reviews: dict[str, Reviews]) -> TokenData:
  """Fits the vocabulary on the training reviews alone and encodes every split.

  Raises:
    DataError: as `hold_out`.
    UsageError: a split is left without reviews.
  """
  splits = {"train": reviews["train"], "test": reviews["test"]}
  if config.validation == "split":
    splits["train"], splits["validation"] = hold_out(splits["train"], config.validation_fraction)
  splits = {name: split.take(range(min(config.limit or len(split), len(split)))) for name, split in splits.items()}
  if not all(len(split) for split in splits.values()):
    raise UsageError("A split is left without reviews: raise --limit or change --validation-fraction.")

  texts = splits["train"].texts
  vocabulary = Vocabulary.fit(texts, size=config.vocabulary_size, strip_html=config.strip_html)
  encoded = {}
  for name, split in splits.items():
    tokens, lengths = vocabulary.encode(split.texts, config.sequence_length)
    encoded[name] = TokenSplit(tokens=tokens, lengths=lengths, labels=split.labels)
  return TokenData(
    train=encoded["train"],
    validation=encoded.get("validation", encoded["test"]),
    test=encoded["test"],
    vocabulary=vocabulary,
  )


def load(
  config: DataConfig,
  *,
  archive: Path | None = None,
  cache_dir: Path,
  report: Callable[[str], None] = lambda line: None,
) -> TokenData:
  """The encoded reviews: from the cache, or made from the first source that has them and then cached.

  Without an archive, arrays that were made with the same settings from the official reviews serve, so a machine
  that has only the cache can train; tensorflow-datasets is not needed for that.

  Args:
    config: which reviews and how they are encoded.
    archive: a local aclImdb archive or folder.
    cache_dir: where arrays and prepared reviews are kept.
    report: gets a line before slow work.

  Raises:
    DataError: there are no reviews, or they are damaged, or come without the films that a held-out part needs.
  """
  if config.data == "sample":
    return encode(config, sample.load())
  if archive is not None:
    source = archive_reader.fingerprint(archive)
    entry = _entry(config, source, cache_dir)
  else:
    source, entry = "store", _find_official(config, cache_dir)
  if entry is not None and entry.is_dir():
    try:
      return _read(entry)
    # NumPy, zipfile and json have no error in common.
    except Exception as error:
      report(f"The cached arrays in {entry} are damaged ({error}); they are made again.")
      shutil.rmtree(entry, ignore_errors=True)

  report(f"Reading the reviews from {archive or 'the prepared store, or the download'} (once; then cached)")

  def on_download(done: int, total: int) -> None:
    if done % (10 * 2**20) == 0 or done == total:
      report(f"Downloaded {done // 2**20} of {total // 2**20} MiB")

  reviews = imdb.load(archive, cache_dir, progress=on_download)
  report("Encoding the reviews (once; then cached)")
  data = encode(config, reviews)
  official = all(content_digest(reviews[name]) == digest for name, digest in imdb.OFFICIAL_CONTENT.items())
  if not official:
    report("Note: these are not the texts of the official IMDB reviews.")
  _write(data, _entry(config, source, cache_dir), config, official)
  return data


def _entry(config: DataConfig, source: str, cache_dir: Path) -> Path:
  settings = json.dumps([_FORMATS[config.validation], source, dataclasses.asdict(config)], sort_keys=True)
  return cache_dir / "tokens" / hashlib.sha256(settings.encode()).hexdigest()[:16]


def _find_official(config: DataConfig, cache_dir: Path) -> Path | None:
  for manifest_path in sorted((cache_dir / "tokens").glob("*/manifest.json")):
    try:
      manifest = _read_manifest(manifest_path)
    except (OSError, ValueError, RecursionError):
      continue
    wanted = {"format": _FORMATS[config.validation], "settings": dataclasses.asdict(config), "official": True}
    if all(manifest[name] == value for name, value in wanted.items()):
      return manifest_path.parent
  return None


def _write(data: TokenData, entry: Path, config: DataConfig, official: bool) -> None:
  """Writes beside the entry and renames, so that a reader sees a whole entry or none."""
  names = _SPLITS if config.validation == "split" else ("train", "test")
  arrays: dict[str, Any] = {
    f"{name}_{field}": array for name in names for field, array in _arrays(getattr(data, name)).items()
  }
  manifest = {
    "format": _FORMATS[config.validation],
    "settings": dataclasses.asdict(config),
    "official": official,
    "digest": data.digest(),
  }
  try:
    entry.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=entry.parent, prefix=".making-") as making:
      whole = Path(making) / entry.name
      whole.mkdir()
      np.savez(whole / "arrays.npz", **arrays)
      (whole / "vocab.json").write_text(data.vocabulary.to_json(), encoding="utf-8")
      (whole / "manifest.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")
      try:
        whole.replace(entry)
      except OSError as error:
        # Another process was faster: no rename replaces a folder that holds something.
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
          raise
  except OSError as error:
    raise DataError(f"The encoded reviews could not be cached in {entry.parent}: {error}. See --cache-dir.") from error


def _require_small(path: Path, limit: int) -> None:
  if not path.is_file() or path.stat().st_size > limit:
    raise ValueError(f"{path.name} is no file of at most {limit:,} bytes")


def _read_manifest(path: Path) -> dict[str, Any]:
  _require_small(path, _MAX_MANIFEST_BYTES)
  manifest = json.loads(path.read_text(encoding="utf-8"))
  if not isinstance(manifest, dict) or manifest.keys() != {"format", "settings", "official", "digest"}:
    raise ValueError(f"{path.name} has other keys than a manifest")
  return manifest


def _read(entry: Path) -> TokenData:
  manifest = _read_manifest(entry / "manifest.json")
  _require_small(entry / "arrays.npz", _MAX_ARRAYS_BYTES)
  # NumPy would leave open a file that it opened itself and that is no archive.
  with (entry / "arrays.npz").open("rb") as file, np.load(file, allow_pickle=False) as arrays:
    # A small file may unpack to any size.
    if sum(member.file_size for member in arrays.zip.infolist()) > _MAX_ARRAYS_BYTES:
      raise ValueError(f"arrays.npz unpacks to more than {_MAX_ARRAYS_BYTES:,} bytes")
    fields = [field.name for field in dataclasses.fields(TokenSplit)]
    names = [name for name in _SPLITS if f"{name}_tokens" in arrays]
    if set(arrays) != {f"{name}_{field}" for name in names for field in fields}:
      raise ValueError("arrays.npz holds other arrays than those of its splits")
    splits = {name: TokenSplit(**{field: arrays[f"{name}_{field}"] for field in fields}) for name in names}
  data = TokenData(
    train=splits["train"],
    validation=splits.get("validation", splits["test"]),
    test=splits["test"],
    vocabulary=Vocabulary.load(entry / "vocab.json"),
  )
  if data.digest() != manifest["digest"]:
    raise ValueError("the content does not match the manifest")
  return data
