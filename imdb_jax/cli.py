"""Arguments to calls. What the scripts do stands elsewhere."""

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NoReturn

import tyro

from imdb_jax import config as config_lib
from imdb_jax.config import Config, RuntimeConfig
from imdb_jax.errors import ImdbJaxError, UsageError

# Encoded at a time: a piece of short lines would be a million reviews.
_TEXTS_AT_ONCE = 256
# Read at a time, and the most that a review may have.
_PIECE_BYTES, _LINE_BYTES = 2**20, 2**26


def _exit_with(code: int, message: str) -> NoReturn:
  try:
    print(message, file=sys.stderr, flush=True)
  except OSError:
    # Its terminal has gone. Python would write there once more at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
  sys.exit(code)


@contextlib.contextmanager
def _clear_errors() -> Iterator[None]:
  """What is meant for a person becomes one line and an exit code, never a traceback."""
  logging.basicConfig(format="warning: %(message)s")
  # Closed from the start, as with `>&-`; this one stays open.
  sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115
  try:
    yield
    sys.stdout.flush()
  except ImdbJaxError as error:
    _exit_with(error.exit_code, f"error: {error}")
  except KeyboardInterrupt:
    # Where there is something to save, the trainer heeds the signal itself.
    _exit_with(130, "Interrupted; there was nothing to save.")
  except BrokenPipeError:
    # The reader has had enough, as in `predict.py … | head`. Python would complain once more at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  except OSError as error:
    _exit_with(1, f"error: {error}")


@contextlib.contextmanager
def _unwinding() -> Iterator[None]:
  """Ctrl-C becomes an exception, so that what a download or an encoding has begun is removed.

  Elsewhere it ends the process at once, as the scripts have it: within an import of JAX an exception gets lost, or
  crashes it.
  """
  previous = signal.getsignal(signal.SIGINT)
  if previous == signal.SIG_DFL:
    signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, previous)


def _parse_config(arguments: list[str], description: str) -> Config:
  """The preset first, then every other flag over it."""
  chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
  chooser.add_argument("--preset", nargs="?", default="article")
  known, _ = chooser.parse_known_args(arguments)
  # A flag without a name is tyro's to complain of.
  default = config_lib.preset(known.preset or "article")
  return tyro.cli(Config, description=description, default=default, args=arguments)


def train() -> None:
  """The command `scripts/train.py`."""
  arguments = sys.argv[1:]
  with _clear_errors():
    presets = ", ".join(config_lib.PRESETS)
    config = _parse_config(arguments, f"Train or resume a sentiment LSTM. Presets: {presets}.")
    from imdb_jax import sharding
    from imdb_jax.training.loop import fit
    from imdb_jax.training.signals import Interrupted

    with sharding.leaving(), _clear_errors(), _unwinding():
      try:
        fit(config)
      except Interrupted as stop:
        again = shlex.join(["python", sys.argv[0], *arguments])
        _exit_with(128 + stop.signal, f"Saved step {stop.step:,} in {config.run_dir}. Resume with:\n  {again}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Restoring:
  """What all commands on a finished run share."""

  run_dir: tyro.conf.Positional[Path]
  """Folder of the run."""
  step: Literal["best", "latest"] | int = "best"
  """Checkpoint: best (by validation accuracy), latest, or a step's number."""
  platform: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
  """Where to compute."""
  json: bool = False
  """Print JSON."""

  def __post_init__(self):
    config_lib.expand_paths(self)

  def load(self, **settings: Any):
    from imdb_jax import sharding
    from imdb_jax.prediction import Classifier

    runtime = RuntimeConfig(platform=self.platform, **settings)
    sharding.keep_freed_memory(runtime)
    return Classifier.load(self.run_dir, step=self.step, runtime=runtime)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Evaluate(_Restoring):
  split: Literal["test", "validation", "train"] = "test"
  """Which reviews."""
  archive: Path | None = None
  """A local aclImdb archive or folder, where the encoded reviews are not in the cache."""
  cache_dir: Path = dataclasses.field(default_factory=config_lib.default_cache_dir)
  """Where encoded reviews are cached."""

  def __call__(self) -> None:
    from imdb_jax import run_directory
    from imdb_jax.data import tokens

    classifier = self.load(archive=self.archive, cache_dir=self.cache_dir)
    with _unwinding():
      data = tokens.load(
        classifier.config.dataset,
        archive=self.archive,
        cache_dir=self.cache_dir,
        report=lambda line: print(line, file=sys.stderr),
      )
    run_directory.check_data(self.run_dir, data.digest())
    result = dataclasses.asdict(classifier.evaluate(getattr(data, self.split)))
    result = {"run_dir": str(self.run_dir), "step": classifier.step, "split": self.split, **result}
    if "seeds" in result:
      numbers = classifier.config.training.seeds
      result["seeds"] = [{"seed": seed, **each} for seed, each in zip(numbers, result["seeds"], strict=True)]
    if self.json:
      print(json.dumps(result))
      return
    for of_seed in result.pop("seeds", []):
      result[f"accuracy, seed {of_seed['seed']}"] = of_seed["accuracy"]
    width = max(map(len, result))
    for name, value in result.items():
      shown = f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
      print(f"{name.replace('_', ' '):<{width}} {shown}")


def evaluate() -> None:
  """The command `scripts/evaluate.py`."""
  with _clear_errors():
    tyro.cli(_Evaluate, description="Evaluate a run's checkpoint.")()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Predict(_Restoring):
  texts: tyro.conf.Positional[tuple[str, ...]] = ()
  """Reviews. Without any, they are read from --file."""
  file: str = "-"
  """A review a line; - is standard input."""

  def __call__(self) -> None:
    if self.texts and self.file != "-":
      raise UsageError(f"--file {self.file}: not together with reviews on the command line.")
    classifier = self.load()
    for texts in self._chunks():
      for start in range(0, len(texts), _TEXTS_AT_ONCE):
        self._answer(classifier, texts[start : start + _TEXTS_AT_ONCE])
      sys.stdout.flush()

  def _answer(self, classifier, texts: list[str]) -> None:
    for text, probability in zip(texts, classifier.predict(texts), strict=True):
      sentiment = "positive" if probability > 0.5 else "negative"
      known_words = len(classifier.vocabulary.ids(text))
      if self.json:
        print(
          json.dumps(
            {"probability": float(probability), "sentiment": sentiment, "known_words": known_words, "text": text}
          )
        )
      else:
        # A line a review, and nothing that a terminal would obey.
        shown = "".join(letter if letter.isprintable() else " " for letter in text[:80])
        shown = shown if len(text) <= 80 else shown[:79] + "…"
        print(f"{probability:.4f}  {sentiment}  {shown}{'' if known_words else '  (no known word: a guess)'}")

  def _chunks(self) -> Iterator[list[str]]:
    """Reviews as they come: whoever writes them to a pipe may wait for the answers."""
    if self.texts:
      yield list(self.texts)
      return
    if self.file == "-" and sys.stdin is not None and sys.stdin.isatty():
      print("Type reviews, one a line; end with Ctrl-D.", file=sys.stderr)
    rest = b""
    try:
      # Standard input is a descriptor, not a path.
      source = 0 if self.file == "-" else self.file
      with open(source, "rb", buffering=0) as file:  # noqa: PTH123
        while piece := file.read(_PIECE_BYTES):
          *lines, rest = (rest + piece).split(b"\n")
          if len(rest) > _LINE_BYTES:
            raise UsageError(f"--file {self.file}: has a line of more than {_LINE_BYTES:,} bytes.")
          if lines:
            yield list(map(_decoded, lines))
    except OSError as error:
      raise UsageError(f"--file {self.file}: {error.strerror}.") from error
    if rest:
      yield [_decoded(rest)]


def _decoded(line: bytes) -> str:
  return line.removesuffix(b"\r").decode("utf-8", errors="replace")


def predict() -> None:
  """The command `scripts/predict.py`."""
  with _clear_errors():
    tyro.cli(_Predict, description="Tell whether reviews are positive.")()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plot:
  run_dir: tyro.conf.Positional[Path]
  """Folder of the run."""
  output: Path | None = None
  """The .png, .pdf or .svg to write; history.png in the run's folder by default."""

  def __post_init__(self):
    config_lib.expand_paths(self)

  def __call__(self) -> None:
    from imdb_jax import plots

    output = self.output or self.run_dir / "history.png"
    try:
      plots.plot_history(self.run_dir, output)
    except OSError as error:
      raise UsageError(f"--output {output}: cannot be written: {error}.") from error
    print(output)


def plot() -> None:
  """The command `scripts/plot.py`."""
  with _clear_errors():
    tyro.cli(_Plot, description="Draw accuracy and loss of a run, training against validation.")()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Prepare:
  archive: Path
  """A local aclImdb archive (.tar.gz, .tar.xz) or its unpacked folder."""
  data_dir: Path = dataclasses.field(default_factory=config_lib.default_cache_dir)
  """Where the record store is written; training looks there first."""

  def __post_init__(self):
    config_lib.expand_paths(self)

  def __call__(self) -> None:
    try:
      from imdb_jax.data import tfds_imdb
    except ImportError as error:
      raise UsageError(f"A record store needs tensorflow-datasets and array-record: {error}.") from error
    try:
      # Before the archive is read, which takes a while.
      self.data_dir.mkdir(parents=True, exist_ok=True)
      tempfile.TemporaryFile(dir=self.data_dir).close()
    except OSError as error:
      raise UsageError(f"--data-dir {self.data_dir}: cannot be written: {error}.") from error
    with _unwinding():
      print(tfds_imdb.prepare(self.data_dir, self.archive))


def prepare() -> None:
  """The command `scripts/prepare.py`."""
  with _clear_errors():
    tyro.cli(_Prepare, description="Prepare the tensorflow-datasets store from a local archive.")()
