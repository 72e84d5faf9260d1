"""One system under measurement, in a process of its own: it computes only when it is told to.

The protocol is a line each way. After its warm-up a worker says `Ready`, or what it lacks; after each line with a
number of steps it runs that many and says `Window`, after a line `evaluate` it says `Evaluation`. The end of its input
ends it.
"""

import dataclasses
import itertools
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, Protocol, TextIO, TypeVar, runtime_checkable

import numpy as np

_Result = TypeVar("_Result")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """What to measure, the same for all systems but for the name.

  Attributes:
    system: name of the system.
    arrays: an .npz with tokens int16[n, t], lengths int32[n] and labels int32[n].
    test_arrays: the like, of the reviews to evaluate; None where there is no `evaluate`.
    num_steps: of all timed windows together.
    matmul_size: n of the [n, n] x [n, n] product that gives the machine's ceiling.
    scratch: an empty folder; what it caches there is gone with the benchmark.
  """

  system: str
  arrays: str
  scratch: str
  num_steps: int
  batch_size: int
  vocabulary_size: int
  embedding_size: int
  hidden_size: int
  seed: int
  platform: str
  num_devices: int | None
  matmul_size: int
  test_arrays: str | None = None


def read_arrays(path: str) -> dict[str, np.ndarray]:
  with np.load(path, allow_pickle=False) as arrays:
    return dict(arrays)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Missing:
  """A package that the system needs is not installed."""

  missing: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unable:
  """The system does not run here; the reason is for people."""

  unable: str


class UnableError(Exception):
  """Raised by what builds a system that does not run here."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ready:
  """Attributes:
  first_seconds: of the first step of each batch shape, summed; compilation is in it.
  num_shapes: how many shapes that were.
  step_seconds: of a step once all is compiled, roughly.
  evaluation_compile_seconds: by which the first evaluation took longer than the second.
  """

  device: str
  versions: dict[str, str]
  first_seconds: float
  num_shapes: int
  step_seconds: float
  evaluation_compile_seconds: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window:
  """Attributes:
  seconds: from the call to the last result on the host.
  loss: mean over the window, to see that the system learns.
  peak_memory_mb: the highest resident memory of the process so far.
  """

  seconds: float
  loss: float | None
  peak_memory_mb: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
  """Attributes:
  seconds: of all test reviews.
  accuracy: on them.
  """

  seconds: float
  accuracy: float


class System(Protocol):
  """Something that makes training steps."""

  device: str
  modules: tuple[str, ...]
  """Packages whose versions matter."""

  def epoch(self, epoch: int) -> list[Any]:
    """The batches of an epoch, counted from 1, in their order."""
    ...

  def shape(self, batch: Any) -> Hashable:
    """Batches of one shape share a compiled step."""
    ...

  def train(self, batches: list[Any]) -> float | None:
    """A step a batch, all finished on return. Returns the mean loss."""
    ...


@runtime_checkable
class Learner(System, Protocol):
  """A system whose accuracy is asked for."""

  def test_batches(self) -> list[Any]:
    """All test reviews."""
    ...

  def evaluate(self, batches: list[Any]) -> float:
    """Accuracy over batches of test reviews."""
    ...

  def forget(self) -> None:
    """Back to before the first step, but for what is compiled."""
    ...


def answers() -> TextIO:
  """Standard output, which is for answers alone: whatever else prints goes to standard error from here on."""
  file = os.fdopen(os.dup(1), "w", encoding="utf-8")
  os.dup2(2, 1)
  return file


def serve(build: Callable[[Job], System]) -> None:
  """Answers until standard input ends."""
  file = answers()

  def reply(message: Missing | Unable | Ready | Window | Evaluation) -> None:
    print(json.dumps(dataclasses.asdict(message)), file=file, flush=True)

  job = Job(**json.loads(sys.argv[1]))
  try:
    system = build(job)
  except ModuleNotFoundError as error:
    reply(Missing(missing=error.name or str(error)))
    return
  except UnableError as error:
    reply(Unable(unable=str(error)))
    return
  epochs = (system.epoch(epoch) for epoch in itertools.count(1))
  plan = list(itertools.islice(itertools.chain.from_iterable(epochs), job.num_steps))
  ready = _warm_up(system, plan)
  if job.test_arrays is not None:
    assert isinstance(system, Learner)
    ready = dataclasses.replace(ready, evaluation_compile_seconds=_warm_up_evaluation(system))
    # The warm-up trained.
    system.forget()
  reply(ready)

  position = 0
  for line in sys.stdin:
    if line.strip() == "evaluate":
      assert isinstance(system, Learner)
      seconds, accuracy = _timed(system.evaluate, system.test_batches())
      reply(Evaluation(seconds=seconds, accuracy=accuracy))
      continue
    window = plan[position : position + int(line)]
    position += len(window)
    seconds, loss = _timed(system.train, window)
    reply(Window(seconds=seconds, loss=loss, peak_memory_mb=_peak_memory_mb()))


def _warm_up(system: System, plan: list[Any]) -> Ready:
  """Runs every shape of the plan until nothing is left to compile."""
  examples = _one_of_each_shape(system, plan)
  first_seconds = sum(_timed(system.train, [batch])[0] for batch in examples)
  system.train(examples)
  step_seconds = _timed(system.train, examples)[0] / len(examples)
  packages = {name: sys.modules[name].__version__ for name in system.modules}
  return Ready(
    device=system.device,
    versions={"python": platform.python_version(), "numpy": np.__version__} | packages,
    first_seconds=first_seconds,
    num_shapes=len(examples),
    step_seconds=step_seconds,
  )


def _warm_up_evaluation(system: Learner) -> float:
  """Returns the seconds of compilation."""
  examples = _one_of_each_shape(system, system.test_batches())
  first_seconds, _ = _timed(system.evaluate, examples)
  second_seconds, _ = _timed(system.evaluate, examples)
  return max(0.0, first_seconds - second_seconds)


def _one_of_each_shape(system: System, batches: list[Any]) -> list[Any]:
  return list({system.shape(batch): batch for batch in batches}.values())


def _timed(work: Callable[[list[Any]], _Result], batches: list[Any]) -> tuple[float, _Result]:
  started = time.perf_counter()
  result = work(batches)
  return time.perf_counter() - started, result


def _peak_memory_mb() -> float:
  """VmHWM, in MB. Linux counts the parent's memory at the start of the child into `ru_maxrss`, so that comes second."""
  status = Path("/proc/self/status")
  if status.exists():
    kilobytes = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:"))
    return int(kilobytes.split()[1]) * 1024 / 1e6
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  # In bytes on macOS, in kilobytes elsewhere.
  return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
