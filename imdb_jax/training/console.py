"""What a person sees of a training run: live on a terminal, plain lines in a pipe or file."""

import errno
import os
import sys
import time
from collections.abc import Mapping, Sequence

from rich import progress as rich_progress
from rich.console import Console as RichConsole
from rich.table import Column, Table


def decimal(value: float) -> str:
  """To four places; a huge value to four digits."""
  return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.4g}"


class _Output(RichConsole):
  """Training goes on where nobody reads any more."""

  def on_broken_pipe(self) -> None:
    """As in `train.py | head`."""
    self.quiet = True
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

  def __exit__(self, *exception) -> None:
    """Ends the writing of something; its terminal may have gone, as with a lost connection."""
    try:
      super().__exit__(*exception)
    except OSError as error:
      if error.errno != errno.EIO:
        raise
      self.on_broken_pipe()


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

  def table(self, title: str, columns: Sequence[str], rows: list[list[str]], *, least: Sequence[str]) -> None:
    """Where the terminal is too narrow, the columns named in `least` are left out, the first of them first."""
    widths = {name: max(map(len, cells)) for name, *cells in zip(columns, columns, *rows, strict=True)}
    for name in least:
      # A column has a border and two blanks, the last one a border more.
      if sum(widths.values()) + 3 * len(widths) + 1 > self._console.width:
        del widths[name]
    table = Table(title=title, title_justify="left")
    for name, width in widths.items():
      # Rich would cut what is too wide, numbers too.
      table.add_column(name, justify="right", min_width=width)
    for row in rows:
      table.add_row(*(cell for name, cell in zip(columns, row, strict=True) if name in widths))
    self._console.print(table)

  def start_epoch(self, epoch: int, num_epochs: int, *, num_steps: int, done: int) -> None:
    """Begins to show an epoch of which `done` steps lie behind a resume."""
    self._epoch, self._num_steps = f"{epoch}/{num_epochs}", num_steps
    self._started, self._done_before = time.perf_counter(), done
    if self._console.is_terminal and not self._console.is_dumb_terminal:
      # Only the bar gives way where the terminal is narrow.
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
      # Rich hides the cursor, and a second Ctrl-C leaves nobody to show it again.
      self._console.show_cursor()
      self._progress = progress
      self._task = progress.add_task(f"Epoch {self._epoch}", total=num_steps, completed=done, status="")

  def show_step(self, done: int, means: Mapping[str, float], num_reviews: int, *, is_logged: bool) -> None:
    """After `done` steps of the epoch: means so far, and the reviews that all seeds have seen since it started here."""
    seconds = max(time.perf_counter() - self._started, 1e-9)
    parts = [f"{name} {decimal(means[name])}" for name in ("loss", "accuracy")]
    parts.append(f"{num_reviews / seconds:,.0f} reviews/s")
    if self._progress is not None:
      self._progress.update(self._task, completed=done, status=self._fitting(parts))
    elif is_logged:
      left = (self._num_steps - done) * seconds / max(done - self._done_before, 1)
      self.line("  ".join((f"Epoch {self._epoch}", f"step {done}/{self._num_steps}", *parts, f"{left:.0f} s left")))

  def _fitting(self, parts: list[str]) -> str:
    """As many of the first ones as the progress line has room for."""
    # Beside them stand the epoch and the steps, and in 13 columns a slash, four blanks and the time left.
    room = self._console.width - len(f"Epoch {self._epoch}") - 2 * len(str(self._num_steps)) - 13
    while len("  ".join(parts)) > max(room, 0):
      parts = parts[:-1]
    return "  ".join(parts)

  def show_evaluation(self, done: int, total: int) -> None:
    if self._progress is not None:
      description = f"Validation {self._epoch}"
      self._progress.update(self._task, description=description, completed=done, total=total, status="")

  def end_epoch(self) -> None:
    if self._progress is not None:
      self._progress.stop()
      self._progress = None
