"""`predict`: texts from the command line, a file or a pipe."""

import csv
import json
import subprocess
import types

import numpy as np
import pytest
from running import assert_one_clear_line, finish, start

import imdb_jax
from imdb_jax import cli
from imdb_jax.config import Config, RuntimeConfig
from imdb_jax.data.reviews import CLASSES

REVIEW = "A film I will not forget."


def test_every_text_gets_an_answer(trained, tmp_path, call):
  texts = [REVIEW, "", "zzzz qqqq", "good " * 200_000]
  (tmp_path / "first.txt").write_text("\n".join(texts))
  code, stdout, stderr = call("predict", trained, "--platform", "cpu", "--json", "--file", tmp_path / "first.txt")
  assert code == 0, stderr
  answers = [json.loads(line) for line in stdout.splitlines()]
  assert [answer["text"] for answer in answers] == texts
  assert all(0 < answer["probabilities"]["positive"] < 1 for answer in answers)
  assert answers[1]["known_words"] == answers[2]["known_words"] == 0

  (tmp_path / "second.txt").write_bytes(b"caf\xff\xfe\n" + texts[0].encode() + b"\n")
  code, stdout, stderr = call("predict", trained, "--platform", "cpu", "--file", tmp_path / "second.txt")
  assert code == 0, stderr
  # The probability of a text does not depend on the other texts.
  probability, name = stdout.splitlines()[1].split()[:2]
  assert name == answers[0]["class"]
  assert float(probability) == pytest.approx(answers[0]["probabilities"][name], abs=1e-4)


@pytest.mark.parametrize(
  "arguments",
  [
    ("RUN", "good", "bad", "--json", "--platform", "cpu"),
    ("RUN", "--platform", "cpu", "--json", "good", "bad"),
    ("--json", "RUN", "good", "--platform", "cpu", "bad"),
  ],
)
def test_texts_may_stand_before_between_and_after_flags(arguments, trained, call):
  code, stdout, stderr = call("imdb-jax", "predict", *(trained if each == "RUN" else each for each in arguments))
  assert code == 0, stderr
  assert [json.loads(line)["text"] for line in stdout.splitlines()] == ["good", "bad"]


def test_several_runs_answer_with_their_mean_probability(trained, other_run, call):
  larger, smaller = (json.loads((each / "vocab.json").read_text())["words"] for each in (trained, other_run))
  (rare, *_) = set(larger) - set(smaller)
  texts = [REVIEW, "a bad film", rare]

  def answers(*arguments):
    code, stdout, stderr = call("predict", *arguments, "--platform", "cpu", "--json")
    assert code == 0, stderr
    return [json.loads(line) for line in stdout.splitlines()]

  single = [answers(run_dir, *texts) for run_dir in (trained, other_run)]
  both = answers(trained, "--with", other_run, *texts)
  assert [answer["text"] for answer in both] == texts
  for answer, *members in zip(both, *single, strict=True):
    probabilities = [member["probabilities"]["positive"] for member in members]
    assert len(set(probabilities)) == 2
    assert answer["probabilities"]["positive"] == pytest.approx(np.mean(probabilities), rel=1e-6)
    assert answer["known_words"] == max(member["known_words"] for member in members)
  assert (single[0][2]["known_words"], single[1][2]["known_words"]) == (1, 0)
  three = answers(trained, texts[0], "--with", other_run, "--with", other_run)
  expected = [single[place][0]["probabilities"]["positive"] for place in (0, 1, 1)]
  assert three[0]["probabilities"]["positive"] == pytest.approx(np.mean(expected), rel=1e-6)


def test_a_folder_that_is_no_run_cannot_join(trained, tmp_path, call):
  result = call("predict", trained, "--with", tmp_path, "good", "--platform", "cpu")
  assert_one_clear_line(result, 2, f"{tmp_path}: not a run directory")


def test_a_pipe_is_answered_line_by_line(trained):
  process = start("predict", trained, "--platform", "cpu", stdin=subprocess.PIPE)
  assert process.stdin is not None
  assert process.stdout is not None
  for text in ("good", "bad"):
    process.stdin.write(f"{text}\r\n".encode())
    process.stdin.flush()
    # Before the pipe is closed: the program at its other end may wait for the answer.
    assert f"  {text}" in process.stdout.readline().decode().rstrip()
  assert finish(process)[0] == 0


def test_many_short_reviews_are_encoded_in_parts(tmp_path, monkeypatch, call):
  """One read of a file may return a million empty lines, whose tokens would take a gigabyte."""
  sizes = []

  def answers(texts, **_):
    sizes.append(len(texts))
    return [{"class": None, "probabilities": {"a": 0.5, "b": 0.5}, "known_words": 0}] * len(texts)

  classifier = types.SimpleNamespace(config=Config())
  ensemble = types.SimpleNamespace(answers=answers, classes=CLASSES, classifiers=[classifier])
  monkeypatch.setattr(cli, "_load", lambda given: ensemble)
  (tmp_path / "reviews.txt").write_text("bad\n" * 10_000)
  code, stdout, _ = call("predict", tmp_path, "--file", tmp_path / "reviews.txt")
  assert code == 0
  assert sum(sizes) == len(stdout.splitlines()) == 10_000
  assert max(sizes) <= 4096


def test_a_review_is_shown_in_one_line_without_control_characters(trained, call):
  code, stdout, stderr = call("predict", trained, "--platform", "cpu", "good\nfilm \x1b[31m\a")
  assert code == 0, stderr
  assert stdout.splitlines() == [stdout.removesuffix("\n")]
  assert "good film  [31m" in stdout
  assert "\x1b" not in stdout


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (("good", "--file", "reviews.txt"), "--file reviews.txt: cannot be combined with reviews on the command line"),
    (("--file", "/dev/zero"), "a line of more than 8,388,608 bytes"),
    (("--file", "/none"), "--file /none: No such file"),
    (("good", "--output", "a.csv"), "--output a.csv: cannot be combined with reviews on the command line"),
    (("good", "--threshold", "1.5"), "--threshold 1.5: must be from 0 to 1"),
    (("good", "--abstain-below", "nan"), "--abstain-below nan: must be from 0 to 1"),
    (("good", "--escape-formulas"), "--escape-formulas: requires --output"),
  ],
)
def test_wrong_files_are_refused(trained, arguments, words, call):
  assert_one_clear_line(call("predict", trained, *arguments, "--platform", "cpu"), 2, words)


def test_a_reader_may_leave_early(trained):
  process = start("predict", trained, "--platform", "cpu", *["good"] * 5000)
  assert process.stdout is not None
  process.stdout.readline()
  process.stdout.close()
  assert process.stderr is not None
  with process.stderr:
    assert process.stderr.read() == b""
  assert process.wait(timeout=60) == 0


def test_a_table_comes_back_with_the_answers_of_the_classifier(trained, tmp_path, call):
  texts = [REVIEW, "zzzz", "a bad\nfilm", "good, good"]
  with (tmp_path / "new.csv").open("w", newline="") as file:
    csv.writer(file).writerows([("id", "review"), *enumerate(texts)])
  flags = ("--file", tmp_path / "new.csv", "--text-column", "review", "--platform", "cpu")
  code, stdout, stderr = call("predict", trained, *flags, "--output", tmp_path / "scored.csv")
  assert (code, stdout, stderr) == (0, f"{tmp_path / 'scored.csv'}: 4 rows\n", "")
  with (tmp_path / "scored.csv").open(newline="") as file:
    rows = list(csv.DictReader(file))
  assert [row["review"] for row in rows] == texts
  classifier = imdb_jax.Classifier.load(trained, runtime=RuntimeConfig(platform="cpu"))
  probabilities = classifier.predict_proba(texts)
  assert [float(row["probability_positive"]) for row in rows] == pytest.approx(probabilities[:, 1].tolist(), rel=1e-6)
  predicted = classifier.predict(texts).tolist()
  assert [row["class"] for row in rows] == [predicted[0], "", *predicted[2:]]
  # Without an output, the answers are printed.
  code, stdout, _ = call("predict", trained, *flags)
  assert [line.split()[1] for line in stdout.splitlines()] == [predicted[0], "unknown", *predicted[2:]]


def test_a_text_without_a_known_word_has_the_shares_of_the_training_texts(trained, call):
  shares = json.loads((trained / "classes.json").read_text())
  code, stdout, _ = call("predict", trained, "--platform", "cpu", "--json", "zzzz qqqq", "--threshold", "0.01")
  answer = json.loads(stdout)
  assert (code, answer["class"], answer["known_words"]) == (0, None, 0)
  total = sum(shares.values())
  assert answer["probabilities"] == pytest.approx({name: count / total for name, count in shares.items()})
