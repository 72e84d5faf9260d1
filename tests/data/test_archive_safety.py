"""read_archive: damaged and hostile archives end in one clear line, exhaust no memory and write nothing."""

import collections
import gzip
import lzma
import random
import tarfile
from pathlib import Path

import pytest
from data.archives import COUNTS, add, make_members, pack, read, refusal
from hypothesis import given, settings
from hypothesis import strategies as st

from imdb_jax import errors
from imdb_jax.data import archive


class TestDamage:
  @pytest.mark.parametrize("suffix", ["tar", "gz", "xz"])
  @pytest.mark.parametrize("part", [0.02, 0.3, 0.6, 0.9])
  def test_cut_short(self, tmp_path, suffix, part):
    path = pack(tmp_path / f"a.{suffix}")
    content = path.read_bytes()
    # The end of the tar itself is 10 KiB of padding, which may be missing.
    end = len(content.rstrip(b"\0")) if suffix == "tar" else len(content)
    path.write_bytes(content[: int(end * part)])
    refusal(path)

  def test_cut_within_a_member_that_is_not_read(self, good):
    content = good.read_bytes()
    good.write_bytes(content[: content.index(b"aclImdb/train/urls_unsup") + 520])
    with pytest.raises(errors.DataError, match="is cut short"):
      archive.read_archive(good, expected=COUNTS)

  @pytest.mark.parametrize("suffix", ["gz", "xz"])
  def test_cut_after_the_last_review(self, tmp_path, suffix):
    path = pack(tmp_path / f"a.{suffix}")
    path.write_bytes(path.read_bytes()[:-6])
    assert "damaged, incomplete" in refusal(path)

  def test_wrong_checksum(self, tmp_path):
    path = pack(tmp_path / "a.gz")
    content = bytearray(path.read_bytes())
    content[-8] ^= 1  # the stored CRC-32; every byte before it is right
    path.write_bytes(content)
    assert "damaged, incomplete" in refusal(path)

  def test_broken_header_is_not_the_end_of_the_archive(self, good):
    content = bytearray(good.read_bytes())
    # The first of the unlabelled reviews, which may all be absent.
    content[content.index(b"aclImdb/train/unsup/")] ^= 1
    good.write_bytes(content)
    assert "broken header" in refusal(good)


class TestHostile:
  """Each archive is complete, and has one more member that it should not have."""

  def hostile(self, tmp_path: Path, name: str, content: bytes = b"", **attributes) -> Path:
    path = pack(tmp_path / "hostile.tar")
    with tarfile.open(path, "a") as file:
      add(file, name, content, **attributes)
    return path

  @pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
  @pytest.mark.parametrize("name", ["aclImdb/train/pos/7_9.txt", "aclImdb/elsewhere"])
  def test_link_or_device(self, tmp_path, kind, name):
    path = self.hostile(tmp_path, name, type=kind, linkname="/etc/passwd")
    assert "is a link or a device" in refusal(path)

  def test_sparse_file(self, tmp_path):
    path = self.hostile(tmp_path, "aclImdb/train/pos/7_9.txt", type=tarfile.GNUTYPE_SPARSE)
    assert "is a sparse file" in refusal(path)

  @pytest.mark.parametrize("name", ["/etc/cron.d/job", "../outside", "aclImdb/../../outside", "aclImdb/.."])
  def test_unsafe_name(self, tmp_path, name):
    assert "unsafe name" in refusal(self.hostile(tmp_path, name, b"x"))

  def test_unsafe_name_stays_on_one_line(self, tmp_path):
    assert r"bad\nnews" in refusal(self.hostile(tmp_path, "../bad\nnews", b"x"))

  @pytest.mark.parametrize("prefix", ["", "./"])
  @pytest.mark.parametrize("name", ["aclImdb/train/pos/1_7.txt", "aclImdb/train/urls_pos.txt"])
  def test_duplicate(self, tmp_path, prefix, name):
    assert f"holds {name} twice" in refusal(self.hostile(tmp_path, prefix + name, b"x"))

  def test_oversized_review(self, tmp_path):
    path = self.hostile(tmp_path, "aclImdb/train/pos/7_9.txt", bytes(2**20 + 1))
    assert "aclImdb/train/pos/7_9.txt has 1,048,577 bytes" in refusal(path)

  def test_oversized_urls_file(self, good, monkeypatch):
    monkeypatch.setattr(archive, "MAX_URLS_BYTES", 50)
    assert "urls_" in refusal(good)

  def test_oversized_archive(self, tmp_path):
    # It claims 3 GiB and has none of them.
    header = tarfile.TarInfo("aclImdb/huge")
    header.size = 3 * 2**30
    (tmp_path / "a.tar").write_bytes(header.tobuf() + bytes(1024))
    assert "holds more than 536,870,912 bytes" in refusal(tmp_path / "a.tar")

  def test_decompression_bomb(self, tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MAX_ARCHIVE_BYTES", 2**22)
    members = make_members() | {"aclImdb/zeros": bytes(2**23)}
    assert "holds more than" in refusal(pack(tmp_path / "a.gz", members))

  def test_bomb_after_the_end_of_the_archive(self, good, monkeypatch):
    monkeypatch.setattr(archive, "MAX_ARCHIVE_BYTES", 2**20)
    with good.open("ab") as file:
      file.write(bytes(2**21))
    assert "holds more than" in refusal(good)

  def test_too_many_members(self, good, monkeypatch):
    monkeypatch.setattr(archive, "MAX_MEMBERS", 5)
    assert "more than 5 members" in refusal(good)

  @pytest.mark.parametrize("form", ["pax", "gnu"])
  def test_oversized_extended_header(self, tmp_path, form):
    path = tmp_path / "a.gz"
    huge = "x" * 2**21
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT if form == "pax" else tarfile.GNU_FORMAT) as file:
      add(file, "a" if form == "pax" else huge, pax_headers={"comment": huge} if form == "pax" else {})
    assert "has a header of 2,09" in refusal(path)

  def test_member_that_ends_before_it_starts(self, tmp_path):
    headers = [tarfile.TarInfo("aclImdb/a"), tarfile.TarInfo("aclImdb/b"), tarfile.TarInfo("aclImdb/loop")]
    headers[-1].size = -1024  # leads back to b
    (tmp_path / "a.tar").write_bytes(b"".join(header.tobuf(tarfile.GNU_FORMAT) for header in headers) + bytes(1024))
    # Newer versions of Python do not accept the number.
    assert any(word in refusal(tmp_path / "a.tar") for word in ("has a negative size", "broken header"))

  def test_endless_chain_of_extended_headers(self, tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MAX_ARCHIVE_BYTES", 2**20)
    header = tarfile.TarInfo("././@LongLink")
    header.type = tarfile.GNUTYPE_LONGNAME
    header.size = 512
    (tmp_path / "a.tar").write_bytes((header.tobuf(tarfile.GNU_FORMAT) + bytes(512)) * 5000)
    assert "holds more than" in refusal(tmp_path / "a.tar")


def test_random_damage_never_escapes_as_another_error(good, tmp_path):
  rng = random.Random(0)
  content = good.read_bytes()
  outcomes = collections.Counter()
  path = tmp_path / "a.tar"
  for _ in range(300):
    damaged = bytearray(content)
    for _ in range(rng.randint(1, 20)):
      damaged[rng.randrange(len(content))] = rng.randrange(256)
    path.write_bytes(damaged)
    try:
      read(path)
      outcomes["read"] += 1
    except errors.DataError:
      outcomes["refused"] += 1
  assert outcomes["refused"] > 100


HONEST = list(make_members().items())
NAMES = st.one_of(
  st.sampled_from([name for name, _ in HONEST]),
  st.sampled_from(
    ["../outside", "/outside", "aclImdb/../../outside", "aclImdb/train", "./aclImdb/train/pos/7_9.txt", ""]
  ),
  st.binary(max_size=300).map(lambda name: name.decode("utf-8", "surrogateescape")),
)
TYPES = st.sampled_from([tarfile.REGTYPE, tarfile.REGTYPE, tarfile.AREGTYPE, *b"1234567gLKxSM"])
SIZES = st.none() | st.sampled_from([-1, 1, 511, 2**20, 2**20 + 1, 2**31, 2**40]) | st.integers(-(2**63), 2**63)


def header(name: str, kind: bytes | int, size: int) -> bytes:
  info = tarfile.TarInfo(name)
  info.type, info.size, info.linkname = bytes([kind]) if isinstance(kind, int) else kind, size, "/etc/passwd"
  return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def test_any_tar_gives_reviews_or_one_clear_line_and_writes_nothing(tmp_path, monkeypatch):
  outcomes = collections.Counter()
  path = tmp_path / "inner" / "a.tar"
  path.parent.mkdir()
  monkeypatch.chdir(path.parent)

  @settings(max_examples=200, deadline=None)
  @given(
    # Without either in many cases, so that enough archives can be read.
    extra=st.just([]) | st.lists(st.tuples(NAMES, TYPES, SIZES, st.binary(max_size=600)), max_size=3),
    missing=st.none() | st.sampled_from(range(len(HONEST))),
    compress=st.sampled_from([bytes, gzip.compress, lzma.compress]),
    data=st.data(),
  )
  def check(extra, missing, compress, data):
    members = [(name, tarfile.REGTYPE, None, content) for i, (name, content) in enumerate(HONEST) if i != missing]
    for member in extra:
      members.insert(data.draw(st.integers(0, len(members))), member)
    tar = b"".join(
      header(name, kind, len(content) if size is None else size) + content + bytes(-len(content) % 512)
      for name, kind, size, content in members
    )
    path.write_bytes(compress(tar + bytes(1024)))
    try:
      assert [len(split) for split in read(path).values()] in ([6, 6, 4], [6, 6, 0])
      outcomes["read"] += 1
    except errors.DataError as error:
      assert len(str(error).splitlines()) == 1
      outcomes["refused"] += 1
    assert list(tmp_path.rglob("*")) == [path.parent, path]

  check()
  assert min(outcomes["read"], outcomes["refused"]) > 10
