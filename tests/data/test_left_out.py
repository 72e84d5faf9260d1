"""Rows without a text are left out: every load says how many and where, whether it reads the file or the cache."""

import csv
import dataclasses
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from data.corpus import assert_same, entry_of

from imdb_jax.config import DataConfig
from imdb_jax.data import sources, tables, tokens

# Two of 42 rows have no text.
ROWS = [(f"text {number}", "ab"[number % 2]) for number in range(40)]
ROWS[3:3], ROWS[30:30] = [("", "a")], [(" \n", "b")]


def as_csv(rows: list[tuple[str, str]]) -> str:
  output = io.StringIO(newline="")
  csv.writer(output).writerows([("text", "label"), *rows])
  return output.getvalue()


def write_csv(path: Path) -> None:
  path.write_text(as_csv(ROWS), newline="")


def write_gz(path: Path) -> None:
  path.write_bytes(gzip.compress(as_csv(ROWS).encode()))


def write_jsonl(path: Path) -> None:
  path.write_text("".join(json.dumps({"text": text or None, "label": label}) + "\n" for text, label in ROWS))


def write_folder(path: Path) -> None:
  for number, (text, label) in enumerate(ROWS):
    (path / label).mkdir(parents=True, exist_ok=True)
    (path / label / f"{number}.txt").write_text(text)


def load(path: Path, test_data: Path | None = None, **settings: Any) -> tuple[tokens.TokenData, list[str]]:
  """Return the data and what is reported of rows left out; the cache is beside the file."""
  config = DataConfig(source=str(path), test_data=test_data and str(test_data), vocabulary_size=20, sequence_length=4)
  config, lines = dataclasses.replace(config, **settings), []
  source = sources.find(config, None, path.parent)
  data = tokens.load(source, config, cache_dir=path.parent / "cache", report=lines.append)
  return data, [line for line in lines if "text is empty" in line]


@pytest.mark.parametrize(
  ("name", "write", "places"),
  [
    ("a.csv", write_csv, ["line 5", "line 32"]),
    ("a.csv.gz", write_gz, ["line 5", "line 32"]),
    ("a.jsonl", write_jsonl, ["line 4", "line 31"]),
    ("a", write_folder, ["a/3.txt", "b/30.txt"]),
  ],
)
def test_every_load_counts_them_and_says_where_they_are(tmp_path, name, write, places):
  write(tmp_path / name)
  counted = f"{tmp_path / name}: left out 2 of 42 rows, whose text is empty"
  found = [load(tmp_path / name) for _ in range(3)]
  for data, lines in found:
    assert lines == [f"{counted} ({', '.join(places)})"]
    assert data.left_out == {counted: places}
    assert len(data.train) + len(data.test) == 40
  assert_same(found[0][0], found[1][0])


@pytest.mark.parametrize("settings", [{}, {"limit": 5}, {"validation": "split"}])
def test_those_of_a_test_file_are_told_as_well(tmp_path, settings):
  write_csv(tmp_path / "a.csv")
  (tmp_path / "b.jsonl").write_text('{"text": "fine", "label": "a"}\n{"text": "", "label": "b"}\n')
  for _ in range(2):
    data, lines = load(tmp_path / "a.csv", tmp_path / "b.jsonl", **settings)
    assert lines[0].endswith("a.csv: left out 2 of 42 rows, whose text is empty (line 5, line 32)")
    assert lines[1].endswith("b.jsonl: left out 1 of 2 rows, whose text is empty (line 2)")
    assert len(data.left_out) == 2


def test_a_file_with_the_same_texts_but_other_empty_rows_has_its_own_places(tmp_path):
  path = tmp_path / "a.csv"
  for _ in range(2):
    write_csv(path)
    before, lines = load(path)
    assert "(line 5, line 32)" in lines[0]
    path.write_text(as_csv([row for row in ROWS if row[0].strip()]), newline="")
    after, lines = load(path)
    assert (lines, after.left_out) == ([], {})
    assert_same(before, after)
    assert before.digest == after.digest


def test_a_long_list_is_cut_short_and_counted_in_full(tmp_path, monkeypatch):
  monkeypatch.setattr(tables, "MAX_LISTED", 100)
  (tmp_path / "a.csv").write_text(as_csv([*ROWS, *[("", "a")] * 1000]), newline="")
  for _ in range(2):
    data, lines = load(tmp_path / "a.csv")
    assert "left out 1,002 of 1,042 rows" in lines[0]
    assert lines[0].endswith("(line 5, line 32, line 45, line 46, line 47, ...)")
    assert [*data.left_out.values()] == [["line 5", "line 32", "line 45", "line 46", "line 47", "line 48", "..."]]


def many_empty_lines(path):
  path.write_text(as_csv([*ROWS, *[("", "a")] * 40_000]), newline="")


def many_empty_files_with_long_names(path):
  write_folder(path)
  for number in range(4000):
    # In JSON, each of these letters takes six bytes.
    (path / "a" / f"{'é' * 118}{number:05}.txt").touch()


@pytest.mark.slow
@pytest.mark.parametrize("write", [many_empty_lines, many_empty_files_with_long_names])
def test_the_longest_lists_fit_into_the_cache(write, tmp_path):
  paths = tmp_path / "a.csv", tmp_path / "b.csv"
  for path in paths:
    write(path)
  first, _ = load(*paths)
  assert all(places[-1] == "..." for places in first.left_out.values())
  (tmp_path / "cache" / "tokens.lock").unlink()
  again, _ = load(*paths)
  assert again.left_out == first.left_out
  # No other process could have filled the cache, so this one has not tried to.
  assert not (tmp_path / "cache" / "tokens.lock").exists()


def test_names_of_files_are_told_in_one_line_without_control_characters(tmp_path):
  write_folder(tmp_path / "a")
  (tmp_path / "a" / "a" / "x\n\x1b[31m.txt").write_text("")
  for _ in range(2):
    data, lines = load(tmp_path / "a")
    assert "left out 3 of 43 rows, whose text is empty (a/3.txt, a/x  [31m.txt, b/30.txt)" in lines[0]
    assert all(line.isprintable() for places in data.left_out.values() for line in places)


FORGED = {
  "null": None,
  "a list": ["line 3"],
  "a text": "line 3",
  "a place that is a number": {"a.csv": [3]},
  "places that are null": {"a.csv": None},
  "places that are a number": {"a.csv": 3},
  "a line break in a place": {"a.csv": ["line 3\nNote: all is well"]},
  "a line break in the count": {"a.csv\nNote: all is well": ["line 3"]},
  "an escape code": {"a.csv": ["\x1b[2J"]},
  "half of a surrogate pair": {"a.csv": ["\ud800"]},
  "three files": {str(number): ["line 3"] for number in range(3)},
  "a million files": {str(number): [] for number in range(10**6)},
  "a million lists": {"a.csv": [[]] * 10**6},
}


@pytest.mark.parametrize("forged", FORGED)
def test_a_list_that_cannot_be_right_is_made_again(tmp_path, forged):
  write_csv(tmp_path / "a.csv")
  expected, lines = load(tmp_path / "a.csv")
  manifest = entry_of(tmp_path / "cache") / "manifest.json"
  intact = manifest.read_text()
  manifest.write_text(json.dumps(json.loads(intact) | {"left_out": FORGED[forged]}))
  again, lines_again = load(tmp_path / "a.csv")
  assert (again.left_out, lines_again) == (expected.left_out, lines)
  assert manifest.read_text() == intact
