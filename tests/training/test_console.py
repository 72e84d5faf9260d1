"""What a terminal shows of a run, and what a pipe does."""

import itertools
import os
import re
import sys
import time

import pytest
from training.tiny import tiny

from imdb_jax.training import report
from imdb_jax.training.console import Console, decimal

SHOW_CURSOR, HIDE_CURSOR = "\x1b[?25h", "\x1b[?25l"
MEANS = {"loss": 0.6916, "accuracy": 0.5288}


@pytest.fixture
def terminal(monkeypatch):
  """Has standard output count as a terminal of that kind."""

  def become(kind: str = "xterm", columns: int = 80) -> None:
    for name, value in {"FORCE_COLOR": "1", "TERM": kind, "COLUMNS": str(columns)}.items():
      monkeypatch.setenv(name, value)

  return become


def plain(written: str) -> list[str]:
  """The lines, without colors and moves of the cursor, that are not blank."""
  lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", written))
  return [line for line in lines if line.strip()]


def show_an_epoch() -> None:
  console = Console()
  console.start_epoch(3, 10, num_steps=391, done=0)
  console.show_step(50, MEANS, 1600, is_logged=True)
  console.end_epoch()


def test_a_terminal_that_cannot_draw_gets_lines(terminal, capsys):
  terminal("dumb")
  show_an_epoch()
  written = capsys.readouterr().out
  assert written.startswith("Epoch 3/10  step 50/391  loss 0.6916  accuracy 0.5288")
  assert "\x1b" not in written


def test_a_run_that_is_ended_at_once_leaves_a_cursor(terminal, capsys):
  terminal()
  console = Console()
  console.start_epoch(3, 10, num_steps=391, done=0)
  console.show_step(50, MEANS, 1600, is_logged=True)
  written = capsys.readouterr().out
  console.end_epoch()
  assert "3/10" in written
  assert written.rfind(SHOW_CURSOR) > written.rfind(HIDE_CURSOR)


def test_a_run_goes_on_without_its_terminal(terminal, monkeypatch):
  terminal()
  ours, theirs = os.openpty()
  with open(theirs, "w") as stdout:  # noqa: PTH123
    monkeypatch.setattr(sys, "stdout", stdout)
    console = Console()
    console.start_epoch(3, 10, num_steps=391, done=0)
    os.close(ours)
    console.end_epoch()
    console.line("SIGHUP: saving step 50")


@pytest.mark.parametrize(
  ("columns", "status"),
  [
    (40, "loss 0.6916"),
    (60, "loss 0.6916  accuracy 0.5288"),
    (80, "loss 0.6916  accuracy 0.5288  1,600 reviews/s"),
    (120, "loss 0.6916  accuracy 0.5288  1,600 reviews/s"),
  ],
)
def test_the_progress_line_leaves_out_what_does_not_fit(columns, status, terminal, monkeypatch, capsys):
  terminal(columns=columns)
  monkeypatch.setattr(time, "perf_counter", itertools.count().__next__)
  console = Console()
  console.start_epoch(3, 10, num_steps=391, done=0)
  console.show_step(50, MEANS, 1600, is_logged=True)
  console.end_epoch()
  # Drawn a last time at the end.
  line = plain(capsys.readouterr().out)[-1]
  assert line.split()[:2] == ["Epoch", "3/10"]
  assert " 50/391 " in line
  assert f" {status} -:--:--" in line
  assert len(line) <= columns


def test_the_progress_line_of_an_evaluation_fits_a_narrow_terminal(terminal, capsys):
  terminal(columns=40)
  console = Console()
  console.start_epoch(10, 10, num_steps=391, done=0)
  console.show_evaluation(12_000, 25_000)
  console.end_epoch()
  line = plain(capsys.readouterr().out)[-1]
  assert line.startswith("Validation 10/10 ")
  assert "12000/25000  -:--:--" in line


@pytest.mark.parametrize(
  ("columns", "shown"),
  [(34, ["loss", "val_loss", "seconds"]), (33, ["loss", "val_loss"]), (23, ["val_loss"]), (10, ["val_loss"])],
)
def test_a_table_leaves_out_columns_and_never_cuts_a_number(columns, shown, terminal, capsys):
  terminal(columns=columns)
  cells = {"loss": "1.235e+12", "val_loss": "0.5987", "seconds": "0.6"}
  Console().table("History", list(cells), [list(cells.values())], least=("seconds", "loss"))
  header, _, row = (line.strip("┏┓┃│ ") for line in plain(capsys.readouterr().out)[2:5])
  assert [name.strip() for name in header.split("┃")] == shown
  assert [cell.strip() for cell in row.split("│")] == [cells[name] for name in shown]


def test_the_closing_tables_keep_the_validation_on_a_narrow_terminal(terminal, tmp_path, capsys):
  terminal(columns=40)
  metrics = {"loss": 0.1, "accuracy": 0.2, "val_loss": 0.3, "val_accuracy": 0.4}
  line = {"epoch": 1, **metrics, "seconds": 1.0, "evaluation_seconds": 1.0, "ensemble_accuracy": 0.5}
  line["seeds"] = [{"seed": seed, **metrics} for seed in range(2)]
  report.show(tiny(tmp_path, num_seeds=2), [line], Console())
  rows = [row for row in plain(capsys.readouterr().out) if row.startswith("│")]
  assert [re.findall(r"[\d.]+", row) for row in rows] == [[first, "0.3000", "0.4000"] for first in "101"]
  assert max(map(len, rows)) <= 40


@pytest.mark.parametrize(
  ("value", "shown"),
  [(0.69164, "0.6916"), (12345.678, "12345.6780"), (1.23456e12, "1.235e+12"), (float("nan"), "nan")],
)
def test_huge_values_are_short(value, shown):
  assert decimal(value) == shown
