"""How long an epoch takes: ours, Keras and PyTorch, in one run: `python benchmarks/epoch_time.py --help`.

Every system is a process of its own, and only one computes at a time. They take turns, window by window, so that
whatever else the machine does falls on all of them. Compilation and warm-up lie outside the windows.
"""

import contextlib
import dataclasses
import difflib
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import baselines
import numpy as np
import ours
import tyro
import worker
from rich.console import Console
from rich.table import Table

from imdb_jax import config
from imdb_jax.errors import ImdbJaxError, UsageError

_HERE = Path(__file__).resolve().parent
_SYSTEMS: dict[str, Any] = {**ours.SYSTEMS, **baselines.SYSTEMS}
_REFERENCE = "ours-chunked"
_WORKS = {
  "article": "padding processed, input and recurrent dropout",
  "masked": "padding skipped, input and recurrent dropout",
  "less": "padding processed, input dropout only",
}
# Seconds of a window with --quick, and of the ceiling's windows always.
_WINDOW_SECONDS = 2.5
_ARTICLE = config.preset("article")
_FIGURES = (
  "ms_per_step",
  "ms_per_step_min",
  "ms_per_step_max",
  "seconds_per_epoch",
  "compile_seconds",
  "peak_memory_mb",
  "share_of_ceiling",
  "ratio_to_ours",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Measure a training step, system by system, window by window."""

  quick: bool = False
  """Windows of a few seconds instead of whole epochs: five minutes instead of hours."""
  windows: int = 5
  """Timed windows of each system."""
  systems: tuple[str, ...] = tuple(_SYSTEMS)
  """Which systems."""
  json: Path | None = None
  """Write the results here."""
  plot: Path | None = None
  """Draw them here, as a PNG."""
  archive: Path | None = None
  """A local aclImdb archive or folder. Without it, random tokens of reviews of about the same lengths."""
  cache_dir: Path = dataclasses.field(default_factory=config.default_cache_dir)
  """Where encoded reviews are cached."""
  platform: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
  """Where our systems compute; the baselines compute where their packages do."""
  num_devices: int | None = None
  """Devices for our systems; by default all, and on a CPU one for each core."""
  bench_python: Path = _HERE.parent / ".venv-bench" / "bin" / "python"
  """Python with the packages of the baselines; `make bench` makes it."""
  num_reviews: int = 25_000
  """Reviews of an epoch, where they are random."""
  batch_size: int = _ARTICLE.training.batch_size
  """Reviews per step."""
  sequence_length: int = _ARTICLE.dataset.sequence_length
  """Positions of a review, padding included."""
  vocabulary_size: int = _ARTICLE.dataset.vocabulary_size
  """Rows of the embedding."""
  embedding_size: int = _ARTICLE.model.embedding_size
  """Width of a word's vector."""
  hidden_size: int = _ARTICLE.model.hidden_size
  """Width of the LSTM's state."""
  matmul_size: int = 4096
  """The ceiling is the speed of a float32 product of two square matrices of this size."""

  def __post_init__(self):
    for name in self.systems:
      if name not in _SYSTEMS:
        nearest = difflib.get_close_matches(name, _SYSTEMS, n=1)
        hint = f" Did you mean {nearest[0]}?" if nearest else ""
        raise UsageError(f"--systems {name}: must be among {', '.join(_SYSTEMS)}.{hint}")
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if type(value) is int and value < 1:
        raise UsageError(f"--{field.name.replace('_', '-')} {value}: must be 1 or more.")

  @property
  def flops_per_step(self) -> int:
    """Of the matrix products of the LSTM at full length: one forward, two backward. The rest is below 1 %."""
    products = self.batch_size * self.sequence_length * (self.embedding_size + self.hidden_size) * 4 * self.hidden_size
    return 3 * 2 * products


class _Process:
  """A worker and the lines exchanged with it."""

  def __init__(self, command: list[str], log: Path, environment: dict[str, str]):
    self._log = log
    with log.open("w", encoding="utf-8") as stderr:
      self._process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment
      )

  def ask(self, num_steps: int) -> dict[str, Any]:
    """Has it run a window and returns the answer."""
    assert self._process.stdin is not None
    # A worker that has died is noticed when its answer is missing.
    with contextlib.suppress(BrokenPipeError):
      self._process.stdin.write(f"{num_steps}\n")
      self._process.stdin.flush()
    return self.receive()

  def receive(self) -> dict[str, Any]:
    """The next line of the worker.

    Raises:
      _WorkerError: it has died.
    """
    assert self._process.stdout is not None
    line = self._process.stdout.readline()
    if not line:
      lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
      raise _WorkerError(f"failed: {lines[-1] if lines else f'exit code {self._process.wait()}'}")
    return json.loads(line)

  def stop(self) -> None:
    self._process.kill()
    self._process.communicate()


class _WorkerError(Exception):
  """Why there are no figures of a system."""


class _Measurement:
  """One system: its process, and what it said."""

  def __init__(self, name: str, options: Options, arrays: Path, num_steps: int):
    """Arguments:
    arrays: see `worker.Job`; folders of the systems are made beside it.
    num_steps: of all windows together, at most.
    """
    self.name, self.problem = name, ""
    self.windows: list[tuple[int, worker.Window]] = []
    self.ready: worker.Ready | None = None
    self._process: _Process | None = None
    scratch = arrays.parent / name
    scratch.mkdir()
    job = worker.Job(
      system=name,
      arrays=str(arrays),
      scratch=str(scratch),
      num_steps=num_steps,
      batch_size=options.batch_size,
      vocabulary_size=options.vocabulary_size,
      embedding_size=options.embedding_size,
      hidden_size=options.hidden_size,
      seed=0,
      platform=options.platform,
      num_devices=options.num_devices,
      matmul_size=options.matmul_size,
    )
    is_baseline = name in baselines.SYSTEMS
    if is_baseline and not options.bench_python.exists():
      self.problem = f"missing: {baselines.SYSTEMS[name].install}"
      return
    python, script = (options.bench_python, "baselines.py") if is_baseline else (sys.executable, "ours.py")
    command = [str(python), str(_HERE / script), json.dumps(dataclasses.asdict(job))]
    # Keras writes a file of settings into its home; TensorFlow tells of the processor's instructions.
    environment = os.environ | {"KERAS_HOME": str(scratch), "TF_CPP_MIN_LOG_LEVEL": "2"}
    self._process = _Process(command, scratch / "stderr.txt", environment)
    try:
      answer = self._process.receive()
    except _WorkerError as error:
      self.problem = str(error)
      return
    if "missing" in answer:
      install = baselines.SYSTEMS[name].install if is_baseline else ours.INSTALL
      self.problem = f"missing {answer['missing']}: {install}"
    else:
      self.ready = worker.Ready(**answer)

  def stop(self) -> None:
    if self._process is not None:
      self._process.stop()

  def run_window(self, num_steps: int) -> None:
    """Adds a window, unless the system has none to give."""
    if self._process is None or self.problem:
      return
    try:
      self.windows.append((num_steps, worker.Window(**self._process.ask(num_steps))))
    except _WorkerError as error:
      self.problem = str(error)

  @property
  def seconds_per_step(self) -> list[float]:
    return [window.seconds / num_steps for num_steps, window in self.windows]


def _write_arrays(options: Options, path: Path) -> str:
  """Writes the reviews that all systems train on, and says in words what they are."""
  if options.archive is not None:
    from imdb_jax.data import tokens

    wanted = dataclasses.replace(
      _ARTICLE.dataset, sequence_length=options.sequence_length, vocabulary_size=options.vocabulary_size
    )
    split = tokens.load(wanted, archive=options.archive, cache_dir=options.cache_dir, report=_say).train
    np.savez(path, tokens=split.tokens, lengths=split.lengths, labels=split.labels)
    return f"{len(split):,} IMDB training reviews, mean length {split.lengths.mean():.0f}"
  rng = np.random.default_rng(0)
  n, t = options.num_reviews, options.sequence_length
  # As the training reviews at 400 positions: mean 190, a tenth of them full.
  lengths = np.clip(rng.lognormal(np.log(0.4 * t), 0.75, n), 1, t).astype(np.int32)
  # Frequent words first: the ranks of words of a text follow Zipf's law.
  ranks = np.arange(1, options.vocabulary_size)
  words = rng.choice(ranks, (n, t), p=1 / ranks / np.sum(1 / ranks)).astype(np.int32)
  words[np.arange(t) < t - lengths[:, None]] = 0
  np.savez(path, tokens=words, lengths=lengths, labels=rng.integers(0, 2, n, dtype=np.int32))
  return f"{n:,} reviews of random words, lengths lognormal and clipped, mean {lengths.mean():.0f} (no real reviews)"


def _say(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


def _measure(options: Options, arrays: Path) -> list[_Measurement]:
  """Starts the systems one after another, then has them take turns. The first is the ceiling."""
  with np.load(arrays) as loaded:
    steps_per_epoch = -(-len(loaded["labels"]) // options.batch_size)
  # Short windows stay within the first epoch, before its last, smaller batch.
  num_steps = max(steps_per_epoch - 1, options.windows) if options.quick else options.windows * steps_per_epoch
  measurements = []
  try:
    for name in (ours.SGEMM, *dict.fromkeys(options.systems)):
      measurement = _Measurement(name, options, arrays, num_steps)
      measurements.append(measurement)
      _say(f"{name}: {measurement.problem or 'ready'}")
    for window in range(options.windows):
      _say(f"Window {window + 1} of {options.windows}")
      for measurement in measurements:
        if measurement.ready is None:
          continue
        fitting = max(1, round(_WINDOW_SECONDS / measurement.ready.step_seconds))
        is_short = options.quick or measurement.name == ours.SGEMM
        measurement.run_window(min(fitting, num_steps // options.windows) if is_short else steps_per_epoch)
  finally:
    for measurement in measurements:
      measurement.stop()
  return measurements


def _row(measurement: _Measurement, options: Options, steps_per_epoch: int, gflops: float | None) -> dict[str, Any]:
  """A row of the results; figures that there are not are None."""
  system = _SYSTEMS[measurement.name]
  row: dict[str, Any] = {
    "system": measurement.name,
    "work": system.work,
    "computes": system.computes,
    "problem": measurement.problem or None,
    "device": None,
    **dict.fromkeys(_FIGURES),
    "ms_per_step_windows": [],
    "steps_per_window": None,
    "loss": None,
  }
  ready, seconds = measurement.ready, measurement.seconds_per_step
  if ready is None or measurement.problem:
    return row
  median = statistics.median(seconds)
  num_steps, last = measurement.windows[-1]
  share = options.flops_per_step / median / 1e9 / gflops if gflops and system.work == "article" else None
  return row | {
    "device": ready.device,
    "ms_per_step": 1e3 * median,
    "ms_per_step_min": 1e3 * min(seconds),
    "ms_per_step_max": 1e3 * max(seconds),
    "seconds_per_epoch": median * steps_per_epoch,
    "compile_seconds": max(0.0, ready.first_seconds - ready.num_shapes * median),
    "peak_memory_mb": last.peak_memory_mb,
    "share_of_ceiling": share,
    "ms_per_step_windows": [1e3 * value for value in seconds],
    "steps_per_window": num_steps,
    "loss": last.loss,
  }


def _processor() -> str:
  for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
    if line.startswith("model name"):
      return line.partition(":")[2].strip()
  return platform.machine()


def run(options: Options) -> dict[str, Any]:
  """Measures, and returns what `--json` writes."""
  with tempfile.TemporaryDirectory(prefix="epoch_time-") as folder:
    arrays = Path(folder) / "reviews.npz"
    data = _write_arrays(options, arrays)
    with np.load(arrays) as loaded:
      steps_per_epoch = -(-len(loaded["labels"]) // options.batch_size)
    ceiling, *measurements = _measure(options, arrays)
  gflops = None
  if ceiling.windows and not ceiling.problem:
    gflops = 2 * options.matmul_size**3 / statistics.median(ceiling.seconds_per_step) / 1e9
  rows = [_row(measurement, options, steps_per_epoch, gflops) for measurement in measurements]
  reference = next((row["ms_per_step"] for row in rows if row["system"] == _REFERENCE), None)
  for row in rows:
    if reference and row["ms_per_step"]:
      row["ratio_to_ours"] = row["ms_per_step"] / reference
  versions: dict[str, set[str]] = {}
  for measurement in (ceiling, *measurements):
    for package, version in (measurement.ready.versions if measurement.ready else {}).items():
      versions.setdefault(package, set()).add(version)
  machine = {
    "processor": _processor(),
    "cores": len(os.sched_getaffinity(0)),
    "sgemm_gflops": gflops,
    "sgemm_problem": ceiling.problem or None,
    "versions": {package: ", ".join(sorted(found)) for package, found in sorted(versions.items())},
    "precision": _ARTICLE.training.matmul_precision,
    "command": shlex.join(["python", "benchmarks/epoch_time.py", *sys.argv[1:]]),
    "data": data,
    "sizes": {
      "batch_size": options.batch_size,
      "sequence_length": options.sequence_length,
      "embedding_size": options.embedding_size,
      "hidden_size": options.hidden_size,
      "vocabulary_size": options.vocabulary_size,
    },
    "windows": options.windows,
    "steps_per_epoch": steps_per_epoch,
    "gflop_per_step": options.flops_per_step / 1e9,
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
    f"Machine: {machine['processor']}, {machine['cores']} cores.",
    "Versions: " + ", ".join(f"{package} {version}" for package, version in machine["versions"].items()),
    f"Data: {machine['data']}.",
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
  axes.invert_yaxis()
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
  figure.savefig(output, dpi=120, format="png")


def main() -> None:
  try:
    options = tyro.cli(Options, description=__doc__)
    results = run(options)
    for path, write in (
      (options.json, lambda path: path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")),
      (options.plot, lambda path: _plot(results, path)),
    ):
      if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
        _say(f"Wrote {path}")
    _show(results)
    failed = [row["system"] for row in results["rows"] if (row["problem"] or "").startswith("failed")]
    if failed:
      sys.exit(f"error: failed: {', '.join(failed)}")
  except ImdbJaxError as error:
    sys.exit(f"error: {error}")


if __name__ == "__main__":
  main()
