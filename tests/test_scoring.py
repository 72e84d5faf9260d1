"""Rows written by Python's csv or json are repeated exactly, with the answers as additional columns."""

import csv
import gzip
import io
import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imdb_jax import scoring
from imdb_jax.data import tables
from imdb_jax.errors import DataError, UsageError

# Without halves of surrogate pairs, which are not Unicode text, and NUL bytes.
VALUE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
ROWS = st.lists(st.tuples(VALUE, VALUE), min_size=1, max_size=8)
EXTRA = ["class", "probability", "probability_no", "probability_yes", "known_words"]


def answers(texts: list[str]) -> list[dict]:
  """Answer yes to long texts and nothing to empty ones; the probability is a function of the text."""
  found = []
  for text in texts:
    yes = len(text) / (len(text) + 1)
    name = None if not text else "yes" if yes > 0.5 else "no"
    found.append({"class": name, "probabilities": {"no": 1 - yes, "yes": yes}, "known_words": len(text)})
  return found


def expected(text: str) -> dict:
  (answer,) = answers([text])
  by_class = answer["probabilities"]
  highest = max(by_class.values())
  numbers = [by_class.get(answer["class"], highest), *by_class.values()]
  return dict(zip(EXTRA, [answer["class"], *numbers, answer["known_words"]], strict=True))


def score(source: Path, output: Path, column: str = "text", **options) -> int:
  return scoring.write(scoring.read(str(source), column), answers, output, source=str(source), **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
  return tmp_path_factory.mktemp("scoring")


@settings(max_examples=100, deadline=None)
@given(rows=ROWS, delimiter=st.sampled_from(",;\t|"), window=st.integers(1, 9), ending=st.sampled_from(["csv", "tsv"]))
def test_csv_comes_back_with_the_answers(folder, rows, delimiter, window, ending):
  with (folder / "a.csv").open("w", newline="", encoding="utf-8") as file:
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerows([("id", "text", "id", "note"), *((i, text, "x", note) for i, (text, note) in enumerate(rows))])
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(scoring, "_MAX_TEXTS", window)
    assert score(folder / "a.csv", folder / f"b.{ending}") == len(rows)
  with (folder / f"b.{ending}").open(newline="", encoding="utf-8") as file:
    header, *found = csv.reader(file, delimiter="\t" if ending == "tsv" else ",")
  assert header == ["id", "text", "id", "note", *EXTRA]
  for number, (text, note) in enumerate(rows):
    values = ["" if value is None else str(value) for value in expected(text).values()]
    assert found[number] == [str(number), text, "x", note, *values]


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, ascii=st.booleans(), separators=st.sampled_from([(",", ":"), (" , ", " : ")]))
def test_json_lines_come_back_as_they_were_written(folder, rows, ascii, separators):
  records = [{"text": text, "note": {"of": [note, 1.50, None]}, "number": 12345678901234567890} for text, note in rows]
  lines = [json.dumps(record, ensure_ascii=ascii, separators=separators) for record in records]
  (folder / "a.jsonl.gz").write_bytes(gzip.compress("".join(f" {line} \r\n\n" for line in lines).encode()))
  assert score(folder / "a.jsonl.gz", folder / "b.jsonl.gz") == len(rows)
  found = gzip.decompress((folder / "b.jsonl.gz").read_bytes()).decode().split("\n")[:-1]
  for (text, _), line, result in zip(rows, lines, found, strict=True):
    assert result.startswith(line[:-1])
    assert json.loads(result) == json.loads(line) | expected(text)


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_lines_of_text_get_a_column(folder, ending):
  (folder / "a.txt").write_bytes("good, film\r\n\ncafé".encode())
  assert score(folder / "a.txt", folder / f"c.{ending}") == 3
  with (folder / f"c.{ending}").open(newline="", encoding="utf-8") as file:
    rows = list(csv.DictReader(file)) if ending == "csv" else list(map(json.loads, file))
  assert [row["text"] for row in rows] == ["good, film", "", "café"]
  assert list(rows[0]) == ["text", *EXTRA]
  assert rows[1]["class"] == ("" if ending == "csv" else None)


def test_cells_that_a_spreadsheet_would_execute_are_disarmed(folder):
  cells = ["=1+1", "+1", "-1", "@x", "\tx", "\rx", "a=b", "'x"]
  (folder / "a.csv").write_text("=note,text\n" + "".join(f'"{cell}",b\n' for cell in cells), newline="")
  score(folder / "a.csv", folder / "b.csv", escape_formulas=True)
  with (folder / "b.csv").open(newline="") as file:
    header, *rows = csv.reader(file)
  assert header[0] == "'=note"
  assert [row[0] for row in rows] == [*(f"'{cell}" for cell in cells[:6]), "a=b", "'x"]


@pytest.mark.parametrize(
  ("name", "content", "output", "error", "message"),
  [
    ("a.csv", "text,class\na,b\n", "b.csv", DataError, "line 2: has a column 'class', as the answers do; rename it"),
    ("a.csv", "text,label\na,b\nc\n", "b.csv", DataError, "line 3: has 1 columns"),
    ("a.csv", "review\na\n", "b.csv", DataError, "no column 'text', only 'review'; see --text-column"),
    ("a.jsonl", '{"text": 1}\n{"text": []}\n', "b.jsonl", DataError, "line 2, column 'text': is neither"),
    ("a.csv", "text\na\n", "b.jsonl", UsageError, "must have the format of --file"),
    ("a.jsonl", '{"text": "a"}\n', "b.csv", UsageError, "must have the format of --file"),
    ("a.csv", "text\na\n", "b.xlsx", UsageError, "must end with .csv, .tsv"),
    ("a.csv", "text\na\n", "none/b.csv", UsageError, "--output .*none/b.csv: No such file"),
  ],
)
def test_a_fault_leaves_the_old_output_alone(tmp_path, name, content, output, error, message):
  (tmp_path / name).write_text(content)
  (tmp_path / "b.csv").write_text("old")
  with pytest.raises(error, match=message):
    score(tmp_path / name, tmp_path / output)
  assert {path.name for path in tmp_path.iterdir()} == {name, "b.csv"}
  assert (tmp_path / "b.csv").read_text() == "old"


def test_an_interrupted_command_leaves_no_part_of_the_output(tmp_path):
  (tmp_path / "a.txt").write_text("a\nb\n")

  def interrupted(texts):
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    scoring.write(scoring.read(str(tmp_path / "a.txt"), "text"), interrupted, tmp_path / "b.csv")
  assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_long_files_take_bounded_memory_and_report_their_progress(tmp_path, monkeypatch, capsys):
  """Rows with 90 MB of other columns; a window may have 16 MB."""
  monkeypatch.setattr(scoring, "_SECONDS_PER_LINE", 0)
  with (tmp_path / "a.csv").open("w") as file:
    file.write("text,note\n")
    file.writelines(f"a,{'x' * 900_000}\n" for _ in range(100))
  tracemalloc.start()
  try:
    assert score(tmp_path / "a.csv", tmp_path / "b.csv.gz") == 100
    assert tracemalloc.get_traced_memory()[1] < 2**26
  finally:
    tracemalloc.stop()
  lines = capsys.readouterr().err.splitlines()
  assert 6 <= len(lines) <= 8
  assert lines[-1].startswith("100 rows, ")


def test_windows_are_answered_as_they_arrive(monkeypatch):
  output, seen = io.StringIO(), []
  monkeypatch.setattr("sys.stdout", output)

  def windows():
    for text in ("a", "bb"):
      yield [(text, tables.Record("", ["text"], [text]))]
      seen.append(output.getvalue().count("\n"))

  scoring.show(windows(), answers, is_json=True)
  assert seen == [1, 2]
