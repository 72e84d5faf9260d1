"""Texts of one's own, from a file to answers, as a person runs the commands."""

import csv
import json
import random
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics
import sklearn.utils.class_weight
from running import Call, assert_one_clear_line, run

import imdb_jax
from imdb_jax.config import Config
from imdb_jax.errors import DataError
from imdb_jax.store import run_directory

WORDS = {"food": "bread soup salt cook", "sport": "ball goal team coach", "tech": "code chip data cloud"}
TINY = ("--platform", "cpu", "--num-devices", "1", "--sequence-length", "16", "--vocabulary-size", "50")
TINY += ("--embedding-size", "4", "--hidden-size", "4", "--epochs", "3", "--learning-rate", "0.1", "--mask-padding")


def write_rows(path: Path, num_rows: int = 600, seed: int = 0) -> Path:
  """Write texts whose words tell the class, with line breaks, quotes and commas in them."""
  rng = random.Random(seed)
  with path.open("w", newline="", encoding="utf-8") as file:
    writer = csv.writer(file)
    writer.writerow(["id", "text", "label"])
    for number in range(num_rows):
      label = list(WORDS)[min(number % 5, 2)]
      words = [rng.choice([*WORDS[label].split(), "the", 'a "b",', "one\ntwo"]) for _ in range(12)]
      writer.writerow([number, " ".join(words), label])
  return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
  """Texts of three classes, and a run on them in the folder `run`."""
  folder = tmp_path_factory.mktemp("own")
  code, stdout, stderr = run("train", "--data", write_rows(folder / "rows.csv"), *TINY, "--run-dir", folder / "run")
  assert (code, stderr) == (0, "")
  assert "Classes     food " in stdout
  assert ", by the hash of the text" in stdout
  return folder


def test_the_run_is_evaluated_on_its_own_test_texts(folder, call: Call):
  code, stdout, _ = call("evaluate", folder / "run", "--json")
  result = json.loads(stdout)
  matrix = np.array(result["confusion_matrix"])
  assert code == 0
  assert matrix.sum() == result["num_reviews"] == sum(each["num_reviews"] for each in result["by_class"])
  assert 80 < result["num_reviews"] < 160
  assert result["accuracy"] == pytest.approx(matrix.trace() / matrix.sum())
  assert result["accuracy"] > 0.8
  assert [each["class"] for each in result["by_class"]] == list(WORDS)
  code, stdout, _ = call("evaluate", folder / "run")
  assert "class sport " in stdout


def test_other_labelled_texts_are_evaluated(folder, tmp_path, call: Call):
  held_out = write_rows(tmp_path / "held_out.csv", 50, seed=1)
  code, stdout, _ = call("evaluate", folder / "run", "--data", held_out, "--json")
  result = json.loads(stdout)
  assert (code, result["num_reviews"], result["data"]) == (0, 50, str(held_out))
  with held_out.open(newline="") as file:
    rows = list(csv.DictReader(file))
  classifier = imdb_jax.Classifier.load(folder / "run")
  predicted = classifier.predict([row["text"] for row in rows])
  expected = sklearn.metrics.confusion_matrix([row["label"] for row in rows], predicted, labels=list(WORDS))
  assert result["confusion_matrix"] == expected.tolist()
  held_out.write_text("text,label\nball,sports\n")
  result = call("evaluate", folder / "run", "--data", held_out)
  assert_one_clear_line(result, 3, "line 2: the label 'sports' is not a class of the training texts")


@pytest.mark.slow
def test_rows_without_a_text_are_counted_by_every_run_and_listed_in_its_folder(folder, tmp_path, call: Call):
  train, test = write_rows(tmp_path / "a.csv", 60), write_rows(tmp_path / "b.csv", 20, seed=1)
  for path, more in ((train, '60,,food\n61," ",tech\n'), (test, "20,,food\n")):
    with path.open("a", newline="") as file:
      file.write(more)
  number = train.read_text().count("\n")
  places = {train: [f"line {number - 1:,}", f"line {number:,}"], test: [f"line {test.read_text().count(chr(10)):,}"]}
  counted = {train: f"{train}: left out 2 of 62 rows, whose text is empty"}
  counted[test] = f"{test}: left out 1 of 21 rows, whose text is empty"
  flags = ("--data", train, "--test-data", test, *TINY, "--epochs", "1", "--cache-dir", tmp_path / "cache", "--run-dir")
  # The second one finds the tokens in the cache.
  for name in ("first", "second"):
    listed = tmp_path / name / "left_out.txt"
    code, stdout, stderr = call("train", *flags, tmp_path / name)
    assert (code, stderr) == (0, "")
    assert ("once; then cached" in stdout) == (name == "first")
    for path, line in counted.items():
      assert f"\n{line} ({', '.join(places[path])})\n" in f"\n{stdout}"
    assert f"Left out    the rows in {listed}\n" in stdout
    blocks = ["\n".join([counted[path], *places[path]]) for path in (train, test)]
    assert listed.read_text() == "\n\n".join(blocks) + "\n"
  code, _, stderr = call("evaluate", tmp_path / "second", "--data", test)
  assert (code, stderr) == (0, f"{counted[test]} ({places[test][0]})\n")
  # A run of an older version has no such file.
  listed.unlink()
  code, stdout, _ = call("train", *flags, tmp_path / "second")
  assert (code, "resumed" in stdout, stdout.count("left out"), listed.exists()) == (0, True, 2, False)
  assert "Left out" not in stdout
  assert not (folder / "run" / "left_out.txt").exists()


def test_answers_name_the_class(folder, call: Call):
  code, stdout, _ = call("predict", folder / "run", "ball goal team", "soup salt bread", "--json")
  answers = [json.loads(line) for line in stdout.splitlines()]
  assert (code, [answer["class"] for answer in answers]) == (0, ["sport", "food"])
  for answer in answers:
    assert list(answer["probabilities"]) == list(WORDS)
    assert sum(answer["probabilities"].values()) == pytest.approx(1)
    assert answer["probabilities"][answer["class"]] == max(answer["probabilities"].values())
  _, stdout, _ = call("predict", folder / "run", "ball goal team")
  assert stdout == f"{answers[0]['probabilities']['sport']:.4f}  sport  ball goal team\n"


def test_a_file_that_has_moved_is_resumed_and_one_that_has_changed_is_refused(folder, tmp_path, call: Call):
  again = ("train", *TINY, "--run-dir", folder / "run", "--data")
  moved = tmp_path / "moved.csv"
  moved.write_bytes((folder / "rows.csv").read_bytes())
  code, stdout, _ = call(*again, moved)
  assert code == 0
  assert "resumed at step" in stdout
  before = {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}
  with moved.open("a") as file:
    file.write("600,coach and goal,sport\n")
  result = call(*again, moved)
  assert_one_clear_line(result, 3, "not the reviews that the run was trained on", " train, ", " now")
  moved.write_bytes((folder / "rows.csv").read_bytes().replace(b",food\r\n", b",foods\r\n"))
  assert_one_clear_line(call(*again, moved), 3, "texts or labels are others")
  result = call(*again, moved, "--text-column", "id")
  assert_one_clear_line(result, 2, "data.text_column: text -> id")
  assert {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
  ("content", "flags", "message"),
  [
    ("text,label\na,1\nb,\n", (), "line 3, column 'label': the label is empty"),
    ("text,label\na,1\nb,1\n", (), "a.csv: all 2 labels are '1'"),
    ("text,label\na,1\nb,0\n", ("--label-column", "stars"), "line 1: has no column 'stars', only 'text', 'label'"),
  ],
)
def test_a_faulty_file_leaves_no_run_behind(tmp_path, call: Call, content, flags, message):
  (tmp_path / "a.csv").write_text(content)
  result = call("train", "--data", tmp_path / "a.csv", *flags, "--run-dir", tmp_path / "run", *TINY)
  assert_one_clear_line(result, 3, message)
  assert not (tmp_path / "run").exists()


def test_test_texts_require_texts_of_ones_own(tmp_path, call: Call):
  result = call("train", "--preset", "sample", "--test-data", "a.csv", "--run-dir", tmp_path / "run")
  assert_one_clear_line(result, 2, "--test-data", "requires texts of your own, not --data sample")


@pytest.mark.parametrize("content", ["{}", '["a"]', '["a", "a"]', '["a", "b", "a"]', '["a", 1]', "[" * 10_000])
def test_damaged_names_of_classes_are_refused(folder, tmp_path, call: Call, content):
  (tmp_path / "run").mkdir()
  for name in ("config.json", "vocab.json", "provenance.json"):
    (tmp_path / "run" / name).write_bytes((folder / "run" / name).read_bytes())
  (tmp_path / "run" / "classes.json").write_text(content)
  assert_one_clear_line(call("predict", tmp_path / "run", "a"), 2, "classes.json")


class TestFromPython:
  TEXTS = tuple(f"{'good fine' if i % 3 else 'bad dull'} word{i}" for i in range(120))
  LABELS = tuple("01" if i % 3 else "1" for i in range(120))

  def config(self, run_dir: Path, **training) -> Config:
    config = Config()
    sections: dict = {
      "data": {"vocabulary_size": 20, "sequence_length": 4},
      "model": {"embedding_size": 4, "hidden_size": 4, "input_dropout_rate": 0, "recurrent_dropout_rate": 0},
      "training": {"epochs": 1, "batch_size": 200, **training},
      "optimizer": {"learning_rate": 1e-20},
      "runtime": {"run_dir": run_dir, "platform": "cpu", "num_devices": 1},
    }
    sections = {name: type(getattr(config, name))(**values) for name, values in sections.items()}
    return Config(**sections)

  @pytest.mark.slow
  def test_classes_are_weighed_in_the_loss_alone(self, tmp_path):
    """The first step's loss is that of the initial model, which a tiny learning rate keeps."""
    given = {"train": (self.TEXTS, self.LABELS), "test": (self.TEXTS[:9], self.LABELS[:9])}
    lines = {}
    for weights in ("none", "balanced"):
      config = self.config(tmp_path / weights, class_weights=weights)
      (lines[weights],) = imdb_jax.fit(config, data=given).history
    classifier = imdb_jax.Classifier.load(tmp_path / "balanced")
    assert classifier.classes == ("01", "1")
    probabilities = classifier.predict_proba(self.TEXTS)
    sample_weight = sklearn.utils.class_weight.compute_sample_weight("balanced", self.LABELS)
    for weights, each in (("none", None), ("balanced", sample_weight)):
      expected = sklearn.metrics.log_loss(self.LABELS, probabilities, sample_weight=each)
      assert lines[weights]["loss"] == pytest.approx(expected, rel=1e-5)
    for name in ("accuracy", "val_loss", "val_accuracy"):
      assert lines["none"][name] == lines["balanced"][name]

  @pytest.mark.slow
  def test_the_same_texts_resume_the_run_and_others_do_not(self, tmp_path):
    config = self.config(tmp_path / "run")
    first = imdb_jax.fit(config, data={"train": (np.array(self.TEXTS), np.array(self.LABELS))})
    again = imdb_jax.fit(config, data={"train": (list(self.TEXTS), list(self.LABELS))})
    assert again.history == first.history
    with pytest.raises(DataError, match="texts or labels are others"):
      imdb_jax.fit(config, data={"train": (self.TEXTS, [label + "!" for label in self.LABELS])})
    assert run_directory.load_config(tmp_path / "run").data.source == "python"

  def test_a_run_on_them_is_evaluated_on_a_file(self, tmp_path, call: Call):
    imdb_jax.fit(self.config(tmp_path / "run"), data={"train": (self.TEXTS, self.LABELS)})
    assert_one_clear_line(call("evaluate", tmp_path / "run"), 3, "name texts to evaluate, as by --data FILE")
    (tmp_path / "a.jsonl").write_text('{"text": "good", "label": "01"}\n{"text": "bad", "label": 1}\n')
    code, stdout, _ = call("evaluate", tmp_path / "run", "--data", tmp_path / "a.jsonl", "--json")
    result = json.loads(stdout)
    assert (code, result["num_reviews"]) == (0, 2)
    assert "confusion_matrix" not in result
    assert sum(result[f"{a}_{b}"] for a in ("true", "false") for b in ("positives", "negatives")) == 2
