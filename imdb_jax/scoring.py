"""Answers for many texts: read in windows, computed together, and written in the order of the texts."""

import contextlib
import csv
import gzip
import json
import lzma
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from imdb_jax.data import tables
from imdb_jax.errors import DataError, UsageError, printable, reraise_as
from imdb_jax.store import files

# Texts that are computed together, and their characters with all columns. Of more texts, more are of similar length.
_MAX_TEXTS, _MAX_CHARACTERS = 4096, 2**24
# Bytes to read at once, and the most that a line may have.
_PIECE_BYTES, _LINE_BYTES = 2**20, 2**23
_SECONDS_PER_LINE = 10

Answer = dict[str, Any]
# A text and its row.
Item = tuple[str, tables.Record]
# Answers texts; see `prediction.Ensemble.answers`.
Answers = Callable[[list[str]], list[Answer]]


def read(name: str, text_column: str) -> Generator[list[Item]]:
  """Yield texts in windows: those of a CSV or JSONL file, or the lines of another file or of - as they arrive."""
  if tables.kind(Path(name)) in (".csv", ".tsv", ".jsonl", ".ndjson"):
    window, size = [], 0
    with contextlib.closing(tables.records(Path(name), text_column)) as found:
      for item in found:
        window.append(item)
        size += len(item[1].line) or sum(map(len, item[1].values))
        if len(window) == _MAX_TEXTS or size >= _MAX_CHARACTERS:
          yield window
          window, size = [], 0
    if window:
      yield window
  else:
    with contextlib.closing(_read_lines(name)) as found:
      yield from of_lines(found)


def of_lines(given: Iterable[Sequence[str]]) -> Generator[list[Item]]:
  """Yield texts in windows."""
  for lines in given:
    for start in range(0, len(lines), _MAX_TEXTS):
      yield [(line, tables.Record("", ["text"], [line])) for line in lines[start : start + _MAX_TEXTS]]


def _read_lines(name: str) -> Generator[list[str]]:
  """Yield the lines of a file as they arrive: whoever writes to a pipe may wait for the answers."""
  if name == "-" and sys.stdin is not None and sys.stdin.isatty():
    print("Type reviews, one per line; end with Ctrl-D.", file=sys.stderr)
  rest = bytearray()
  # Standard input is descriptor 0, not a path.
  path = 0 if name == "-" else name
  with reraise_as(UsageError, f"--file {name}"), open(path, "rb", buffering=0) as file:  # noqa: PTH123
    while piece := file.read(_PIECE_BYTES):
      rest += piece
      if b"\n" in piece:
        *lines, rest = rest.split(b"\n")
        yield list(map(_decode, lines))
      if len(rest) > _LINE_BYTES:
        raise UsageError(f"--file {name}: has a line of more than {_LINE_BYTES:,} bytes.")
  if rest:
    yield [_decode(rest)]


def _decode(line: bytearray) -> str:
  return line.removesuffix(b"\r").decode("utf-8", errors="replace")


def show(windows: Iterable[list[Item]], answers: Answers, *, is_json: bool) -> None:
  """Print an answer per text: as JSON, or as probability, class and beginning of the text."""
  for window in windows:
    texts = [text for text, _ in window]
    for text, answer in zip(texts, answers(texts), strict=True):
      if is_json:
        print(json.dumps(answer | {"text": text}))
      else:
        shown = printable(text if len(text) <= 80 else text[:79] + "…")
        shown += "" if answer["known_words"] else "  (no known word)"
        print(f"{_probability(answer):.4f}  {printable(answer['class'] or 'unknown')}  {shown}")
    sys.stdout.flush()


def _probability(answer: Answer) -> float:
  """Return the probability of the class, or the highest one if there is no class."""
  return answer["probabilities"].get(answer["class"], max(answer["probabilities"].values()))


def write(
  windows: Iterable[list[Item]], answers: Answers, output: Path, *, source: str = "-", escape_formulas: bool = False
) -> int:
  """Write all rows with their columns and answers to a file, whose name tells the format; return their number.

  The file is written aside and renamed at the end. The rows were read from `source`. With `escape_formulas`, cells that
  a spreadsheet program would execute get an apostrophe in front.

  Raises:
    DataError: the rows have a column of the same name as a column of the answers.
    UsageError: the formats of the files do not fit, or the output cannot be written.
  """
  is_json, reads = tables.kind(output) in (".jsonl", ".ndjson"), tables.kind(Path(source))
  if not is_json and tables.kind(output) not in (".csv", ".tsv"):
    raise UsageError(f"--output {output}: must end with .csv, .tsv, .jsonl or .ndjson, also with .gz or .xz.")
  if (is_json and reads in (".csv", ".tsv")) or (not is_json and reads in (".jsonl", ".ndjson")):
    raise UsageError(f"--output {output}: must have the format of --file {source}, whose columns it repeats.")
  if is_json and escape_formulas:
    raise UsageError("--escape-formulas: requires --output with .csv or .tsv.")
  started = shown = time.monotonic()
  count = 0
  with _aside(output) as file:
    writer = csv.writer(file, delimiter="\t" if tables.kind(output) == ".tsv" else ",")
    for window in windows:
      for (_, record), answer in zip(window, answers([text for text, _ in window]), strict=True):
        columns = _columns(answer)
        if taken := columns.keys() & record.names:
          raise DataError(f"{source}, {record.place}: has a column {min(taken)!r}, as the answers do; rename it.")
        if is_json:
          # The row stays as it is written.
          line = record.line.strip() or json.dumps(dict(zip(record.names, record.values, strict=True)))
          file.write(f"{line[:-1].rstrip()}, {json.dumps(columns)[1:]}\n")
        else:
          rows = [[*record.names, *columns]] * (count == 0) + [[*record.values, *columns.values()]]
          writer.writerows([map(_escaped, row) for row in rows] if escape_formulas else rows)
        count += 1
      if time.monotonic() >= shown + _SECONDS_PER_LINE:
        shown = time.monotonic()
        print(f"{count:,} rows, {count / (shown - started):,.0f} per second", file=sys.stderr)
  return count


def _columns(answer: Answer) -> dict[str, Any]:
  probabilities = {f"probability_{name}": value for name, value in answer["probabilities"].items()}
  first = {"class": answer["class"], "probability": _probability(answer)}
  return first | probabilities | {"known_words": answer["known_words"]}


def _escaped(cell: Any) -> Any:
  return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


@contextlib.contextmanager
def _aside(output: Path) -> Iterator[IO[str]]:
  """Open a file under another name, and rename it at the end: a command that is interrupted leaves no part of it."""
  opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(output.suffix.lower(), open)
  with contextlib.ExitStack() as stack:
    stack.enter_context(reraise_as(UsageError, f"--output {output}"))
    unfinished = stack.enter_context(files.aside(output))
    yield stack.enter_context(opener(unfinished, "xt", encoding="utf-8", newline=""))
