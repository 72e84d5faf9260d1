"""The archive of the Large Movie Review Dataset, read as a stream: nothing is ever extracted."""

import collections
import contextlib
import gzip
import hashlib
import lzma
import os
import pathlib
import re
import stat
import tarfile
import types
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import BinaryIO, cast

from imdb_jax import errors
from imdb_jax.data import reviews

OFFICIAL_URL = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
OFFICIAL_SHA256 = "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe"
OFFICIAL_SIZE = 84_125_825  # bytes
OFFICIAL_COUNTS: Mapping[str, int] = types.MappingProxyType(
  {"train/neg": 12_500, "train/pos": 12_500, "train/unsup": 50_000, "test/neg": 12_500, "test/pos": 12_500}
)

MAX_REVIEW_BYTES = 2**20
MAX_URLS_BYTES = 2**24
MAX_HEADER_BYTES = 2**20
MAX_ARCHIVE_BYTES = 2**31
MAX_MEMBERS = 300_000

# Folder of the archive: the split that its reviews belong to, and their label.
KINDS: Mapping[str, tuple[str, int]] = types.MappingProxyType(
  {
    "train/neg": ("train", reviews.NEGATIVE),
    "train/pos": ("train", reviews.POSITIVE),
    "train/unsup": ("unsupervised", reviews.UNLABELLED),
    "test/neg": ("test", reviews.NEGATIVE),
    "test/pos": ("test", reviews.POSITIVE),
  }
)

_FOLDERS = ("train", "train/neg", "train/pos", "train/unsup", "test", "test/neg", "test/pos", "test/unsup")
_REVIEW = re.compile(r"aclImdb/((?:train|test)/(?:pos|neg|unsup))/([0-9]{1,9})_[0-9]+\.txt")
_URLS = re.compile(r"aclImdb/(train|test)/urls_(pos|neg|unsup)\.txt")
_FILM = re.compile(rb"/title/tt([0-9]{1,9})(?:/|$)")

# What the decompressors and tarfile raise on damaged or hostile bytes; the last three come from their parsers.
_DAMAGE = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, tarfile.TarError, ValueError, LookupError)


def read_archive(path: pathlib.Path, *, expected: Mapping[str, int] = OFFICIAL_COUNTS) -> dict[str, reviews.Reviews]:
  """Reads all reviews of an archive (.tar.gz, .tar.xz, .tar) or of its unpacked folder.

  Args:
    path: the archive, the folder `aclImdb`, or a folder that contains `aclImdb`.
    expected: how many reviews each of "train/neg", "train/pos", "train/unsup", "test/neg" and "test/pos" must
      hold. "train/unsup" may also be absent altogether.

  Returns:
    The splits "train", "test" and "unsupervised", in canonical order. `films` is None for a split whose
    urls files the archive lacks.

  Raises:
    DataError: the archive is missing, unreadable, damaged, unsafe or incomplete.
  """
  found: dict[str, list[tuple[int, str]]] = collections.defaultdict(list)
  urls: dict[str, Sequence[bytes]] = {}
  with _clear_errors(path):
    files = _folder_files(path) if _is_folder(path) else _archive_files(path)
    for name, content in files:
      if review := _REVIEW.fullmatch(name):
        # The stock tfds builder strips too, so both sources agree. No official review is changed by it.
        found[review[1]].append((int(review[2]), content.strip().decode("utf-8", "replace")))
      elif listing := _URLS.fullmatch(name):
        urls[f"{listing[1]}/{listing[2]}"] = content.splitlines()

  for kind in sorted({*expected, *found}):
    count, wanted = len(found[kind]), expected.get(kind, 0)
    if count != wanted and (kind != "train/unsup" or count):
      raise errors.DataError(f"{path}: {kind} has {count:,} reviews, expected {wanted:,}; {_REMEDY}")
  return {split: _collect(path, split, found, urls) for split in ("train", "test", "unsupervised")}


def fingerprint(path: pathlib.Path) -> str:
  """SHA-256 (hex) that changes with the content: of the bytes of an archive; of the names, sizes and times in a folder.

  Raises:
    DataError: the archive is missing or unreadable, or the folder is not one that `read_archive` accepts.
  """
  with _clear_errors(path):
    if not _is_folder(path):
      with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
    found = ((name, entry.stat(follow_symlinks=False)) for name, entry in _folder_entries(path))
    lines = sorted(f"{name} {status.st_size} {status.st_mtime_ns}\n" for name, status in found)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


_REMEDY = f"get the official archive from {OFFICIAL_URL} (sha256 {OFFICIAL_SHA256})"


@contextlib.contextmanager
def _clear_errors(path: pathlib.Path) -> Iterator[None]:
  """Turns whatever a missing, unreadable or damaged archive raises into a DataError of one line."""
  try:
    yield
  except FileNotFoundError as error:
    raise errors.DataError(
      f"no archive at {path}: download {OFFICIAL_URL} ({OFFICIAL_SIZE:,} bytes, sha256 {OFFICIAL_SHA256}) "
      "and name it with --archive, which takes .tar.gz, .tar.xz, .tar or the unpacked folder"
    ) from error
  except (*_DAMAGE, RecursionError) as error:
    reason = " ".join(str(error).split())
    raise errors.DataError(f"{path} is damaged or incomplete ({reason}); {_REMEDY}") from error
  except OSError as error:
    raise errors.DataError(f"{path} cannot be read: {error.strerror or error}; check the file or --archive") from error


def _is_folder(path: pathlib.Path) -> bool:
  mode = path.stat().st_mode
  if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
    raise errors.DataError(f"{path} is neither a file nor a folder; --archive takes .tar.gz, .tar.xz, .tar or a folder")
  return stat.S_ISDIR(mode)


def _is_wanted(name: str) -> bool:
  return bool(_REVIEW.fullmatch(name) or _URLS.fullmatch(name))


def _check_size(path: pathlib.Path, name: str, size: int) -> None:
  limit = MAX_REVIEW_BYTES if _REVIEW.fullmatch(name) else MAX_URLS_BYTES
  if not 0 <= size <= limit:
    raise errors.DataError(f"{path}: {name} has {size:,} bytes, at most {limit:,} are allowed; {_REMEDY}")


class _BoundedStream:
  """What tarfile reads from: forward only, and no read larger than an honest archive needs.

  tarfile loads extended headers whole, of the size that the archive claims, and skips members by any distance.
  """

  def __init__(self, stream: BinaryIO | gzip.GzipFile | lzma.LZMAFile, path: pathlib.Path):
    self._stream = stream
    self._path = path
    self.last_read = b""

  def tell(self) -> int:
    return self._stream.tell()

  def seek(self, position: int) -> int:
    if position < self.tell():
      raise tarfile.ReadError("a member overlaps the one before it")
    self._check_end(position)
    return self._stream.seek(position)

  def read(self, size: int) -> bytes:
    if not 0 <= size <= MAX_HEADER_BYTES:
      raise errors.DataError(
        f"{self._path} has a header of {size:,} bytes, at most {MAX_HEADER_BYTES:,} are allowed; {_REMEDY}"
      )
    self._check_end(self.tell() + size)
    self.last_read = self._stream.read(size)
    return self.last_read

  def _check_end(self, position: int) -> None:
    if position > MAX_ARCHIVE_BYTES:
      raise errors.DataError(f"{self._path} unpacks to more than {MAX_ARCHIVE_BYTES:,} bytes; {_REMEDY}")


@contextlib.contextmanager
def _open_stream(path: pathlib.Path) -> Iterator[_BoundedStream]:
  """The uncompressed tar; the compression is told by the first bytes, as names lie."""
  with contextlib.ExitStack() as stack:
    file = stack.enter_context(path.open("rb"))
    magic = file.read(6)
    file.seek(0)
    if magic.startswith(b"\x1f\x8b"):
      stream = stack.enter_context(gzip.GzipFile(fileobj=file))
    elif magic == b"\xfd7zXZ\x00":
      stream = stack.enter_context(lzma.LZMAFile(file))
    else:
      stream = file
    yield _BoundedStream(stream, path)


def _archive_files(path: pathlib.Path) -> Iterator[tuple[str, bytes]]:
  """Yields name and content of each review and urls file, in the archive's order."""
  seen = set()
  with _open_stream(path) as stream:
    try:
      archive = tarfile.open(fileobj=cast(BinaryIO, stream), mode="r:")  # noqa: SIM115 - closed by the `with` below
    except tarfile.ReadError as error:
      raise errors.DataError(f"{path} is not a .tar.gz, .tar.xz or .tar archive; {_REMEDY}") from error
    with archive:
      for count, member in enumerate(archive, 1):
        if count > MAX_MEMBERS:
          raise errors.DataError(f"{path} has more than {MAX_MEMBERS:,} members; {_REMEDY}")
        name = _checked_name(path, member)
        if not _is_wanted(name) or not member.isfile():
          continue
        if name in seen:
          raise errors.DataError(f"{path} holds {name} twice; {_REMEDY}")
        seen.add(name)
        _check_size(path, name, member.size)
        yield name, _read_member(stream, member)
    # tarfile takes a broken header for the end of the archive.
    if stream.last_read.strip(b"\0"):
      raise tarfile.ReadError("a broken header")
    # gzip and xz verify their checksums only at the end of the file, behind the end of the tar.
    while stream.read(MAX_HEADER_BYTES):
      pass


def _checked_name(path: pathlib.Path, member: tarfile.TarInfo) -> str:
  """The member's name without a leading "./"; refuses what has no place in the archive."""
  if member.name.startswith("/") or ".." in member.name.split("/"):
    raise errors.DataError(f"{path} holds the unsafe name {member.name!r}; {_REMEDY}")
  if not member.isfile() and not member.isdir():
    raise errors.DataError(f"{path}: {member.name!r} is a link or a device, not a file; {_REMEDY}")
  if member.issparse():
    raise errors.DataError(f"{path}: {member.name!r} is a sparse file; {_REMEDY}")
  return member.name.removeprefix("./")


def _read_member(stream: _BoundedStream, member: tarfile.TarInfo) -> bytes:
  stream.seek(member.offset_data)
  pieces, missing = [], member.size
  while missing:
    piece = stream.read(min(missing, MAX_HEADER_BYTES))
    if not piece:
      raise tarfile.ReadError(f"{member.name} is cut short")
    pieces.append(piece)
    missing -= len(piece)
  return b"".join(pieces)


def _folder_entries(path: pathlib.Path) -> Iterator[tuple[str, os.DirEntry[str]]]:
  """Yields the member name and the entry of each review and urls file, in no particular order."""
  inner = path / "aclImdb"
  root = inner if os.path.lexists(inner) else path
  if not (root / "train").is_dir() or not (root / "test").is_dir():
    raise errors.DataError(f"{path} is a folder without aclImdb in it; --archive takes aclImdb or the folder around it")
  if root.is_symlink() and root != path:
    raise errors.DataError(f"{root} is a link, not a folder; name its target with --archive")
  count, total = 0, 0
  for folder in _FOLDERS:
    directory = root / folder
    if directory.is_symlink():
      raise errors.DataError(f"{directory} is a link, not a folder; {_REMEDY}")
    if not directory.is_dir():
      continue
    with os.scandir(directory) as entries:
      for entry in entries:
        name = f"aclImdb/{folder}/{entry.name}"
        if entry.is_symlink():
          raise errors.DataError(f"{entry.path!r} is a link, not a file; {_REMEDY}")
        if not _is_wanted(name):
          continue
        if not entry.is_file(follow_symlinks=False):
          raise errors.DataError(f"{entry.path!r} is not a regular file; {_REMEDY}")
        size = entry.stat(follow_symlinks=False).st_size
        _check_size(path, name, size)
        count, total = count + 1, total + size
        if count > MAX_MEMBERS or total > MAX_ARCHIVE_BYTES:
          raise errors.DataError(
            f"{path} has over {MAX_MEMBERS:,} reviews or {MAX_ARCHIVE_BYTES:,} bytes of them; {_REMEDY}"
          )
        yield name, entry


def _folder_files(path: pathlib.Path) -> Iterator[tuple[str, bytes]]:
  for name, entry in _folder_entries(path):
    yield name, pathlib.Path(entry.path).read_bytes()


def _collect(
  path: pathlib.Path,
  split: str,
  found: Mapping[str, Sequence[tuple[int, str]]],
  urls: Mapping[str, Sequence[bytes]],
) -> reviews.Reviews:
  labels = {kind: label for kind, (owner, label) in KINDS.items() if owner == split}
  films = None
  if all(kind in urls for kind in labels):
    films = [_film(path, kind, urls[kind], number) for kind in labels for number, _ in found[kind]]
  return reviews.canonical(
    [text for kind in labels for _, text in found[kind]],
    [label for kind, label in labels.items() for _ in found[kind]],
    films,
  )


def _film(path: pathlib.Path, kind: str, lines: Sequence[bytes], number: int) -> int:
  """The film of review `number`: line `number`, counted from 0, is https://…/title/tt0123456/…"""
  match = _FILM.search(lines[number]) if number < len(lines) else None
  if match is None:
    raise errors.DataError(f"{path}: the urls file of {kind} names no film for review {number}; {_REMEDY}")
  return int(match[1])
