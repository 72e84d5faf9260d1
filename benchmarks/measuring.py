"""What the benchmarks share: the systems and their processes, the reviews that they train on, the machine.

Every system is a process of its own, and only one computes at a time. They take turns, so that whatever else the
machine does falls on all of them. Compilation and warm-up lie outside what is timed.
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
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import baselines
import numpy as np
import ours
import worker

from imdb_jax import config
from imdb_jax.data.tokens import TokenSplit
from imdb_jax.errors import UsageError

_HERE = Path(__file__).resolve().parent
SYSTEMS: dict[str, Any] = {**ours.SYSTEMS, **baselines.SYSTEMS}
ARTICLE = config.preset("article")
ARTICLE_SIZES = {
  "batch_size": ARTICLE.training.batch_size,
  "sequence_length": ARTICLE.dataset.sequence_length,
  "embedding_size": ARTICLE.model.embedding_size,
  "hidden_size": ARTICLE.model.hidden_size,
  "vocabulary_size": ARTICLE.dataset.vocabulary_size,
}
# Of the sgemm whose speed is the machine's ceiling.
MATMUL_SIZE = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Flags of every benchmark."""

  json: Path | None = None
  """Write the results here."""
  platform: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
  """Where our systems compute; the baselines compute where their packages do."""
  num_devices: int | None = None
  """Devices for our systems; by default all, and on a CPU one for each core."""
  bench_python: Path = _HERE.parent / ".venv-bench" / "bin" / "python"
  """Python with the packages of the baselines; `make bench` makes it."""

  def __post_init__(self):
    config.expand_paths(self)
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      for number in value if isinstance(value, tuple) else (value,):
        if type(number) is int and number < 1:
          raise UsageError(f"--{field.name.replace('_', '-')} {number}: must be 1 or more.")


def check_systems(names: Iterable[str], known: Collection[str]) -> None:
  """Raises:
  UsageError: a name is not among the known ones.
  """
  for name in names:
    if name not in known:
      nearest = difflib.get_close_matches(name, known, n=1)
      hint = f" Did you mean {nearest[0]}?" if nearest else ""
      raise UsageError(f"--systems {name}: must be among {', '.join(known)}.{hint}")


def make_job(
  options: Options,
  system: str,
  arrays: Path,
  *,
  num_steps: int,
  sizes: Mapping[str, int] = ARTICLE_SIZES,
  **fields: Any,
) -> worker.Job:
  """A job of these sizes; the system's scratch is beside the arrays, which have the sequence length."""
  of_job: dict[str, Any] = {name: size for name, size in sizes.items() if name != "sequence_length"}
  of_job |= {"matmul_size": MATMUL_SIZE, "platform": options.platform, "num_devices": options.num_devices, "seed": 0}
  scratch = str(arrays.parent / system)
  return worker.Job(system=system, arrays=str(arrays), scratch=scratch, num_steps=num_steps, **(of_job | fields))


class Process:
  """A worker and the lines exchanged with it."""

  def __init__(self, python: Path, script: str, arguments: Iterable[str], scratch: Path):
    """Makes `scratch`, where the worker may leave files."""
    scratch.mkdir(parents=True)
    self._log = scratch / "stderr.txt"
    # Keras writes a file of settings into its home; TensorFlow tells of the processor's instructions.
    environment = os.environ | {"KERAS_HOME": str(scratch), "TF_CPP_MIN_LOG_LEVEL": "2"}
    command = [str(python), str(_HERE / script), *arguments]
    with self._log.open("w", encoding="utf-8") as stderr:
      self._process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment
      )

  def ask(self, line: str) -> dict[str, Any]:
    """Sends a line and returns the answer."""
    assert self._process.stdin is not None
    # A worker that has died is noticed when its answer is missing.
    with contextlib.suppress(BrokenPipeError):
      self._process.stdin.write(line + "\n")
      self._process.stdin.flush()
    return self.receive()

  def receive(self) -> dict[str, Any]:
    """The next line of the worker.

    Raises:
      WorkerError: it has died.
    """
    assert self._process.stdout is not None
    line = self._process.stdout.readline()
    if not line:
      lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
      raise WorkerError(f"failed: {lines[-1] if lines else f'exit code {self._process.wait()}'}")
    return json.loads(line)

  def stop(self) -> None:
    self._process.kill()
    self._process.communicate()


class WorkerError(Exception):
  """Why there are no figures of a system."""


class Measurement:
  """One system: its process, and what it said."""

  def __init__(self, job: worker.Job, bench_python: Path):
    self.name, self.problem = job.system, ""
    self.windows: list[tuple[int, worker.Window]] = []
    self.ready: worker.Ready | None = None
    self._process: Process | None = None
    is_baseline = self.name in baselines.SYSTEMS
    install = baselines.SYSTEMS[self.name].install if is_baseline else ours.INSTALL
    if is_baseline and not bench_python.exists():
      self.problem = f"missing: {install}"
      return
    python, script = (bench_python, "baselines.py") if is_baseline else (Path(sys.executable), "ours.py")
    self._process = Process(python, script, [json.dumps(dataclasses.asdict(job))], Path(job.scratch))
    try:
      answer = self._process.receive()
    except WorkerError as error:
      self.problem = str(error)
      return
    if "missing" in answer:
      self.problem = f"missing {answer['missing']}: {install}"
    elif "unable" in answer:
      self.problem = answer["unable"]
    else:
      self.ready = worker.Ready(**answer)

  def stop(self) -> None:
    if self._process is not None:
      self._process.stop()

  def _ask(self, line: str) -> dict[str, Any] | None:
    """The worker's answer; None where the system has none to give."""
    if self._process is None or self.problem:
      return None
    try:
      return self._process.ask(line)
    except WorkerError as error:
      self.problem = str(error)
      return None

  def run_window(self, num_steps: int) -> None:
    """Adds a window, unless the system has none to give."""
    answer = self._ask(str(num_steps))
    if answer is not None:
      self.windows.append((num_steps, worker.Window(**answer)))

  def evaluate(self) -> worker.Evaluation | None:
    """Of all test reviews; None where the system has none to give."""
    answer = self._ask("evaluate")
    return None if answer is None else worker.Evaluation(**answer)

  def steps_within(self, seconds: float) -> int:
    """How many steps take about so long; at least 1."""
    return max(1, round(seconds / self.ready.step_seconds)) if self.ready else 1

  @property
  def seconds(self) -> float:
    """Of all windows."""
    return sum(window.seconds for _, window in self.windows)

  @property
  def seconds_per_step(self) -> list[float]:
    return [window.seconds / num_steps for num_steps, window in self.windows]

  def timings(self) -> dict[str, Any]:
    """The fields of the results that the windows give; None and [] where the system has failed."""
    times = [] if self.problem else [1e3 * seconds for seconds in self.seconds_per_step]
    return {
      "ms_per_step": statistics.median(times) if times else None,
      "ms_per_step_min": min(times, default=None),
      "ms_per_step_max": max(times, default=None),
      "ms_per_step_windows": times,
      "steps_per_window": self.windows[-1][0] if times else None,
    }

  @property
  def compile_seconds(self) -> float:
    """What the first steps took longer than others do, and the first evaluation. Asks for a window."""
    assert self.ready is not None
    median = statistics.median(self.seconds_per_step)
    return max(0.0, self.ready.first_seconds - self.ready.num_shapes * median) + self.ready.evaluation_compile_seconds


def sgemm_gflops(ceiling: Measurement, matmul_size: int) -> float | None:
  """The machine's ceiling, from the windows of `ours.SGEMM`."""
  if ceiling.problem or not ceiling.windows:
    return None
  return 2 * matmul_size**3 / statistics.median(ceiling.seconds_per_step) / 1e9


def flops_per_step(sizes: Mapping[str, int]) -> int:
  """Of the matrix products of the LSTM at full length: one forward, two backward. The rest is below 1 %."""
  hidden_size = sizes["hidden_size"]
  products = sizes["batch_size"] * sizes["sequence_length"] * (sizes["embedding_size"] + hidden_size) * 4 * hidden_size
  return 3 * 2 * products


def random_reviews(num_reviews: int, sequence_length: int, vocabulary_size: int) -> TokenSplit:
  """Random words in reviews of about the lengths of the real ones."""
  rng = np.random.default_rng(0)
  n, t = num_reviews, sequence_length
  # As the training reviews at 400 positions: mean 190, a tenth of them full.
  lengths = np.clip(rng.lognormal(np.log(0.4 * t), 0.75, n), 1, t).astype(np.int32)
  # Frequent words first: the ranks of words of a text follow Zipf's law.
  ranks = np.arange(1, vocabulary_size)
  words = rng.choice(ranks, (n, t), p=1 / ranks / np.sum(1 / ranks)).astype(np.int32)
  words[np.arange(t) < t - lengths[:, None]] = 0
  return TokenSplit(tokens=words, lengths=lengths, labels=rng.integers(0, 2, n, dtype=np.int32))


def write_arrays(path: Path, split: TokenSplit) -> None:
  """Writes what `worker.Job.arrays` names."""
  np.savez(path, tokens=split.tokens, lengths=split.lengths, labels=split.labels)


def describe_machine(versions: Iterable[Mapping[str, str]]) -> dict[str, Any]:
  """The part of the results that says where they hold: processor, cores, versions, precision, command.

  Args:
    versions: of packages, from each process.
  """
  # Imports JAX, which `--help` does without.
  from imdb_jax import sharding

  found: dict[str, set[str]] = {}
  for package, version in (item for process in versions for item in process.items()):
    found.setdefault(package, set()).add(version)
  return {
    "processor": _processor(),
    "cores": sharding.num_cores(),
    "versions": {package: ", ".join(sorted(several)) for package, several in sorted(found.items())},
    "precision": ARTICLE.training.matmul_precision,
    "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
  }


def _processor() -> str:
  path = Path("/proc/cpuinfo")
  if path.exists():
    for line in path.read_text(encoding="utf-8").splitlines():
      if line.startswith("model name"):
        return line.partition(":")[2].strip()
  return platform.processor() or platform.machine()


def machine_lines(machine: dict[str, Any]) -> list[str]:
  """The last lines below every table."""
  return [
    f"Machine: {machine['processor']}, {machine['cores']} cores.",
    "Versions: " + ", ".join(f"{package} {version}" for package, version in machine["versions"].items()),
    f"Data: {machine['data']}.",
  ]


def say(line: str) -> None:
  """Progress, on standard error."""
  print(line, file=sys.stderr, flush=True)


def write_json(path: Path, results: dict[str, Any]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def save_figure(figure: Any, path: Path) -> None:
  """Writes a figure of Matplotlib as a PNG."""
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=120, format="png")
  say(f"Wrote {path}")


def is_interrupted(work: Callable[[], None]) -> bool:
  """Does the work, and tells whether Ctrl-C ended it. The worth of hours may lie in what was measured until then."""
  try:
    work()
  except KeyboardInterrupt:
    say("Interrupted: what follows is what was measured until then.")
    return True
  return False


def exit_if_failed(problems: Mapping[str, str | None]) -> None:
  """Ends the command with an error where a system failed; one whose packages are missing is no failure."""
  failed = [name for name, problem in problems.items() if (problem or "").startswith("failed")]
  if failed:
    sys.exit(f"error: failed: {', '.join(failed)}")
