"""The rows of a comparison. Each model is trained once, and its result is kept in the comparison's folder.

settings.json       digests of the reviews
ROW-seedN.json      a result, see `imdb_jax.comparison.results`
ROW-seedN/          the run of a recurrent model
language-seed0/     the run of a language model, from which all models of the row `pretrained` start
comparison.html, .md, .json
lock                held by a running comparison
"""

import dataclasses
import functools
import importlib.util
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from imdb_jax import devices
from imdb_jax.comparison import linear, results, table
from imdb_jax.config import Config
from imdb_jax.data import sources, tables, tokens
from imdb_jax.data.reviews import Reviews
from imdb_jax.errors import ImdbJaxError, PlatformError, UsageError, first_line
from imdb_jax.prediction import Classifier
from imdb_jax.presets import PRESETS
from imdb_jax.processes import Interrupted
from imdb_jax.store import files, run_directory
from imdb_jax.task import Classification
from imdb_jax.training.console import Console
from imdb_jax.training.loop import FitResult, fit

# Rows that do not depend on a seed.
LINEAR: dict[str, Callable[[Reviews, Reviews], results.Result]] = {
  "majority": linear.majority,
  "tfidf": functools.partial(linear.ngrams, is_nb_svm=False),
  "nb-svm": functools.partial(linear.ngrams, is_nb_svm=True),
  "fasttext": linear.fasttext,
}
# Preset, and the settings that differ from it.
RECURRENT: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
  "bag": (
    "fast",
    {
      "model": {"cell": "bag", "pooling": "mean", "embedding": "random", "input_dropout_rate": 0.5},
      "optimizer": {"learning_rate": 5e-3, "embedding_rate": 1.0},
      "training": {"epochs": 3},
    },
  ),
  "rnn": ("article", {"model": {"cell": "rnn"}}),
  "gru": ("article", {"model": {"cell": "gru"}}),
  "lstm": ("article", {}),
  "bi-lstm": ("article", {"model": {"directions": 2}}),
  "fast": ("fast", {}),
  "strong": ("strong", {}),
  "pretrained": ("pretrained", {}),
}
ROWS = (*LINEAR, *RECURRENT)
# fastText is compiled at its installation.
DEFAULT_ROWS = tuple(row for row in ROWS if row != "fasttext" or importlib.util.find_spec("fasttext"))


def compare(base: Config, rows: Sequence[str] = DEFAULT_ROWS, *, quick: bool = False) -> None:
  """Compute the missing results of some rows; write and print the table of all results in the folder.

  Args:
    base: folder, reviews and platform of the comparison; `training.num_seeds` is the number of models per row.
    rows: names from `ROWS`.
    quick: use small models and short reviews, for a demonstration.

  Raises:
    UsageError: a row is unknown, or the folder holds something else or is in use.
    DataError: the reviews are missing or damaged.
    ImdbJaxError: a row has failed; the table names it.
    Interrupted: a signal arrived; the run in progress has been saved.
  """
  if unknown := [row for row in rows if row not in ROWS]:
    raise UsageError(f"--rows {unknown[0]:.80}: unknown. There are {', '.join(ROWS)}.")
  devices.keep_freed_memory(base.runtime)
  console, run_dir = Console(), base.run_dir
  console.line("Reading the reviews")
  source = sources.find(base.data, base.runtime.archive, base.runtime.cache_dir)
  splits = tokens.split(base.data, source.load(console.line))
  tables.report_left_out(splits["train"].left_out, console.line)
  train, validation = splits["train"], splits.setdefault("validation", splits["test"])
  if len(train.classes) != 2:
    raise UsageError(f"--data {base.data.source}: has {len(train.classes)} classes, but two are compared.")
  settings = {"quick": quick, "train": train.digest, "validation": validation.digest}
  found = run_directory.names(run_dir) - {"lock", "settings.json.new"}
  if found and ("settings.json" not in found or run_directory.read_json(run_dir / "settings.json") != settings):
    raise UsageError(
      f"--run-dir {run_dir}: holds something else, or a comparison on other reviews or with another --quick; "
      "nothing was touched. Name another folder."
    )
  done: dict[str, list[results.Result]] = {}
  failures: dict[str, ImdbJaxError] = {}
  fit_once = functools.cache(fit)  # Several models start from the same run.
  with run_directory.locked(run_dir):
    files.write_json(run_dir / "settings.json", settings)
    for row in ROWS:
      try:
        for seed in range(1 if row in LINEAR else base.training.num_seeds):
          path = run_dir / f"{row}-seed{seed}.json"
          runs = _runs(base, row, seed, quick) if row in RECURRENT else None
          model = runs[-1].to_dict() if runs else row
          result = results.read(path, model, len(validation), console.line)
          if result is None and row in rows:
            console.line(f"\n{path.stem}")
            result = _train(runs, fit_once) if runs else LINEAR[row](train, validation)
            result = dataclasses.replace(result, model=model)
            files.write(path, json.dumps(vars(result)) + "\n")
          if result:
            done.setdefault(row, []).append(result)
      except ImdbJaxError as error:
        failures[row] = error
      except MemoryError as error:
        failures[row] = PlatformError(f"Not enough memory: {first_line(error)}.")
      if row in failures:
        console.line(f"{row} failed: {failures[row]}")
    table.write(base, done, failures, splits, console)
  for row, error in failures.items():
    raise type(error)(f"{len(failures)} of {len(rows)} rows failed; {row}: {error}")


def _runs(base: Config, row: str, number: int, quick: bool) -> list[Config]:
  """Return the settings of the runs that a recurrent model takes; the last one is the model."""
  runs = [_configure(base, "language", 0, quick)] if row == "pretrained" else []
  return [*runs, _configure(base, row, number, quick, init_from=runs[0].run_dir if runs else None)]


def _configure(base: Config, row: str, number: int, quick: bool, init_from: Path | None = None) -> Config:
  """Return the settings of a run: of a row's model, or of the language model. An ensemble takes several seeds."""
  (name, overrides), sample = RECURRENT.get(row, (row, {})), PRESETS["sample"]
  # The preset "sample" is the article's, smaller and with a higher rate.
  config = sample if quick and name == "article" else PRESETS[name]
  changed = {section: dataclasses.replace(getattr(config, section), **fields) for section, fields in overrides.items()}
  config = dataclasses.replace(config, **changed)
  data, model, training = (sample if quick else config).data, config.model, config.training
  num_units = min(model.hidden_size, sample.model.hidden_size) if quick else model.hidden_size
  # Only IMDB has unlabelled reviews.
  is_used = model.unlabelled and base.data.source == "imdb"
  return dataclasses.replace(
    config,
    data=dataclasses.replace(data, source=base.data.source, validation=base.data.validation),
    model=dataclasses.replace(model, hidden_size=num_units, unlabelled=is_used),
    training=dataclasses.replace(training, seed=number * training.num_seeds),
    runtime=dataclasses.replace(base.runtime, run_dir=base.run_dir / f"{row}-seed{number}", init_from=init_from),
  )


def _train(runs: Sequence[Config], fit_once: Callable[[Config], FitResult]) -> results.Result:
  """Train or resume runs, and predict with the last step of the last one. Its best may be chosen on these reviews."""
  histories, config = [], runs[-1]
  for run in runs:
    fitted = fit_once(run)
    histories.append(fitted.history)
    if fitted.late_signal:
      raise Interrupted(fitted.late_signal, fitted.history[-1]["step"])
  classifier = Classifier.load(config.run_dir, step="latest", runtime=config.runtime)
  split = classifier.read_split("validation")
  # This compiles.
  classifier.logits(tokens.TokenSplit(**{name: array[:1] for name, array in vars(split).items()}))
  started = time.perf_counter()
  logits = classifier.logits(split)
  return results.Result(
    predict_seconds=time.perf_counter() - started,
    logits=Classification().ensemble(logits)[:, 0].tolist(),
    num_parameters=classifier.num_parameters,
    train_seconds=sum(line["seconds"] for history in histories for line in history),
    val_accuracy=[line["val_accuracy"] for line in histories[-1]],
    computed_on=results.describe_machine(jax.devices()[0].device_kind),
  )
