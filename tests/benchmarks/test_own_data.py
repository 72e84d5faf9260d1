"""The benchmark of texts of one's own: its data sets, and what it reports of each system."""

import csv
import io
import json
import tarfile
from pathlib import Path

import pytest

# Each test starts processes that import JAX, or reads the sources of several packages.
pytestmark = pytest.mark.slow


def read(folder: Path, name: str) -> list[dict[str, str]]:
  with (folder / f"{name}.csv").open(newline="", encoding="utf-8") as file:
    return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
  """An archive with three reviews for each polarity, side and number of stars."""
  path = tmp_path_factory.mktemp("archive") / "reviews.tar.gz"
  with tarfile.open(path, "w:gz") as file:
    for side in ("train", "test"):
      for number, stars in enumerate([1, 2, 3, 4, 7, 8, 9, 10] * 3):
        text = f"review {number} of the {side} side, {stars}".encode()
        member = tarfile.TarInfo(f"aclImdb/{side}/{'pos' if stars > 5 else 'neg'}/{number}_{stars}.txt")
        member.size = len(text)
        file.addfile(member, io.BytesIO(text))
  return path


def test_the_stars_are_the_classes_of_imdb(run, archive, tmp_path):
  done = run("own_data_sets.py", tmp_path / "sets", "--archive", archive)
  assert done.returncode == 0, done.stderr[-2000:]
  assert json.loads(done.stdout)["imdb-5"] == "24 training and 24 test rows"
  groups = {1: "1-2", 2: "1-2", 3: "3-4", 4: "3-4", 7: "7", 8: "8-9", 9: "8-9", 10: "10"}
  for side in ("train", "test"):
    for row in read(tmp_path / "sets" / "imdb-5", side):
      assert f"of the {side} side" in row["text"]
      assert row["label"] == groups[int(row["text"].split(", ")[1])]
    assert {row["label"] for row in read(tmp_path / "sets" / "imdb-2", side)} == {"neg", "pos"}


def test_docstrings_do_not_tell_their_package_and_no_text_is_on_both_sides(module):
  rows = module("own_data_sets").read_docstrings()
  sides: dict[str, set[str]] = {"train": set(), "test": set()}
  for side, group, text, label in rows:
    assert label not in text.lower()
    assert group.startswith(f"{label}/")
    sides[side].add(group)
  assert not sides["train"] & sides["test"], "a module is on both sides"
  assert len({text for _, _, text, _ in rows}) == len(rows)


def test_held_out_rows_are_from_the_training_rows(run, archive, tmp_path):
  for flags in ((), ("--held-out",)):
    done = run("own_data_sets.py", tmp_path / f"sets{len(flags)}", "--archive", archive, *flags)
    assert done.returncode == 0, done.stderr[-2000:]
  whole = {row["text"] for row in read(tmp_path / "sets0" / "imdb-2", "train")}
  train, held_out = ({row["text"] for row in read(tmp_path / "sets1" / "imdb-2", side)} for side in ("train", "test"))
  assert train | held_out == whole
  assert not train & held_out


def test_every_system_has_its_figures(run, tmp_path):
  done = run(
    "own_data.py",
    *("--limit", "60", "--systems", "fast", "tfidf", "fasttext", "--platform", "cpu", "--num-devices", "1"),
    *("--fasttext-python", tmp_path / "absent", "--json", tmp_path / "results.json"),
  )
  assert done.returncode == 0, done.stderr[-2000:]
  results = json.loads((tmp_path / "results.json").read_text())
  fast, tfidf, fasttext = results["rows"]
  for row, system in ((fast, "fast"), (tfidf, "tfidf")):
    assert (row["data"], row["system"], row["seeds"], row["problem"]) == ("docstrings", system, 1, None)
    assert 0.1 < row["accuracy"] < 1
    assert 0 < row["fit_seconds"] < row["train_seconds"]
    assert row["texts_per_second"] > 0
    assert 50 < row["predict_memory_mb"] < 4000
  assert fasttext["problem"] == "missing absent: see --fasttext-python"
  assert f"docstrings fasttext: {fasttext['problem']}" in done.stdout
  assert {"python", "jax", "scikit-learn"} <= set(results["machine"]["versions"])
  assert str(tmp_path) not in json.dumps(results), "a path of this machine"


def test_a_row_has_the_mean_of_its_seeds(module):
  names = ("train_seconds", "fit_seconds", "texts_per_second", "train_memory_mb", "predict_memory_mb")
  runs = [
    {"data": "imdb-2", "system": "fast", "problem": None, "accuracy": accuracy, **dict.fromkeys(names, seconds)}
    for accuracy, seconds in ((0.8, 1.0), (0.9, 2.0), (0.7, 9.0))
  ]
  runs.append({"data": "imdb-2", "system": "fast", "problem": "failed: killed"})
  row = module("own_data").summarize(runs)
  assert (row["seeds"], row["problem"]) == (3, "failed: killed")
  assert row["accuracy"] == pytest.approx(0.8)
  assert row["accuracy_std"] == pytest.approx(0.1)
  assert row["train_seconds"] == 2.0


def test_two_words_of_each_of_many_texts_tell_its_label(run, tmp_path):
  done = run("many_rows.py", "1005", tmp_path / "many.csv")
  assert done.returncode == 0, done.stderr[-2000:]
  signs = {"bad": {"awful", "bad", "dull", "poor"}, "good": {"fine", "good", "great", "lovely"}}
  rows = read(tmp_path, "many")
  assert len(rows) == 1005
  for row in rows:
    words = row["text"].split()
    assert 20 <= len(words) <= 60
    others = [word for word in words if word not in signs[row["label"]]]
    assert len(words) - len(others) in (1, 2)
    assert all(word.startswith("w") for word in others)
  assert 400 < sum(row["label"] == "good" for row in rows) < 600
