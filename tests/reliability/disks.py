"""Trials with the disk: it is full at each size in turn, or the power fails."""

import contextlib
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from reliability import system_calls
from reliability.processes import Process
from reliability.sandbox import (
  EVERY,
  NUM_STEPS,
  Failure,
  Trial,
  finish,
  last_line,
  newest_visible,
  require,
  require_kept,
  require_tool,
  visible_steps,
  wait_at_most,
)

from imdb_jax.store import files

# A whole run, with the free space that a save requires, needs a little less than this.
_MOST_KILOBYTES, _MOST_FILES = 1150, 340
# How often to fail writes of a run.
FAILURES = 4
_IMAGE_BYTES = 24 * 2**20


def fill_disk(trial: Trial) -> list[str]:
  """Run on a disk that is full at some write, then on a larger one. Sizes are even over all trials."""
  share = (trial.number + trial.rng.random()) / trial.count
  # Every fourth disk runs out of files instead of bytes.
  size = (
    f"nr_inodes={5 + int(share * _MOST_FILES)}"
    if trial.number % 4 == 3
    else f"size={4 + int(share * _MOST_KILOBYTES)}k"
  )
  with _mounted("-t", "tmpfs", "-o", size, "tmpfs", str(trial.folder)):
    run_dir = trial.folder / "run"
    with trial.sandbox.started(run_dir) as (process,):
      code, stderr = finish(process), process.stderr
    if code:
      _require_clear(code, stderr, size)
      # The first step is saved long before the first epoch ends.
      is_saved = any((run_dir / "manifests").glob("*.json"))
      require(is_saved or last_line(run_dir) < 20, "all steps were lost")
      if (run_dir / "checkpoints").is_dir():
        for path in (run_dir / "manifests").glob("*.json"):
          _require_intact(run_dir / "checkpoints" / path.stem, path)
    subprocess.run(["mount", "-o", "remount,size=64m,nr_inodes=10000", str(trial.folder)], check=True)
    trial.sandbox.require_end(run_dir)
  return [] if code else ["completed"]


def fail_write(trial: Trial) -> list[str]:
  """Fail system calls of saves as if the disk was full: a save checks the free space, but others may take it."""
  begun, calls = system_calls.of_a_save(trial.sandbox)
  writes = [call for call in calls if call.name in ("openat", "mkdir", "write", "writev", "rename", "fsync")]
  run_dir = Path(shutil.copytree(begun, trial.folder / "run"))
  hits = []
  for turn in range(FAILURES):
    call = writes[(turn * trial.count + trial.number) * len(writes) // (FAILURES * trial.count)]
    promised = newest_visible(run_dir)
    with trial.sandbox.started(run_dir, pause=True) as (process,):
      with system_calls.injected("error=ENOSPC", call, process, run_dir):
        code = finish(process)
      if code == 0:
        hits.append("missed")
        break
      _require_clear(code, process.stderr, f"failed {call}")
    hits.append(call.name)
    require_kept(run_dir, promised)
  trial.sandbox.require_end(run_dir)
  return hits


def _require_clear(code: int, stderr: str, cause: str) -> None:
  lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
  require(len(lines) == 1 and code in (2, 3, 4), f"no clear error after {cause}, exit {code}: {stderr}")


def _require_intact(folder: Path, path: Path) -> None:
  try:
    files.check_manifest(folder, path)
  except (OSError, ValueError) as error:
    raise Failure(f"step {path.stem} was lost: {error}") from None


def cut_power(trial: Trial) -> list[str]:
  """Stop a run, copy the image of its file system as the disk has it, and resume the run in the copy."""
  image, copy, disk = (trial.folder / name for name in ("image", "copy", "disk"))
  every = EVERY if trial.number % 2 else 50
  run_dir, options = disk / "run", ("--save-every-steps", str(every))
  disk.mkdir()
  with image.open("wb") as file:
    file.truncate(_IMAGE_BYTES)
  require_tool("mkfs.ext4")
  subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
  # The file system itself flushes once per hour only.
  with (
    _mounted("-o", "loop,commit=3600", str(image), str(disk)),
    trial.sandbox.started(run_dir, *options) as (process,),
  ):
    _wait_at_random(process, run_dir, trial.rng.randrange(0, NUM_STEPS, every), trial.rng.uniform(0, 0.1))
    process.send_signal(signal.SIGSTOP)
    while process.returncode is None and not process.is_stopped():
      wait_at_most(process, 0.001)
    moment, steps = process.moment, visible_steps(run_dir)
    subprocess.run(["cp", "--sparse=always", str(image), str(copy)], check=True)
  # During a save, the newest manifest may be visible before it is on the disk.
  promised = max(steps[:-1] if moment == "save" else steps, default=-1)
  with _mounted("-o", "loop", str(copy), str(disk)):
    require_kept(run_dir, promised)
    trial.sandbox.require_end(run_dir, *options)
    require(not (run_dir / "damaged").exists(), "a power cut is taken for damage")
  return [moment]


def _wait_at_random(process: Process, run_dir: Path, step: int, seconds: float) -> None:
  """Wait until a step is saved, and a little longer; for step 0, during the start."""
  if step == 0:
    seconds *= 20
  while process.returncode is None and step > 0 and newest_visible(run_dir) < step:
    wait_at_most(process, 0.001)
  wait_at_most(process, seconds)


@contextlib.contextmanager
def _mounted(*arguments: str) -> Iterator[None]:
  """Mount a file system; the last argument is the folder."""
  done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
  if done.returncode:
    raise PermissionError(done.stderr.strip())
  try:
    yield
  finally:
    subprocess.run(["umount", "-l", arguments[-1]], check=True)
