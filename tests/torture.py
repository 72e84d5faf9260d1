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
from reliability.sandbox import Failure, Sandbox, Trial, snapshot
from reliability.trials import TRIALS

from imdb_jax.errors import ImdbJaxError
from imdb_jax.validation import flag, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """How often to do what."""

  kills: int = setting(80, "Runs to kill at random, four times each.")
  save_kills: int = setting(85, "Runs to kill in saves, eight times each; requires strace.")
  signals: int = setting(200, "Runs to stop with SIGINT or SIGTERM.")
  damages: int = setting(200, "Checkpoints to damage.")
  lies: int = setting(500, "Run directories to forge.")
  disk_full: int = setting(100, "Runs on a disk that fills up; requires permission to mount a tmpfs.")
  failed_writes: int = setting(25, "Runs with a disk full in four saves each; requires strace.")
  power_cuts: int = setting(50, "Power cuts; requires permission to mount an ext4 image.")
  process_stops: int = setting(20, "Runs of two processes, one of which gets SIGTERM.")
  process_kills: int = setting(20, "Runs of two processes, one of which is killed.")
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
    hits: what was hit, with counts: what a disturbed process was doing, or how its command answered.
    seconds: time taken.
  """

  title: str
  count: int
  failures: list[str]
  hits: Mapping[str, int]
  seconds: float

  def row(self) -> str:
    """Return the row of the table."""
    hits = ", ".join(f"{count:,} {hit}" for hit, count in sorted(self.hits.items(), key=lambda item: -item[1]))
    return f"| {self.title} | {self.count:,} | {self.count - len(self.failures):,} | {hits} | {self.seconds:.0f} |"


TABLE = "| trial | count | passed | what was hit | seconds |\n|---|---|---|---|---|"


def scratch() -> str | None:
  """Return a folder in memory for the trials, if it is large: they flush millions of files to the disk."""
  memory = Path("/dev/shm")
  return str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > 2**31 else None


def run_trials(sandbox: Sandbox, options: Options, name: str) -> Outcome:
  """Run all trials of a kind.

  Raises:
    PermissionError: the trials cannot be run on this machine.
  """
  kind, count, started = TRIALS[name], getattr(options, name), time.monotonic()

  def run(number: int) -> str | list[str]:
    folder, rng = sandbox.folder / f"{name}-{number}", random.Random(f"{options.seed} {name} {number}")
    folder.mkdir()
    try:
      return kind.run(Trial(sandbox=sandbox, folder=folder, rng=rng, number=number, count=count))
    except (Failure, ImdbJaxError) as error:
      return f"{name} {number} of {count} with seed {options.seed}: {error}"
    finally:
      shutil.rmtree(folder, ignore_errors=True)

  before, hits, failures = snapshot(sandbox.whole), collections.Counter(), []
  with concurrent.futures.ThreadPoolExecutor(kind.at_once) as pool:
    for result in pool.map(run, range(count)):
      if isinstance(result, str):
        failures.append(result)
      else:
        hits.update(result)
  if snapshot(sandbox.whole) != before:
    failures.append(f"{name} with seed {options.seed}: another run has changed")
  return Outcome(title=kind.title, count=count, failures=failures, hits=hits, seconds=time.monotonic() - started)


def run_mutations(sandbox: Sandbox, options: Options) -> Outcome:
  """Change files at random and read them."""
  started = time.monotonic()
  failures = read_mutated(sandbox.whole, sandbox.folder / "mutations", options.mutations, options.seed)
  return Outcome(
    title="archive, vocabulary, files of a run, cache or text changed at random: an answer or one of our errors",
    count=options.mutations,
    failures=failures,
    hits={},
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
  made = tempfile.TemporaryDirectory(prefix="torture-", dir=scratch())
  with made as folder, contextlib.closing(Sandbox(Path(folder))) as sandbox:
    for name in TRIALS:
      try:
        report(run_trials(sandbox, options, name))
      except PermissionError as error:
        report(Outcome(title=f"{TRIALS[name].title} (not run: {error})", count=0, failures=[], hits={}, seconds=0))
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
