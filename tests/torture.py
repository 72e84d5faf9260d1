"""Stops, damage and hostile files, at random and many times: `python tests/torture.py --help`, or `make torture`.

Each trial draws its moment or its damage from a seed, which is printed with every failure.
"""

import argparse
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
from reliability.mutations import read_mutated
from reliability.processes import MOMENTS
from reliability.sandbox import Failure, Sandbox
from reliability.trials import TRIALS

from imdb_jax.errors import ImdbJaxError
from imdb_jax.validation import flag, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """How often to do what."""

  kills: int = setting(60, "Runs to kill with SIGKILL.")
  signals: int = setting(40, "Runs to stop with SIGINT or SIGTERM.")
  damages: int = setting(200, "Checkpoints to damage.")
  disk_full: int = setting(20, "Runs on a disk that fills up; requires permission to mount a tmpfs.")
  process_stops: int = setting(10, "Runs of two processes, one of which gets SIGTERM.")
  process_kills: int = setting(10, "Runs of two processes, one of which is killed.")
  mutations: int = setting(5000, "Files to change at random.")
  seed: int = setting(0, "Seed of everything random.")
  markdown: Path | None = setting(None, "File to write the table to.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
  """Result of all trials of a kind.

  Attributes:
    title: what was done.
    count: number of trials.
    failures: one text per failed trial.
    moments: what the disturbed processes were doing, with counts.
    seconds: time taken.
  """

  title: str
  count: int
  failures: list[str]
  moments: Mapping[str, int]
  seconds: float

  def row(self) -> str:
    """Return the row of the table."""
    hit = ", ".join(f"{self.moments[moment]} {moment}" for moment in MOMENTS if moment in self.moments)
    return f"| {self.title} | {self.count:,} | {self.count - len(self.failures):,} | {hit} | {self.seconds:.0f} |"


TABLE = "| trial | count | passed | what the process was doing | seconds |\n|---|---|---|---|---|"


def run_trials(sandbox: Sandbox, options: Options, name: str) -> Outcome:
  """Run all trials of a kind.

  Raises:
    PermissionError: a tmpfs cannot be mounted.
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
  """Change files at random and read them."""
  started = time.monotonic()
  failures = read_mutated(sandbox.whole, sandbox.folder / "mutations", options.mutations, options.seed)
  return Outcome(
    title="archive, vocabulary, files of a run, cache or text changed at random: an answer or one of our errors",
    count=options.mutations,
    failures=failures,
    moments={},
    seconds=time.monotonic() - started,
  )


def _parse() -> Options:
  parser = argparse.ArgumentParser(
    description="Disturb training and its files at random; check that nothing is lost and no damaged file is used.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    allow_abbrev=False,
  )
  for field in dataclasses.fields(Options):
    kind = Path if field.name == "markdown" else int
    parser.add_argument(flag(field.name), type=kind, default=field.default, help=field.metadata["doc"])
  return Options(**vars(parser.parse_args()))


def main() -> None:
  """Run everything, print a table, and exit with 1 if a trial failed."""
  options = _parse()
  # Reading checkpoints needs a CPU only. Warnings about damaged ones are expected.
  jax.config.update("jax_platforms", "cpu")
  logging.disable(logging.WARNING)
  rows, failures = [], []

  def report(outcome: Outcome) -> None:
    rows.append(outcome.row())
    failures.extend(outcome.failures)
    print(rows[-1], flush=True)

  started = time.monotonic()
  print(TABLE, flush=True)
  with tempfile.TemporaryDirectory(prefix="torture-") as folder, contextlib.closing(Sandbox(Path(folder))) as sandbox:
    for name in TRIALS:
      try:
        report(run_trials(sandbox, options, name))
      except PermissionError as error:
        report(Outcome(title=f"{TRIALS[name][0]} (not run: {error})", count=0, failures=[], moments={}, seconds=0))
    report(run_mutations(sandbox, options))
  print(f"{time.monotonic() - started:.0f} s in total")
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
