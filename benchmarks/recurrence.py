"""The recurrence alone, forward and with its gradients: `python benchmarks/recurrence.py --help`.

Our implementations beside Keras and PyTorch, at the article's sizes but for the one that an axis varies. Every system
is a process; at each point they take turns, window by window. A window makes calls one after another and waits once, so
that a device is never idle for want of work.
"""

import dataclasses
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measuring
import tyro
from measuring import Process, WorkerError
from recurrence_worker import BASELINES, SYSTEMS, Answer, Point
from rich.console import Console
from rich.table import Table

from imdb_jax.errors import ImdbJaxError, UsageError

_AXES = {"batch_size": "rows", "num_steps": "positions", "hidden_size": "hidden units"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(measuring.Options):
  """Measure the recurrence, system by system, along axes of its sizes."""

  systems: tuple[str, ...] = tuple(SYSTEMS)
  """Which systems."""
  batch_size: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024)
  """Rows."""
  num_steps: tuple[int, ...] = (100, 200, 400, 800, 1600)
  """Positions."""
  hidden_size: tuple[int, ...] = (64, 128, 256)
  """Hidden units, and as many inputs."""
  windows: int = 5
  """Timed windows of each system at each point."""
  window_seconds: float = 0.2
  """How long a window takes, about; at least a call."""
  clock_ghz: float = 1.98
  """Of a streaming multiprocessor, for the floor of a GPU kernel; an H200 has 1.98."""
  plot: Path | None = None
  """Draw the results here, as a PNG."""

  def __post_init__(self):
    super().__post_init__()
    measuring.check_systems(self.systems, SYSTEMS)
    if self.clock_ghz <= 0:
      raise UsageError(f"--clock-ghz {self.clock_ghz}: must be a positive number.")

  def points(self) -> list[Point]:
    """Along each axis, the article's sizes once; forward, then with gradients."""
    base = {"batch_size": 32, "num_steps": 400, "hidden_size": 128}
    sizes = [base | {axis: value} for axis in _AXES for value in getattr(self, axis)]
    unique = [dict(items) for items in dict.fromkeys(tuple(size.items()) for size in sizes)]
    return [Point(**size, gradients=gradients) for size in unique for gradients in (False, True)]

  def floor_ms(self, point: Point) -> float:
    """A kernel that keeps the recurrent weights on chip reads all of them each position: bfloat16 at 128 bytes a clock.

    Once forward and once backward; more rows than a tile run beside each other.
    """
    directions = 2 if point.gradients else 1
    return directions * point.num_steps * 2 * 4 * point.hidden_size**2 / (128 * self.clock_ghz * 1e6)


def _measure_point(
  options: Options, point: Point, processes: dict[str, Process], floor_ms: float | None
) -> list[dict[str, Any]]:
  """A row a system."""
  problems: dict[str, str | None] = {}
  repeats, times = {}, {name: [] for name in options.systems}

  def ask(name: str, line: str) -> Answer | None:
    try:
      if name in processes:
        return Answer(**processes[name].ask(line))
      problems[name] = "missing: make bench"
    except WorkerError as error:
      problems[name] = str(error)
    return None

  for name in options.systems:
    answer = ask(name, json.dumps(dataclasses.asdict(point)))
    if answer is not None:
      problems[name] = answer.problem
      repeats[name] = max(1, round(options.window_seconds / answer.seconds)) if answer.seconds else 1
  for _ in range(options.windows):
    for name in options.systems:
      if problems[name] is None and (answer := ask(name, str(repeats[name]))) is not None:
        times[name].append(1e3 * answer.seconds)
  return [
    {
      **dataclasses.asdict(point),
      "system": name,
      "recurrent_dropout": SYSTEMS[name][1],
      "problem": problems[name],
      "ms": statistics.median(times[name]) if times[name] and problems[name] is None else None,
      "ms_windows": times[name],
      "floor_ms": floor_ms,
    }
    for name in options.systems
  ]


def measure(options: Options, has_gpu: bool, save: Callable[[list[dict[str, Any]]], None]) -> None:
  """Calls `save` with all rows so far, after each point. Only a GPU has a floor."""
  rows: list[dict[str, Any]] = []
  with tempfile.TemporaryDirectory(prefix="recurrence-") as folder:
    processes = {}
    try:
      for name in dict.fromkeys(options.systems):
        python = options.bench_python if name in BASELINES else Path(sys.executable)
        if python.exists():
          processes[name] = Process(python, "recurrence_worker.py", [name, options.platform], Path(folder) / name)
      for point in options.points():
        rows += _measure_point(options, point, processes, options.floor_ms(point) if has_gpu else None)
        shown = ", ".join(f"{row['system']} {row['ms']:.3g}" for row in rows[-len(options.systems) :] if row["ms"])
        measuring.say(f"{_describe(point)}: {shown or 'nothing'} ms")
        save(rows)
    finally:
      for process in processes.values():
        process.stop()


def _describe(point: Point) -> str:
  direction = "forward and backward" if point.gradients else "forward"
  return f"{point.batch_size} rows, {point.num_steps} positions, {point.hidden_size} units, {direction}"


def _show(results: dict[str, Any]) -> None:
  console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
  table = Table(title="The recurrence alone", title_justify="left")
  for column in (
    "rows",
    "positions",
    "units",
    "direction",
    "system",
    "recurrent dropout",
    "ms",
    "min - max",
    "floor ms",
  ):
    table.add_column(column, justify="left" if column in ("direction", "system") else "right")
  for row in results["rows"]:
    if row["ms"] is not None:
      windows = row["ms_windows"]
      table.add_row(
        *(str(row[axis]) for axis in _AXES),
        "both" if row["gradients"] else "forward",
        row["system"],
        "yes" if row["recurrent_dropout"] else "no",
        f"{row['ms']:.3f}",
        f"{min(windows):.3f} - {max(windows):.3f}",
        "" if row["floor_ms"] is None else f"{row['floor_ms']:.3f}",
      )
  console.print(table)
  problems = dict.fromkeys(f"{row['system']}: {row['problem']}." for row in results["rows"] if row["problem"])
  for line in (
    *problems,
    f"Median of {results['windows']} windows. The floor is that of a GPU kernel that reads the recurrent weights from "
    "its own memory once a position.",
    *measuring.machine_lines(results["machine"]),
  ):
    console.print(line, markup=False, soft_wrap=True)


def _plot(results: dict[str, Any], output: Path) -> None:
  """A panel an axis and direction; systems without recurrent dropout are dashed, the floor is dotted."""
  from matplotlib.figure import Figure
  from matplotlib.ticker import LogFormatter, NullLocator

  figure = Figure(figsize=(16, 9), layout="constrained")
  panels = figure.subplots(2, len(_AXES), sharey="row")
  base = {"batch_size": 32, "num_steps": 400, "hidden_size": 128}
  systems = list(dict.fromkeys(row["system"] for row in results["rows"]))
  for (line, gradients), (column, axis) in ((d, a) for d in enumerate((False, True)) for a in enumerate(_AXES)):
    axes = panels[line][column]
    others = {name: value for name, value in base.items() if name != axis}
    rows = [
      row
      for row in results["rows"]
      if row["gradients"] == gradients and all(row[name] == value for name, value in others.items())
    ]
    for index, system in enumerate(systems):
      own = sorted((row[axis], row["ms"]) for row in rows if row["system"] == system and row["ms"] is not None)
      style = "-" if SYSTEMS[system][1] else "--"
      if own:
        axes.plot(*zip(*own, strict=True), style, marker="o", color=f"C{index}", label=system)
    floor = sorted({(row[axis], row["floor_ms"]) for row in rows if row["floor_ms"] is not None})
    if floor:
      axes.plot(*zip(*floor, strict=True), ":", color="black", label="floor of a GPU kernel")
    axes.set(xscale="log", yscale="log", xlabel=_AXES[axis])
    ticks = sorted({row[axis] for row in rows})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
    axes.grid(alpha=0.3)
    if column == 0:
      axes.set_ylabel(f"milliseconds, {'forward and backward' if gradients else 'forward'}")
  panels[0][0].legend(fontsize=8)
  machine = results["machine"]
  figure.suptitle(f"LSTM of 32 rows, 400 positions, 128 units, one size varied; {machine['device']}")
  measuring.save_figure(figure, output)


def main() -> None:
  try:
    options = tyro.cli(Options, description=__doc__)
    machine = _describe_machine(options)
    results: dict[str, Any] = {"machine": machine, "windows": options.windows, "rows": []}

    def save(rows: list[dict[str, Any]]) -> None:
      results["rows"] = rows
      if options.json is not None:
        measuring.write_json(options.json, results)

    has_gpu = machine["platform"] == "gpu"
    is_interrupted = measuring.is_interrupted(lambda: measure(options, has_gpu, save))
    if results["rows"]:
      if options.plot is not None:
        _plot(results, options.plot)
      _show(results)
    if is_interrupted:
      sys.exit(130)
    measuring.exit_if_failed({row["system"]: row["problem"] for row in results["rows"]})
  except ImdbJaxError as error:
    sys.exit(f"error: {error}")


def _describe_machine(options: Options) -> dict[str, Any]:
  import jax

  devices = jax.devices() if options.platform == "auto" else jax.devices(options.platform)
  machine = measuring.describe_machine([{"jax": jax.__version__}])
  return machine | {
    "device": devices[0].device_kind,
    "platform": devices[0].platform,
    "data": "random numbers",
  }


if __name__ == "__main__":
  main()
