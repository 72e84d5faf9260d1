"""Small files are read up to a limit, written whole or not at all, and links are never followed."""

import gc
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from imdb_jax.store import files


def test_a_file_is_read_up_to_its_limit(tmp_path):
  path = tmp_path / "a.json"
  path.write_text('"é"', encoding="utf-8")
  assert files.read_bytes(path, 4) == b'"\xc3\xa9"'
  assert files.read_json(path, 4) == "é"
  for read in (files.read_bytes, files.read_json):
    with pytest.raises(ValueError, match=r"a\.json is larger than 3 bytes"):
      read(path, 3)


def test_a_json_file_may_have_a_mebibyte(tmp_path):
  path = tmp_path / "a.json"
  path.write_text("7".rjust(2**20))
  assert files.read_json(path) == 7
  path.write_text("7".rjust(2**20 + 1))
  with pytest.raises(ValueError, match="larger than 1,048,576 bytes"):
    files.read_json(path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 10**5, b'{"a": 1} 2'])
def test_malformed_json_is_a_value_error(content, tmp_path):
  (tmp_path / "a.json").write_bytes(content)
  with pytest.raises(ValueError):
    files.read_json(tmp_path / "a.json")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to(path.parent / "real")])
@pytest.mark.parametrize("read", [files.read_bytes, files.read_json, files.sha256])
def test_pipes_folders_and_links_are_not_read(make, read, tmp_path):
  """A pipe without a writer would block forever."""
  (tmp_path / "real").write_text("{}")
  make(tmp_path / "a.json")
  with pytest.raises(OSError):
    read(tmp_path / "a.json")


def test_a_missing_file_is_told_apart(tmp_path):
  with pytest.raises(FileNotFoundError):
    files.read_json(tmp_path / "a.json")


@pytest.mark.parametrize("old", [None, "old"])
def test_a_written_file_replaces_the_old_one(old, tmp_path):
  path = tmp_path / "a.json"
  if old:
    path.write_text(old)
  files.write_json(path, {"é": [1, 2.5, None]})
  assert files.read_json(path) == {"é": [1, 2.5, None]}
  assert path.read_bytes().endswith(b"\n")
  assert [each.name for each in tmp_path.iterdir()] == ["a.json"], "no unfinished file stays"


def test_lines_end_alike_on_every_system(tmp_path):
  files.write(tmp_path / "a", "one\r\ntwo\n")
  assert (tmp_path / "a").read_bytes() == b"one\r\ntwo\n"


def test_a_failed_write_leaves_the_old_content(tmp_path, monkeypatch):
  path = tmp_path / "a"
  files.write(path, "old")

  def fail(descriptor):
    raise OSError("No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
      files.write(path, "new")
  assert path.read_text() == "old"
  # What the failed attempt has left is no obstacle.
  files.write(path, "new")
  assert path.read_text() == "new"


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
  """Otherwise a power cut may leave an empty file under the final name."""
  path, synced, fsync = tmp_path / "a", [], os.fsync

  def record(descriptor):
    synced.append((os.fstat(descriptor).st_ino, path.exists()))
    fsync(descriptor)

  monkeypatch.setattr(os, "fsync", record)
  files.write(path, "new")
  assert synced == [(path.stat().st_ino, False), (tmp_path.stat().st_ino, True)]


@pytest.mark.parametrize("name", ["a", "a.new"])
def test_nothing_is_written_through_links(name, tmp_path):
  outside = tmp_path / "outside"
  outside.write_text("precious")
  (tmp_path / name).symlink_to(outside)
  files.write(tmp_path / "a", "new")
  assert outside.read_text() == "precious"
  assert (tmp_path / "a").read_text() == "new"
  assert not (tmp_path / "a").is_symlink()


def test_a_link_that_appears_while_a_file_is_written_is_not_followed(tmp_path, monkeypatch):
  outside = tmp_path / "outside"
  outside.write_text("precious")
  remove = files.remove

  def remove_then_link(path):
    remove(path)
    path.symlink_to(outside)

  monkeypatch.setattr(files, "remove", remove_then_link)
  with pytest.raises(FileExistsError):
    files.write(tmp_path / "a", "new")
  assert outside.read_text() == "precious"


def test_removing_takes_files_folders_and_links_but_not_what_links_point_to(tmp_path):
  outside = tmp_path / "outside"
  outside.mkdir()
  (outside / "precious").touch()
  inside = tmp_path / "inside"
  (inside / "folder").mkdir(parents=True)
  (inside / "folder" / "link").symlink_to(outside)
  (inside / "file").touch()
  (inside / "link").symlink_to(outside)
  for name in ("folder", "file", "link", "missing"):
    files.remove(inside / name)
  assert list(inside.iterdir()) == []
  assert (outside / "precious").exists()


def test_walking_gives_the_sizes_of_all_files(tmp_path):
  (tmp_path / "b" / "empty").mkdir(parents=True)
  (tmp_path / "b" / "c").write_bytes(b"12")
  (tmp_path / "a").write_bytes(b"")
  (tmp_path / "é").write_bytes(b"1")
  assert files.walk(tmp_path) == {"a": 0, "b/c": 2, "é": 1}


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to(path.parent.parent)])
def test_walking_refuses_links_and_devices(make, tmp_path):
  (tmp_path / "b").mkdir()
  make(tmp_path / "b" / "odd")
  with pytest.raises(OSError, match="b/odd is a link or a device"):
    files.walk(tmp_path)
  (tmp_path / "link").symlink_to(tmp_path / "b")
  with pytest.raises(OSError, match="is not a folder"):
    files.walk(tmp_path / "link")


@pytest.fixture
def deep(tmp_path) -> Iterator[Path]:
  """A folder in a folder in a folder ..."""
  folder = tmp_path / "deep"
  for _ in range(1100):
    folder.mkdir()
    folder = folder / "d"
  yield tmp_path / "deep"
  # pytest would fail to remove it.
  subprocess.run(["rm", "-rf", tmp_path / "deep"], check=True)


def test_a_crowd_of_files_or_folders_is_refused(tmp_path, deep):
  (tmp_path / "wide").mkdir()
  for number in range(1001):
    (tmp_path / "wide" / str(number)).touch()
  for folder in (deep, tmp_path / "wide"):
    with pytest.raises(ValueError, match="holds more than 1,000 files"):
      files.walk(folder)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_folder_nested_too_deeply_to_be_removed_is_an_error_of_one_line(deep):
  with pytest.raises(OSError, match="deep is nested too deeply"):
    files.remove(deep)
  # Python leaves a folder open that it was reading.
  gc.collect()
