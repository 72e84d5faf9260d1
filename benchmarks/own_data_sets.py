"""Write the data sets of own_data.py as CSV files: train.csv and test.csv in a folder per data set. Print their sizes.

    python benchmarks/own_data_sets.py FOLDER [--archive PATH] [--limit N] [--held-out]

It runs in a process of its own, so that the texts do not count as memory of the systems.
"""

import argparse
import ast
import csv
import hashlib
import importlib.util
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

# The stars that the names of IMDB's files end with; no review has 5 or 6.
STARS = {"1": "1-2", "2": "1-2", "3": "3-4", "4": "3-4", "7": "7", "8": "8-9", "9": "8-9", "10": "10"}
# Classes of the third data set: packages that are installed with the tests.
PACKAGES = ("numpy", "scipy", "sklearn", "jax", "matplotlib")
# Training and test rows.
SIZES = {"imdb-2": (2_000, 5_000), "imdb-5": (10_000, 5_000), "docstrings": (10_000, 5_000)}

_REVIEW = re.compile(r"aclImdb/(train|test)/(pos|neg)/[0-9]+_([0-9]+)\.txt")
_NAMES = re.compile(r"\b(numpy|np|scipy|sp|sklearn|scikit[- ]?learn|jax|jnp|lax|xla|matplotlib|mpl|plt|pyplot)\b", re.I)
_TEST_SHARE = 0.25

# Side, group, text and label. The rows of a group are on one side.
Row = tuple[str, str, str, str]


def _share(text: str) -> float:
  """Return a number from 0 to 1 that depends on nothing but the text."""
  return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


def read_imdb(archive: Path) -> Iterator[tuple[str, str, str, str]]:
  """Yield side, text, polarity and stars of the labelled reviews of the official archive."""
  with tarfile.open(archive) as members:
    for member in members:
      found = _REVIEW.fullmatch(member.name)
      content = members.extractfile(member) if found else None
      if found and content:
        yield found[1], content.read().decode().strip(), found[2], STARS[found[3]]


def read_docstrings() -> list[Row]:
  """Return paragraphs of the docstrings of `PACKAGES`; the label is the package, whose names are removed.

  Paragraphs that two packages share are left out. A module is on one side.
  """
  found: dict[str, Row | None] = {}
  for package in PACKAGES:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    for path in sorted(root.rglob("*.py")):
      module = path.relative_to(root.parent).as_posix()
      if "/tests/" in module or "/_vendor" in module or "/externals/" in module or "/_lib/" in module:
        continue
      side = "test" if _share(module) < _TEST_SHARE else "train"
      for text in _paragraphs(path):
        # As part of another word, which no pattern would cut out.
        if package in text.lower():
          continue
        known = found.setdefault(text, (side, module, text, package))
        if known is not None and known[3] != package:
          found[text] = None
  return [row for row in found.values() if row is not None]


def _paragraphs(path: Path) -> Iterator[str]:
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
      for paragraph in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
        text = " ".join(_NAMES.sub(" ", paragraph).split())
        # Shorter ones are titles and lists of names; examples are programs.
        if len(re.findall("[A-Za-z]{2,}", text)) >= 10 and ">>>" not in text:
          yield text


def write(folder: Path, rows: list[Row], num_train: int, num_test: int, held_out: bool) -> str:
  """Write train.csv and test.csv, and return their numbers of rows.

  With `held_out`, a part of the training rows takes the place of the test rows.
  """
  # The order of hashes is as good as a shuffle.
  rows = sorted(rows, key=lambda row: _share(row[2]))
  sides = {name: [row for row in rows if row[0] == name] for name in ("train", "test")}
  train, test = sides["train"][:num_train], sides["test"][:num_test]
  if held_out:
    test = [row for row in train if _share("held out " + row[1]) < _TEST_SHARE]
    train = [row for row in train if _share("held out " + row[1]) >= _TEST_SHARE]
  folder.mkdir(parents=True)
  for name, chosen in (("train", train), ("test", test)):
    with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
      writer = csv.writer(file)
      writer.writerow(("text", "label"))
      writer.writerows((text, label) for _, _, text, label in chosen)
  return f"{len(train):,} training and {len(test):,} test rows"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("folder", type=Path)
  parser.add_argument("--archive", type=Path)
  parser.add_argument("--limit", type=int, default=10**9)
  parser.add_argument("--held-out", action="store_true")
  given = parser.parse_args()
  data = {"docstrings": read_docstrings()}
  if given.archive:
    # The text is the group: IMDB's training and test reviews are of different films.
    reviews = list(read_imdb(given.archive))
    data["imdb-2"] = [(side, text, text, polarity) for side, text, polarity, _ in reviews]
    data["imdb-5"] = [(side, text, text, stars) for side, text, _, stars in reviews]
  num_rows = {}
  for name, rows in data.items():
    num_train, num_test = (min(size, given.limit) for size in SIZES[name])
    num_rows[name] = write(given.folder / name, rows, num_train, num_test, given.held_out)
  print(json.dumps(num_rows))


if __name__ == "__main__":
  main()
