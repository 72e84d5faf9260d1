"""read_archive: one result from every form of the archive, one clear line for everything that is none."""

import collections
import gzip
import io
import lzma
import os
import pathlib
import random
import re
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imdb_jax import errors
from imdb_jax.data import archive, reviews

EXPECTED = {"train/neg": 2, "train/pos": 2, "train/unsup": 3, "test/neg": 2, "test/pos": 2}


def make_members() -> dict[str, bytes]:
  """Name and content of each file of a tiny archive; the unlabelled reviews come last."""
  members = {"aclImdb/README": b"about", "aclImdb/imdb.vocab": b"the\nand\n"}
  for kind, count in sorted(EXPECTED.items(), key=lambda item: item[0] == "train/unsup"):
    split, side = kind.split("/")
    rating = {"neg": 2, "pos": 9, "unsup": 0}[side]
    for number in range(count):
      members[f"aclImdb/{kind}/{number}_{rating}.txt"] = f"{kind} review {number}, as dull as ditchwater.".encode()
    films = range(len(kind) * 100, len(kind) * 100 + count)
    members[f"aclImdb/{split}/urls_{side}.txt"] = b"".join(
      b"http://www.imdb.com/title/tt%07d/usercomments\n" % film for film in films
    )
  return members


def pack(path: pathlib.Path, members: dict[str, bytes], prefix: str = "") -> pathlib.Path:
  """Writes a tar, compressed as its name says."""
  suffix = path.suffix.removeprefix(".")
  with tarfile.open(path, "w:" if suffix == "tar" else f"w:{suffix}") as file:  # pyright: ignore[reportCallIssue, reportArgumentType]
    for name, content in members.items():
      add(file, prefix + name, content)
  return path


def add(file: tarfile.TarFile, name: str, content: bytes = b"", **attributes) -> None:
  info = tarfile.TarInfo(name)
  info.size = len(content)
  for attribute, value in attributes.items():
    setattr(info, attribute, value)
  file.addfile(info, io.BytesIO(content))


def unpack(path: pathlib.Path, members: dict[str, bytes]) -> pathlib.Path:
  for name, content in members.items():
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    (path / name).write_bytes(content)
  return path


def read(path: pathlib.Path) -> dict[str, reviews.Reviews]:
  return archive.read_archive(path, expected=EXPECTED)


def refusal(path: pathlib.Path) -> str:
  """The one line with which the archive at `path` is refused."""
  with pytest.raises(errors.DataError) as caught:
    read(path)
  message = str(caught.value)
  assert "\n" not in message
  assert str(path) in message
  return message


def assert_same(left: dict[str, reviews.Reviews], right: dict[str, reviews.Reviews]) -> None:
  assert left.keys() == right.keys()
  for split in left:
    assert left[split].texts == right[split].texts
    np.testing.assert_array_equal(left[split].labels, right[split].labels)
    np.testing.assert_array_equal(left[split].films, right[split].films)


@pytest.fixture
def good(tmp_path) -> pathlib.Path:
  return pack(tmp_path / "good.tar", make_members())


class TestForms:
  def test_texts_labels_and_films(self, good):
    splits = read(good)
    assert list(splits) == ["train", "test", "unsupervised"]
    train = splits["train"]
    by_text = dict(zip(train.texts, zip(train.labels.tolist(), train.films.tolist(), strict=True), strict=True))
    assert by_text == {
      "train/neg review 0, as dull as ditchwater.": (0, 900),
      "train/neg review 1, as dull as ditchwater.": (0, 901),
      "train/pos review 0, as dull as ditchwater.": (1, 900),
      "train/pos review 1, as dull as ditchwater.": (1, 901),
    }
    assert splits["unsupervised"].labels.tolist() == [-1] * 3
    assert sorted(splits["test"].films) == [800, 800, 801, 801]

  @pytest.mark.parametrize("name", ["a.tar", "a.gz", "a.xz"])
  @pytest.mark.parametrize("prefix", ["", "./"])
  def test_repacks_in_another_order_read_the_same(self, tmp_path, good, name, prefix):
    members = list(make_members().items())
    random.Random(len(name + prefix)).shuffle(members)
    assert_same(read(pack(tmp_path / name, dict(members), prefix)), read(good))

  def test_type_is_told_by_content_not_by_name(self, tmp_path, good):
    renamed = pack(tmp_path / "a.xz", make_members()).rename(tmp_path / "a.tar.gz")
    assert_same(read(renamed), read(good))

  @pytest.mark.parametrize("inner", [".", "aclImdb"])
  def test_folder_reads_the_same(self, tmp_path, good, inner):
    assert_same(read(unpack(tmp_path / "folder", make_members()) / inner), read(good))

  def test_unlabelled_reviews_may_be_absent(self, tmp_path):
    members = {name: content for name, content in make_members().items() if "unsup" not in name}
    for path in (pack(tmp_path / "a.gz", members), unpack(tmp_path / "folder", members)):
      splits = read(path)
      assert [len(split) for split in splits.values()] == [4, 4, 0]

  def test_films_are_none_where_a_urls_file_is_missing(self, tmp_path):
    members = make_members()
    del members["aclImdb/train/urls_neg.txt"]
    splits = read(pack(tmp_path / "a.tar", members))
    assert splits["train"].films is None
    assert splits["test"].films is not None

  def test_text_is_stripped_and_bad_utf8_replaced(self, tmp_path):
    members = make_members()
    members["aclImdb/train/pos/0_9.txt"] = b"\n caf\xc3\xa9 \xff \t"
    assert "caf\u00e9 \ufffd" in read(pack(tmp_path / "a.tar", members))["train"].texts

  def test_other_names_are_ignored(self, tmp_path, good):
    members = make_members() | {
      "aclImdb/train/pos/0_9.txt.orig": b"x",
      "aclImdb/train/pos/deep/0_9.txt": b"x",
      "other/aclImdb/train/pos/0_9.txt": b"x",
      "aclImdb/train/labeledBow.feat": b"x" * 2**21,
    }
    assert_same(read(pack(tmp_path / "a.tar", members)), read(good))
    assert_same(read(unpack(tmp_path / "folder", members)), read(good))


class TestWrongContent:
  def test_count_is_named(self, tmp_path):
    members = make_members()
    del members["aclImdb/train/pos/0_9.txt"]
    for path in (pack(tmp_path / "a.tar", members), unpack(tmp_path / "folder", members)):
      assert "train/pos has 1 reviews, expected 2" in refusal(path)

  def test_large_counts_are_grouped(self, good):
    with pytest.raises(errors.DataError, match=r"test/neg has 2 reviews, expected 12,500"):
      archive.read_archive(good)

  def test_some_unlabelled_reviews_are_not_enough(self, tmp_path):
    members = make_members()
    del members["aclImdb/train/unsup/0_0.txt"]
    assert "train/unsup has 2 reviews, expected 3" in refusal(pack(tmp_path / "a.tar", members))

  def test_unexpected_kind(self, tmp_path):
    members = make_members() | {"aclImdb/test/unsup/0_0.txt": b"x"}
    assert "test/unsup has 1 reviews, expected 0" in refusal(pack(tmp_path / "a.tar", members))

  @pytest.mark.parametrize("urls", [b"http://www.imdb.com/title/tt0000001/usercomments\n", b"nothing\nhere\n"])
  def test_urls_file_that_names_no_film(self, tmp_path, urls):
    members = make_members() | {"aclImdb/test/urls_pos.txt": urls}
    assert "the urls file of test/pos names no film" in refusal(pack(tmp_path / "a.tar", members))


class TestMissing:
  def test_absent_archive_says_where_to_get_it(self, tmp_path):
    message = refusal(tmp_path / "absent.tar.gz")
    for part in (archive.OFFICIAL_URL, archive.OFFICIAL_SHA256, "84,125,825 bytes", "--archive", ".tar.xz"):
      assert part in message

  def test_folder_without_the_archive(self, tmp_path):
    assert "without aclImdb" in refusal(tmp_path)

  @pytest.mark.parametrize("content", [b"", b"some text", b"PK\x03\x04" + bytes(600), b"x" * 5000])
  def test_not_an_archive(self, tmp_path, content):
    path = tmp_path / "a.tar.gz"
    path.write_bytes(content)
    assert "is not a .tar.gz, .tar.xz or .tar archive" in refusal(path)

  def test_pipe_is_refused_without_waiting_for_it(self, tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    assert "neither a file nor a folder" in refusal(tmp_path / "a.tar")

  def test_unreadable(self, good, monkeypatch):
    def deny(self, *args):
      raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(pathlib.Path, "open", deny)
    assert "cannot be read: Permission denied" in refusal(good)


class TestDamage:
  @pytest.mark.parametrize("suffix", ["tar", "gz", "xz"])
  @pytest.mark.parametrize("part", [0.02, 0.3, 0.6, 0.9])
  def test_cut_short(self, tmp_path, suffix, part):
    path = pack(tmp_path / f"a.{suffix}", make_members())
    content = path.read_bytes()
    # The tar's own end is padding of 10 KiB, which nobody misses.
    end = len(content.rstrip(b"\0")) if suffix == "tar" else len(content)
    path.write_bytes(content[: int(end * part)])
    refusal(path)

  @pytest.mark.parametrize("suffix", ["gz", "xz"])
  def test_cut_behind_the_last_review(self, tmp_path, suffix):
    path = pack(tmp_path / f"a.{suffix}", make_members())
    path.write_bytes(path.read_bytes()[:-6])
    assert "damaged or incomplete" in refusal(path)

  def test_wrong_checksum(self, tmp_path):
    path = pack(tmp_path / "a.gz", make_members())
    content = bytearray(path.read_bytes())
    content[-8] ^= 1  # the stored CRC-32: every byte before it is right
    path.write_bytes(content)
    assert "damaged or incomplete" in refusal(path)

  def test_broken_header_is_no_end_of_archive(self, good):
    content = bytearray(good.read_bytes())
    # The first of the unlabelled reviews, which may be absent altogether.
    content[content.index(b"aclImdb/train/unsup/")] ^= 1
    good.write_bytes(content)
    assert "broken header" in refusal(good)


class TestHostile:
  """Each archive is complete, and holds one thing more that it should not."""

  def hostile(self, tmp_path: pathlib.Path, name: str, content: bytes = b"", **attributes) -> pathlib.Path:
    path = pack(tmp_path / "hostile.tar", make_members())
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
  @pytest.mark.parametrize("name", ["aclImdb/train/pos/1_9.txt", "aclImdb/train/urls_pos.txt"])
  def test_duplicate(self, tmp_path, prefix, name):
    assert f"holds {name} twice" in refusal(self.hostile(tmp_path, prefix + name, b"x"))

  def test_oversized_review(self, tmp_path):
    path = self.hostile(tmp_path, "aclImdb/train/pos/7_9.txt", bytes(2**20 + 1))
    assert "aclImdb/train/pos/7_9.txt has 1,048,577 bytes" in refusal(path)

  def test_oversized_urls_file(self, tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MAX_URLS_BYTES", 50)
    assert "urls_" in refusal(pack(tmp_path / "a.tar", make_members()))

  def test_oversized_archive(self, tmp_path):
    # Claims 3 GiB and holds none of them.
    header = tarfile.TarInfo("aclImdb/huge")
    header.size = 3 * 2**30
    (tmp_path / "a.tar").write_bytes(header.tobuf() + bytes(1024))
    assert "unpacks to more than 2,147,483,648 bytes" in refusal(tmp_path / "a.tar")

  def test_decompression_bomb(self, tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MAX_ARCHIVE_BYTES", 2**22)
    members = make_members() | {"aclImdb/zeros": bytes(2**23)}
    assert "unpacks to more than" in refusal(pack(tmp_path / "a.gz", members))

  def test_bomb_behind_the_end_of_the_archive(self, tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MAX_ARCHIVE_BYTES", 2**20)
    path = pack(tmp_path / "a.tar", make_members())
    with path.open("ab") as file:
      file.write(bytes(2**21))
    assert "unpacks to more than" in refusal(path)

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
    # Newer versions of tarfile notice it themselves.
    assert re.search("overlaps|invalid|negative|broken header", refusal(tmp_path / "a.tar"))

  def test_endless_chain_of_extended_headers(self, tmp_path):
    header = tarfile.TarInfo("././@LongLink")
    header.type = tarfile.GNUTYPE_LONGNAME
    header.size = 512
    (tmp_path / "a.tar").write_bytes((header.tobuf(tarfile.GNU_FORMAT) + bytes(512)) * 5000)
    refusal(tmp_path / "a.tar")

  def test_random_damage_never_escapes_as_another_error(self, tmp_path):
    """Anything but a DataError, or the reviews, fails this test."""
    rng = random.Random(0)
    content = pack(tmp_path / "good.tar", make_members()).read_bytes()
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
    # Nothing of either in a good part of the cases, so that enough of them can be read.
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
      assert [len(split) for split in read(path).values()] in ([4, 4, 3], [4, 4, 0])
      outcomes["read"] += 1
    except errors.DataError as error:
      assert len(str(error).splitlines()) == 1
      outcomes["refused"] += 1
    assert list(tmp_path.rglob("*")) == [path.parent, path]

  check()
  assert min(outcomes["read"], outcomes["refused"]) > 10


class TestHostileFolder:
  @pytest.fixture
  def folder(self, tmp_path) -> pathlib.Path:
    return unpack(tmp_path / "folder", make_members())

  def test_linked_review(self, folder, tmp_path):
    review = folder / "aclImdb/train/pos/0_9.txt"
    review.rename(tmp_path / "secret")
    review.symlink_to(tmp_path / "secret")
    assert "is a link" in refusal(folder)

  @pytest.mark.parametrize("name", ["aclImdb", "aclImdb/test", "aclImdb/test/neg"])
  def test_linked_directory(self, folder, tmp_path, name):
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(errors.DataError, match="is a link"):
      read(folder)

  def test_the_named_folder_itself_may_be_a_link(self, folder, tmp_path):
    (tmp_path / "link").symlink_to(folder / "aclImdb")
    assert_same(read(tmp_path / "link"), read(folder))

  def test_pipe_in_place_of_a_review(self, folder):
    (folder / "aclImdb/train/pos/0_9.txt").unlink()
    os.mkfifo(folder / "aclImdb/train/pos/0_9.txt")
    assert "is not a regular file" in refusal(folder)

  def test_oversized_review(self, folder):
    (folder / "aclImdb/train/pos/0_9.txt").write_bytes(bytes(2**20 + 1))
    assert "has 1,048,577 bytes" in refusal(folder)

  @pytest.mark.parametrize(("limit", "value"), [("MAX_MEMBERS", 5), ("MAX_ARCHIVE_BYTES", 100)])
  def test_too_much(self, folder, monkeypatch, limit, value):
    monkeypatch.setattr(archive, limit, value)
    assert "reviews or" in refusal(folder)


class TestFingerprint:
  def test_of_an_archive_is_its_sha256(self, tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert archive.fingerprint(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"

  def test_of_a_folder_follows_its_reviews(self, tmp_path):
    folder = unpack(tmp_path / "folder", make_members())
    review = folder / "aclImdb/train/pos/0_9.txt"
    before = archive.fingerprint(folder)
    assert archive.fingerprint(folder / "aclImdb") == before

    (folder / "aclImdb/notes.txt").write_bytes(b"not part of it")
    assert archive.fingerprint(folder) == before

    os.utime(review, ns=(1, 1))
    touched = archive.fingerprint(folder)
    review.write_bytes(review.read_bytes() + b"!")
    os.utime(review, ns=(1, 1))
    grown = archive.fingerprint(folder)
    review.rename(review.with_name("9_9.txt"))
    assert len({before, touched, grown, archive.fingerprint(folder)}) == 4

  def test_of_nothing(self, tmp_path):
    with pytest.raises(errors.DataError, match="no archive at"):
      archive.fingerprint(tmp_path / "absent")


@pytest.mark.skipif("IMDB_ARCHIVE" not in os.environ, reason="IMDB_ARCHIVE names no archive")
def test_official_archive():
  splits = archive.read_archive(pathlib.Path(os.environ["IMDB_ARCHIVE"]))
  assert [len(split) for split in splits.values()] in ([25_000, 25_000, 50_000], [25_000, 25_000, 0])
  for split in ("train", "test"):
    assert np.bincount(splits[split].labels).tolist() == [12_500, 12_500]
    # At most 30 reviews of a film on each side: the authors' rule.
    films = splits[split].films
    assert films is not None
    for label in (reviews.NEGATIVE, reviews.POSITIVE):
      _, counts = np.unique(films[splits[split].labels == label], return_counts=True)
      assert counts.max() == 30
  # Train and test share no films: the authors' rule again, which they broke once.
  assert len(np.intersect1d(splits["train"].films, splits["test"].films)) == 1
  digests = {split: reviews.content_digest(splits[split]) for split in ("train", "test")}
  assert digests == {
    "train": "cdf7738840818ea7578deb141a8af6e056feedbf11dcb9a46c064ec6934666e1",
    "test": "d655bb2abbbafcdcff3d4edc6d2cb215119c504d9a3dce4ba9d7352b610d3839",
  }
