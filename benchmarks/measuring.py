"""Shared parts of the benchmarks: flags, workers and their timed windows, reviews, and the description of the machine.

Every system runs in a process of its own, and only one computes at a time. The systems take turns, window by window, so
that whatever else the machine does affects all of them. Compilation and warm-up are not part of any window.
"""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import itertools
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import reporting
from worker import SIZES, Job

from imdb_jax import config, presets
from imdb_jax.arguments import Parser
from imdb_jax.data import sources, tokens
from imdb_jax.errors import ImdbJaxError
from imdb_jax.store import files
from imdb_jax.validation import flag

ARTICLE = presets.preset("article")
RANDOM_REVIEWS = "reviews of random words (no real reviews)"

Options = argparse.Namespace
Save = Callable[[dict[str, Any]], None]
# Name, type, default and help. The type is int (at least 1), float (above 0), bool, Path, or the known names. A flag
# whose default is a tuple takes several values.
Flag = tuple[str, Any, Any, str]

_PYTHON = Path(__file__).resolve().parent.parent / ".venv-bench" / "bin" / "python"
_FLAGS: list[Flag] = [
  ("--json", Path, None, "Write the results to this file."),
  ("--platform", ("auto", "cpu", "gpu", "tpu"), "auto", "Where our systems compute."),
  ("--num-devices", int, None, "Devices for our systems; by default all, and one per CPU core."),
  ("--bench-python", Path, _PYTHON, "Python with Keras and PyTorch, which `make bench` installs."),
]
PLOT: Flag = ("--plot", Path, None, "Draw the results to this PNG file.")
WINDOWS: Flag = ("--windows", int, 5, "Timed windows of each system.")
WINDOW_SECONDS: Flag = ("--window-seconds", float, 1.0, "Approximate length of a window, which has at least one step.")
MATMUL_SIZE: Flag = ("--matmul-size", int, 4096, "The ceiling is the speed of a product of two matrices of this size.")
CACHE: Flag = ("--cache-dir", Path, config.default_cache_dir(), "Cache folder.")
SIZE_FLAGS: dict[str, Flag] = {
  field.name: (flag(field.name), int, getattr(section, field.name), field.metadata["doc"])
  for section in (ARTICLE.training, ARTICLE.data, ARTICLE.model)
  for field in dataclasses.fields(section)
  if field.name in SIZES
}
ARTICLE_SIZES = {name: default for name, (_, _, default, _) in SIZE_FLAGS.items()}


def parse(doc: str | None, flags: Iterable[Flag], args: Sequence[str]) -> Options:
  """Return the options of a benchmark; raise UsageError if a flag or value is invalid."""
  parser = Parser(prog=f"python {sys.argv[0]}", description=doc)
  for name, kind, default, text in [*_FLAGS, *flags]:
    if kind is bool:
      parser.add_argument(name, action="store_true", help=text)
      continue
    several = isinstance(default, tuple)
    shown = " ".join(map(str, default)) if several else default
    settings: dict[str, Any] = {"nargs": "+"} if several else {}
    metavar = {int: "N", float: "X", Path: "PATH"}.get(kind) or ("NAME" if several else f"{{{','.join(kind)}}}")
    settings |= {"metavar": metavar, "help": text if shown in (None, "") else f"{text} [{shown}]"}
    parser.add_argument(name, type=functools.partial(_read, kind), default=default, **settings)
  return parser.parse_args(args)


def _read(kind: Any, text: str) -> Any:
  if kind is Path:
    # Shells leave the ~ of --json=~/x alone. Path.expanduser raises for a folder named ~x.
    return Path(os.path.expanduser(text))  # noqa: PTH111
  if kind in (int, float):
    with contextlib.suppress(ValueError):
      if 0 < kind(text) < float("inf"):
        return kind(text)
    allowed = "a whole number of at least 1" if kind is int else "a number above 0"
    raise argparse.ArgumentTypeError(f"{text:.80}: must be {allowed}")
  if text not in kind:
    nearest = difflib.get_close_matches(text, kind, n=1)
    hint = f" Did you mean {nearest[0]}?" if nearest else ""
    raise argparse.ArgumentTypeError(f"{text:.80}: unknown.{hint} There are {', '.join(kind)}")
  return text


def run(doc: str | None, flags: Iterable[Flag], measure: Callable[[Options, Save], None]) -> None:
  """Run a benchmark, write its results, draw its figure and print its table.

  `measure` calls its second argument with all results so far, whenever there are new ones. After Ctrl-C they are
  reported, too: they may be the work of hours. It may write to the folder `options.scratch`. Expected errors become
  one line and an exit code.
  """
  results: dict[str, Any] = {}
  status: int | str | None = None
  figure = None
  try:
    options = parse(doc, flags, sys.argv[1:])
    # cost_curves.py draws one figure per axis into a folder.
    figure = getattr(options, "plot", None) or getattr(options, "plot_dir", None)

    def save(so_far: dict[str, Any]) -> None:
      results.update(so_far)
      if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        # Ctrl-C may come while the file is written.
        files.write(options.json, json.dumps(results, indent=2) + "\n")

    with tempfile.TemporaryDirectory(prefix="imdb_jax-benchmark-") as folder:
      options.scratch = Path(folder)
      measure(options, save)
  except KeyboardInterrupt:
    say("Interrupted. The results below are those measured so far.")
    status = 130
  except ImdbJaxError as error:
    say(f"error: {error}")
    sys.exit(error.exit_code)
  if results:
    if figure is not None:
      reporting.plot(results, figure)
    reporting.show(results)
    # A missing package or device is not a failure.
    failed = [name for name, problem in reporting.problems(results).items() if problem.startswith("failed")]
    status = status or (f"error: failed: {', '.join(failed)}" if failed else None)
  sys.exit(status)


def say(line: str) -> None:
  """Print a line about the progress to standard error."""
  print(line, file=sys.stderr, flush=True)


def load_reviews(options: Options, **settings: Any) -> tokens.TokenData:
  """Return the encoded IMDB reviews. The settings are those of `DataConfig`, by default the article's."""
  data = dataclasses.replace(ARTICLE.data, **settings)
  source = sources.find(data, options.archive, options.cache_dir)
  return tokens.load(source, data, cache_dir=options.cache_dir, report=say)


def random_reviews(num_reviews: int, sequence_length: int, vocabulary_size: int) -> tokens.TokenSplit:
  """Return reviews of random words, with about the lengths of the real ones."""
  rng = np.random.default_rng(0)
  n, t = num_reviews, sequence_length
  # As the training reviews at 400 positions: mean 190, and a tenth of them full.
  lengths = np.clip(rng.lognormal(np.log(0.4 * t), 0.75, n), 1, t).astype(np.int32)
  # Word frequencies follow Zipf's law.
  ranks = np.arange(1, vocabulary_size)
  words = rng.choice(ranks, (n, t), p=1 / ranks / np.sum(1 / ranks)).astype(np.int32)
  words[np.arange(t) < t - lengths[:, None]] = 0
  return tokens.TokenSplit(tokens=words, lengths=lengths, labels=rng.integers(0, 2, n, dtype=np.int32))


def write_arrays(file: Path, split: tokens.TokenSplit) -> str:
  """Write the file that `worker.Job.arrays` names, and return its name."""
  np.savez(file, tokens=split.tokens, lengths=split.lengths, labels=split.labels)
  return str(file)


class Worker(contextlib.ExitStack):
  """A worker process and the windows of its job. Leaving the context ends the process and removes its files.

  Attributes:
    problem: why there are no figures; "" if there are.
    job: what is prepared.
    ready: the answer to the preparation.
    windows: number of steps and answer of each window.
  """

  def __init__(self, script: str, python: Path = Path(sys.executable)):
    """Start a script with a Python. It finds no compiled programs, so that every system compiles."""
    super().__init__()
    home = self.enter_context(tempfile.TemporaryDirectory(prefix="imdb_jax-benchmark-"))
    self.problem, self._log = "", Path(home) / "stderr.txt"
    self._process: Any = None
    environment = {
      "JAX_COMPILATION_CACHE_DIR": str(Path(home, "xla")),
      # Keras writes its settings file there.
      "KERAS_HOME": home,
      "TF_CPP_MIN_LOG_LEVEL": "2",
      # The workers share a GPU, so none of them may reserve its memory.
      "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
      "TF_FORCE_GPU_ALLOW_GROWTH": "true",
    }
    if python.exists():
      command = [str(python), str(Path(__file__).resolve().with_name(script))]
      with self._log.open("w", encoding="utf-8") as log:
        self._process = subprocess.Popen(
          command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | environment
        )
      self.callback(self._process.communicate)
      self.callback(self._process.kill)

  def ask(self, request: str, argument: Any = None) -> dict[str, Any] | None:
    """Send a request and return its answer; None, with `problem` set, if there is none."""
    if not self._process:
      self.problem = "missing: make bench"
    if self.problem:
      return None
    # If the worker has died, its answer is missing.
    with contextlib.suppress(BrokenPipeError):
      print(json.dumps({request: argument}), file=self._process.stdin, flush=True)
    line = self._process.stdout.readline()
    if line:
      answer = json.loads(line)
    else:
      lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
      answer = {"problem": f"failed: {lines[-1] if lines else f'exit code {self._process.wait()}'}"}
    self.problem = answer.get("problem", "")
    return None if self.problem else answer

  def prepare(self, job: Job) -> "Worker":
    """Build and warm up the system of a job, in place of the job before."""
    self.job, self.problem = job, ""
    self.windows: list[tuple[int, dict[str, Any]]] = []
    self.ready = self.ask("prepare", dataclasses.asdict(job))
    return self

  def run_window(self, num_steps: int) -> None:
    """Time a window, unless there is a problem."""
    answer = self.ask("run", num_steps)
    if answer is not None:
      self.windows.append((num_steps, answer))

  def steps_within(self, seconds: float) -> int:
    """Return how many steps take about so long; at least 1."""
    return max(1, round(seconds / self.ready["step_seconds"])) if self.ready else 1

  def timings(self) -> dict[str, Any]:
    """Return the fields of the results that every system has; None where there are no figures."""
    times = [] if self.problem else [1e3 * window["seconds"] / num_steps for num_steps, window in self.windows]
    return {
      "system": self.job.system,
      "problem": self.problem or None,
      "device": self.ready["device"] if self.ready else None,
      "ms_per_step": statistics.median(times) if times else None,
      "ms_per_step_min": min(times, default=None),
      "ms_per_step_max": max(times, default=None),
      "ms_per_step_windows": times,
      "steps_per_window": self.windows[-1][0] if times else None,
    }

  def compile_seconds(self) -> float:
    """Return the extra time of the first steps and of the first evaluation. Requires a window."""
    assert self.ready is not None
    expected = self.ready["num_shapes"] * self.timings()["ms_per_step"] / 1e3
    return max(0.0, self.ready["first_seconds"] - expected) + self.ready["evaluation_compile_seconds"]


def make_job(options: Options, system: str, **fields: Any) -> Job:
  """Return a job with the article's sizes, on the devices that the flags name; `fields` overrides both."""
  fields = {**ARTICLE_SIZES, "platform": options.platform, "num_devices": options.num_devices, **fields}
  return Job(system=system, **fields)


def start(options: Options, system: str) -> Worker:
  if system.startswith(("keras", "torch")):
    return Worker("baselines.py", options.bench_python)
  return Worker("ours.py")


@contextlib.contextmanager
def prepared(options: Options, jobs: Sequence[Job]) -> Iterator[list[Worker]]:
  """Yield a prepared worker for each job."""
  with contextlib.ExitStack() as stack:
    workers = []
    for job in jobs:
      workers.append(stack.enter_context(start(options, job.system)).prepare(job))
      say(f"{job.system}: {workers[-1].problem or 'ready'}")
    yield workers


def take_turns(workers: Sequence[Worker], num_windows: int, seconds: float) -> None:
  """Time windows of about so many seconds, one system after another."""
  for _, worker in itertools.product(range(num_windows), workers):
    worker.run_window(worker.steps_within(seconds))


def describe_ceiling(ceiling: Worker) -> dict[str, Any]:
  ms = ceiling.timings()["ms_per_step"]
  gflops = 2 * ceiling.job.matmul_size**3 / ms / 1e6 if ms else None
  return {"sgemm_gflops": gflops, "sgemm_problem": ceiling.problem or None}


def gflop_per_step(job: Job) -> float:
  """Return the work of the LSTM's matrix products at full length in GFLOP. The rest of a step is below 1%."""
  rows, columns = job.batch_size * job.sequence_length, 4 * job.hidden_size
  # One product forward and two backward, each with a multiplication and an addition.
  return 3 * 2 * rows * (job.embedding_size + job.hidden_size) * columns / 1e9


def describe_machine(facts: Iterable[Mapping[str, Any] | None], data: str) -> dict[str, Any]:
  """Return under which conditions results hold. `facts` has `versions` and `precision` of each worker that runs."""
  # This imports JAX, which `--help` does without.
  from imdb_jax import devices

  file = Path("/proc/cpuinfo")
  found = re.search(r"model name\s*: (.+)", file.read_text(encoding="utf-8")) if file.exists() else None
  known = [fact for fact in facts if fact is not None]
  versions = sorted({version for fact in known for version in fact["versions"].items()})
  by_package = itertools.groupby(versions, lambda version: version[0])
  precisions = {fact["precision"] for fact in known if fact["precision"]}
  return {
    "processor": found[1] if found else platform.processor() or platform.machine(),
    "cores": devices.num_cores(),
    "versions": {package: ", ".join(version for _, version in several) for package, several in by_package},
    "precision": "; ".join(sorted(precisions)) or "default of each package",
    "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    "data": data,
  }
