"""How the time of a training step grows with its sizes: `python benchmarks/cost_curves.py --help`.

The article's work on random reviews, at the article's sizes but for the one that an axis varies. At every point the
systems take turns, window by window, as `measuring.py` says, and the machine's ceiling has a turn as well.
"""

import dataclasses
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import measuring
import ours
import tyro
from measuring import SYSTEMS, Measurement
from rich.console import Console
from rich.table import Table

from imdb_jax.errors import ImdbJaxError

_SYSTEMS = tuple(name for name, system in SYSTEMS.items() if system.work == "article")
# What an axis varies, and how a figure calls it.
_AXES = {
  "length": ("sequence_length", "positions of a review"),
  "batch": ("batch_size", "reviews per step"),
  "hidden_size": ("hidden_size", "units of the LSTM"),
  "devices": ("num_devices", "devices"),
}
# Of random reviews, which come back epoch after epoch: no batch is smaller than the others.
_BATCHES_PER_EPOCH = 8
# A worker plans its batches ahead.
_MOST_STEPS_PER_WINDOW = 2000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(measuring.Options):
  """Measure a training step along axes of its sizes."""

  axes: tuple[Literal["length", "batch", "hidden_size", "devices"], ...] = ("length", "batch", "hidden_size", "devices")
  """Which axes."""
  systems: tuple[str, ...] = ("ours-chunked", "ours-scan")
  """Which systems, of those that do the article's work; along the axis of devices only ours."""
  length: tuple[int, ...] = (25, 50, 100, 200, 400, 800, 1600)
  """Positions of a review, padding included."""
  batch: tuple[int, ...] = (4, 8, 16, 32, 64, 128, 256)
  """Reviews per step."""
  hidden_size: tuple[int, ...] = (32, 64, 128, 256, 512)
  """Widths of the LSTM's state."""
  devices: tuple[int, ...] = ()
  """Numbers of devices; by default 1, 2, 4 ... and as many as there are cores."""
  windows: int = 5
  """Timed windows of each system at each point."""
  window_seconds: float = 1.0
  """How long a window takes, about; at least a step."""
  plot_dir: Path | None = None
  """Draw a figure an axis into this folder, as PNGs."""
  matmul_size: int = measuring.MATMUL_SIZE
  """The ceiling is the speed of a float32 product of two square matrices of this size."""

  def __post_init__(self):
    super().__post_init__()
    measuring.check_systems(self.systems, _SYSTEMS)

  def points(self) -> list[tuple[str, int]]:
    """Axis and value of every point."""
    # Imports JAX, which `--help` does without.
    from imdb_jax import sharding

    values = {axis: getattr(self, axis) for axis in self.axes}
    if "devices" in values and not self.devices:
      values["devices"] = _powers_up_to(sharding.num_cores())
    return [(axis, value) for axis in values for value in values[axis]]


def _powers_up_to(number: int) -> list[int]:
  """1, 2, 4 ... below the number, and the number."""
  return [2**power for power in range(number.bit_length()) if 2**power < number] + [number]


def _sizes(axis: str, value: int) -> dict[str, int]:
  varied, _ = _AXES[axis]
  return dict(measuring.ARTICLE_SIZES) if axis == "devices" else measuring.ARTICLE_SIZES | {varied: value}


def _measure_point(options: Options, axis: str, value: int, folder: Path) -> list[Measurement]:
  """All systems, in turns."""
  sizes, num_devices = _sizes(axis, value), value if axis == "devices" else options.num_devices
  num_reviews = _BATCHES_PER_EPOCH * sizes["batch_size"]
  folder.mkdir()
  arrays = folder / "reviews.npz"
  measuring.write_arrays(
    arrays, measuring.random_reviews(num_reviews, sizes["sequence_length"], sizes["vocabulary_size"])
  )
  num_steps = options.windows * _MOST_STEPS_PER_WINDOW
  measurements: list[Measurement] = []
  try:
    for name in dict.fromkeys(options.systems):
      if axis != "devices" or name in ours.SYSTEMS:
        job = measuring.make_job(options, name, arrays, num_steps=num_steps, sizes=sizes, num_devices=num_devices)
        measurements.append(Measurement(job, options.bench_python))
    for _ in range(options.windows):
      for measurement in measurements:
        _run_window(measurement, options)
  finally:
    for measurement in measurements:
      measurement.stop()
  return measurements


def _run_window(measurement: Measurement, options: Options) -> None:
  measurement.run_window(min(measurement.steps_within(options.window_seconds), _MOST_STEPS_PER_WINDOW))


def _point(axis: str, value: int, measurement: Measurement) -> dict[str, Any]:
  """What the results hold of a system at a point."""
  sizes, timings = _sizes(axis, value), measurement.timings()
  spent = measurement.problem or f"{timings['ms_per_step']:.2f} ms a step"
  measuring.say(f"{axis} {value}, {measurement.name}: {spent}")
  return {
    "axis": axis,
    "value": value,
    "system": measurement.name,
    "sizes": sizes,
    "device": measurement.ready.device if measurement.ready else None,
    "problem": measurement.problem or None,
    "gflop_per_step": measuring.flops_per_step(sizes) / 1e9,
    "ceiling_ms": None,
    **timings,
  }


def measure(options: Options, save: Callable[[dict[str, Any]], None]) -> None:
  """Calls `save` with all results so far, after each point of an axis."""
  wanted, points = options.points(), []
  with tempfile.TemporaryDirectory(prefix="cost_curves-") as name:
    folder = Path(name)
    num_steps = len(wanted) * _MOST_STEPS_PER_WINDOW
    job = measuring.make_job(
      options, ours.SGEMM, folder / "none.npz", num_steps=num_steps, matmul_size=options.matmul_size
    )
    ceiling = Measurement(job, options.bench_python)
    done = [ceiling]
    try:
      for axis, value in wanted:
        measurements = _measure_point(options, axis, value, folder / f"{axis}-{value}")
        _run_window(ceiling, options)
        done += measurements
        points += [_point(axis, value, measurement) for measurement in measurements]
        save(_results(options, points, done))
    finally:
      ceiling.stop()


def _results(options: Options, points: Sequence[dict[str, Any]], done: Sequence[Measurement]) -> dict[str, Any]:
  """What `--json` writes. The first of `done` is the ceiling."""
  ceiling = done[0]
  gflops = measuring.sgemm_gflops(ceiling, options.matmul_size)
  if gflops is not None:
    points = [point | {"ceiling_ms": 1e3 * point["gflop_per_step"] / gflops} for point in points]
  return {
    "machine": {
      **measuring.describe_machine(measurement.ready.versions for measurement in done if measurement.ready),
      "sgemm_gflops": gflops,
      "sgemm_problem": ceiling.problem or None,
      "data": "reviews of random words (no real reviews)",
    },
    "windows": options.windows,
    "points": points,
  }


def _show(results: dict[str, Any]) -> None:
  console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
  table = Table(title="Time of a training step along axes of its sizes", title_justify="left")
  for column in ("axis", "value", "system", "ms/step", "min - max", "ceiling ms"):
    table.add_column(column, justify="left" if column in ("axis", "system") else "right", no_wrap=True)
  for point in results["points"]:
    start = point["axis"], str(point["value"]), point["system"]
    if point["problem"]:
      table.add_row(*start, point["problem"])
      continue
    table.add_row(
      *start,
      f"{point['ms_per_step']:.2f}",
      f"{point['ms_per_step_min']:.2f} - {point['ms_per_step_max']:.2f}",
      "" if point["ceiling_ms"] is None else f"{point['ceiling_ms']:.2f}",
    )
  console.print(table)
  machine = results["machine"]
  ceiling = machine["sgemm_problem"] or f"{machine['sgemm_gflops']:.0f} GFLOP/s"
  for line in (
    f"Median of {results['windows']} windows. Ceiling: the step's products at {ceiling}, the speed of a large float32 "
    "product in the same run.",
    *measuring.machine_lines(machine),
  ):
    console.print(line, markup=False, soft_wrap=True)


def _plot(results: dict[str, Any], axis: str, output: Path) -> None:
  """A line a system, whiskers from the fastest to the slowest window, and the ceiling dotted."""
  from matplotlib.figure import Figure
  from matplotlib.ticker import LogFormatter, NullLocator

  points = [point for point in results["points"] if point["axis"] == axis]
  figure = Figure(figsize=(7.5, 5), layout="constrained")
  axes = figure.subplots()
  for index, system in enumerate(dict.fromkeys(point["system"] for point in points)):
    own = [point for point in points if point["system"] == system and point["ms_per_step"] is not None]
    times = [point["ms_per_step"] for point in own]
    below = [point["ms_per_step"] - point["ms_per_step_min"] for point in own]
    above = [point["ms_per_step_max"] - point["ms_per_step"] for point in own]
    values = [point["value"] for point in own]
    axes.errorbar(values, times, yerr=[below, above], marker="o", capsize=3, color=f"C{index}", label=system)
  ceiling = {point["value"]: point["ceiling_ms"] for point in points if point["ceiling_ms"] is not None}
  axes.plot(list(ceiling), list(ceiling.values()), color="black", linestyle=":", label="ceiling (sgemm)")
  axes.set_xscale("log")
  axes.set_yscale("log")
  ticks = sorted({point["value"] for point in points})
  axes.set_xticks(ticks, [str(tick) for tick in ticks])
  axes.xaxis.set_minor_locator(NullLocator())
  axes.yaxis.set_major_formatter(LogFormatter())
  axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
  axes.grid(which="both", alpha=0.3)
  axes.legend()
  machine = results["machine"]
  axes.set(xlabel=_AXES[axis][1], ylabel="milliseconds a training step")
  axes.set_title(f"{machine['processor']}, {machine['cores']} cores, {machine['precision']}", fontsize=11)
  measuring.save_figure(figure, output)


def main() -> None:
  try:
    options = tyro.cli(Options, description=__doc__)
    results: dict[str, Any] = {}

    def save(so_far: dict[str, Any]) -> None:
      results.update(so_far)
      if options.json is not None:
        measuring.write_json(options.json, results)

    is_interrupted = measuring.is_interrupted(lambda: measure(options, save))
    if results:
      if options.plot_dir is not None:
        for axis in dict.fromkeys(point["axis"] for point in results["points"]):
          _plot(results, axis, options.plot_dir / f"{axis}.png")
      _show(results)
    if is_interrupted:
      sys.exit(130)
    measuring.exit_if_failed(
      {f"{point['system']} at {point['axis']} {point['value']}": point["problem"] for point in results["points"]}
    )
  except ImdbJaxError as error:
    sys.exit(f"error: {error}")


if __name__ == "__main__":
  main()
