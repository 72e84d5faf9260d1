"""A folder that is not as it was left is told apart, whatever was done to it."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imdb_jax import manifest


@pytest.fixture
def folder(tmp_path):
  path = tmp_path / "folder"
  (path / "inner").mkdir(parents=True)
  (path / "a").write_bytes(bytes(range(200)))
  (path / "inner" / "b").write_bytes(b"b" * 100)
  (path / "empty").write_bytes(b"")
  manifest.write(path, tmp_path / "manifests" / "1.json", {"answer": 42})
  return path


def problem(folder) -> str | None:
  return manifest.problem(folder, folder.parent / "manifests" / "1.json")


def test_what_was_left_alone_has_no_problem(folder):
  assert problem(folder) is None
  assert manifest.read(folder.parent / "manifests" / "1.json") == {"answer": 42}
  assert [path.name for path in (folder.parent / "manifests").iterdir()] == ["1.json"], "nothing unfinished stays"


@pytest.mark.parametrize("position", [0, 99, 199])
@pytest.mark.parametrize("bit", [0, 7])
def test_a_flipped_bit(folder, position, bit):
  changed = bytearray((folder / "a").read_bytes())
  changed[position] ^= 1 << bit
  (folder / "a").write_bytes(changed)
  assert "a has been altered" in problem(folder)


@pytest.mark.parametrize(
  ("damage", "said"),
  [
    (lambda folder: os.truncate(folder / "a", 199), "a has 199 bytes instead of 200"),
    (lambda folder: (folder / "inner" / "b").unlink(), "inner/b is missing"),
    (lambda folder: (folder / "c").write_bytes(b""), "c does not belong to it"),
    (lambda folder: (folder / "a").rename(folder / "d"), "a is missing"),
    (lambda folder: (folder.parent / "manifests" / "1.json").unlink(), "No such file"),
    (lambda folder: (folder.parent / "manifests" / "1.json").write_text("[]"), "manifest 1.json is damaged"),
    (lambda folder: (folder.parent / "manifests" / "1.json").write_text("{" * 10**5), "Expecting property name"),
    (lambda folder: (folder.parent / "manifests" / "1.json").write_text("[" * 10**5), "recursion"),
    (lambda folder: (folder.parent / "manifests" / "1.json").write_bytes(b"x" * 2**21), "no file of at most"),
  ],
)
def test_damage_is_named(folder, damage, said):
  damage(folder)
  assert said in problem(folder)


@pytest.mark.parametrize("name", ["a", "inner"])
def test_links_are_refused_even_to_the_very_same_content(folder, name):
  (folder / name).rename(folder.parent / "elsewhere")
  (folder / name).symlink_to(folder.parent / "elsewhere")
  assert f"{name} is a link" in problem(folder)


def test_a_link_in_place_of_the_folder_or_its_manifest_is_refused(folder):
  whole = folder.parent / "manifests" / "1.json"
  whole.rename(folder.parent / "kept.json")
  whole.symlink_to(folder.parent / "kept.json")
  assert "no file" in problem(folder)
  folder.rename(folder.parent / "kept")
  folder.symlink_to(folder.parent / "kept")
  whole.unlink()
  (folder.parent / "kept.json").rename(whole)
  assert "is no folder" in problem(folder)


def test_a_pipe_is_refused_and_not_waited_for(folder):
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


@given(value=JSON)
def test_no_manifest_of_another_making_passes_or_crashes(value, tmp_path_factory):
  folder = tmp_path_factory.mktemp("run") / "folder"
  folder.mkdir()
  (folder / "a").write_bytes(b"a")
  path = folder.parent / "1.json"
  path.write_text(json.dumps(value), encoding="utf-8")
  assert manifest.problem(folder, path)


def test_a_link_where_the_manifest_is_made_is_not_written_through(folder):
  victim = folder.parent / "victim"
  victim.write_text("precious")
  (folder.parent / "manifests" / "2.new").symlink_to(victim)
  manifest.write(folder, folder.parent / "manifests" / "2.json", {})
  assert victim.read_text() == "precious"
