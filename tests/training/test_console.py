"""Output of a run on a terminal, in a file or pipe, and in a notebook."""

import builtins
import dataclasses
import io
import itertools
import os
import re
import sys
import time
import types

import pytest
from training.tiny import tiny

import imdb_jax
from imdb_jax import plots
from imdb_jax.report import page
from imdb_jax.training.console import Console, decimal, epoch_line

SHOW_CURSOR, HIDE_CURSOR = "\x1b[?25h", "\x1b[?25l"
MEANS = {"loss": 0.6916, "accuracy": 0.5288}
METRICS = {"loss": 0.1, "accuracy": 0.2, "val_loss": 0.3, "val_accuracy": 0.4}


@pytest.fixture
def terminal(monkeypatch):
  """Make rich treat standard output as a terminal."""

  def become(kind: str = "xterm", columns: int = 80) -> None:
    for name, value in {"FORCE_COLOR": "1", "TERM": kind, "COLUMNS": str(columns)}.items():
      monkeypatch.setenv(name, value)

  return become


def plain(written: str) -> list[str]:
  """Return the lines that are not blank, without colors and cursor moves."""
  lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", written))
  return [line for line in lines if line.strip()]


def show_an_epoch() -> None:
  console = Console()
  console.start_epoch(3, 10, num_steps=391, done=0)
  console.show_step(50, MEANS, 1600, is_logged=True)
  console.end_epoch()


def test_a_terminal_without_cursor_moves_gets_lines(terminal, capsys):
  terminal("dumb")
  show_an_epoch()
  written = capsys.readouterr().out
  assert written.startswith("Epoch 3/10  step 50/391  loss 0.6916  accuracy 0.5288")
  assert "\x1b" not in written


def test_a_run_that_is_killed_leaves_the_cursor_visible(terminal, capsys):
  terminal()
  console = Console()
  console.start_epoch(3, 10, num_steps=391, done=0)
  console.show_step(50, MEANS, 1600, is_logged=True)
  written = capsys.readouterr().out
  console.end_epoch()
  assert "3/10" in written
  assert written.rfind(SHOW_CURSOR) > written.rfind(HIDE_CURSOR)


def test_a_run_continues_without_its_terminal(terminal, monkeypatch):
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
  show_an_epoch()
  # The line is drawn for the last time at the end.
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


def show_a_run(tmp_path) -> None:
  """Print the longest lines of a run."""
  line = {"epoch": 1, **METRICS, "val_loss": 1.23456e12, "seconds": 1234.5, "evaluation_seconds": 1.0}
  line["seeds"] = [{"seed": seed, **METRICS} for seed in range(2)]
  config, console = tiny(tmp_path, num_seeds=2), Console()
  reason = "mosaic_gpu: it supports hidden sizes of 64 and 128, not 4, and an NVIDIA GPU of a later kind"
  console.header({"Preset": "sample", "Seeds": "0 to 1: 2 models, one ensemble", "Recurrence": f"chunked ({reason})"})
  console.line(epoch_line(line, 10))
  console.line("\n".join(page.summary(config, [line])))


@pytest.mark.parametrize("columns", [40, 60, 100])
def test_lines_wrap_at_words_on_a_terminal_and_not_at_all_elsewhere(columns, terminal, tmp_path, capsys):
  show_a_run(tmp_path)
  whole = capsys.readouterr().out.splitlines()
  assert len(whole) == 6
  assert max(map(len, whole)) > 100
  terminal(columns=columns)
  show_a_run(tmp_path)
  wrapped = plain(capsys.readouterr().out)
  assert max(map(len, wrapped)) <= columns
  assert " ".join(wrapped).split() == " ".join(whole).split()
  # Long values of the header wrap below themselves.
  (first,) = (number for number, line in enumerate(wrapped) if line.startswith("Recurrence  chunked"))
  assert wrapped[first + 1].startswith(" " * len("Recurrence  "))


class Notebook(io.StringIO):
  """Standard output of a Jupyter kernel, which is not a terminal, and the outputs of a cell."""

  def __init__(self):
    super().__init__()
    self.cell: list[list[dict[str, str]]] = []

  def isatty(self) -> bool:
    return False

  def display(self, data: dict[str, str], *, raw: bool, display_id: bool) -> types.SimpleNamespace:
    """Do what IPython.display.display does: return a handle whose method replaces the output."""
    assert raw and display_id
    shown = [data]
    self.cell.append(shown)
    return types.SimpleNamespace(update=lambda data, *, raw: shown.append(data))


def test_a_notebook_shows_a_line_and_curves_that_are_replaced_and_no_shell_hints(
  shared_programs, tmp_path, monkeypatch
):
  shell = type("ZMQInteractiveShell", (), {})()
  monkeypatch.setattr(builtins, "get_ipython", lambda: shell, raising=False)
  monkeypatch.setattr(sys, "stdout", Notebook())
  # As the kernel of a notebook does.
  monkeypatch.setitem(sys.modules, "ipykernel", sys)
  monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(display=sys.stdout.display))
  monkeypatch.setattr(plots, "svg", lambda figure: str([len(line.get_xdata()) for line in figure.axes[0].lines]))
  monkeypatch.setenv("FORCE_COLOR", "1")
  monkeypatch.setenv("COLUMNS", "60")
  config = tiny(tmp_path / "run")
  imdb_jax.fit(dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, log_every=2)))
  written = sys.stdout.getvalue()
  assert "\x1b" not in written
  assert "\r" not in written
  assert written.splitlines()[0].split() == ["Preset", "sample"]
  assert written.splitlines()[-1].startswith("Best epoch ")
  assert max(map(len, written.splitlines())) > 60
  for hint in ("Next:", "scripts/", ".py", "imdb-jax", "\nEpoch"):
    assert hint not in written
  line, curves = sys.stdout.cell
  shown = [each["text/plain"] for each in line[1:]]
  assert shown[0].startswith("Epoch 1/2  step 2/") and shown[-1].startswith("Epoch 2/2  loss ")
  # Each with the epochs so far.
  assert [each["text/html"] for each in curves[1:]] == ["[1, 1, 1]", "[2, 2, 1]"]


def test_a_script_that_has_imported_a_kernel_gets_lines(capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, "ipykernel", sys)
  show_an_epoch()
  assert capsys.readouterr().out.startswith("Epoch 3/10  step 50/391  loss 0.6916  accuracy 0.5288")


@pytest.mark.parametrize(
  ("value", "shown"),
  [(0.69164, "0.6916"), (12345.678, "12345.6780"), (1.23456e12, "1.235e+12"), (float("nan"), "nan")],
)
def test_huge_values_are_short(value, shown):
  assert decimal(value) == shown
