"""Reader of the Large Movie Review Dataset from its archive.

An archive is read as a stream and never extracted. It may be damaged or hostile, so names, types and sizes are checked
before any content is read, and everything that takes time or memory has a limit.
"""

import collections
import contextlib
import gzip
import io
import itertools
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Collection, Generator, Iterator, Mapping
from pathlib import Path

import numpy as np

from imdb_jax.data import imdb
from imdb_jax.data.reviews import Reviews, canonical
from imdb_jax.errors import DataError
from imdb_jax.store import files

MAX_REVIEW_BYTES = 2**20
MAX_URLS_BYTES = 2**22
MAX_HEADER_BYTES = 2**20
# The official archive has 84 MB, unpacks to 0.3 GB in 100,000 members, and holds 137 MB of reviews and urls files. PAX
# headers, which some programs add, double the members and take another 0.1 GB.
MAX_PACKED_BYTES = 2**27
MAX_ARCHIVE_BYTES = 2**29
MAX_REVIEWS_BYTES = 160 * 2**20
MAX_MEMBERS = 300_000

# A review, with its number and rating; or a urls file, which has the film of each review.
_MEMBER = re.compile(r"aclImdb/(train|test)/(?:(pos|neg|unsup)/([0-9]{1,9})_([0-9]{1,9})|urls_(pos|neg|unsup))\.txt")
_FILM = re.compile(rb"/title/tt([0-9]{1,9})(?:/|$)")
_BLOCK, _PIECE = 512, 2**20
# Types of extended headers: PAX, and long names of GNU. No name in this dataset is long enough to need one.
_EXTENDED = (b"x", b"g", b"X", b"L", b"K")
_REMEDY = f"get the official archive from {imdb.URL} (sha256 {imdb.SHA256})"
# What this module and the decompressors raise.
DAMAGE = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, ValueError)


def read_archive(
  path: Path, splits: Collection[str] = imdb.LABELLED_SPLITS, *, expected: Mapping[str, int] = imdb.COUNTS
) -> dict[str, Reviews]:
  """Read some of `imdb.SPLITS` from an archive (.tar.gz, .tar.xz, .tar), in canonical order; count all reviews.

  A group is a film; `groups` is None if the archive lacks the split's urls files. `expected` is the number of reviews
  of each kind.

  Raises:
    DataError: the archive is missing, unreadable, damaged, unsafe or incomplete.
  """
  counts: collections.Counter[str] = collections.Counter()
  found: dict[str, list[tuple[int, int, str]]] = collections.defaultdict(list)
  urls: dict[str, list[bytes]] = {}
  # Closed here: a generator that is abandoned on an error would keep its file open.
  with _clear_errors(path), contextlib.closing(_members(path)) as members:
    for member, content in members:
      kind, is_review = f"{member[1]}/{member[2] or member[5]}", member[2] is not None
      counts[kind] += is_review
      if imdb.KINDS.get(kind, ("",))[0] not in splits:
        continue
      if is_review:
        # The stock tfds builder strips texts too, so that both sources agree. It changes no official review.
        found[kind].append((int(member[3]), int(member[4]), content.strip().decode("utf-8", "replace")))
      else:
        urls[kind] = content.splitlines()
    imdb.check_counts(counts, expected)
    return {split: _reviews(split, found, urls) for split in splits}


def _reviews(split: str, found: Mapping[str, list[tuple[int, int, str]]], urls: Mapping[str, list[bytes]]) -> Reviews:
  kinds = [kind for kind in imdb.KINDS if imdb.KINDS[kind][0] == split]
  rows = [(kind, *review) for kind in kinds for review in found[kind]]
  films = None
  if all(kind in urls for kind in kinds):
    films = [_film(kind, urls[kind], number) for kind, number, _, _ in rows]
  labels, stars = [imdb.KINDS[kind][1] for kind, *_ in rows], np.array([stars for _, _, stars, _ in rows], np.int32)
  return canonical([text for *_, text in rows], labels, films, stars=stars)


def _film(kind: str, lines: list[bytes], number: int) -> int:
  """Return the film of review `number`: line `number` of the urls file, from 0, is https://…/title/tt0123456/…"""
  # A line may be long, and be that of many reviews.
  match = _FILM.search(lines[number], 0, 1000) if number < len(lines) else None
  if match is None:
    raise ValueError(f"the urls file of {kind} names no film for review {number}")
  return int(match[1])


def fingerprint(path: Path) -> str:
  """Return the SHA-256 of an archive, in hex; raise DataError if it is missing or unreadable."""
  with _clear_errors(path):
    path = Path(os.path.realpath(path))
    _check_size(path.stat().st_size)
    return files.sha256(path)


@contextlib.contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
  """Turn every error of a missing, unreadable or damaged archive into a DataError of one line."""
  try:
    yield
  except FileNotFoundError as error:
    raise DataError(
      f"no archive at {path}: download {imdb.URL} ({imdb.SIZE:,} bytes, sha256 {imdb.SHA256}); "
      "--archive takes .tar.gz, .tar.xz or .tar"
    ) from error
  except DAMAGE as error:
    reason = " ".join(str(error).split())
    raise DataError(f"{path} is damaged, incomplete or unsafe: {reason}; {_REMEDY}") from error
  except OSError as error:
    hint = "pack the folder: tar cf aclImdb.tar aclImdb" if path.is_dir() else "check the file"
    raise DataError(f"{path} cannot be read: {error.strerror or error}; {hint}") from error


def _members(path: Path) -> Generator[tuple[re.Match[str], bytes]]:
  """Yield each review and urls file, as a match of `_MEMBER` and its content."""
  seen, total = set(), 0
  with contextlib.closing(_tar_files(path)) as found:
    for name, size, content in found:
      if member := _MEMBER.fullmatch(name):
        limit = MAX_REVIEW_BYTES if member[3] else MAX_URLS_BYTES
        if size > limit:
          raise ValueError(f"{name} has {size:,} bytes, at most {limit:,} are allowed")
        if name in seen:
          raise ValueError(f"it holds {name} twice")
        seen.add(name)
        total += size
        if total > MAX_REVIEWS_BYTES:
          raise ValueError(f"its reviews have more than {MAX_REVIEWS_BYTES:,} bytes")
        yield member, content


def _check_size(size: int) -> None:
  if size > MAX_ARCHIVE_BYTES:
    raise ValueError(f"it holds more than {MAX_ARCHIVE_BYTES:,} bytes")


def _read(stream: io.BufferedIOBase, size: int, name: str) -> bytes:
  content = stream.read(size)
  if len(content) < size:
    raise ValueError(f"{name!r} is cut short")
  return content


def _tar_files(path: Path) -> Generator[tuple[str, int, bytes]]:
  """Yield name, size and content of each file of a tar in order; the content ends after `MAX_URLS_BYTES`.

  TarFile is not used: it loads extended headers of any size and takes a broken header for the end of the archive.
  """
  with opened(path) as stream:
    end = 0
    for count in itertools.count():
      header = stream.read(_BLOCK)
      if count and not header.strip(b"\0"):
        break
      try:
        member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
      except tarfile.HeaderError as error:
        if count:
          raise ValueError(f"a broken header: {error}") from error
        raise DataError(f"{path} is not a .tar.gz, .tar.xz or .tar archive; {_REMEDY}") from error
      if count >= MAX_MEMBERS:
        raise ValueError(f"it has more than {MAX_MEMBERS:,} members")
      _check_member(member)
      # The size of a directory is a hint; no content follows.
      size = 0 if member.isdir() else -(-member.size // _BLOCK) * _BLOCK
      end += _BLOCK + size
      _check_size(end)
      content = _read(stream, min(size, MAX_URLS_BYTES), member.name)
      if member.isreg():
        yield member.name.removeprefix("./"), member.size, content[: member.size]
      for skipped in range(len(content), size, _PIECE):
        _read(stream, min(size - skipped, _PIECE), member.name)
    # gzip and xz verify their checksums only at the end of the file, after the end of the tar.
    while stream.read(_PIECE):
      _check_size(stream.tell())


@contextlib.contextmanager
def opened(path: Path) -> Iterator[io.BufferedIOBase]:
  """Open a .gz, .xz or uncompressed file for reading what it contains; reading raises one of `DAMAGE`."""
  with files.open_regular(Path(os.path.realpath(path))) as file:
    # The first bytes tell the compression; the name may be wrong.
    magic = file.peek(6)
    if not magic.startswith((b"\x1f\x8b", b"\xfd7zXZ\0")):
      yield file
      return
    size = os.fstat(file.fileno()).st_size
    if size > MAX_PACKED_BYTES:
      raise ValueError(f"it has {size:,} packed bytes, at most {MAX_PACKED_BYTES:,} are allowed")
    with gzip.GzipFile(fileobj=file) if magic.startswith(b"\x1f") else lzma.LZMAFile(file) as stream:
      yield stream


def _check_member(member: tarfile.TarInfo) -> None:
  name, size = member.name, member.size
  if size < 0:
    raise ValueError(f"{name!r} has a negative size")
  if member.type in _EXTENDED:
    if size > MAX_HEADER_BYTES:
      raise ValueError(f"it has a header of {size:,} bytes, at most {MAX_HEADER_BYTES:,} are allowed")
  elif name.startswith("/") or ".." in name.split("/"):
    raise ValueError(f"it holds the unsafe name {name!r}")
  elif member.type == tarfile.GNUTYPE_SPARSE:
    raise ValueError(f"{name!r} is a sparse file")
  elif not member.isreg() and not member.isdir():
    raise ValueError(f"{name!r} is a link or a device, not a file")
