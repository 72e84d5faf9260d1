"""Worker of own_data.py: trains and applies classifiers, each in a process of its own, and measures processes.

    measure COMMAND ...               run a command; print its seconds and peak memory
    train-NAME FOLDER MODEL SEED      train on FOLDER/train.csv, and save to the file MODEL
    predict-NAME FOLDER MODEL         restore, and predict the texts of FOLDER/test.csv

The last line of output is JSON. Packages are imported where they are used: fastText runs in another environment.
"""

import csv
import importlib
import importlib.metadata
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def measure(*command: str) -> dict[str, Any]:
  """Run a command. Linux counts the memory of a process that starts another one as that of the other: ours is small."""
  started = time.perf_counter()
  _, status, usage = os.wait4(os.posix_spawn(command[0], command, os.environ), 0)
  # macOS counts bytes, other systems kilobytes.
  memory_mb = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
  code = os.waitstatus_to_exitcode(status)
  return {"code": code, "seconds": time.perf_counter() - started, "memory_mb": memory_mb}


def _read(folder: str, name: str) -> tuple[list[str], list[str]]:
  with Path(folder, f"{name}.csv").open(encoding="utf-8", newline="") as file:
    rows = list(csv.DictReader(file))
  return [row["text"] for row in rows], [row["label"] for row in rows]


def _predict(folder: str, predict: Callable[[list[str]], Iterable[str]], package: str) -> dict[str, Any]:
  """Time the predictions of the test texts. `predict` takes texts and returns labels."""
  texts, labels = _read(folder, "test")
  predict(texts[:1])
  started = time.perf_counter()
  predicted = predict(texts)
  seconds = time.perf_counter() - started
  correct = sum(found == label for found, label in zip(predicted, labels, strict=True))
  versions = {"python": platform.python_version(), package: importlib.metadata.version(package)}
  return {"accuracy": correct / len(labels), "texts_per_second": len(texts) / seconds, "versions": versions}


def train_tfidf(folder: str, model: str, seed: str) -> dict[str, Any]:
  """Train logistic regression on the TF-IDF of words and pairs of words; C was chosen on held-out rows."""
  import joblib
  from sklearn.feature_extraction.text import TfidfVectorizer
  from sklearn.linear_model import LogisticRegression
  from sklearn.pipeline import make_pipeline

  texts, labels = _read(folder, "train")
  started = time.perf_counter()
  vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
  fitted = make_pipeline(vectorizer, LogisticRegression(C=30, max_iter=1000)).fit(texts, labels)
  seconds = time.perf_counter() - started
  joblib.dump(fitted, model)
  return {"fit_seconds": seconds}


def predict_tfidf(folder: str, model: str) -> dict[str, Any]:
  import joblib

  fitted = joblib.load(model)
  return _predict(folder, lambda texts: fitted.predict(texts).tolist(), "scikit-learn")


def _as_line(text: str) -> str:
  """Return a text as fastText's tutorial prepares it: small letters, signs apart from words, one line."""
  return " ".join(re.sub(r"([.!?,'/()\"])", r" \1 ", text).lower().split())


def train_fasttext(folder: str, model: str, seed: str) -> dict[str, Any]:
  """Train fastText; the settings were chosen on held-out rows."""
  # It is in no lock file.
  fasttext = importlib.import_module("fasttext")
  texts, labels = _read(folder, "train")
  started, lines = time.perf_counter(), Path(f"{model}.txt")
  lines.write_text(
    "".join(f"__label__{label} {_as_line(text)}\n" for text, label in zip(texts, labels, strict=True)), encoding="utf-8"
  )
  settings = {"lr": 0.5, "epoch": 25, "wordNgrams": 2, "thread": os.cpu_count(), "verbose": 0}
  fitted = fasttext.train_supervised(str(lines), seed=int(seed), **settings)
  seconds = time.perf_counter() - started
  fitted.save_model(model)
  return {"fit_seconds": seconds}


def predict_fasttext(folder: str, model: str) -> dict[str, Any]:
  # It is in no lock file.
  fasttext = importlib.import_module("fasttext")
  fitted = fasttext.load_model(model)

  def predict(texts: list[str]) -> list[str]:
    labels, _ = fitted.predict([_as_line(text) for text in texts])
    return [label[0].removeprefix("__label__") for label in labels]

  return _predict(folder, predict, "fasttext-wheel")


def predict_ours(folder: str, model: str) -> dict[str, Any]:
  from imdb_jax import Classifier

  # The last epoch: the best one would be chosen on the test texts.
  classifier = Classifier.load(model, step="latest")
  classifier.warmup()
  return _predict(folder, classifier.predict, "imdb_jax")


if __name__ == "__main__":
  action, *arguments = sys.argv[1:]
  try:
    answer = globals()[action.replace("-", "_")](*arguments)
  except ModuleNotFoundError as error:
    answer = {"problem": f"missing {error.name}"}
  print(json.dumps(answer))
