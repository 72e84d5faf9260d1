"""Every difference between a folder and its manifest is detected and named."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imdb_jax.store import files


@pytest.fixture
def folder(tmp_path):
  path = tmp_path / "folder"
  (path / "inner").mkdir(parents=True)
  (path / "a").write_bytes(bytes(range(200)))
  (path / "inner" / "b").write_bytes(b"b" * 100)
  (path / "empty").write_bytes(b"")
  (tmp_path / "manifests").mkdir()
  files.write_manifest(path, tmp_path / "manifests" / "1.json", {"answer": 42})
  return path


def check(folder) -> dict:
  return files.check_manifest(folder, folder.parent / "manifests" / "1.json")


def problem(folder) -> str:
  with pytest.raises((OSError, ValueError)) as caught:
    check(folder)
  return str(caught.value)


def test_an_unchanged_folder_gives_the_facts(folder):
  assert check(folder) == {"answer": 42}
  assert [path.name for path in (folder.parent / "manifests").iterdir()] == ["1.json"], "no unfinished file stays"


@pytest.mark.parametrize("position", [0, 99, 199])
@pytest.mark.parametrize("bit", [0, 7])
def test_a_flipped_bit_is_detected(folder, position, bit):
  changed = bytearray((folder / "a").read_bytes())
  changed[position] ^= 1 << bit
  (folder / "a").write_bytes(changed)
  assert problem(folder) == "a has changed: its size or SHA-256 differs"


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (lambda folder: os.truncate(folder / "a", 199), "a has changed: its size"),
    (lambda folder: (folder / "inner" / "b").unlink(), "inner/b is missing"),
    (lambda folder: (folder / "c").write_bytes(b""), "c is not listed in the manifest"),
    (lambda folder: (folder / "a").rename(folder / "d"), "a is missing"),
    (lambda folder: (folder.parent / "manifests" / "1.json").unlink(), "No such file"),
    (lambda folder: (folder.parent / "manifests" / "1.json").write_text("[]"), "manifest 1.json is damaged"),
    (lambda folder: (folder.parent / "manifests" / "1.json").write_text("{" * 10**5), "Expecting property name"),
    (lambda folder: (folder.parent / "manifests" / "1.json").write_text("[" * 10**5), "nested too deeply"),
    (lambda folder: (folder.parent / "manifests" / "1.json").write_bytes(b"x" * 2**21), "larger than 1,048,576"),
  ],
)
def test_damage_is_named(folder, damage, message):
  damage(folder)
  assert message in problem(folder)


@pytest.mark.parametrize("name", ["a", "inner"])
def test_links_are_refused_even_if_they_lead_to_the_same_content(folder, name):
  (folder / name).rename(folder.parent / "elsewhere")
  (folder / name).symlink_to(folder.parent / "elsewhere")
  assert f"{name} is a link" in problem(folder)


def test_a_link_in_place_of_the_folder_or_its_manifest_is_refused(folder):
  path = folder.parent / "manifests" / "1.json"
  path.rename(folder.parent / "kept.json")
  path.symlink_to(folder.parent / "kept.json")
  assert "symbolic links" in problem(folder)
  folder.rename(folder.parent / "kept")
  folder.symlink_to(folder.parent / "kept")
  path.unlink()
  (folder.parent / "kept.json").rename(path)
  assert "is not a folder" in problem(folder)


def test_a_pipe_is_refused_without_waiting_for_its_writer(folder):
  (folder / "a").unlink()
  os.mkfifo(folder / "a")
  assert "a is a link or a device" in problem(folder)


JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
  lambda children: (
    st.lists(children)
    | st.dictionaries(st.text() | st.sampled_from(["files", "facts", "a", "size", "sha256"]), children)
  ),
)


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("run") / "folder"
  folder.mkdir()
  (folder / "a").write_bytes(b"a")
  return folder


@settings(deadline=None)
@given(value=JSON)
def test_no_other_json_passes_for_a_manifest_or_crashes(value, small_folder):
  path = small_folder.parent / "1.json"
  path.write_text(json.dumps(value), encoding="utf-8")
  with pytest.raises(ValueError):
    files.check_manifest(small_folder, path)


def test_a_manifest_is_not_written_through_a_link(folder):
  victim = folder.parent / "victim"
  victim.write_text("precious")
  (folder.parent / "manifests" / "2.json.new").symlink_to(victim)
  files.write_manifest(folder, folder.parent / "manifests" / "2.json", {})
  assert victim.read_text() == "precious"
