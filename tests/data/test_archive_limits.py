"""Reading an archive takes little time and memory, whatever the archive holds."""

import gzip
import lzma
import os
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable

import pytest
from data.archives import make_members, pack, refusal

from imdb_jax import errors
from imdb_jax.data import archive

# Reads an archive as the commands do.
READ = """
import sys
from pathlib import Path
from imdb_jax.data import archive
from imdb_jax.errors import DataError

try:
  archive.read_archive(Path(sys.argv[1]))
except DataError as error:
  print(error)
# Unlike the resource usage, which includes that of the parent before this program was started.
print(*(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")))
"""


def header(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0) -> bytes:
  info = tarfile.TarInfo(name)
  info.type, info.size = kind, size
  return info.tobuf(tarfile.GNU_FORMAT)


def extended(kind: bytes, content: bytes) -> bytes:
  """Return an extended header, and the member that it describes."""
  return header("extended", kind, len(content)) + content + bytes(-len(content) % 512) + header("aclImdb/a")


def extended_headers() -> bytes:
  """Return 2,000 members with PAX values of 1 MB and one emoji, which a string of Python stores in 4 MB."""
  value = b"1048576 comment=" + "\U0001f3ac".encode()
  return gzip.compress(extended(b"x", value.ljust(2**20 - 1, b"x") + b"\n")) * 2000


def demanding(packed: bytes) -> bytes:
  """Return a file of .xz that demands a dictionary of 4 GB, in a byte of the block's header, before its checksum."""
  block = packed[12:16] + b"\x28" + packed[17:20]
  return packed[:12] + block + zlib.crc32(block).to_bytes(4, "little") + packed[24:]


ATTACKS: dict[str, Callable[[], bytes]] = {
  "2 GB of extended headers": extended_headers,
  "a length of 4,000 digits": lambda: extended(b"x", b"1" + b"0" * 4000 + b" path=x\n"),
  "a length of a million digits": lambda: extended(b"x", b"9" * 10**6 + b" path=x\n"),
  "a global header of 1 GB": lambda: lzma.compress(header("extended", b"g", 2**30)),
  "a decoder of 4 GB": lambda: demanding(lzma.compress(bytes(10_000))),
}


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_costs_seconds_and_little_memory_and_gives_one_line(tmp_path, attack):
  path = tmp_path / "archive"
  path.write_bytes(ATTACKS[attack]())
  start = time.monotonic()
  done = subprocess.run([sys.executable, "-c", READ, str(path)], capture_output=True, text=True, check=True)
  # It takes two seconds at most. The limit is for busy machines.
  assert time.monotonic() - start < 20
  line, memory = done.stdout.splitlines()
  assert line.startswith(str(path))
  # The interpreter and NumPy take 30,000 kB.
  assert int(memory.split()[1]) < 150_000
  assert not done.stderr


class TestLimits:
  """Each limit refuses a small archive once it is small itself."""

  @pytest.mark.parametrize(
    ("limit", "value", "reason"),
    [
      ("MAX_PACKED_BYTES", 100, "packed bytes, at most 100 are allowed"),
      ("MAX_REVIEWS_BYTES", 100, "reviews have more than 100 bytes"),
      ("MAX_ARCHIVE_BYTES", 2000, "holds more than 2,000 bytes"),
      ("MAX_MEMBERS", 5, "more than 5 members"),
    ],
  )
  def test_too_much(self, tmp_path, monkeypatch, limit, value, reason):
    monkeypatch.setattr(archive, limit, value)
    assert reason in refusal(pack(tmp_path / "a.xz"))

  @pytest.mark.parametrize("kind", [tarfile.DIRTYPE, b"x", b"L"])
  def test_too_many_members_that_are_no_files(self, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(archive, "MAX_MEMBERS", 50)
    path = tmp_path / "a.tar"
    path.write_bytes(header("aclImdb/a", kind) * 100 + bytes(1024))
    assert "more than 50 members" in refusal(path)

  def test_packed_streams_that_are_followed_by_something_else(self, tmp_path):
    path = pack(tmp_path / "a.gz")
    path.write_bytes(path.read_bytes() + bytes(8) + b"something else")
    assert "damaged" in refusal(path)

  def test_file_that_is_too_large_is_not_hashed(self, tmp_path):
    path = tmp_path / "a.tar"
    path.touch()
    os.truncate(path, 2**40)
    with pytest.raises(errors.DataError, match="holds more than 536,870,912 bytes"):
      archive.fingerprint(path)

  def test_film_is_not_searched_in_a_long_line(self, tmp_path):
    """Thousands of reviews may name the same line."""
    urls = (b"x" * 1000 + b"/title/tt0000001/\n") * 3
    path = pack(tmp_path / "a.tar", make_members() | {"aclImdb/train/urls_pos.txt": urls})
    assert "the urls file of train/pos names no film" in refusal(path)
