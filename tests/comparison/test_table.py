"""The table on terminals of any width, as Markdown and as JSON, and the reviews on which models disagree."""

import re

import numpy as np
import pytest

from imdb_jax.comparison import table
from imdb_jax.comparison.results import Result
from imdb_jax.errors import DivergenceError
from imdb_jax.report import page

LSTM = {
  "name": "lstm",
  "accuracies": [0.8712, 0.8752, 0.8732],
  "accuracy": 0.8732,
  "accuracy_std": 0.002,
  "difference": 0.0,
  "interval": [0.0, 0.0],
  "train_seconds": 1234.5,
  "loss": 0.3119,
  "calibration_error": 0.0181,
  "num_parameters": 643_585,
  "reviews_per_second": 812.3,
}
SVM = {
  "name": "pretrained",
  "accuracies": [0.9181],
  "accuracy": 0.9181,
  "accuracy_std": None,
  "difference": 0.0449,
  "interval": [-0.0412, 0.0486],
  "train_seconds": 24.56,
  "loss": None,
  "calibration_error": None,
  "num_parameters": 1_408_814,
  "reviews_per_second": None,
}
ROWS = [LSTM, SVM]


def test_a_pipe_gets_the_whole_table():
  heading, lstm, svm = table.lines(ROWS, {})
  assert " ".join(heading.split()) == "Model n Acc. % ± vs lstm Train Loss ECE Params Rev/s"
  assert " ".join(lstm.split()) == "lstm 3 87.32 0.20 +0.0 [0.0, 0.0] 1234 0.312 1.8 644k 812"
  assert " ".join(svm.split()) == "pretrained 1 91.81 - +4.5 [-4.1, 4.9] 24.6 - - 1.41M -"
  assert len({len(heading), len(lstm), len(svm)}) == 1


@pytest.mark.parametrize(("width", "last"), [(20, "%"), (40, "±"), (60, "Loss"), (80, "Rev/s"), (100, "Rev/s")])
def test_a_narrow_terminal_shows_the_most_important_columns(width, last):
  shown = table.lines(ROWS, {}, width)
  assert shown[0].split()[-1] == last
  assert max(map(len, shown[:3])) <= max(width, 21)
  assert shown[3:] == ([] if last == "Rev/s" else [shown[-1]])
  if shown[3:]:
    assert re.fullmatch(r"Too narrow for .*Rev/s: see comparison\.md", shown[3])


def test_a_column_without_values_is_left_out():
  heading, _ = table.lines([SVM], {})
  assert " ".join(heading.split()) == "Model n Acc. % vs lstm Train Params"


def markdown(failures: dict[str, Exception]) -> list[str]:
  text = page.render("comparison.md", title="Title", cells=table._cells(ROWS), failures=failures, notes=["A note."])
  return [line for line in text.splitlines() if line.startswith("|")]


def test_a_failure_is_one_line_of_the_table():
  failures: dict[str, Exception] = {"fast": DivergenceError("Step 3 is\nnot finite | inf")}
  assert table.lines(ROWS, failures)[-1] == "fast        failed: Step 3 is not finite | inf"
  assert markdown(failures)[-1].startswith(r"| fast |  | failed: Step 3 is not finite \| inf |")
  assert table.lines([], failures)[-1].startswith("fast")


def test_all_lines_of_the_markdown_table_have_the_same_columns():
  lines = markdown({"fast": ValueError("no")})
  assert {line.count("|") for line in lines} == {11}
  assert "| lstm | 3 | 87.32 | 0.20 |" in lines[2]


@pytest.mark.parametrize(
  ("value", "shown"),
  [
    *((0, "0"), (1, "1"), (0.1236, "0.124"), (12.345, "12.3"), (999.7, "1000"), (9999, "9999")),
    *((12_345, "12.3k"), (999_999, "1000k"), (1_408_814, "1.41M")),
  ],
)
def test_numbers_have_three_digits(value, shown):
  assert table._number(value) == shown


def test_reviews_on_which_models_disagree_come_first():
  labels = np.array([0, 1] * 20 + [1], np.int32)
  logits = np.zeros((2, 41))
  logits[:, 40], logits[:, 7] = (3, -3), (-2, 2)
  first, second = ([Result(logits=row.tolist())] for row in logits)
  found = table.disagreements({"first": first, "second": second}, labels, lambda row: f"text {row}")
  assert len(found) == 20
  expected = [("first", pytest.approx(0.952574, abs=1e-6), True), ("second", pytest.approx(0.047426, abs=1e-6), False)]
  assert found[0] == {"number": 40, "label": "positive", "answers": expected, "text": "text 40"}
  assert [each["number"] for each in found[:3]] == [40, 7, 0]
  assert [is_right for *_, is_right in found[2]["answers"]] == [True, True]


def test_models_of_a_row_disagree_with_others_by_their_mean_probability():
  seeds = [Result(logits=[6.0, 3.0]), Result(logits=[-6.0, 3.0])]
  results = {"first": seeds, "second": [Result(logits=[0.0, 0.0])]}
  found = table.disagreements(results, np.array([0, 1], np.int32), str)
  assert [each["number"] for each in found] == [1, 0]
  # Half of the models are not most of them.
  assert [is_right for *_, is_right in found[1]["answers"]] == [False, True]


def test_texts_and_names_are_escaped_in_the_page():
  results = {name: [Result(logits=[1.0], val_accuracy=[0.5])] for name in ("<b>one</b>", "two $x_{")}
  rows = [dict(LSTM, name=name) for name in results]
  text = table.page(
    rows,
    results,
    np.array([1]),
    lambda row: "<script>",
    title="<i>",
    notes=["<u>"],
    failures={},
    reference="<b>one</b>",
  )
  assert not any(tag in text for tag in ("<b>one", "<script>", "<i>", "<u>"))
  assert "&lt;script&gt;" in text
