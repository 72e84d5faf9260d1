"""What a terminal shows of a run, and what a pipe does."""

import pytest

from imdb_jax.training.console import Console

SHOW_CURSOR, HIDE_CURSOR = "\x1b[?25h", "\x1b[?25l"
MEANS = {"loss": 0.6916, "accuracy": 0.5288}


@pytest.fixture
def terminal(monkeypatch):
  """Has standard output count as a terminal of that kind."""

  def become(kind: str = "xterm", columns: int = 80) -> None:
    for name, value in {"FORCE_COLOR": "1", "TERM": kind, "COLUMNS": str(columns)}.items():
      monkeypatch.setenv(name, value)

  return become


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
