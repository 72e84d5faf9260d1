"""Stops, damage and hostile files, many times at random: `python tests/torture.py --help`, or `make torture`.

Each trial draws its moment or its damage from a seed that is printed where it fails.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import logging
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import tyro
from reliability.mutations import read_mutated
from reliability.processes import MOMENTS
from reliability.sandbox import Failure, Sandbox
from reliability.trials import TRIALS

from imdb_jax.errors import ImdbJaxError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Disturb training and input at random, and see that nothing is lost or let in."""

  kills: int = 60
  """Runs killed with SIGKILL."""
  signals: int = 40
  """Runs stopped with SIGINT or SIGTERM."""
  damages: int = 200
  """Checkpoints damaged."""
  disk_full: int = 20
  """Runs on a disk that fills up (needs the right to mount a tmpfs)."""
  process_stops: int = 10
  """Runs of two processes, one of which gets SIGTERM."""
  process_kills: int = 10
  """Runs of two processes, one of which is killed."""
  mutations: int = 5000
  """Files from outside, mutated."""
  seed: int = 0
  """Of all that is random."""
  markdown: Path | None = None
  """Write the table here."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
  """Attributes:
  title: what was done.
  count: how many times.
  failures: what went wrong, a text each.
  moments: what the disturbed processes were at.
  seconds: it took.
  """

  title: str
  count: int
  failures: list[str]
  moments: Mapping[str, int]
  seconds: float

  def row(self) -> str:
    hit = ", ".join(f"{self.moments[moment]} {moment}" for moment in MOMENTS if moment in self.moments)
    return f"| {self.title} | {self.count:,} | {self.count - len(self.failures):,} | {hit} | {self.seconds:.0f} |"


TABLE = "| trial | count | as it must be | moments hit | seconds |\n|---|---|---|---|---|"


def run_trials(sandbox: Sandbox, options: Options, name: str) -> Outcome:
  """All trials of a kind.

  Raises:
    PermissionError: a disk cannot be mounted here.
  """
  title, trial, at_once = TRIALS[name]
  count, moments, started = getattr(options, name), collections.Counter(), time.monotonic()

  def run(number: int) -> str | list[str]:
    folder = sandbox.folder / f"{name}-{number}"
    folder.mkdir()
    try:
      return trial(sandbox, random.Random(f"{options.seed} {name} {number}"), folder)
    except (Failure, ImdbJaxError) as error:
      return f"{name} {number} with seed {options.seed}: {error}"
    finally:
      shutil.rmtree(folder, ignore_errors=True)

  failures = []
  with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
    for result in pool.map(run, range(count)):
      if isinstance(result, str):
        failures.append(result)
      else:
        moments.update(result)
  return Outcome(title=title, count=count, failures=failures, moments=moments, seconds=time.monotonic() - started)


def run_mutations(sandbox: Sandbox, options: Options) -> Outcome:
  started = time.monotonic()
  failures = read_mutated(sandbox.whole, sandbox.folder / "mutations", options.mutations, options.seed)
  return Outcome(
    title="a file from outside mutated",
    count=options.mutations,
    failures=failures,
    moments={},
    seconds=time.monotonic() - started,
  )


def main() -> None:
  options = tyro.cli(Options, description=__doc__)
  # The look at checkpoints needs no more than a CPU, and says of damaged ones what is expected.
  jax.config.update("jax_platforms", "cpu")
  logging.disable(logging.WARNING)
  rows, failures = [], []

  def tell(outcome: Outcome) -> None:
    rows.append(outcome.row())
    failures.extend(outcome.failures)
    print(rows[-1], flush=True)

  started = time.monotonic()
  print(TABLE, flush=True)
  with tempfile.TemporaryDirectory(prefix="torture-") as folder, contextlib.closing(Sandbox(Path(folder))) as sandbox:
    for name in TRIALS:
      try:
        tell(run_trials(sandbox, options, name))
      except PermissionError as error:
        tell(Outcome(title=f"{TRIALS[name][0]} (not run: {error})", count=0, failures=[], moments={}, seconds=0))
    tell(run_mutations(sandbox, options))
  print(f"{time.monotonic() - started:.0f} s in all")
  for failure in failures:
    print(failure, file=sys.stderr)
  if options.markdown is not None:
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, jax {jax.__version__}"
    command = " ".join(["python tests/torture.py", *sys.argv[1:]])
    options.markdown.parent.mkdir(parents=True, exist_ok=True)
    options.markdown.write_text("\n".join([command, machine, "", TABLE, *rows, ""]), encoding="utf-8")
  sys.exit(1 if failures else 0)


if __name__ == "__main__":
  main()
