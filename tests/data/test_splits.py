"""Own texts are split so that nothing leaks, and so that further rows move none to the other side."""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imdb_jax.data import splits, tokens
from imdb_jax.data.reviews import CLASSES, Reviews
from imdb_jax.data.tables import Row
from imdb_jax.errors import DataError


def rows(num_rows: int, *, num_groups: int = 0, num_classes: int = 3, first: int = 0) -> list[Row]:
  return [
    Row(f"line {i}", f"text {i}", "abcdef"[i % num_classes], f"group {i % num_groups}" if num_groups else "")
    for i in range(first, first + num_rows)
  ]


def split(train: list[Row], test: list[Row] | None = None, lines: list[str] | None = None) -> dict[str, Reviews]:
  given = {"train": (train, {})} | ({} if test is None else {"test": (test, {})})
  return splits.split(given, [].append if lines is None else lines.append, "a.csv")


def sides(found: dict[str, Reviews]) -> dict[str, str]:
  """Return the side of each text, with a part held out."""
  rest, held = tokens.hold_out(found["train"], 0.25)
  parts = {"train": rest, "validation": held, "test": found["test"]}
  texts = {text: name for name, each in parts.items() for text in each.texts}
  assert len(texts) == len({text for each in found.values() for text in each.texts}), "a text on two sides"
  return texts


def test_a_fifth_is_for_testing_and_every_row_is_somewhere():
  found = split(rows(3000))
  assert len(found["train"]) + len(found["test"]) == 3000
  # Four standard deviations of a binomial distribution.
  assert abs(len(found["test"]) - 600) < 4 * np.sqrt(3000 * 0.2 * 0.8)
  counts = collections.Counter(sides(found).values())
  assert abs(counts["validation"] - 600) < 4 * np.sqrt(2400 * 0.25 * 0.75)


@pytest.mark.parametrize("num_groups", [0, 100])
def test_further_rows_move_none(num_groups):
  few, more = (sides(split(rows(size, num_groups=num_groups))) for size in (500, 2000))
  assert few.items() <= more.items()
  assert len({*more.values()}) == 3


def test_groups_and_equal_texts_stay_on_one_side():
  given = rows(600, num_groups=60)
  # Equal texts in pairs of groups, some of them with other labels.
  given += [Row("copy", f"text {i}", "b", f"group {i % 60 + 1}") for i in range(0, 60, 10)]
  found = sides(split(given))
  for i in range(60):
    assert len({found[f"text {j}"] for j in range(i, 600, 60)}) == 1
  for i in range(0, 60, 10):
    assert found[f"text {i}"] == found[f"text {i + 1}"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 12)), min_size=1, max_size=60))
def test_hashes_are_those_of_linked_rows(pairs):
  """Against a search for linked rows that is slow and simple."""
  given = [Row("", f"text {text}", "a", f"group {group}" if group else "") for text, group in pairs]
  hashes = splits._hashes(given)
  linked = [{i} for i in range(len(given))]
  for _ in given:
    for i, one in enumerate(given):
      for j, other in enumerate(given):
        if one.text == other.text or (one.group and one.group == other.group):
          linked[i] |= linked[j]
  for i, members in enumerate(linked):
    assert {j for j in range(len(given)) if hashes[j] == hashes[i]} == members


def test_the_split_is_the_published_one():
  """A run is resumed only with the same split. Never regenerate it."""
  assert list(split(rows(40))["test"].texts) == TEST_TEXTS


TEST_TEXTS = [f"text {i}" for i in (19, 26, 30, 12, 13, 20, 6, 34, 17, 28, 14)]


def test_a_test_file_is_used_as_it_is():
  lines = []
  found = split(rows(30), rows(6, first=28), lines)
  assert (len(found["train"]), len(found["test"])) == (30, 6)
  assert lines == ["Note: 2 different texts are both for training and for testing."]
  with pytest.raises(DataError, match=r"line 3: the label 'd' is not a class of the training texts"):
    split(rows(30), rows(6, num_classes=4))


@pytest.mark.parametrize(
  ("labels", "classes"),
  [
    (["pos", "neg"], ("neg", "pos")),
    (["10", "9", "1.5", "-1", "x", "01"], ("-1", "01", "1.5", "9", "10", "x")),
    (["nan", "1", "inf"], ("1", "inf", "nan")),
    (["1", "1.0", "01"], ("01", "1", "1.0")),
    (["positive", "negative"], CLASSES),
  ],
)
def test_classes_are_in_order(labels, classes):
  found = split([Row("", f"{label} {i}", label) for i in range(20) for label in labels])
  assert found["train"].classes == found["test"].classes == classes
  for text, label in zip(found["train"].texts, found["train"].labels, strict=True):
    assert text.split()[0] == classes[label]


@pytest.mark.parametrize(
  ("given", "message"),
  [
    (rows(30, num_classes=1), "a.csv: all 30 labels are 'a': at least two classes are needed"),
    (
      [*rows(30, num_classes=2), Row("line 31", "text", "c")],
      r"a.csv: line 31: .*'c' has no other row \(3 classes in 31 rows\)",
    ),
    ([Row("", f"text {i}", "ab"[i % 2]) for i in (0, 1, 2, 3)], "a.csv: none of the 4 rows is for testing"),
  ],
)
def test_too_few_are_refused(given, message):
  with pytest.raises(DataError, match=message):
    split(given)


def test_a_class_that_is_only_for_testing_is_refused():
  test = split(rows(100))["test"].texts[:2]
  with pytest.raises(DataError, match=r"a\.csv: all rows of class 'x' are for testing: add more, or choose"):
    split([*rows(100), *(Row("", text, "x") for text in test)])


def test_names_of_classes_count_in_the_digest():
  one = split([Row("", f"text {i}", "ab"[i % 2]) for i in range(40)])["train"]
  other = split([Row("", f"text {i}", "xy"[i % 2]) for i in range(40)])["train"]
  assert one.texts == other.texts
  assert one.digest != other.digest
