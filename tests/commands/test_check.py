"""`check`: figures and warnings about labelled texts, before training."""

import csv
import json
from pathlib import Path

import pytest
from running import assert_one_clear_line


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
  with path.open("w", newline="", encoding="utf-8") as file:
    csv.writer(file).writerows([("text", "label"), *rows])
  return path


@pytest.fixture
def rows() -> list[tuple[str, str]]:
  """120 texts of 5 or 6 different words each, a rare class, and a copy with another label."""
  found = [(f"word one two three four{' five' * (i % 2)} w{i}", "big") for i in range(110)]
  return [*found, *((f"other o{i}", "rare \x1b[31m" + "x" * 50) for i in range(10)), (found[0][0], "rare")]


def test_the_figures_are_those_of_the_files(tmp_path, call, rows):
  train, test = write(tmp_path / "a.csv", rows[:100] + rows[110:120]), write(tmp_path / "b.csv", rows[95:115])
  flags = ("--test-data", test, "--sequence-length", "5", "--vocabulary-size", "8")
  code, stdout, stderr = call("imdb-jax", "check", train, *flags, "--json")
  result = json.loads(stdout)
  assert (code, stderr) == (0, "")
  assert result["rows"] == {"train": 110, "test": 20}
  assert [each["train"] for each in result["classes"].values()] == [100, 10]
  # The vocabulary has the words in 50 texts or more, other, and no w0 to w99.
  assert result["lengths"]["longest"] == 6
  assert result["lengths"]["median"] == 5
  num_words = sum(len(text.split()) for text, _ in rows[:100] + rows[110:120])
  assert result["unknown_word_shares"]["train"] == pytest.approx(110 / num_words)
  assert result["cut_share"] == pytest.approx((50 + 8) / 130)
  assert (result["copies"], result["test_texts_in_train"], result["texts_with_several_labels"]) == (10, 10, 0)
  assert 0 < result["training_seconds"] < 60
  warnings = "\n".join(result["warnings"])
  for words in ("has 10 rows for training", "has 91% of the rows", "10 texts for testing are also for training"):
    assert words in warnings
  longer = json.loads(call("imdb-jax", "check", train, *flags, "--json", "--epochs", "1000")[1])
  assert longer["training_seconds"] == pytest.approx(100 * result["training_seconds"])


def test_people_get_lines_of_60_columns(tmp_path, call, rows):
  path = write(tmp_path / "a.csv", [*rows, ("", "big")] * 2)
  code, stdout, stderr = call("imdb-jax", "check", path)
  assert (code, stderr) == (0, "")
  assert max(map(len, stdout.splitlines())) <= 60
  assert "\x1b" not in stdout
  text = " ".join(stdout.split())
  assert "left out 2 of 244 rows, whose text is empty (line 123, line 245)" in text
  assert "1 texts also occur with another label" in text


def test_programs_get_the_places_of_rows_without_a_text(tmp_path, call, rows):
  train, test = write(tmp_path / "a.csv", [*rows, ("", "big")] * 2), write(tmp_path / "b.csv", [*rows, (" ", "big")])
  result = json.loads(call("imdb-jax", "check", train, "--test-data", test, "--json")[1])
  assert result["left_out"] == {
    f"{train}: left out 2 of 244 rows, whose text is empty": ["line 123", "line 245"],
    f"{test}: left out 1 of 122 rows, whose text is empty": ["line 123"],
  }
  assert f"{test}: left out 1 of 122 rows, whose text is empty (line 123)" in result["warnings"]
  assert json.loads(call("imdb-jax", "check", write(tmp_path / "c.csv", rows * 2), "--json")[1])["left_out"] == {}


def test_a_faulty_file_is_one_clear_line(tmp_path, call):
  result = call("imdb-jax", "check", write(tmp_path / "a.csv", [("a", "x"), ("b", "")]))
  assert_one_clear_line(result, 3, "line 3, column 'label': the label is empty")
  assert_one_clear_line(call("imdb-jax", "check", "--json"), 2, "FILE: missing")
