"""Seconds of training to a test accuracy, ours and Keras's: `python benchmarks/time_to_accuracy.py --help`.

Ours is the trainer itself with a preset, Keras the article's recipe, both on the same arrays. The systems take turns,
a whole run of ours and an epoch of Keras's, as `measuring.py` says. Every run trains to its end: the accuracy that
counts is the last epoch's, never the best.
"""

import contextlib
import dataclasses
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import baselines
import measuring
import tyro
from rich.console import Console
from rich.table import Table

from imdb_jax import config
from imdb_jax.data import tokens
from imdb_jax.errors import ImdbJaxError, UsageError

_PRESETS = ("fast", "article")
_KERAS = tuple(name for name, system in baselines.SYSTEMS.items() if isinstance(system, baselines.Keras))
_REFERENCE = "fast"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(measuring.Options):
  """Train to a test accuracy, system by system, seed by seed."""

  systems: tuple[str, ...] = ("fast", "keras-jax")
  """Which systems: presets of the trainer, and Keras on its backends."""
  target: float = 0.8844
  """The test accuracy to reach; the article's best epoch by default."""
  seeds: int = 5
  """Runs of each preset, each of other models; seeds from 0."""
  keras_seeds: int = 1
  """Runs of each Keras."""
  epochs: int | None = None
  """Epochs of a preset, instead of its own."""
  keras_epochs: int = measuring.ARTICLE.training.epochs
  """Epochs of Keras."""
  plot: Path | None = None
  """Draw the results here, as a PNG."""
  archive: Path | None = None
  """A local aclImdb archive or folder; otherwise the cache, the prepared store or a download, as for training."""
  cache_dir: Path = dataclasses.field(default_factory=config.default_cache_dir)
  """Where encoded reviews are cached."""
  limit: int | None = None
  """Use only the first N reviews of each split."""
  sequence_length: int = measuring.ARTICLE.dataset.sequence_length
  """Positions of a review, padding included."""

  def __post_init__(self):
    super().__post_init__()
    measuring.check_systems(self.systems, (*_PRESETS, *_KERAS))
    if not 0 < self.target <= 1:
      raise UsageError(f"--target {self.target}: must be above 0 and at most 1.")

  @property
  def dataset(self) -> config.DataConfig:
    return dataclasses.replace(
      measuring.ARTICLE.dataset, validation="test", limit=self.limit, sequence_length=self.sequence_length
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Epoch:
  training_seconds: float
  evaluation_seconds: float
  test_accuracy: float


@dataclasses.dataclass(kw_only=True)
class Run:
  """One seed of one system, as far as it has come.

  Attributes:
    num_epochs: of the whole run.
    compile_seconds: in none of the epochs.
    versions: of packages, in the process of this run.
    problem: why it has come no further.
  """

  system: str
  seed: int
  num_epochs: int
  epochs: list[Epoch] = dataclasses.field(default_factory=list)
  compile_seconds: float | None = None
  device: str | None = None
  versions: dict[str, str] = dataclasses.field(default_factory=dict)
  problem: str | None = None

  def __str__(self) -> str:
    return f"{self.system}, seed {self.seed}"

  @property
  def is_finished(self) -> bool:
    return len(self.epochs) == self.num_epochs

  def add(self, epoch: Epoch) -> None:
    self.epochs.append(epoch)
    measuring.say(
      f"{self}, epoch {len(self.epochs)} of {self.num_epochs}: {epoch.training_seconds:.1f} s training, "
      f"{epoch.evaluation_seconds:.1f} s evaluation, test accuracy {epoch.test_accuracy:.4f}"
    )

  def fail(self, problem: str) -> None:
    self.problem = problem
    measuring.say(f"{self}: {problem}")


def _begin(runs: list[Run], system: str, seed: int, num_epochs: int) -> Run:
  run = Run(system=system, seed=seed, num_epochs=num_epochs)
  runs.append(run)
  measuring.say(f"{run}: started")
  return run


def turns(counts: Mapping[str, int]) -> list[str]:
  """Names in the order of their turns: those of each are spread evenly over the whole.

  Args:
    counts: turns of each name.
  """
  places = [((turn + 0.5) / count, name) for name, count in counts.items() for turn in range(count)]
  return [name for _, name in sorted(places, key=lambda place: place[0])]


def epochs_to(target: float, epochs: Sequence[Epoch]) -> tuple[Sequence[Epoch], bool]:
  """The epochs up to the first that reaches the target, and True; where none does, all of them and False."""
  for index, epoch in enumerate(epochs):
    if epoch.test_accuracy >= target:
      return epochs[: index + 1], True
  return epochs, False


def _train_preset(options: Options, preset: str, folder: Path, runs: list[Run]) -> Generator[None, None, None]:
  """Adds runs of the trainer to `runs`, a run a turn."""
  training = config.preset(preset).training
  num_epochs = options.epochs or training.epochs
  # No model is part of two runs.
  for seed in range(0, options.seeds * training.num_seeds, training.num_seeds):
    run = _begin(runs, preset, seed, num_epochs)
    home = folder / f"{preset}-{seed}"
    cache_dir = home / "cache"
    cache_dir.mkdir(parents=True)
    # The reviews of all runs, but a cache of XLA's programs of its own: each compiles, as Keras does.
    (cache_dir / "tokens").symlink_to(options.cache_dir.absolute() / "tokens")
    flags = {
      "seed": seed,
      "epochs": num_epochs,
      "validation": options.dataset.validation,
      "limit": options.limit,
      "sequence-length": options.sequence_length,
      "archive": options.archive,
      "cache-dir": cache_dir,
      "run-dir": home / "run",
      "platform": options.platform,
      "num-devices": options.num_devices,
    }
    arguments = [text for name, value in flags.items() if value is not None for text in (f"--{name}", str(value))]
    process = measuring.Process(Path(sys.executable), "trainer.py", [preset, *arguments], home / "scratch")
    try:
      answer = process.receive()
      provenance = json.loads((home / "run" / "provenance.json").read_text(encoding="utf-8"))
      run.compile_seconds = answer["compile_seconds"]
      run.device = f"{len(provenance['devices'])} x {provenance['devices'][0]}"
      run.versions = {"python": provenance["python"], **provenance["versions"]}
      for line in answer["history"]:
        run.add(
          Epoch(
            training_seconds=line["seconds"],
            evaluation_seconds=line["evaluation_seconds"],
            # A run of several models is one ensemble.
            test_accuracy=line["ensemble_accuracy" if training.num_seeds > 1 else "val_accuracy"],
          )
        )
    except measuring.WorkerError as error:
      run.fail(str(error))
    finally:
      process.stop()
    yield


def _train_keras(
  options: Options, system: str, folder: Path, data: tokens.TokenData, runs: list[Run]
) -> Generator[None, None, None]:
  """Adds runs of Keras to `runs`, an epoch a turn; in between its process waits."""
  steps_per_epoch = -(-len(data.train) // measuring.ARTICLE.training.batch_size)
  for seed in range(options.keras_seeds):
    run = _begin(runs, system, seed, options.keras_epochs)
    home = folder / f"{system}-{seed}"
    home.mkdir()
    arrays, test_arrays = home / "train.npz", home / "test.npz"
    measuring.write_arrays(arrays, data.train)
    measuring.write_arrays(test_arrays, data.test)
    num_steps = options.keras_epochs * steps_per_epoch
    job = measuring.make_job(options, system, arrays, num_steps=num_steps, seed=seed, test_arrays=str(test_arrays))
    measurement = measuring.Measurement(job, options.bench_python)
    try:
      for _ in range(options.keras_epochs):
        measurement.run_window(steps_per_epoch)
        evaluation = measurement.evaluate()
        if measurement.ready is None or evaluation is None:
          run.fail(measurement.problem)
          break
        run.compile_seconds = measurement.compile_seconds
        run.device, run.versions = measurement.ready.device, measurement.ready.versions
        run.add(
          Epoch(
            training_seconds=measurement.windows[-1][1].seconds,
            evaluation_seconds=evaluation.seconds,
            test_accuracy=evaluation.accuracy,
          )
        )
        yield
    finally:
      measurement.stop()


def measure(options: Options, data: tokens.TokenData, runs: list[Run], save: Callable[[], None]) -> None:
  """Fills `runs`, and calls `save` after every turn."""
  with tempfile.TemporaryDirectory(prefix="time_to_accuracy-") as name, contextlib.ExitStack() as stack:
    folder, counts, systems = Path(name), {}, {}
    for system in dict.fromkeys(options.systems):
      is_keras = system in _KERAS
      counts[system] = options.keras_seeds * options.keras_epochs if is_keras else options.seeds
      training = (
        _train_keras(options, system, folder, data, runs) if is_keras else _train_preset(options, system, folder, runs)
      )
      systems[system] = stack.enter_context(contextlib.closing(training))
    for system in turns(counts):
      # A run that failed leaves turns over.
      next(systems[system], None)
      save()


def summarize(system: str, runs: Sequence[Run], target: float) -> dict[str, Any]:
  """A row of the results: means and standard deviations over seeds.

  A run that never reaches the target counts with its whole training. One that was cut short counts only for what it
  had come to.
  """
  counted = [run for run in runs if run.is_finished or epochs_to(target, run.epochs)[1]]
  spent = [epochs_to(target, run.epochs) for run in counted]
  return {
    "system": system,
    "seeds": len(counted),
    "reached": sum(is_reached for _, is_reached in spent),
    "training_seconds": _spread([sum(epoch.training_seconds for epoch in epochs) for epochs, _ in spent]),
    "evaluation_seconds": _spread([sum(epoch.evaluation_seconds for epoch in epochs) for epochs, _ in spent]),
    "compile_seconds": _spread([run.compile_seconds for run in runs if run.compile_seconds is not None]),
    "last_accuracy": _spread([run.epochs[-1].test_accuracy for run in runs if run.is_finished]),
    "ratio_to_fast": None,
    "problem": next((run.problem for run in runs if run.problem), None),
  }


def _spread(values: Sequence[float]) -> dict[str, Any] | None:
  if not values:
    return None
  return {
    "mean": statistics.mean(values),
    "std": statistics.stdev(values) if len(values) > 1 else None,
    "n": len(values),
  }


def summary(systems: Sequence[str], runs: Sequence[Run], target: float) -> list[dict[str, Any]]:
  """A row a system. Ratios stand only where every seed of ours has reached the target."""
  rows = [summarize(name, [run for run in runs if run.system == name], target) for name in systems]
  ours = next((row for row in rows if row["system"] == _REFERENCE), None)
  if ours is not None and ours["seeds"] and ours["reached"] == ours["seeds"]:
    for row in rows:
      if row["training_seconds"] is not None:
        row["ratio_to_fast"] = row["training_seconds"]["mean"] / ours["training_seconds"]["mean"]
  return rows


def _results(options: Options, data: tokens.TokenData, runs: Sequence[Run]) -> dict[str, Any]:
  """What `--json` writes."""
  mean = data.train.lengths.mean()
  return {
    "machine": {
      **measuring.describe_machine(run.versions for run in runs),
      "data": f"{len(data.train):,} IMDB training reviews, mean length {mean:.0f}, and {len(data.test):,} test reviews",
      "data_digest": data.digest(),
    },
    "target": options.target,
    "rows": summary(tuple(dict.fromkeys(options.systems)), runs, options.target),
    "runs": [
      dataclasses.asdict(run) | {"reached": epochs_to(options.target, run.epochs)[1], "is_finished": run.is_finished}
      for run in runs
    ],
  }


def _show(results: dict[str, Any]) -> None:
  console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
  table = Table(title=f"Training to a test accuracy of {results['target']:.4f}", title_justify="left")
  table.add_column("system", no_wrap=True)
  for column in ("reached", "s training", "s evaluation", "s compilation", "last epoch's accuracy", "x fast"):
    table.add_column(column, justify="right")
  for row in results["rows"]:
    if not row["seeds"]:
      table.add_row(row["system"], row["problem"] or "not finished")
      continue
    missed = row["seeds"] - row["reached"]
    at_least, ratio = "≥ " if missed else "", row["ratio_to_fast"]
    table.add_row(
      row["system"],
      f"{row['reached']} of {row['seeds']}" + (f", not reached: {missed}" if missed else ""),
      at_least + _cell(row["training_seconds"], ".1f"),
      at_least + _cell(row["evaluation_seconds"], ".1f"),
      _cell(row["compile_seconds"], ".1f"),
      _cell(row["last_accuracy"], ".4f"),
      "" if ratio is None else f"{at_least}{ratio:.2f}",
    )
  console.print(table)
  for line in (
    "Mean ± standard deviation over seeds. Training and evaluation up to the end of the epoch that reaches the target; "
    "where it is not reached, of the whole run.",
    *measuring.machine_lines(results["machine"]),
  ):
    console.print(line, markup=False, soft_wrap=True)


def _cell(spread: dict[str, Any] | None, form: str) -> str:
  if spread is None:
    return ""
  return f"{spread['mean']:{form}}" + ("" if spread["std"] is None else f" ± {spread['std']:{form}}")


def _plot(results: dict[str, Any], output: Path) -> None:
  """A line a run, a dot an epoch."""
  from matplotlib.figure import Figure
  from matplotlib.ticker import LogFormatter, PercentFormatter

  figure = Figure(figsize=(10, 5.5), layout="constrained")
  axes = figure.subplots()
  for index, row in enumerate(results["rows"]):
    runs = [run for run in results["runs"] if run["system"] == row["system"] and run["epochs"]]
    for run in runs:
      seconds, total = [], 0.0
      for epoch in run["epochs"]:
        total += epoch["training_seconds"]
        seconds.append(total)
      accuracies = [epoch["test_accuracy"] for epoch in run["epochs"]]
      label = f"{row['system']} ({len(runs)} seed{'s' if len(runs) > 1 else ''})" if run is runs[0] else None
      axes.plot(seconds, accuracies, marker="o", markersize=4, linewidth=1.2, color=f"C{index}", label=label)
  axes.axhline(results["target"], color="black", linestyle=":", label=f"target, {results['target']:.2%}")
  axes.set_xscale("log")
  axes.xaxis.set_major_formatter(LogFormatter())
  axes.xaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
  axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
  axes.grid(which="both", alpha=0.3)
  axes.legend(loc="lower right")
  axes.set(xlabel="seconds of training, evaluation and compilation apart", ylabel="test accuracy")
  machine = results["machine"]
  axes.set_title(f"Test accuracy after each epoch\n{machine['processor']}, {machine['cores']} cores", fontsize=11)
  measuring.save_figure(figure, output)


def main() -> None:
  try:
    options = tyro.cli(Options, description=__doc__)
    data = tokens.load(options.dataset, archive=options.archive, cache_dir=options.cache_dir, report=measuring.say)
    runs: list[Run] = []

    def save() -> None:
      if options.json is not None:
        measuring.write_json(options.json, _results(options, data, runs))

    is_interrupted = measuring.is_interrupted(lambda: measure(options, data, runs, save))
    save()
    results = _results(options, data, runs)
    if options.plot is not None:
      _plot(results, options.plot)
    _show(results)
    if is_interrupted:
      sys.exit(130)
    measuring.exit_if_failed({row["system"]: row["problem"] for row in results["rows"]})
  except ImdbJaxError as error:
    sys.exit(f"error: {error}")


if __name__ == "__main__":
  main()
