"""Files written by Python's csv and json are read back exactly; each error is one line that says where the fault is."""

import csv
import gzip
import io
import json
import lzma
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imdb_jax.config import DataConfig
from imdb_jax.data import tables
from imdb_jax.errors import DataError

CONFIG = DataConfig()
# Without halves of surrogate pairs, which are not Unicode text, and NUL bytes.
VALUE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
PAIRS = st.lists(st.tuples(VALUE.filter(str.strip), VALUE.filter(str.strip)), min_size=1, max_size=8)


def read(path: Path, lines: list[str] | None = None, **config) -> list[tuple[str, str]]:
  rows, left_out = tables.read(path, DataConfig(**config))
  tables.report_left_out(left_out, [].append if lines is None else lines.append)
  return [(row.text, row.label) for row in rows]


def write(path: Path, content: str | bytes) -> Path:
  path.write_bytes(content.encode() if isinstance(content, str) else content)
  return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
  return tmp_path_factory.mktemp("tables")


class TestWhatWasWrittenComesBack:
  @settings(max_examples=150, deadline=None)
  @given(
    pairs=PAIRS,
    delimiter=st.sampled_from(",;\t|"),
    # With minimal quoting and \n alone, Python 3.11 writes \r without quotes, which its own reader refuses.
    form=st.sampled_from([(csv.QUOTE_MINIMAL, "\r\n"), (csv.QUOTE_ALL, "\r\n"), (csv.QUOTE_ALL, "\n")]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig"]),
  )
  def test_csv(self, folder, pairs, delimiter, form, encoding):
    output = io.StringIO(newline="")
    writer = csv.writer(output, delimiter=delimiter, quoting=form[0], lineterminator=form[1])
    writer.writerows([("text", "number", "label"), *((text, i, label) for i, (text, label) in enumerate(pairs))])
    assert read(write(folder / "a.csv", output.getvalue().encode(encoding))) == pairs

  @settings(max_examples=80, deadline=None)
  @given(pairs=PAIRS, ascii=st.booleans())
  def test_jsonl(self, folder, pairs, ascii):
    lines = [json.dumps({"stars": label, "review": text}, ensure_ascii=ascii) for text, label in pairs]
    path = write(folder / "a.jsonl", "\n".join(lines))
    assert read(path, text_column="review", label_column="stars") == pairs

  @pytest.mark.parametrize(("name", "compress"), [("a.csv.gz", gzip.compress), ("a.tsv.xz", lzma.compress)])
  def test_packed(self, tmp_path, name, compress):
    assert read(write(tmp_path / name, compress(b"text\tlabel\ngood\t1\n"))) == [("good", "1")]

  def test_folder(self, tmp_path):
    for label, name, text in (("01", "a.txt", "one\r\n"), ("1", "b.txt", "\ufefftwo"), ("1", "c.md", "no text")):
      (tmp_path / label).mkdir(exist_ok=True)
      write(tmp_path / label / name, text)
    assert read(tmp_path) == [("one\r\n", "01"), ("two", "1")]

  def test_labels_are_kept_as_written(self, tmp_path):
    lines = [f'{{"text": "a", "label": {label}}}' for label in ("1", "1.0", "1e0", '"01"', "true", "-0", "1" * 50)]
    labels = [label for _, label in read(write(tmp_path / "a.jsonl", "\n".join(lines)))]
    assert labels == ["1", "1.0", "1e0", "01", "true", "-0", "1" * 50]
    assert read(write(tmp_path / "a.csv", "text,label\na, 1\nb,1.0")) == [("a", " 1"), ("b", "1.0")]

  def test_long_texts(self, tmp_path):
    """Longer than the limit that Python's csv has by default, which other readers of the process keep."""
    before = csv.field_size_limit()
    assert len(read(write(tmp_path / "a.csv", "text,label\n" + "a" * 1_000_000 + ",1"))[0][0]) == 1_000_000
    assert csv.field_size_limit() == before


def test_rows_without_a_text_are_reported(tmp_path):
  lines = []
  path = write(tmp_path / "a.csv", 'text,label\nfine,1\n,0\n\n" \n",1\ngood,0\n')
  assert read(path, lines) == [("fine", "1"), ("good", "0")]
  assert lines == [f"{path}: left out 2 of 4 rows, whose text is empty (line 3, line 5)"]
  rows, left_out = tables.from_python({"test": (["a", " ", "b"], [1, 2, 3])}, "test")
  assert [row.text for row in rows] == ["a", "b"]
  assert left_out == {"data['test']: left out 1 of 3 rows, whose text is empty": ["row 1"]}


FAULTS = {
  "no rows": ("a.csv", "text,label\n", r"has no rows with a text"),
  "empty": ("a.csv", "", "line 1: has no column 'text': it is empty"),
  "no column": (
    "a.csv",
    "review;label\na;1",
    r"line 1: has no column 'text', only 'review', 'label'; see --text-column",
  ),
  "two columns": ("a.csv", "text,label,text\na,1,b", r"line 1: has two columns 'text'"),
  "too few": ("a.csv", 'text,label\n"a\nb",1\nc\n', r"line 4: has 1 columns, the first line has 2"),
  "too many": (
    "a.csv",
    "text,label\nhello, you,1",
    r"line 2: has 3 columns, the first line has 2; is a text with .* not in double quotes\?",
  ),
  "no label": ("a.csv", "text,label\na,1\nb, \n", r"line 3, column 'label': the label is empty"),
  "an open quote": ("a.csv", 'text,label\na,1\n"b,1\nc,1\n', r"line 3: unexpected end of data"),
  "a stray quote": ("a.csv", 'text,label\n"a"b,1\n', r"line 2: ',' expected after '\"'"),
  "Latin-1": ("a.csv", "text,label\na,1\ncafé,1\n".encode("latin-1"), r"line 3: byte 4 \(0xe9\) is not UTF-8"),
  "UTF-16": ("a.csv", "text,label\na,1".encode("utf-16-le"), r"line 1: holds a NUL byte; save the file as UTF-8"),
  "a NUL byte": ("a.jsonl", b'{"text": "a", "label": 1}\n\0', r"line 2: holds a NUL byte"),
  "an id twice": (
    "a.csv",
    "id,text,label\n7,a,1\n8,b,1\n7,c,0\n",
    r"line 4, column 'id': '7' occurs twice, first in line 2",
  ),
  "a long label": ("a.csv", "text,label\na," + "b" * 201, r"line 2, column 'label': has 201 characters, at most 200"),
  "a long text": ("a.csv", "text,label\n" + "b" * (2**20 + 1), r"line 2: field larger than field limit"),
  "a long JSON text": (
    "a.jsonl",
    json.dumps({"text": "b" * (2**20 + 1), "label": "c"}),
    r"line 1, column 'text': has 1,0",
  ),
  "a long line": ("a.csv", "text,label\n" + "b," * 2**22 + "c", r"line 2: a row has more than 8,388,608 bytes"),
  "a long row": ("a.csv", "text,label\n" + '"b\n",' * 2**21, r"line 2: a row has more than 8,388,608 bytes"),
  "no JSON": ("a.jsonl", '{"text": "a", "label": 1}\n{"text"', r"line 2: not JSON: "),
  "no object": ("a.jsonl", "[1]", r"line 1: not a JSON object"),
  "deep JSON": ("a.jsonl", "[" * 100_000, r"line 1: not JSON: "),
  "a list as text": (
    "a.jsonl",
    '{"text": ["a"], "label": 1}',
    r"line 1, column 'text': is neither a text nor a number",
  ),
  "no field": ("a.jsonl", '{"text": "a"}', r"line 1: has no column 'label', only 'text'"),
  "null": ("a.jsonl", '{"text": "a", "label": null}', r"line 1, column 'label': the label is empty"),
  "a surrogate": ("a.jsonl", r'{"text": "\ud800", "label": 1}', r"line 1, column 'text': holds half of a surrogate"),
  "too many classes": (
    "a.csv",
    "text,label\n" + "".join(f"a,{i}\n" for i in range(1002)),
    r"line 1,002, column 'label': more than 1,000 different labels",
  ),
  "another format": ("a.xlsx", "PK", r"the name ends with none of \.csv"),
  "cut short": ("a.csv.gz", gzip.compress(b"text,label\na,1\n")[:-9], r"ended before the end-of-stream marker"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line_that_says_where(tmp_path, fault):
  name, content, message = FAULTS[fault]
  path = write(tmp_path / name, content)
  with pytest.raises(DataError, match=message) as caught:
    read(path)
  assert str(caught.value).startswith(f"{path}: ")
  assert len(str(caught.value).splitlines()) == 1
  assert len(str(caught.value)) < 1000


def test_what_is_no_file_is_refused(tmp_path):
  with pytest.raises(DataError, match="no such file or folder"):
    read(tmp_path / "absent.csv")
  os.mkfifo(tmp_path / "pipe.csv")
  with pytest.raises(DataError, match=r"cannot be read: pipe\.csv is not a regular file"):
    read(tmp_path / "pipe.csv")


class TestFolders:
  def test_without_texts(self, tmp_path):
    (tmp_path / "train" / "pos").mkdir(parents=True)
    with pytest.raises(DataError, match=r"train has no \.txt files; a sub-folder holds the texts of one label"):
      read(tmp_path)

  @pytest.mark.parametrize("name", ["pos/link.txt", "link"])
  def test_with_links(self, tmp_path, name):
    (tmp_path / "pos").mkdir()
    (tmp_path / name).symlink_to("/etc")
    with pytest.raises(DataError, match="is a link"):
      read(tmp_path)

  def test_in_another_encoding(self, tmp_path):
    (tmp_path / "pos").mkdir()
    write(tmp_path / "pos" / "1.txt", b"fine\n\xe9")
    with pytest.raises(DataError, match=r"pos/1\.txt, line 2: is not UTF-8"):
      read(tmp_path)

  def test_with_groups(self, tmp_path):
    with pytest.raises(DataError, match="a folder has no column 'film'"):
      read(tmp_path, group_column="film")


@pytest.mark.parametrize(
  ("line", "count", "message"),
  [
    (b"a,b\n", 10**5, "has more than 10,000 rows"),
    (b"\n", 10**6, "has more than 50,000 lines"),
    (b" " * 10**6, 500, "line 2: a row has more than"),
    (b"a" * 10**6 + b",b\n", 100, "has more than 20,000,000 bytes, unpacked"),
  ],
)
def test_a_bomb_is_not_unpacked_beyond_the_limits(tmp_path, monkeypatch, line, count, message):
  for name, value in {"MAX_ROWS": 10_000, "MAX_LINES": 50_000, "MAX_BYTES": 20_000_000}.items():
    monkeypatch.setattr(tables, name, value)
  path = write(tmp_path / "bomb.csv.gz", gzip.compress(b"text,label\n" + line * count, 1))
  tracemalloc.start()
  with pytest.raises(DataError, match=message):
    read(path)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 100 * 2**20


class TestFromPython:
  @pytest.mark.parametrize("convert", [list, tuple, np.array, pa.array, lambda values: pa.chunked_array([values])])
  def test_columns_of_any_library(self, convert):
    given = {"train": (convert(["a", "b"]), convert([3, 10]))}
    assert [row[1:3] for row in tables.from_python(given, "train")[0]] == [("a", "3"), ("b", "10")]

  @pytest.mark.parametrize(
    ("columns", "message"),
    [
      ((["a", "b"], [1]), "must be texts and labels, and groups if wanted, of the same length"),
      ((["a", "b"],), "must be texts and labels"),
      ((["a", 3.5], [1, 2]), "row 1: the text must be a str, not float"),
      ((["a", "b"], [1, None]), "row 1, column 'label': the label is empty"),
      ((["a", "b"], [1, float("nan")]), "row 1, column 'label': the label is empty"),
    ],
  )
  def test_other_values_are_refused(self, columns, message):
    with pytest.raises(DataError, match=rf"^data\['test'\]: {message}"):
      tables.from_python({"test": columns}, "test")


def test_the_fingerprint_follows_the_bytes(tmp_path):
  path = write(tmp_path / "a.csv", "text,label\na,1")
  before = tables.fingerprint(path)
  os.utime(path, (0, 0))
  assert tables.fingerprint(path) == before
  assert tables.fingerprint(write(path, "text,label\nb,1")) != before
