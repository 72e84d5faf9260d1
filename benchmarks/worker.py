"""The worker's side of the benchmarks: a system in a process of its own, which computes only when it is told to.

Requests and answers are lines of JSON. A request is an object with one key, the name of a method of `Handlers`:

    {"prepare": JOB}     build a system, compile it and warm it up
    {"run": N}           run N steps
    {"evaluate": null}   evaluate all test reviews

A worker that cannot do it answers {"problem": TEXT}. It ends when its input ends. This module runs in the benchmark
environment, too, so it imports only NumPy.
"""

import dataclasses
import itertools
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

# Fields of a job.
SIZES = ("batch_size", "sequence_length", "embedding_size", "hidden_size", "vocabulary_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """Description of one measurement.

  `num_steps` steps are planned; further steps repeat them. `arrays` is an .npz file with tokens int16[n, t], lengths
  int32[n] and labels int32[n], or None for a recurrence alone; `test_arrays` is the same for the reviews to evaluate.
  `matmul_size` is the n of the [n, n] x [n, n] product that gives the machine's ceiling. With `gradients`, a recurrence
  runs forward and backward.
  """

  system: str
  batch_size: int
  sequence_length: int
  embedding_size: int
  hidden_size: int
  vocabulary_size: int
  num_steps: int = 1
  arrays: str | None = None
  test_arrays: str | None = None
  seed: int = 0
  platform: str = "auto"
  num_devices: int | None = None
  matmul_size: int = 1
  gradients: bool = False


class UnableError(Exception):
  """The system does not run here; the message says why."""


class System:
  """Base class of the systems."""

  device: str = "cpu"
  precision: str | None = None  # Of the matrix products, if known.
  modules: tuple[str, ...] = ()  # Packages whose versions matter.

  def epoch(self, epoch: int) -> list[Any]:
    """Return the batches of an epoch, counted from 1, in their order."""
    return [None]

  def shape(self, batch: Any) -> Hashable:
    """Return a key that is equal for batches that share a compiled step."""
    return None

  def train(self, batches: list[Any]) -> float | None:
    """Run one step per batch, wait for all of them, and return the mean loss."""
    raise NotImplementedError

  def test_batches(self) -> list[Any]:
    """Return all test reviews in batches."""
    return []

  def evaluate(self, batches: list[Any]) -> float:
    """Return the accuracy over batches of test reviews."""
    raise NotImplementedError

  def forget(self) -> None:
    """Return to the state before the first step, but keep what is compiled."""


class Calls(System):
  """A system whose step is one call. A window waits once, at its end, so that the device is never idle."""

  def __init__(self, call: Callable[[], Any], wait: Callable[[Any], Any], device: str, modules: tuple[str, ...]):
    """Take a function that starts a computation, and one that waits for its result and all results before."""
    self._call, self._wait, self.device, self.modules = call, wait, device, modules

  def train(self, batches: list[Any]) -> None:
    result = None
    for _ in batches:
      result = self._call()
    self._wait(result)


class Handlers:
  """Handlers of the requests for the systems that `build` builds."""

  def __init__(self, build: Callable[[Job], System]):
    self._build, self._system = build, System()

  def prepare(self, fields: dict[str, Any]) -> dict[str, Any]:
    """Build the system of a job, in place of the system before, and warm it up.

    `first_seconds` is the total time of the first step of each of `num_shapes` batch shapes, which includes
    compilation, and `step_seconds` the approximate time of a step after that. `evaluation_compile_seconds` is the extra
    time of the first evaluation compared with the second.
    """
    job = Job(**fields)
    # Free the memory of the system before.
    self._system = System()
    self._system = system = self._build(job)
    epochs = (system.epoch(epoch) for epoch in itertools.count(1))
    plan = list(itertools.islice(itertools.chain.from_iterable(epochs), job.num_steps))
    self._batches = itertools.cycle(plan)
    # One batch of each shape, until nothing is left to compile.
    batches = list({system.shape(batch): batch for batch in plan}.values())
    first_seconds = sum(_timed(system.train, [batch])[0] for batch in batches)
    _, step_seconds = (_timed(system.train, batches)[0] / len(batches) for _ in range(2))
    tests = list({system.shape(batch): batch for batch in system.test_batches()}.values())
    first, second = (_timed(system.evaluate, tests)[0] if tests else 0.0 for _ in range(2))
    # The warm-up has trained.
    system.forget()
    versions = {name: sys.modules[name].__version__ for name in ("numpy", *system.modules)}
    return {
      "device": system.device,
      "precision": system.precision,
      "versions": {"python": platform.python_version(), **versions},
      "first_seconds": first_seconds,
      "num_shapes": len(batches),
      "step_seconds": step_seconds,
      "evaluation_compile_seconds": max(0.0, first - second),
    }

  def run(self, num_steps: int) -> dict[str, Any]:
    """Run the next steps of the plan. `seconds` ends with the last result; the peak memory is that of the process."""
    seconds, loss = _timed(self._system.train, list(itertools.islice(self._batches, num_steps)))
    return {"seconds": seconds, "loss": loss, "peak_memory_mb": peak_memory_mb()}

  def evaluate(self, _: None) -> dict[str, Any]:
    """Return `seconds` and `accuracy` of an evaluation of all test reviews."""
    seconds, accuracy = _timed(self._system.evaluate, self._system.test_batches())
    return {"seconds": seconds, "accuracy": accuracy}


def _timed(work: Callable[[list[Any]], Any], batches: list[Any]) -> tuple[float, Any]:
  started = time.perf_counter()
  result = work(batches)
  return time.perf_counter() - started, result


def serve(handlers: Handlers, install: str) -> None:
  """Answer requests until standard input ends. `install` is the command that installs a missing package."""
  # Standard output is for answers alone: all other output goes to standard error from now on.
  file = os.fdopen(os.dup(1), "w", encoding="utf-8")
  os.dup2(2, 1)
  for line in sys.stdin:
    ((name, argument),) = json.loads(line).items()
    try:
      answer = getattr(handlers, name)(argument)
    except ModuleNotFoundError as error:
      answer = {"problem": f"missing {error.name}: {install}"}
    except UnableError as error:
      answer = {"problem": str(error)}
    print(json.dumps(answer), file=file, flush=True)


def jax_calls(function: Callable[..., Any], arrays: tuple[Any, ...], gradients: bool, module: str) -> Calls:
  """Return calls of a JAX function, forward or also backward."""
  import jax

  def both(*arrays):
    outputs, vjp = jax.vjp(function, *arrays)
    return vjp(outputs)

  compiled, placed = jax.jit(both if gradients else function), jax.device_put(arrays)
  return Calls(lambda: compiled(*placed), jax.block_until_ready, device_name(jax.devices()[:1]), ("jax", module))


def device_name(devices: Any) -> str:
  return f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"


def as_flags(settings: Mapping[str, Any]) -> list[str]:
  """Return settings as command-line arguments, without those that are None."""
  given = {name: value for name, value in settings.items() if value is not None}
  return [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def read_arrays(path: str | None) -> dict[str, np.ndarray]:
  assert path is not None
  with np.load(path, allow_pickle=False) as arrays:
    return dict(arrays)


def peak_memory_mb() -> float:
  """Return the peak resident memory of this process in MB."""
  # On Linux, `ru_maxrss` of a child starts at the memory of its parent, so VmHWM comes first.
  status = Path("/proc/self/status")
  if status.exists():
    kilobytes = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:"))
    return int(kilobytes.split()[1]) * 1024 / 1e6
  # macOS counts bytes, other systems kilobytes.
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
