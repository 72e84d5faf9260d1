"""Output of a training run: live on a terminal and in a notebook, plain lines in a pipe or file."""

import builtins
import errno
import importlib
import math
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
from rich import progress as rich_progress
from rich.console import Console as RichConsole
from rich.table import Column, Table
from rich.text import Text

from imdb_jax import plots
from imdb_jax.config import NAMED_SOURCES, Config
from imdb_jax.data.reviews import CLASSES
from imdb_jax.data.tokens import TokenData
from imdb_jax.errors import UsageError, printable
from imdb_jax.program import Program
from imdb_jax.store.metrics_log import METRICS, Line, decimal


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
    has_kernel = "ipykernel" in sys.modules
    force_terminal = False if has_kernel else None
    # A script may import the kernel without running in it.
    self._is_notebook = has_kernel and hasattr(builtins, "get_ipython") and not is_quiet
    self._console = _Output(quiet=is_quiet, highlight=False, force_jupyter=False, force_terminal=force_terminal)
    # A terminal wraps at words; a file or pipe gets whole lines.
    self._console.soft_wrap = not self._console.is_terminal
    self._progress: rich_progress.Progress | None = None
    # Outputs of a notebook's cell: a line about the epoch, and the curves.
    self._live: list[Any] = []

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
    if self._is_notebook and not self._live:
      display = importlib.import_module("IPython.display").display
      self._live = [display({"text/plain": ""}, raw=True, display_id=True) for _ in range(2)]
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
      self._show("  ".join((f"Epoch {self._epoch}", f"step {done}/{self._num_steps}", *parts, f"{left:.0f} s left")))

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

  def show_epoch(self, history: list[Line], num_epochs: int) -> None:
    """Show the last one of the finished epochs; in a notebook, also the curves so far."""
    self.end_epoch()
    self._show(epoch_line(history[-1], num_epochs))
    if self._live:
      self._live[1].update({"text/html": plots.svg(plots.history(history)), "text/plain": ""}, raw=True)

  def _show(self, line: str) -> None:
    """Print a line; in a notebook, in place of the previous one."""
    if self._live:
      self._live[0].update({"text/plain": line}, raw=True)
    else:
      self.line(line)


def start_facts(program: Program, step: int) -> dict[str, Any]:
  """Return what provenance.json records of a start of the trainer."""
  return {
    "step": step,
    "devices": f"{program.mesh.size} x {program.mesh.devices.flat[0].device_kind}",
    "processes": jax.process_count(),
    "implementation": program.choice.name,
    "model": program.own_model,
    "precision": program.precision,
  }


def show_header(program: Program, data: TokenData, step: int, console: Console) -> None:
  """Print what will be trained, on what and how."""
  config, seeds = program.config, program.config.training.seeds
  facts, platform = start_facts(program, step), program.mesh.devices.flat[0].platform
  num_available = len(jax.devices(platform))
  limited = f" of {num_available}" if program.mesh.size < num_available else ""
  num_parameters = sum(leaf.size for leaf in jax.tree.leaves(program.abstract_state().params)) // len(seeds)
  num_steps = math.ceil(len(data.train) / config.training.batch_size)
  own = {} if data.classes == CLASSES and config.data.source in NAMED_SOURCES else _describe(config, data)
  if (path := config.run_dir / "left_out.txt").exists():
    own["Left out"] = f"the rows in {path}"
  console.header(
    {
      "Preset": config.preset,
      "Seeds": f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}: {len(seeds)} models, one ensemble",
      "Devices": f"{facts['devices']} ({platform}){limited}, {facts['processes']} process(es)",
      "Recurrence": f"{program.choice.name} ({program.choice.reason})",
      "Precision": f"matrix products in {program.precision}",
      "Parameters": f"{num_parameters:,}",
      **own,
      "Examples": f"{len(data.train):,} train, {len(data.validation):,} validation ({config.data.validation})",
      "Steps": f"{num_steps:,} per epoch, {config.training.epochs} epoch(s)",
      "Run": f"{config.run_dir} ({f'resumed at step {step:,}' if step else 'new'})",
    }
  )


def _describe(config: Config, data: TokenData) -> dict[str, str]:
  """Return rows of the header about own texts: the classes, and how the test texts were chosen."""
  shown = [f"{printable(name)} {count:,}" for name, count in data.counts.items()]
  more = f" and {len(shown) - 10:,} more" if len(shown) > 10 else ""
  group = config.data.group_column
  chosen = config.data.test_data or f"{len(data.test):,}"
  if config.data.test_data is None and config.data.source != "python":
    chosen += f", by the hash of column {group!r}" if group else ", by the hash of the text"
  return {"Texts": config.data.source, "Classes": ", ".join(shown[:10]) + more, "Test texts": printable(chosen)}


def epoch_line(line: Line, num_epochs: int) -> str:
  """Return an epoch in one line."""
  values = "  ".join(f"{name} {decimal(line[name])}" for name in METRICS)
  times = f"{line['seconds']:.1f} s training, {line['evaluation_seconds']:.1f} s evaluation"
  return f"Epoch {line['epoch']}/{num_epochs}  {values}  {times}"
