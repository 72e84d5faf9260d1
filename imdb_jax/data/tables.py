"""Labelled texts of one's own: CSV and JSON Lines files, also packed as .gz or .xz, and folders with one per label.

The files may be damaged or hostile: they are read as a stream, and everything that takes memory or time has a limit.
Texts and labels are kept as written: 1, 1.0 and 01 are three labels.
"""

import contextlib
import csv
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np

from imdb_jax.config import DataConfig
from imdb_jax.data import archive
from imdb_jax.data.reviews import LeftOut
from imdb_jax.errors import DataError, first_line, printable, reraise_as
from imdb_jax.store import files

# Of a file or folder, unpacked; of one row in bytes, and of a text and a label in characters.
MAX_BYTES, MAX_ROW_BYTES, MAX_TEXT, MAX_LABEL = 2**32, 2**23, 2**20, 200
MAX_ROWS, MAX_LINES, MAX_CLASSES = 4_000_000, 40_000_000, 1_000
# Of a list of rows without a text: characters, and 8 for each row.
MAX_LISTED = 500_000
_DELIMITERS = ",;\t|"
_FORMATS = (
  ".csv, .tsv, .txt, .jsonl or .ndjson, also with .gz or .xz, or a folder with one sub-folder of .txt per label"
)


class Row(NamedTuple):
  """A labelled text. `place` tells people where it is; the group and the id are empty if there is none."""

  place: str
  text: str
  label: str = ""
  group: str = ""
  id: str = ""


class Record(NamedTuple):
  """A row of a file with all of its columns. `line` is its line of JSON; empty for CSV."""

  place: str
  names: Sequence[str]
  values: Sequence[Any]
  line: str = ""


class _Lines:
  """The decoded lines of a stream, with their numbers.

  Attributes:
    start: number of the first line of the current row, which a quoted line break continues.
  """

  def __init__(self, stream: Any):
    self.start, self._number, self._row_bytes, self._total = 1, 0, 0, 0
    self._stream = stream

  def __iter__(self) -> Iterator[str]:
    return self

  def __next__(self) -> str:
    line = self._stream.readline(MAX_ROW_BYTES + 1)
    if not line:
      raise StopIteration
    self._number += 1
    self._row_bytes += len(line)
    self._total += len(line)
    if self._row_bytes > MAX_ROW_BYTES:
      raise ValueError(f"line {self.start:,}: a row has more than {MAX_ROW_BYTES:,} bytes; is a quote missing?")
    _check_total(self._total)
    if self._number > MAX_LINES:
      raise ValueError(f"has more than {MAX_LINES:,} lines")
    if b"\0" in line:
      raise ValueError(f"line {self._number:,}: holds a NUL byte; save the file as UTF-8")
    try:
      return line.decode("utf-8-sig" if self._number == 1 else "utf-8")
    except UnicodeDecodeError as error:
      problem = f"byte {error.start + 1:,} (0x{line[error.start]:02x}) is not UTF-8"
      raise ValueError(f"line {self._number:,}: {problem}; save the file as UTF-8") from error

  def begin_row(self) -> None:
    """Count the next line as the first one of a row."""
    self.start, self._row_bytes = self._number + 1, 0


def _check_total(size: int) -> None:
  if size > MAX_BYTES:
    raise ValueError(f"has more than {MAX_BYTES:,} bytes, unpacked")


def read(path: Path, config: DataConfig) -> tuple[list[Row], LeftOut]:
  """Read labelled texts from a file, whose format follows from its name, or a folder.

  Raises DataError, which names line and column, if the file is missing, too large or damaged, or a row has no label.
  """
  columns = [config.text_column, config.label_column, config.group_column or "", "id"]
  with _clear_errors(path), contextlib.closing(_rows(path, columns)) as rows:
    return _checked(rows, columns, path)


def from_python(given: Mapping[str, Sequence[Any]], name: str) -> tuple[list[Row], LeftOut]:
  """Return rows of the texts, labels and perhaps groups of a split: lists, or columns of NumPy, pandas or Arrow.

  Raises DataError if the columns differ in length, a label is missing, or a text is not a text.
  """
  columns, path = [], Path(f"data[{name!r}]")
  for column in given[name]:
    # Arrow's columns have the first method, those of NumPy and pandas the second.
    convert = getattr(column, "to_pylist", None) or getattr(column, "tolist", None)
    columns.append(list(column) if convert is None else convert())
  with _clear_errors(path):
    if len(columns) not in (2, 3) or len({*map(len, columns)}) != 1:
      raise ValueError("must be texts and labels, and groups if wanted, of the same length")
    if odd := [number for number, text in enumerate(columns[0]) if not isinstance(text, str)]:
      raise ValueError(f"row {odd[0]:,}: the text must be a str, not {type(columns[0][odd[0]]).__name__}")
    # NaN differs from itself.
    strings = [["" if value is None or value != value else str(value) for value in column] for column in columns]
    rows = (Row(f"row {number:,}", *values) for number, values in enumerate(zip(*strings, strict=True)))
    return _checked(rows, Row._fields[1:], path)


def _checked(rows: Iterable[Row], columns: Sequence[str], path: Path) -> tuple[list[Row], LeftOut]:
  """Return the rows that have a text, and where the others are; raise ValueError if a row is not as it should be."""
  found, skipped, ids, labels = [], [], {}, set()
  for row in rows:
    for column, value, limit in zip(columns, row[1:], (MAX_TEXT, MAX_LABEL, MAX_TEXT, MAX_TEXT), strict=True):
      if len(value) > limit:
        raise ValueError(f"{row.place}, column {column!r}: has {len(value):,} characters, at most {limit:,} may be")
      if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"{row.place}, column {column!r}: holds half of a surrogate pair")
    if not row.label.strip():
      raise ValueError(f"{row.place}, column {columns[1]!r}: the label is empty")
    if row.id and (first := ids.setdefault(row.id, row.place)) != row.place:
      raise ValueError(f"{row.place}, column {columns[3]!r}: {row.id!r:.80} occurs twice, first in {first}")
    labels.add(row.label)
    if len(labels) > MAX_CLASSES:
      raise ValueError(f"{row.place}, column {columns[1]!r}: more than {MAX_CLASSES:,} different labels")
    (found if row.text.strip() else skipped).append(row)
    if len(found) + len(skipped) > MAX_ROWS:
      raise ValueError(f"has more than {MAX_ROWS:,} rows")
  if not found:
    raise ValueError("has no rows with a text")
  counted = f"left out {len(skipped):,} of {len(found) + len(skipped):,} rows, whose text is empty"
  places = [printable(row.place) for row in skipped]
  num_listed = int(np.searchsorted(np.cumsum([len(place) + 8 for place in places]), MAX_LISTED))
  places[num_listed:] = ["..."] * (num_listed < len(skipped))
  return found, {printable(f"{path}: {counted}"): places} if skipped else {}


def report_left_out(left_out: LeftOut, report: Callable[[str], None]) -> None:
  """Report in a line per file how many rows have no text, and where the first five are."""
  for counted, places in left_out.items():
    report(f"{counted} ({', '.join(places[:5])}{', ...' if len(places) > 5 else ''})")


@contextlib.contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
  """Turn every error of a missing, unreadable or damaged file into a DataError of one line; limit fields of CSV."""
  previous = csv.field_size_limit(MAX_TEXT)
  try:
    yield
  except FileNotFoundError as error:
    raise DataError(f"{path}: no such file or folder; name {_FORMATS}, or imdb or sample.") from error
  except archive.DAMAGE as error:
    raise DataError(f"{path}: {first_line(error)}.") from error
  except OSError as error:
    raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from error
  finally:
    csv.field_size_limit(previous)


def fingerprint(path: Path) -> str:
  """Return a SHA-256 in hex: of a file's bytes, or of the names, sizes and times of a folder's texts.

  Raises DataError if the file or folder is missing or unreadable.
  """
  with _clear_errors(path):
    if not path.is_dir():
      _check_total(path.stat().st_size)
      return files.sha256(Path(os.path.realpath(path)))
    found = ((entry.path, entry.stat(follow_symlinks=False)) for _, entry in _folder_files(path))
    lines = (f"{os.path.relpath(name, path)!r} {status.st_size} {status.st_mtime_ns}\n" for name, status in found)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def kind(path: Path) -> str:
  """Return the ending of a file's name that tells its format: without .gz and .xz, in small letters."""
  return PurePath(path.name.lower().removesuffix(".gz").removesuffix(".xz")).suffix


def records(path: Path, text_column: str) -> Generator[tuple[str, Record]]:
  """Yield the text and all columns of each row of a CSV or JSONL file, labelled or not, as a stream.

  Raises DataError, which names the line, if the file is missing, too large or damaged, or has no column of texts.
  """
  with _clear_errors(path), contextlib.closing(_records(path, [text_column])) as found:
    for record in found:
      yield _row(record, [text_column]).text, record


def _rows(path: Path, columns: Sequence[str]) -> Generator[Row]:
  if path.is_dir():
    yield from _folder_rows(path, columns)
  else:
    with contextlib.closing(_records(path, columns)) as found:
      yield from (_row(record, columns) for record in found)


def _row(record: Record, columns: Sequence[str]) -> Row:
  """Return some columns as text, as they are written; those that are missing or null are empty."""
  by_name, texts = dict(zip(record.names, record.values, strict=True)), []
  for name in columns:
    value = by_name.get(name)
    if not isinstance(value, str | bool | None):
      raise ValueError(f"{record.place}, column {name!r}: is neither a text nor a number")
    texts.append(str(value).lower() if isinstance(value, bool) else value or "")
  return Row(record.place, *texts)


def _records(path: Path, columns: Sequence[str]) -> Generator[Record]:
  if kind(path) in (".jsonl", ".ndjson"):
    return _json_records(path, columns)
  if kind(path) in (".csv", ".tsv", ".txt"):
    return _csv_records(path, columns)
  raise ValueError(f"the name ends with none of {_FORMATS}")


def _missing(columns: Sequence[str], names: Iterable[str]) -> str:
  """Return the first required column that is not among the names."""
  return next((column for column in columns[:3] if column and column not in names), "")


def _csv_records(path: Path, columns: Sequence[str]) -> Generator[Record]:
  headers = []
  for delimiter in _DELIMITERS:
    with archive.opened(path) as stream:
      lines = _Lines(stream)
      reader = csv.reader(lines, delimiter=delimiter, strict=True)
      header = []
      with contextlib.suppress(csv.Error):
        header = next(reader, [])
      headers.append(header)
      if _missing(columns, header):
        continue
      if repeated := [column for column in columns if header.count(column) > 1]:
        raise ValueError(f"line 1: has two columns {repeated[0]!r}")
      while True:
        lines.begin_row()
        with reraise_as(ValueError, f"line {lines.start:,}", csv.Error):
          values = next(reader, None)
        if values is None:
          return
        if not values:
          continue  # An empty line.
        if len(values) != len(header):
          hint = "; is a text with a delimiter not in double quotes?" if len(values) > len(header) else ""
          raise ValueError(f"line {lines.start:,}: has {len(values)} columns, the first line has {len(header)}{hint}")
        yield Record(f"line {lines.start:,}", header, values)
  found = max(headers, key=len)
  raise ValueError(f"line 1: has no column {_missing(columns, found)!r}{_choices(found)}")


def _choices(names: Iterable[str]) -> str:
  names = [f"{name!r:.40}" for name in itertools.islice(names, 10)]
  return f", only {', '.join(names)}; see --text-column and --label-column" if names else ": it is empty"


def _json_records(path: Path, columns: Sequence[str]) -> Generator[Record]:
  with archive.opened(path) as stream:
    lines = _Lines(stream)
    for line in lines:
      if line.strip():
        with reraise_as(ValueError, f"line {lines.start:,}: not JSON", (ValueError, RecursionError)):
          # Numbers stay as they are written.
          record = json.loads(line, parse_int=str, parse_float=str, parse_constant=str)
        if not isinstance(record, dict):
          raise ValueError(f"line {lines.start:,}: not a JSON object")
        if missing := _missing(columns, record):
          raise ValueError(f"line {lines.start:,}: has no column {missing!r}{_choices(record)}")
        yield Record(f"line {lines.start:,}", [*record], [*record.values()], line)
      lines.begin_row()


def _entries(folder: os.PathLike[str]) -> list[os.DirEntry[str]]:
  """Return what a folder holds, by name."""
  with os.scandir(folder) as found:
    entries = list(itertools.islice(found, MAX_ROWS + 1))
  if len(entries) > MAX_ROWS:
    raise ValueError(f"{folder} holds more than {MAX_ROWS:,} files")
  if links := [entry.path for entry in entries if entry.is_symlink()]:
    raise ValueError(f"{links[0]!r} is a link, not a file or folder")
  return sorted(entries, key=lambda entry: entry.name)


def _folder_files(path: Path) -> Iterator[tuple[str, os.DirEntry[str]]]:
  """Yield label and entry of each text of a folder, by name."""
  folders = [entry for entry in _entries(path) if entry.is_dir()]
  if len(folders) > MAX_CLASSES:
    raise ValueError(f"has more than {MAX_CLASSES:,} sub-folders")
  for folder in folders:
    texts = [entry for entry in _entries(folder) if entry.name.endswith(".txt")]
    if not texts:
      raise ValueError(f"{folder.path} has no .txt files; a sub-folder holds the texts of one label")
    yield from ((folder.name, entry) for entry in texts)


def _folder_rows(path: Path, columns: Sequence[str]) -> Generator[Row]:
  if columns[2]:
    raise ValueError(f"a folder has no column {columns[2]!r}; --group-column requires a file")
  total = 0
  for label, entry in _folder_files(path):
    content = files.read_bytes(Path(entry.path), 4 * MAX_TEXT)
    total += len(content)
    _check_total(total)
    try:
      yield Row(os.path.relpath(entry.path, path), content.decode("utf-8-sig"), label)
    except UnicodeDecodeError as error:
      line = content.count(b"\n", 0, error.start) + 1
      raise ValueError(f"{entry.path}, line {line:,}: is not UTF-8") from error
