"""Compare our presets with TF-IDF and fastText on three data sets as CSV files: accuracy, time and memory.

Every system trains and predicts in processes of its own, one after another. Ours runs through its commands, and finds
no compiled programs. `own_data_sets.py` describes the data sets.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import measuring
import own_data_sets
from measuring import Options, Save
from worker import as_flags

from imdb_jax.errors import UsageError

# Flags of our trainer by system.
OURS = {
  "fast": "--preset fast",
  "fast-ngrams": "--preset fast --epochs 4 --ngrams 3",
  "strong": "--preset strong",
}
_OTHERS = ("tfidf", "fasttext")
# TF-IDF has no seed.
_WITHOUT_SEED = ("tfidf",)

FLAGS: list[measuring.Flag] = [
  ("--systems", (*OURS, *_OTHERS), ("fast", "fast-ngrams", "strong", *_OTHERS), "Ours, and bags of words."),
  ("--data", tuple(own_data_sets.SIZES), tuple(own_data_sets.SIZES), "Data sets; those of IMDB need --archive."),
  (
    "--archive",
    Path,
    None,
    "Official aclImdb archive, as .tar.gz or .tar.xz; without it, only docstrings are measured.",
  ),
  ("--seeds", int, 1, "Models per system and data set, with different seeds."),
  ("--limit", int, None, "Use at most N training and N test rows."),
  ("--held-out", bool, False, "Test on a quarter of the training rows, to choose settings by."),
  ("--fasttext-python", Path, Path(sys.executable), "Python with the package fasttext-wheel."),
]

_FOLDER = Path(__file__).resolve().parent
_WORKER = str(_FOLDER / "own_data_worker.py")


class _Problem(Exception):
  """A process has failed, or a package is missing; the message says why."""


def _run(python: Path, script: str, *arguments: str | Path, **settings: Any) -> tuple[list[str], dict[str, Any]]:
  """Run a script in a process of its own; return its lines of output, and its seconds and memory."""
  if not python.exists():
    raise _Problem(f"missing {python.name}: see --fasttext-python")
  command = [sys.executable, _WORKER, "measure", python, script, *arguments, *as_flags(settings)]
  with tempfile.TemporaryDirectory(prefix="imdb_jax-benchmark-") as folder:
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": folder}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=True)
  *lines, figures = done.stdout.splitlines()
  answer = json.loads(figures)
  if answer["code"]:
    raise _Problem(f"failed: {(done.stderr.strip() or 'without a message').splitlines()[-1]}")
  return lines, answer


def _train_ours(options: Options, system: str, folder: Path, model: Path, seed: int) -> dict[str, Any]:
  scripts = _FOLDER.parent / "scripts"
  places = {"run_dir": model, "cache_dir": f"{model}-cache", "num_devices": options.num_devices}
  files = {"data": folder / "train.csv", "test_data": folder / "test.csv"}
  flags = {"seed": seed, "platform": options.platform, **files, **places}
  _, process = _run(Path(sys.executable), str(scripts / "train.py"), *OURS[system].split(), **flags)
  lines = (model / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
  epochs = [line for line in map(json.loads, lines) if "val_accuracy" in line]
  start = json.loads((model / "provenance.json").read_text(encoding="utf-8"))["starts"][-1]
  seconds = sum(line["seconds"] for line in epochs)
  return process | {"fit_seconds": seconds, "versions": start["versions"], "precision": start["precision"]}


def _measure(options: Options, system: str, folder: Path, seed: int) -> dict[str, Any]:
  """Train and predict in a process each, and return the figures."""
  model, name = options.scratch / f"{folder.name}-{system}-{seed}", system if system in _OTHERS else "ours"
  python = options.fasttext_python if system == "fasttext" else Path(sys.executable)

  def work(task: str, *arguments: str) -> tuple[dict[str, Any], dict[str, Any]]:
    lines, process = _run(python, _WORKER, f"{task}-{name}", folder, model, *arguments)
    answer = json.loads(lines[-1])
    if "problem" in answer:
      raise _Problem(answer["problem"])
    return answer, process

  if name == "ours":
    trained = _train_ours(options, system, folder, model, seed)
  else:
    answer, process = work("train", str(seed))
    trained = process | answer
  predicted, process = work("predict")
  return {
    "train_seconds": trained["seconds"],
    "fit_seconds": trained["fit_seconds"],
    "train_memory_mb": trained["memory_mb"],
    "predict_seconds": process["seconds"],
    "predict_memory_mb": process["memory_mb"],
    "accuracy": predicted["accuracy"],
    "texts_per_second": predicted["texts_per_second"],
    "versions": trained.get("versions", {}) | predicted["versions"],
    "precision": trained.get("precision"),
  }


def summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
  """Return a row of the results: mean and standard deviation of the accuracy, and medians of the other figures."""
  measured = [run for run in runs if not run["problem"]]
  row: dict[str, Any] = {name: runs[0][name] for name in ("data", "system")} | {"seeds": len(measured)}
  row["problem"] = next((run["problem"] for run in runs if run["problem"]), None)
  accuracies = [run["accuracy"] for run in measured]
  row["accuracy"] = statistics.mean(accuracies) if accuracies else None
  row["accuracy_std"] = statistics.stdev(accuracies) if len(accuracies) > 1 else None
  for name in ("train_seconds", "fit_seconds", "texts_per_second", "train_memory_mb", "predict_memory_mb"):
    row[name] = statistics.median(run[name] for run in measured) if measured else None
  return row


def _write_data(options: Options) -> dict[str, str]:
  """Write the data sets, and return their numbers of rows by name."""
  flags = as_flags({"archive": options.archive, "limit": options.limit}) + ["--held-out"] * options.held_out
  command = [sys.executable, str(_FOLDER / "own_data_sets.py"), str(options.scratch), *flags]
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode:
    raise UsageError(f"--archive {options.archive}: {done.stderr.strip().splitlines()[-1]}.")
  return json.loads(done.stdout)


def measure(options: Options, save: Save) -> None:
  num_rows, runs = _write_data(options), []
  names = [name for name in dict.fromkeys(options.data) if name in num_rows]
  for seed, name, system in itertools.product(range(options.seeds), names, dict.fromkeys(options.systems)):
    if seed and system in _WITHOUT_SEED:
      continue
    run: dict[str, Any] = {"data": name, "system": system, "seed": seed, "problem": None}
    try:
      run |= _measure(options, system, options.scratch / name, seed)
    except _Problem as problem:
      run["problem"] = str(problem)
    runs.append(run)
    shown = run["problem"] or "accuracy {accuracy:.4f}, {train_seconds:.1f} s".format_map(run)
    measuring.say(f"{name}, {system}, seed {seed}: {shown}")
    save({"machine": _describe(options, runs, num_rows), "rows": _rows(runs), "runs": runs})


def _describe(options: Options, runs: list[dict[str, Any]], num_rows: dict[str, str]) -> dict[str, Any]:
  """Return the conditions of the results, without the paths of this machine."""
  data = "; ".join(f"{name}: {num_rows[name]}" for name in dict.fromkeys(run["data"] for run in runs))
  machine = measuring.describe_machine([run for run in runs if not run["problem"]], data)
  for path in filter(None, (options.archive, options.fasttext_python, options.json)):
    machine["command"] = machine["command"].replace(str(path), path.name)
  return machine


def _rows(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
  grouped: dict[tuple[str, str], list[dict[str, Any]]] = {}
  for run in runs:
    grouped.setdefault((run["data"], run["system"]), []).append(run)
  return [summarize(group) for group in grouped.values()]


if __name__ == "__main__":
  measuring.run(__doc__, FLAGS, measure)
