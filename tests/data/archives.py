"""Small archives for tests, and comparisons of what is read from them."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from imdb_jax.data import archive, imdb
from imdb_jax.data.reviews import Reviews
from imdb_jax.errors import DataError

COUNTS = {"train/neg": 3, "train/pos": 3, "train/unsup": 4, "test/neg": 3, "test/pos": 3}


def make_members(counts: dict[str, int] = COUNTS, *, word: str = "fine") -> dict[str, bytes]:
  """Return name and content of each file. Each review is of another film, but some have the same text."""
  members = {"aclImdb/README": b"about", "aclImdb/imdb.vocab": b"the\nand\n"}
  # The unlabelled reviews, which may be absent, come last.
  for kind in sorted(counts, key=lambda kind: kind == "train/unsup"):
    split, side = kind.split("/")
    films = [len(members) * 1000 + counts[kind] - number for number in range(counts[kind])]
    for number in range(counts[kind]):
      text = f"{kind} review {number % 2}: café, “{word}” <br />"
      members[f"aclImdb/{kind}/{number}_7.txt"] = text.encode()
    urls = b"".join(b"http://www.imdb.com/title/tt%07d/usercomments\n" % film for film in films)
    members[f"aclImdb/{split}/urls_{side}.txt"] = urls
  return members


def add(file: tarfile.TarFile, name: str, content: bytes = b"", **attributes) -> None:
  """Add a member to a tar; `attributes` are those of its TarInfo."""
  info = tarfile.TarInfo(name)
  info.size = len(content)
  for attribute, value in attributes.items():
    setattr(info, attribute, value)
  file.addfile(info, io.BytesIO(content))


def pack(path: Path, members: dict[str, bytes] | None = None, prefix: str = "") -> Path:
  """Write a tar, compressed as its name says: .tar, .gz or .xz."""
  compression = path.suffix.removeprefix(".").removeprefix("tar")
  with tarfile.open(path, f"w:{compression}") as file:  # pyright: ignore[reportCallIssue, reportArgumentType]
    for name, content in (make_members() if members is None else members).items():
      add(file, prefix + name, content)
  return path


def assert_same(left: dict[str, Reviews], right: dict[str, Reviews]) -> None:
  """Compare texts, labels and films of all splits, and their order."""
  assert list(left) == list(right)
  for name in left:
    assert left[name].texts == right[name].texts, name
    np.testing.assert_array_equal(left[name].labels, right[name].labels)
    np.testing.assert_array_equal(left[name].groups, right[name].groups)


def read(path: Path, splits=imdb.SPLITS) -> dict[str, Reviews]:
  return archive.read_archive(path, splits, expected=COUNTS)


def refusal(path: Path) -> str:
  """Return the line with which the archive at `path` is refused."""
  with pytest.raises(DataError) as caught:
    read(path)
  message = str(caught.value)
  assert "\n" not in message
  assert str(path) in message
  return message
