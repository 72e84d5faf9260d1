"""Console output of a training run: live on a terminal, plain lines in a pipe, file or notebook."""

import errno
import os
import sys
import time
from collections.abc import Mapping

from rich import progress as rich_progress
from rich.console import Console as RichConsole
from rich.table import Column, Table
from rich.text import Text

from imdb_jax.errors import UsageError
from imdb_jax.store.metrics_log import decimal


class _Output(RichConsole):
  """A console that keeps silent once nobody reads it, so that training goes on."""

  def on_broken_pipe(self) -> None:
    """Silence the console, as in `train.py | head`."""
    self.quiet = True
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

  def __exit__(self, *exception) -> None:
    try:
      super().__exit__(*exception)
    except OSError as error:
      # EIO: the terminal has gone.
      if error.errno != errno.EIO:
        raise UsageError(f"Standard output cannot be written: {error.strerror}.") from error
      self.on_broken_pipe()


class Console:
  """Standard output; quiet in all processes except the first."""

  def __init__(self, *, is_quiet: bool = False):
    # In a notebook, rich would create an output block per line. Its kernel asks for colors, as a terminal does.
    force_terminal = False if "ipykernel" in sys.modules else None
    self._console = _Output(quiet=is_quiet, highlight=False, force_jupyter=False, force_terminal=force_terminal)
    # A terminal wraps at words; a file or pipe gets whole lines.
    self._console.soft_wrap = not self._console.is_terminal
    self._progress: rich_progress.Progress | None = None

  @property
  def width(self) -> int | None:
    """Columns of the terminal; None without a terminal, where lines may have any length."""
    return self._console.width if self._console.is_terminal else None

  def line(self, text: str = "") -> None:
    """Print a line of text."""
    self._console.print(text, markup=False)

  def header(self, rows: Mapping[str, str]) -> None:
    """Print one line of name and value each; on a terminal, long values wrap below themselves."""
    if self._console.is_terminal:
      grid = Table.grid(Column(no_wrap=True), Column(overflow="fold"), padding=(0, 2, 0, 0))
      for name, value in rows.items():
        grid.add_row(Text(name), Text(value))
      self._console.print(grid)
      return
    width = max(map(len, rows))
    for name, value in rows.items():
      self.line(f"{name:<{width}}  {value}")

  def start_epoch(self, epoch: int, num_epochs: int, *, num_steps: int, done: int) -> None:
    """Start to show an epoch, whose first `done` steps a resumed run does not repeat."""
    self._epoch, self._num_steps = f"{epoch}/{num_epochs}", num_steps
    self._started, self._done_before = time.perf_counter(), done
    if self._console.is_terminal and not self._console.is_dumb_terminal:
      # Only the bar shrinks on a narrow terminal.
      progress = rich_progress.Progress(
        "{task.description}",
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(table_column=Column(no_wrap=True)),
        "{task.fields[status]}",
        rich_progress.TimeRemainingColumn(table_column=Column(no_wrap=True)),
        console=self._console,
        transient=True,
      )
      progress.start()
      # Rich hides the cursor, and a second Ctrl-C would leave it hidden.
      self._console.show_cursor()
      self._progress = progress
      self._task = progress.add_task(f"Epoch {self._epoch}", total=num_steps, completed=done, status="")

  def show_step(self, done: int, means: Mapping[str, float], num_reviews: int, *, is_logged: bool) -> None:
    """Show how many steps of an epoch are done, and loss and accuracy so far; `is_logged`: also without a terminal.

    `num_reviews` counts those that all seeds have processed since `start_epoch`.
    """
    seconds = max(time.perf_counter() - self._started, 1e-9)
    parts = [f"{name} {decimal(means[name])}" for name in ("loss", "accuracy")]
    parts.append(f"{num_reviews / seconds:,.0f} reviews/s")
    if self._progress is not None:
      self._progress.update(self._task, completed=done, status=self._fit(parts))
    elif is_logged:
      left = (self._num_steps - done) * seconds / max(done - self._done_before, 1)
      self.line("  ".join((f"Epoch {self._epoch}", f"step {done}/{self._num_steps}", *parts, f"{left:.0f} s left")))

  def _fit(self, parts: list[str]) -> str:
    """Return the first parts, as many as the progress line has room for."""
    # Epoch and steps take their own width; a slash, four blanks and the time left take 13 columns.
    room = self._console.width - len(f"Epoch {self._epoch}") - 2 * len(str(self._num_steps)) - 13
    while len("  ".join(parts)) > max(room, 0):
      parts = parts[:-1]
    return "  ".join(parts)

  def show_evaluation(self, done: int, total: int) -> None:
    """Show the progress of an evaluation."""
    if self._progress is not None:
      description = f"Validation {self._epoch}"
      self._progress.update(self._task, description=description, completed=done, total=total, status="")

  def end_epoch(self) -> None:
    """Remove the progress bar."""
    if self._progress is not None:
      self._progress.stop()
      self._progress = None
