"""The cache of token arrays returns nothing damaged, and nothing that cannot be right, even if its digest agrees."""

import dataclasses
import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.corpus import CONFIG, assert_same, entry_of, load

from imdb_jax.data import tokens


def flip(path: Path, place: float) -> None:
  content = bytearray(path.read_bytes())
  content[int(place * len(content))] ^= 0xFF
  path.write_bytes(content)


def truncate(path: Path, share: float) -> None:
  content = path.read_bytes()
  path.write_bytes(content[: int(share * len(content))])


def grow(path: Path) -> None:
  with path.open("ab") as file:
    file.write(b"x")


def link_to_itself(entry: Path) -> None:
  shutil.rmtree(entry)
  entry.symlink_to(entry.name)


def move_away(entry: Path) -> Path:
  """Move an entry out of the cache, and return where it is."""
  return entry.rename(entry.parents[2] / "elsewhere")


def link_elsewhere(entry: Path) -> None:
  """Replace the link of the source, which leads to the entry, by a link out of the cache."""
  elsewhere = move_away(entry)
  (link,) = entry.parent.iterdir()
  link.unlink()
  link.symlink_to(elsewhere)


DAMAGES = {
  "arrays absent": lambda entry: (entry / "arrays").unlink(),
  "arrays empty": lambda entry: truncate(entry / "arrays", 0),
  "arrays cut short": lambda entry: truncate(entry / "arrays", 0.5),
  "arrays without their last byte": lambda entry: truncate(entry / "arrays", 0.999),
  "arrays with one more byte": lambda entry: grow(entry / "arrays"),
  "arrays of a terabyte": lambda entry: os.truncate(entry / "arrays", 2**40),
  "arrays are a pipe": lambda entry: [(entry / "arrays").unlink(), os.mkfifo(entry / "arrays")],
  "arrays without their first byte": lambda entry: flip(entry / "arrays", 0),
  "a byte of the arrays": lambda entry: flip(entry / "arrays", 0.1),
  "another byte of the arrays": lambda entry: flip(entry / "arrays", 0.5),
  "vocabulary absent": lambda entry: (entry / "vocab.json").unlink(),
  "vocabulary cut short": lambda entry: truncate(entry / "vocab.json", 0.5),
  "vocabulary changed": lambda entry: (entry / "vocab.json").write_text(
    (entry / "vocab.json").read_text().replace("review", "sequel")
  ),
  "manifest absent": lambda entry: (entry / "manifest.json").unlink(),
  "manifest cut short": lambda entry: truncate(entry / "manifest.json", 0.5),
  "manifest not an object": lambda entry: (entry / "manifest.json").write_text("[]"),
  "manifest deeply nested": lambda entry: (entry / "manifest.json").write_text("[" * 100_000),
  "manifest without digest": lambda entry: (entry / "manifest.json").write_text("{}"),
  "manifest larger than 8 MiB": lambda entry: (entry / "manifest.json").write_text(
    (entry / "manifest.json").read_text() + " " * 2**23
  ),
  "entry absent behind its link": shutil.rmtree,
  "entry replaced by a file": lambda entry: [shutil.rmtree(entry), entry.touch()],
  "entry replaced by a link to itself": link_to_itself,
  "entry replaced by a link out of the cache": lambda entry: entry.symlink_to(move_away(entry)),
  "link of the source leads out of the cache": link_elsewhere,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_entry_is_reported_and_made_again(corpus, cache_dir, damage):
  expected, _ = load(corpus, cache_dir)
  DAMAGES[damage](entry_of(cache_dir))
  data, lines = load(corpus, cache_dir)
  assert_same(data, expected)
  assert corpus.num_loads == 2
  assert [("damaged" in line) for line in lines] == [True, False, False]
  # The new entry is intact.
  assert_same(load(corpus, cache_dir)[0], expected)
  assert corpus.num_loads == 2


def renewed(entry: Path, data: tokens.TokenData, **rows: Any) -> None:
  """Replace the arrays of an entry, and make its manifest agree with them, except for the numbers of rows."""
  tokens._write(entry, data, {})
  manifest = json.loads((entry / "manifest.json").read_text())
  manifest["rows"] |= rows
  (entry / "manifest.json").write_text(json.dumps(manifest))


def changed(field: str, value: int) -> Callable[[tokens.TokenData], tokens.TokenData]:
  """Return a function that sets the last element of an array."""

  def change(data: tokens.TokenData) -> tokens.TokenData:
    array = getattr(data.train, field).copy()
    array.flat[-1] = value
    return dataclasses.replace(data, train=dataclasses.replace(data.train, **{field: array}))

  return change


def moved_length(data: tokens.TokenData) -> tokens.TokenData:
  """Make one review a word longer and another one a word shorter, so that the sum stays."""
  lengths = data.train.lengths.copy()
  lengths[[0, -1]] += [1, -1]
  return dataclasses.replace(data, train=dataclasses.replace(data.train, lengths=lengths))


LIES = {
  "an id below 0": changed("tokens", -1),
  "an id as large as the vocabulary": changed("tokens", 20),
  "padding where a word should be": changed("tokens", 0),
  "a label of 7": changed("labels", 7),
  "a negative label": changed("labels", -1),
  "a length above the sequence's": changed("lengths", 7),
  "a negative length": changed("lengths", -1),
  "a word of one review counted in another": moved_length,
}


@pytest.mark.parametrize("lie", LIES)
def test_arrays_that_match_their_digest_but_cannot_be_right_are_made_again(corpus, cache_dir, lie):
  expected, _ = load(corpus, cache_dir)
  renewed(entry_of(cache_dir), LIES[lie](expected))
  data, lines = load(corpus, cache_dir)
  assert_same(data, expected)
  assert "damaged" in lines[0]


SHAPES = [
  pytest.param(lambda array: array.astype(np.int32), id="other types"),
  pytest.param(lambda array: array.astype(array.dtype.newbyteorder()), id="other byte order"),
  pytest.param(lambda array: np.repeat(array, 2, axis=-1), id="too wide or too long"),
  pytest.param(lambda array: array[..., :-1], id="too narrow or too short"),
  pytest.param(lambda array: array[:0], id="empty"),
  pytest.param(lambda array: array[None], id="one more axis"),
  pytest.param(lambda array: array.astype("U4"), id="texts"),
]


@pytest.mark.parametrize("change", SHAPES)
@pytest.mark.parametrize("field", ["tokens", "lengths", "labels"])
def test_arrays_of_another_shape_or_type_are_those_of_the_config_or_made_again(corpus, cache_dir, change, field):
  """A file without headers cannot say what it holds."""
  expected, _ = load(corpus, cache_dir)
  train = dataclasses.replace(expected.train, **{field: change(getattr(expected.train, field))})
  renewed(entry_of(cache_dir), dataclasses.replace(expected, train=train), train=12)
  assert_same(load(corpus, cache_dir)[0], expected)


@pytest.mark.parametrize("rows", [0, -1, 11, 13, 25_001, 10**12, 10**30, 12.0, True, "12", None, [12]])
def test_impossible_numbers_of_rows_allocate_nothing(corpus, cache_dir, rows):
  expected, _ = load(corpus, cache_dir)
  renewed(entry_of(cache_dir), expected, train=rows)
  tracemalloc.start()
  data, lines = load(corpus, cache_dir)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert_same(data, expected)
  assert "damaged" in lines[0]
  # A buffer for the largest vocabulary takes 16 MiB.
  assert peak < 20 * 2**20


def test_a_sparse_entry_costs_no_more_than_the_largest_that_is_written(corpus, cache_dir):
  """A file may claim any size without taking it."""
  load(corpus, cache_dir)
  entry = entry_of(cache_dir)
  os.truncate(entry / "arrays", 2**40)
  manifest = json.loads((entry / "manifest.json").read_text())
  (entry / "manifest.json").write_text(json.dumps(manifest | {"rows": {"train": 10**9, "test": 10**9}}))
  _, lines = load(corpus, cache_dir)
  assert "an impossible number of reviews" in lines[0]


@pytest.mark.parametrize("change", [{"vocabulary_size": 200_000}, {"strip_html": False}])
def test_the_vocabulary_of_another_config_is_not_used(corpus, cache_dir, change):
  expected, _ = load(corpus, cache_dir)
  other = tokens.encode(dataclasses.replace(CONFIG, **change), corpus.splits)
  renewed(entry_of(cache_dir), dataclasses.replace(expected, vocabulary=other.vocabulary))
  data, lines = load(corpus, cache_dir)
  assert_same(data, expected)
  assert "vocab.json" in lines[0]
