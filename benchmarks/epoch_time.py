"""How long an epoch takes: ours, Keras and PyTorch, in one run: `python benchmarks/epoch_time.py --help`.

The systems take turns, window by window, as `measuring.py` says.
"""

import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

import measuring
import ours
import tyro
from measuring import ARTICLE, SYSTEMS, Measurement
from rich.console import Console
from rich.table import Table

from imdb_jax import config
from imdb_jax.data import tokens
from imdb_jax.errors import ImdbJaxError

_REFERENCE = "ours-chunked"
_WORKS = {
  "article": "padding processed, input and recurrent dropout",
  "masked": "padding skipped, input and recurrent dropout",
  "less": "padding processed, input dropout only",
}
# Seconds of a window with --quick, and of the ceiling's windows always.
_WINDOW_SECONDS = 2.5
_FIGURES = ("seconds_per_epoch", "compile_seconds", "peak_memory_mb", "share_of_ceiling", "ratio_to_ours", "loss")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(measuring.Options):
  """Measure a training step, system by system, window by window."""

  quick: bool = False
  """Windows of a few seconds instead of a whole epoch in as many windows: five minutes instead of twenty."""
  windows: int = 5
  """Timed windows of each system."""
  systems: tuple[str, ...] = tuple(SYSTEMS)
  """Which systems."""
  plot: Path | None = None
  """Draw the results here, as a PNG."""
  archive: Path | None = None
  """A local aclImdb archive or folder. Without it, random tokens of reviews of about the same lengths."""
  cache_dir: Path = dataclasses.field(default_factory=config.default_cache_dir)
  """Where encoded reviews are cached."""
  num_reviews: int = 25_000
  """Reviews of an epoch, where they are random."""
  batch_size: int = ARTICLE.training.batch_size
  """Reviews per step."""
  sequence_length: int = ARTICLE.dataset.sequence_length
  """Positions of a review, padding included."""
  vocabulary_size: int = ARTICLE.dataset.vocabulary_size
  """Rows of the embedding."""
  embedding_size: int = ARTICLE.model.embedding_size
  """Width of a word's vector."""
  hidden_size: int = ARTICLE.model.hidden_size
  """Width of the LSTM's state."""
  matmul_size: int = measuring.MATMUL_SIZE
  """The ceiling is the speed of a float32 product of two square matrices of this size."""

  def __post_init__(self):
    super().__post_init__()
    measuring.check_systems(self.systems, SYSTEMS)

  @property
  def sizes(self) -> dict[str, int]:
    return {name: getattr(self, name) for name in measuring.ARTICLE_SIZES}


def _reviews(options: Options) -> tuple[tokens.TokenSplit, str]:
  """The reviews that all systems train on, and what they are in words."""
  if options.archive is None:
    split = measuring.random_reviews(options.num_reviews, options.sequence_length, options.vocabulary_size)
    lengths = f"lengths lognormal and clipped, mean {split.lengths.mean():.0f}"
    return split, f"{len(split):,} reviews of random words, {lengths} (no real reviews)"
  wanted = dataclasses.replace(
    ARTICLE.dataset, sequence_length=options.sequence_length, vocabulary_size=options.vocabulary_size
  )
  split = tokens.load(wanted, archive=options.archive, cache_dir=options.cache_dir, report=measuring.say).train
  return split, f"{len(split):,} IMDB training reviews, mean length {split.lengths.mean():.0f}"


def _measure(options: Options, arrays: Path, steps_per_epoch: int) -> list[Measurement]:
  """Starts the systems one after another, then has them take turns. The first is the ceiling."""
  # Short windows stay before the epoch's last, smaller batch.
  num_steps = max(steps_per_epoch - 1 if options.quick else steps_per_epoch, options.windows)
  measurements = []
  try:
    for name in (ours.SGEMM, *dict.fromkeys(options.systems)):
      job = measuring.make_job(
        options, name, arrays, num_steps=num_steps, sizes=options.sizes, matmul_size=options.matmul_size
      )
      measurement = Measurement(job, options.bench_python)
      measurements.append(measurement)
      measuring.say(f"{name}: {measurement.problem or 'ready'}")
    for window in range(options.windows):
      measuring.say(f"Window {window + 1} of {options.windows}")
      for measurement in measurements:
        if measurement.ready is None:
          continue
        share = num_steps * (window + 1) // options.windows - num_steps * window // options.windows
        is_short = options.quick or measurement.name == ours.SGEMM
        measurement.run_window(min(measurement.steps_within(_WINDOW_SECONDS), share) if is_short else share)
  finally:
    for measurement in measurements:
      measurement.stop()
  return measurements


def _row(measurement: Measurement, options: Options, steps_per_epoch: int, gflops: float | None) -> dict[str, Any]:
  """A row of the results; figures that there are not are None."""
  system = SYSTEMS[measurement.name]
  row: dict[str, Any] = {
    "system": measurement.name,
    "work": system.work,
    "computes": system.computes,
    "problem": measurement.problem or None,
    "device": None,
    **measurement.timings(),
    **dict.fromkeys(_FIGURES),
  }
  if measurement.ready is None or measurement.problem:
    return row
  seconds_per_step = row["ms_per_step"] / 1e3
  gflops_here = measuring.flops_per_step(options.sizes) / seconds_per_step / 1e9
  _, last = measurement.windows[-1]
  return row | {
    "device": measurement.ready.device,
    "seconds_per_epoch": seconds_per_step * steps_per_epoch if options.quick else measurement.seconds,
    "compile_seconds": measurement.compile_seconds,
    "peak_memory_mb": last.peak_memory_mb,
    "share_of_ceiling": gflops_here / gflops if gflops and system.work == "article" else None,
    "loss": last.loss,
  }


def run(options: Options) -> dict[str, Any]:
  """Measures, and returns what `--json` writes."""
  with tempfile.TemporaryDirectory(prefix="epoch_time-") as folder:
    split, data = _reviews(options)
    arrays = Path(folder) / "reviews.npz"
    measuring.write_arrays(arrays, split)
    steps_per_epoch = -(-len(split) // options.batch_size)
    ceiling, *measurements = _measure(options, arrays, steps_per_epoch)
  gflops = measuring.sgemm_gflops(ceiling, options.matmul_size)
  rows = [_row(measurement, options, steps_per_epoch, gflops) for measurement in measurements]
  reference = next((row["ms_per_step"] for row in rows if row["system"] == _REFERENCE), None)
  for row in rows:
    if reference and row["ms_per_step"]:
      row["ratio_to_ours"] = row["ms_per_step"] / reference
  machine = {
    **measuring.describe_machine(
      measurement.ready.versions for measurement in (ceiling, *measurements) if measurement.ready
    ),
    "sgemm_gflops": gflops,
    "sgemm_problem": ceiling.problem or None,
    "data": data,
    "sizes": options.sizes,
    "windows": options.windows,
    "steps_per_epoch": steps_per_epoch,
    "gflop_per_step": measuring.flops_per_step(options.sizes) / 1e9,
  }
  return {"machine": machine, "works": _WORKS, "rows": rows}


def _show(results: dict[str, Any]) -> None:
  machine = results["machine"]
  console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
  table = Table(title="Time of a training step", title_justify="left")
  table.add_column("system", no_wrap=True)
  table.add_column("work")
  table.add_column("computes", min_width=24)
  for column in ("ms/step", "min - max", "s/epoch", "compile s", "memory MB", "x ours", "of ceiling"):
    table.add_column(column, justify="right")
  for row in results["rows"]:
    if row["ms_per_step"] is None:
      table.add_row(row["system"], row["work"], row["problem"])
      continue
    ratio, share = row["ratio_to_ours"], row["share_of_ceiling"]
    table.add_row(
      row["system"],
      row["work"],
      row["computes"],
      f"{row['ms_per_step']:.1f}",
      f"{row['ms_per_step_min']:.1f} - {row['ms_per_step_max']:.1f}",
      f"{row['seconds_per_epoch']:.1f}",
      f"{row['compile_seconds']:.1f}",
      f"{row['peak_memory_mb']:.0f}",
      "" if ratio is None else f"{ratio:.2f}",
      "" if share is None else f"{share:.0%}",
    )
  console.print(table)
  ceiling = machine["sgemm_problem"] or f"{machine['sgemm_gflops']:.0f} GFLOP/s"
  for line in (
    *(f"{name}: {meaning}." for name, meaning in results["works"].items()),
    f"Ceiling: {ceiling}, a large float32 product in the same run; a step of the article: "
    f"{machine['gflop_per_step']:.2f} GFLOP.",
    f"x ours: times {_REFERENCE}. Median of {machine['windows']} windows; an epoch has {machine['steps_per_epoch']} "
    f"steps. Precision: {machine['precision']}.",
    *measuring.machine_lines(machine),
  ):
    console.print(line, markup=False, soft_wrap=True)


def _plot(results: dict[str, Any], output: Path) -> None:
  """Horizontal bars, fastest first; whiskers are the fastest and slowest window."""
  from matplotlib.figure import Figure
  from matplotlib.patches import Patch

  machine = results["machine"]
  rows = sorted(results["rows"], key=lambda row: row["ms_per_step"] or float("inf"))
  figure = Figure(figsize=(11, 1.8 + 0.48 * len(rows)), layout="constrained")
  axes = figure.subplots()
  colors = {"article": "#1f77b4", "masked": "#2ca02c", "less": "#7f7f7f"}
  longest = max((row["ms_per_step_max"] or 0 for row in rows), default=0) or 1
  for position, row in enumerate(rows):
    median = row["ms_per_step"]
    if median is None:
      axes.text(longest * 0.01, position, row["problem"], va="center", style="italic", color="#666666")
      continue
    below, above = median - row["ms_per_step_min"], row["ms_per_step_max"] - median
    is_ours = row["system"] in ours.SYSTEMS
    axes.barh(position, median, color=colors[row["work"]], alpha=1 if is_ours else 0.5)
    axes.errorbar(median, position, xerr=[[below], [above]], color="black", capsize=3, linewidth=1)
    share = "" if row["share_of_ceiling"] is None else f", {row['share_of_ceiling']:.0%} of the ceiling"
    label = f"{median:.1f} ms, {row['seconds_per_epoch']:.0f} s an epoch{share}"
    axes.text(row["ms_per_step_max"] + longest * 0.012, position, label, va="center", fontsize=9)
  axes.set_yticks(range(len(rows)), [row["system"] for row in rows])
  for label, row in zip(axes.get_yticklabels(), rows, strict=True):
    label.set_fontweight("bold" if row["system"] in ours.SYSTEMS else "normal")
  # Rows without a bar do not widen the axis by themselves. The first one stands on top.
  axes.set_ylim(len(rows) - 0.5, -0.5)
  axes.set_xlim(0, longest * 1.55)
  axes.set_xlabel(
    f"milliseconds a step: median of {machine['windows']} windows, whiskers from fastest to slowest (bold: ours)"
  )
  axes.grid(axis="x", alpha=0.3)
  axes.set_axisbelow(True)
  sizes = machine["sizes"]
  axes.set_title(
    f"Training step of an LSTM: batch {sizes['batch_size']}, {sizes['sequence_length']} positions, "
    f"{sizes['embedding_size']} inputs, {sizes['hidden_size']} units\n"
    f"{machine['processor']}, {machine['cores']} cores, {machine['precision']}",
    fontsize=11,
  )
  works = {row["work"] for row in rows}
  legend = [Patch(color=colors[name], label=meaning) for name, meaning in results["works"].items() if name in works]
  axes.legend(handles=legend, loc="upper right", fontsize=9)
  measuring.save_figure(figure, output)


def main() -> None:
  try:
    options = tyro.cli(Options, description=__doc__)
    results = run(options)
    if options.json is not None:
      measuring.write_json(options.json, results)
      measuring.say(f"Wrote {options.json}")
    if options.plot is not None:
      _plot(results, options.plot)
    _show(results)
    measuring.exit_if_failed({row["system"]: row["problem"] for row in results["rows"]})
  except ImdbJaxError as error:
    sys.exit(f"error: {error}")


if __name__ == "__main__":
  main()
