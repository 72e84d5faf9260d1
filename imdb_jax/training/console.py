"""What a person sees of a training run: live on a terminal, plain lines in a pipe or file."""

import os
import sys
import time
from collections.abc import Mapping

from rich import progress as rich_progress
from rich.console import Console as RichConsole
from rich.table import Table


class _Output(RichConsole):
  def on_broken_pipe(self) -> None:
    """Nobody reads any more, as in `train.py | head`: training goes on."""
    self.quiet = True
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Console:
  """Writes to standard output, and to nothing in the processes other than the first."""

  def __init__(self, *, is_quiet: bool = False):
    self._console = _Output(quiet=is_quiet, highlight=False, soft_wrap=True)
    self._progress: rich_progress.Progress | None = None
    self._task = rich_progress.TaskID(0)
    self._started = 0.0
    self._done_before = 0

  def line(self, text: str = "") -> None:
    self._console.print(text, markup=False)

  def header(self, rows: Mapping[str, str]) -> None:
    """One `name  value` line each."""
    width = max(map(len, rows))
    for name, value in rows.items():
      self.line(f"{name:<{width}}  {value}")

  def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for column in columns:
      table.add_column(column, justify="right")
    for row in rows:
      table.add_row(*row)
    self._console.print(table)

  def start_epoch(self, epoch: int, num_epochs: int, *, num_steps: int, done: int) -> None:
    """Begins to show an epoch of which `done` steps lie behind a resume."""
    self._label, self._num_steps = f"Epoch {epoch}/{num_epochs}", num_steps
    self._started, self._done_before = time.perf_counter(), done
    if self._console.is_terminal and not self._console.is_dumb_terminal:
      progress = rich_progress.Progress(
        "{task.description}",
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        "{task.fields[status]}",
        rich_progress.TimeRemainingColumn(),
        console=self._console,
        transient=True,
      )
      progress.start()
      # Rich hides the cursor, and a second Ctrl-C leaves nobody to show it again.
      self._console.show_cursor()
      self._progress = progress
      self._task = progress.add_task(self._label, total=num_steps, completed=done, status="")

  def show_step(self, done: int, means: Mapping[str, float], num_reviews: int, *, is_logged: bool) -> None:
    """After `done` steps of the epoch: means so far, and the reviews that all seeds have seen since it started here."""
    seconds = max(time.perf_counter() - self._started, 1e-9)
    rate = num_reviews / seconds
    status = f"loss {means['loss']:.4f}  accuracy {means['accuracy']:.4f}  {rate:,.0f} reviews/s"
    if self._progress is not None:
      self._progress.update(self._task, completed=done, status=status)
    elif is_logged:
      left = (self._num_steps - done) * seconds / max(done - self._done_before, 1)
      self.line(f"{self._label}  step {done}/{self._num_steps}  {status}  {left:.0f} s left")

  def show_evaluation(self, done: int, total: int) -> None:
    if self._progress is not None:
      description = f"{self._label}  validation"
      self._progress.update(self._task, description=description, completed=done, total=total, status="")

  def end_epoch(self) -> None:
    if self._progress is not None:
      self._progress.stop()
      self._progress = None
