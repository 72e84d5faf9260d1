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
from collections.abc import Iterator
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

  def send(self, num_steps: int) -> None:
    assert self._process.stdin is not None
    # A worker that has died is noticed when its answer is missing.
    with contextlib.suppress(BrokenPipeError):
      self._process.stdin.write(f"{num_steps}\n")
      self._process.stdin.flush()

  def receive(self) -> dict[str, Any]:
    """Raises: _WorkerError: there is no answer."""
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

  def __init__(self, name: str, options: Options, arrays: Path, num_steps: int, processes: contextlib.ExitStack):
    self.name, self.windows, self.problem = name, [], ""
    self.ready: worker.Ready | None = None
    self._process: _Process | None = None
    scratch = arrays.parent / name
    scratch.mkdir()
    job = worker.Job(
      system=name,
      arrays=str(arrays),
      scratch=str(scratch),
      num_steps=num_steps,
      seed=0,
      **{
        field: getattr(options, field)
        for field in (
          "batch_size",
          "vocabulary_size",
          "embedding_size",
          "hidden_size",
          "platform",
          "num_devices",
          "matmul_size",
        )
      },
    )
    is_ours = name not in baselines.SYSTEMS
    python = sys.executable if is_ours else str(options.bench_python)
    if not is_ours and not options.bench_python.exists():
      self.problem = f"missing: {_SYSTEMS[name].install}"
      return
    script = _HERE / ("ours.py" if is_ours else "baselines.py")
    command = [python, str(script), json.dumps(dataclasses.asdict(job))]
    # Keras writes a settings file into its home.
    environment = os.environ | {"KERAS_HOME": str(scratch), "TF_CPP_MIN_LOG_LEVEL": "2"}
    self._process = _Process(command, scratch / "stderr.txt", environment)
    processes.callback(self._process.stop)

  def start(self) -> None:
    if self._process is None:
      return
    try:
      answer = self._process.receive()
    except _WorkerError as error:
      self.problem = str(error)
      return
    if "missing" in answer:
      install = getattr(_SYSTEMS.get(self.name), "install", ours.INSTALL)
      self.problem = f"missing {answer['missing']}: {install}"
    else:
      self.ready = worker.Ready(**answer)

  def run_window(self, num_steps: int) -> None:
    """Adds a window, unless the system has none to give."""
    if self._process is None or self.problem:
      return
    self._process.send(num_steps)
    try:
      self.windows.append((num_steps, worker.Window(**self._process.receive())))
    except _WorkerError as error:
      self.problem = str(error)

  @property
  def seconds_per_step(self) -> list[float]:
    return [window.seconds / num_steps for num_steps, window in self.windows]
