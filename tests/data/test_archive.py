"""read_archive: every form of the archive gives the same reviews, and a wrong one gives one clear line."""

import gzip
import lzma
import os
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
from data.archives import add, assert_same, make_members, pack, read, refusal

from imdb_jax import errors
from imdb_jax.data import archive, imdb, reviews
from imdb_jax.store import files


class TestForms:
  def test_texts_labels_and_films(self, good):
    splits = read(good)
    assert list(splits) == ["train", "test", "unsupervised"]
    train = splits["train"]
    assert train.groups is not None
    found = sorted(zip(train.texts, train.labels.tolist(), train.groups.tolist(), strict=True))
    # Line n of a urls file is the film of review n. Reviews 0 and 2 have the same text.
    numbers, texts = (0, 2, 1), "train/{} review {}: café, “fine” <br />"
    urls = {side: make_members()[f"aclImdb/train/urls_{side}.txt"].splitlines() for side in ("neg", "pos")}
    films = {side: [int(line.split(b"/")[4].removeprefix(b"tt")) for line in urls[side]] for side in urls}
    expected = [(texts.format(side, n % 2), side == "pos", films[side][n]) for side in urls for n in numbers]
    assert found == sorted(expected)
    assert splits["unsupervised"].labels.tolist() == [-1] * 4
    assert len(set(films["neg"] + films["pos"])) == 6

  @pytest.mark.parametrize("name", ["a.tar", "a.gz", "a.xz"])
  @pytest.mark.parametrize("prefix", ["", "./"])
  def test_repacks_in_another_order_read_the_same(self, tmp_path, good, name, prefix):
    members = list(make_members().items())
    random.Random(len(name + prefix)).shuffle(members)
    assert_same(read(pack(tmp_path / name, dict(members), prefix)), read(good))

  def test_directories(self, tmp_path, good):
    with tarfile.open(tmp_path / "a.tar", "w") as file:
      for name, size in {"./": 0, "aclImdb": 4096, "aclImdb/train/pos/7_7.txt": 0}.items():
        info = tarfile.TarInfo(name)
        info.type, info.size = tarfile.DIRTYPE, size
        file.addfile(info)
      for name, content in make_members().items():
        add(file, name, content)
    assert_same(read(tmp_path / "a.tar"), read(good))

  @pytest.mark.parametrize("mode", ["w", "w:gz"])
  def test_extended_headers(self, tmp_path, good, mode):
    """GNU tar and Python write them for times within a second and for names of users and files that are not ASCII."""
    path = tmp_path / "a.tar"
    settings = {"format": tarfile.PAX_FORMAT, "pax_headers": {"comment": "caf\u00e9"}}
    with tarfile.open(path, mode, **settings) as file:
      add(file, "aclImdb/\u00e9" + "long" * 50, b"x", mtime=1.5)
      for name, content in make_members().items():
        add(file, name, content, mtime=1.5, uname="Zo\u00eb")
    assert_same(read(path), read(good))

  @pytest.mark.parametrize(("compress", "padding"), [(gzip.compress, 0), (gzip.compress, 2**21), (lzma.compress, 0)])
  def test_several_packed_streams(self, tmp_path, good, compress, padding):
    """As bgzip, pixz and cat write them; zeros may follow a stream of gzip."""
    content, path = good.read_bytes(), tmp_path / "a"
    pieces = content[:5000], content[5000:5001], b"", content[5001:]
    path.write_bytes(b"".join(compress(piece) + bytes(padding) for piece in pieces))
    assert_same(read(path), read(good))

  def test_content_tells_the_type_not_the_name(self, tmp_path, good):
    renamed = pack(tmp_path / "a.xz").rename(tmp_path / "a.tar.gz")
    assert_same(read(renamed), read(good))

  def test_link_to_an_archive(self, tmp_path, good):
    (tmp_path / "link.tar").symlink_to(good)
    assert_same(read(tmp_path / "link.tar"), read(good))
    assert archive.fingerprint(tmp_path / "link.tar") == archive.fingerprint(good)

  def test_only_the_requested_splits_are_read(self, good):
    assert_same(read(good, ("test",)), {"test": read(good)["test"]})

  def test_unlabelled_reviews_may_be_absent(self, tmp_path):
    members = {name: content for name, content in make_members().items() if "unsup" not in name}
    assert [len(split) for split in read(pack(tmp_path / "a.gz", members)).values()] == [6, 6, 0]

  def test_groups_are_none_without_a_urls_file(self, tmp_path):
    members = make_members()
    del members["aclImdb/train/urls_neg.txt"]
    splits = read(pack(tmp_path / "a.tar", members))
    assert splits["train"].groups is None
    assert splits["test"].groups is not None

  def test_text_is_stripped_and_bad_utf8_replaced(self, tmp_path):
    members = make_members() | {"aclImdb/train/pos/0_7.txt": b"\n caf\xc3\xa9 \xff \t"}
    assert "caf\u00e9 \ufffd" in read(pack(tmp_path / "a.tar", members))["train"].texts

  def test_other_names_are_ignored(self, tmp_path, good):
    members = make_members() | {
      "aclImdb/train/pos/0_7.txt.orig": b"x",
      "aclImdb/train/pos/deep/0_7.txt": b"x",
      "other/aclImdb/train/pos/0_7.txt": b"x",
      "aclImdb/train/labeledBow.feat": b"x" * 2**21,
      # Longer than a tar header holds.
      "aclImdb/train/pos/" + "long" * 30 + ".txt": b"x",
    }
    assert_same(read(pack(tmp_path / "a.tar", members)), read(good))


class TestWrongContent:
  def test_count_is_named(self, tmp_path):
    members = make_members()
    del members["aclImdb/train/pos/0_7.txt"]
    assert "train/pos has 2 reviews, expected 3" in refusal(pack(tmp_path / "a.tar", members))

  def test_large_counts_are_grouped(self, good):
    with pytest.raises(errors.DataError, match=r"test/neg has 3 reviews, expected 12,500"):
      archive.read_archive(good)

  @pytest.mark.parametrize("splits", [imdb.SPLITS, imdb.LABELLED_SPLITS])
  def test_some_unlabelled_reviews_are_not_enough(self, tmp_path, splits):
    members = make_members()
    del members["aclImdb/train/unsup/0_7.txt"]
    with pytest.raises(errors.DataError, match="train/unsup has 3 reviews, expected 4"):
      read(pack(tmp_path / "a.tar", members), splits)

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
    for part in (imdb.URL, imdb.SHA256, "84,125,825 bytes", "--archive", ".tar.xz"):
      assert part in message

  def test_unpacked_folder_says_how_to_pack_it(self, tmp_path):
    assert "tar cf aclImdb.tar aclImdb" in refusal(tmp_path)

  @pytest.mark.parametrize("content", [b"", b"some text", b"PK\x03\x04" + bytes(600), b"x" * 5000, bytes(10_240)])
  def test_not_an_archive(self, tmp_path, content):
    path = tmp_path / "a.tar.gz"
    path.write_bytes(content)
    assert "is not a .tar.gz, .tar.xz or .tar archive" in refusal(path)

  def test_pipe_is_refused_without_waiting_for_it(self, tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    assert "is not a regular file" in refusal(tmp_path / "a.tar")
    with pytest.raises(errors.DataError, match="is not a regular file"):
      archive.fingerprint(tmp_path / "a.tar")

  def test_unreadable(self, good, monkeypatch):
    def deny(path):
      raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(files, "open_regular", deny)
    assert "cannot be read: Permission denied" in refusal(good)


class TestFingerprint:
  def test_of_an_archive_is_its_sha256(self, tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert archive.fingerprint(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"

  def test_of_a_missing_archive(self, tmp_path):
    with pytest.raises(errors.DataError, match="no archive at"):
      archive.fingerprint(tmp_path / "absent")


@pytest.mark.skipif("IMDB_ARCHIVE" not in os.environ, reason="IMDB_ARCHIVE names no archive")
def test_official_archive():
  splits = archive.read_archive(Path(os.environ["IMDB_ARCHIVE"]))
  assert [len(split) for split in splits.values()] == [25_000, 25_000]
  films = []
  for split in splits.values():
    assert np.bincount(split.labels).tolist() == [12_500, 12_500]
    # The authors allowed at most 30 reviews of a film per label.
    assert split.groups is not None
    films.append(split.groups)
    for label in (reviews.NEGATIVE, reviews.POSITIVE):
      _, counts = np.unique(split.groups[split.labels == label], return_counts=True)
      assert counts.max() == 30
  # The authors also wanted train and test to share no films; they share one.
  assert len(np.intersect1d(*films)) == 1
  assert reviews.content(splits) == imdb.CONTENT
