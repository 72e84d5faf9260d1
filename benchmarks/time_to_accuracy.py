"""Compare the training time to a test accuracy: our presets, linear models, and Keras with the article's recipe.

The systems take turns: a whole run of ours or of a linear model, an epoch of Keras. Every run trains to its end.
"""

import contextlib
import statistics
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import measuring
import systems
from measuring import ARTICLE, Options, Save, Worker
from worker import as_flags

from imdb_jax import presets
from imdb_jax.data.tokens import TokenData
from imdb_jax.errors import UsageError

# One seed of one system, as the results have it.
Run = dict[str, Any]

_PRESETS = ("fast", "article")
# Rows of `imdb-jax compare`; a fit counts as an epoch.
_LINEAR = ("tfidf", "nb-svm")
_KERAS = tuple(name for name, system in systems.BASELINES.items() if system.backend != "torch")

FLAGS: list[measuring.Flag] = [
  ("--systems", (*_PRESETS, *_LINEAR, *_KERAS), ("fast", "nb-svm", "keras-jax"), "Presets, linear models, Keras."),
  ("--target", float, 0.8844, "Test accuracy to reach, by default that of the article's best epoch."),
  ("--seeds", int, 5, "Runs of each preset, each with other seeds, and of each linear model."),
  ("--keras-seeds", int, 1, "Runs of each Keras."),
  ("--epochs", int, None, "Epochs of a preset, instead of its own."),
  ("--keras-epochs", int, ARTICLE.training.epochs, "Epochs of Keras."),
  measuring.PLOT,
  ("--archive", Path, None, "Local aclImdb archive; without it, the reviews are found as in training."),
  measuring.CACHE,
  ("--limit", int, None, "Use only the first N reviews of each split."),
  measuring.SIZE_FLAGS["sequence_length"],
]


def new_run(system: str, seed: int, num_epochs: int) -> Run:
  """Return a run without epochs; an epoch has training_seconds, evaluation_seconds and test_accuracy."""
  unknown = dict.fromkeys(("compile_seconds", "device", "precision", "problem"))
  return {"system": system, "seed": seed, "num_epochs": num_epochs, "epochs": [], "versions": {}, **unknown}


def _add_epoch(run: Run, training_seconds: float, evaluation_seconds: float, test_accuracy: float) -> None:
  seconds = {"training_seconds": training_seconds, "evaluation_seconds": evaluation_seconds}
  run["epochs"].append({**seconds, "test_accuracy": test_accuracy})
  measuring.say(
    f"{run['system']}, seed {run['seed']}, epoch {len(run['epochs'])} of {run['num_epochs']}: {training_seconds:.1f} s "
    f"training, {evaluation_seconds:.1f} s evaluation, test accuracy {test_accuracy:.4f}"
  )


def _fail(run: Run, problem: str) -> None:
  run["problem"] = problem
  measuring.say(f"{run['system']}, seed {run['seed']}: {problem}")


def is_finished(run: Run) -> bool:
  return len(run["epochs"]) == run["num_epochs"]


def epochs_to(target: float, run: Run) -> tuple[list[dict[str, float]], bool]:
  """Return the epochs up to the first that reaches the target, and True; if none does, all of them and False."""
  for index, epoch in enumerate(run["epochs"]):
    if epoch["test_accuracy"] >= target:
      return run["epochs"][: index + 1], True
  return run["epochs"], False


def turns(counts: Mapping[str, int]) -> list[str]:
  """Return names in the order of their turns, spread evenly, from the number of turns of each name."""
  places = [((turn + 0.5) / count, name) for name, count in counts.items() for turn in range(count)]
  return [name for _, name in sorted(places, key=lambda place: place[0])]


def _train_preset(options: Options, preset: str, runs: list[Run]) -> Generator[None, None, None]:
  """Add runs of the trainer to `runs`, one per turn."""
  training = presets.preset(preset).training
  # No model is part of two runs.
  for seed in range(0, options.seeds * training.num_seeds, training.num_seeds):
    runs.append(run := new_run(preset, seed, options.epochs or training.epochs))
    with Worker("ours.py") as worker:
      names = ("limit", "sequence_length", "archive", "cache_dir", "platform", "num_devices")
      flags = {"preset": preset, "seed": seed, "epochs": run["num_epochs"], "validation": "test"}
      flags |= {"run_dir": options.scratch / f"{preset}-{seed}", **{name: getattr(options, name) for name in names}}
      answer = worker.ask("train", as_flags(flags))
      if answer is None:
        _fail(run, worker.problem)
      else:
        run |= answer["facts"]
        for line in answer["history"]:
          _add_epoch(run, line["seconds"], line["evaluation_seconds"], line["val_accuracy"])
    yield


def _fit_linear(options: Options, system: str, runs: list[Run]) -> Generator[None, None, None]:
  """Add fits of a linear model to `runs`, one per turn. They differ in their seconds only."""
  for number in range(options.seeds):
    runs.append(run := new_run(system, number, 1))
    with Worker("ours.py") as worker:
      fields = {"system": system, "limit": options.limit, "cache_dir": str(options.cache_dir)}
      answer = worker.ask("linear", fields | {"archive": options.archive and str(options.archive)})
      if answer is None:
        _fail(run, worker.problem)
      else:
        run |= {"device": "cpu", "versions": answer["versions"], "compile_seconds": 0.0}
        _add_epoch(run, answer["seconds"], answer["evaluation_seconds"], answer["accuracy"])
    yield


def _train_keras(options: Options, system: str, data: TokenData, runs: list[Run]) -> Generator[None, None, None]:
  """Add runs of Keras to `runs`, one epoch per turn; between its turns the worker waits."""
  steps_per_epoch = -(-len(data.train) // ARTICLE.training.batch_size)
  for seed in range(options.keras_seeds):
    runs.append(run := new_run(system, seed, options.keras_epochs))
    with measuring.start(options, system) as worker:
      fields = {"seed": seed, "num_steps": options.keras_epochs * steps_per_epoch}
      for name, split in {"arrays": data.train, "test_arrays": data.test}.items():
        fields[name] = measuring.write_arrays(options.scratch / f"{name}.npz", split)
      worker.prepare(measuring.make_job(options, system, sequence_length=options.sequence_length, **fields))
      for _ in range(options.keras_epochs):
        worker.run_window(steps_per_epoch)
        evaluation = worker.ask("evaluate")
        if worker.ready is None or evaluation is None:
          _fail(run, worker.problem)
          break
        run |= {name: worker.ready[name] for name in ("device", "versions")}
        run["compile_seconds"] = worker.compile_seconds()
        _add_epoch(run, worker.windows[-1][1]["seconds"], evaluation["seconds"], evaluation["accuracy"])
        yield


def summarize(system: str, runs: Sequence[Run], target: float) -> dict[str, Any]:
  """Return a row of the results: means and standard deviations over the seeds.

  A run that does not reach the target counts as a whole. A run that was interrupted counts only if it has reached it.
  """
  counted = [epochs_to(target, run) for run in runs if is_finished(run) or epochs_to(target, run)[1]]
  return {
    "system": system,
    "seeds": len(counted),
    "reached": sum(is_reached for _, is_reached in counted),
    "training_seconds": _spread([sum(epoch["training_seconds"] for epoch in epochs) for epochs, _ in counted]),
    "evaluation_seconds": _spread([sum(epoch["evaluation_seconds"] for epoch in epochs) for epochs, _ in counted]),
    "compile_seconds": _spread([run["compile_seconds"] for run in runs if run["compile_seconds"] is not None]),
    "last_accuracy": _spread([run["epochs"][-1]["test_accuracy"] for run in runs if is_finished(run)]),
    "ratio_to_fast": None,
    "problem": next((run["problem"] for run in runs if run["problem"]), None),
  }


def _spread(values: Sequence[float]) -> dict[str, Any] | None:
  if not values:
    return None
  std = statistics.stdev(values) if len(values) > 1 else None
  return {"mean": statistics.mean(values), "std": std, "n": len(values)}


def summary(systems: Sequence[str], runs: Sequence[Run], target: float) -> list[dict[str, Any]]:
  """Return a row per system. There are ratios only if all seeds of ours have reached the target."""
  rows = [summarize(name, [run for run in runs if run["system"] == name], target) for name in dict.fromkeys(systems)]
  fast = next((row for row in rows if row["system"] == "fast" and 0 < row["seeds"] == row["reached"]), None)
  for row in rows:
    if fast is not None and row["training_seconds"] is not None:
      row["ratio_to_fast"] = row["training_seconds"]["mean"] / fast["training_seconds"]["mean"]
  return rows


def measure(options: Options, save: Save) -> None:
  if options.target > 1:
    raise UsageError(f"--target {options.target}: must be above 0 and at most 1.")
  data = measuring.load_reviews(options, limit=options.limit, sequence_length=options.sequence_length)
  shown = f"{len(data.train):,} IMDB training reviews, mean length {data.train.lengths.mean():.0f}, "
  shown += f"and {len(data.test):,} test reviews"
  runs: list[Run] = []
  with contextlib.ExitStack() as stack:
    counts, trainers = {}, {}
    for name in dict.fromkeys(options.systems):
      is_keras, train = name in _KERAS, _fit_linear if name in _LINEAR else _train_preset
      counts[name] = options.keras_seeds * options.keras_epochs if is_keras else options.seeds
      trainers[name] = _train_keras(options, name, data, runs) if is_keras else train(options, name, runs)
      # Ends a worker that waits for its next turn.
      stack.callback(trainers[name].close)
    for name in turns(counts):
      # A run that has failed leaves turns over.
      next(trainers[name], None)
      machine = measuring.describe_machine(runs, shown) | {"data_digest": data.digest}
      rows = summary(options.systems, runs, options.target)
      ended = [run | {"reached": epochs_to(options.target, run)[1], "is_finished": is_finished(run)} for run in runs]
      save({"machine": machine, "target": options.target, "rows": rows, "runs": ended})


if __name__ == "__main__":
  measuring.run(__doc__, FLAGS, measure)
