"""One disturbance each, at a moment or of a kind that is drawn at random; see `TRIALS`.

A trial raises `Failure` if the run does not end like one that nothing disturbed, bit for bit in parameters, optimizer
state and metrics. It returns the moments at which it disturbed something.
"""

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from reliability.processes import Process
from reliability.sandbox import HANGS, LAST_LINE_BUT_ONE, Failure, Sandbox, finish, last_line, newest_state, require

from imdb_jax import manifest
from imdb_jax.errors import CheckpointError, PlatformError

SIGNAL_EXITS = {signal.SIGINT: 130, signal.SIGTERM: 143}
# Several processes agree on a signal before every fourth dispatch, of up to eight steps, and at every fourth batch of
# an evaluation, so a later one may find the run at its end.
LAST_AGREEMENT = LAST_LINE_BUT_ONE - 16
# Seconds within which a process whose partner was killed has left; it takes about seven.
LEFT_ALONE = 30
# The same where it may have been killed before they joined: a minute is what a process waits for another to come.
NEVER_JOINED = 90


def _cache(rng: random.Random, folder: Path) -> tuple[str, ...]:
  """Some runs compile for themselves and keep what they compile, the others find it in the cache."""
  return ("--cache-dir", str(folder / "cache")) if rng.random() < 0.3 else ()


def _go_on(process: Process, seconds: float) -> None:
  with contextlib.suppress(TimeoutError):
    process.wait(seconds)


def kill(sandbox: Sandbox, rng: random.Random, folder: Path) -> list[str]:
  """Up to three kills, each at any moment from the start to the last save; some while a signal is heeded."""
  run_dir, cache = folder / "run", _cache(rng, folder)
  moments = []
  for _ in range(rng.randint(1, 3)):
    with sandbox.started(run_dir, *cache) as (process,):
      _go_on(process, rng.uniform(0, sandbox.seconds * 1.1))
      if rng.random() < 0.3:
        process.send_signal(signal.SIGTERM)
        _go_on(process, rng.uniform(0, 0.3))
      process.send_signal(signal.SIGKILL)
      if process.wait(HANGS) == -signal.SIGKILL:
        moments.append(process.moment)
  sandbox.require_end(run_dir, *cache)
  require(not (run_dir / "damaged").exists(), "a kill is taken for damage")
  return moments


def stop(sandbox: Sandbox, rng: random.Random, folder: Path) -> list[str]:
  run_dir, cache = folder / "run", _cache(rng, folder)
  number = rng.choice(list(SIGNAL_EXITS))
  with sandbox.started(run_dir, *cache) as (process,):
    _go_on(process, rng.uniform(0, sandbox.seconds))
    moment = process.moment
    process.send_signal(number)
    # Read afterwards: training may have gone on by a few lines, never back.
    line = last_line(run_dir)
    code, stderr = finish(process), process.stderr
  if line < 0:
    # Before there is anything to save Python itself ends on the signal.
    require(code in (SIGNAL_EXITS[number], -number), f"exit {code} on {number.name} at the start: {stderr}")
  elif line < LAST_LINE_BUT_ONE:
    require(code == SIGNAL_EXITS[number], f"exit {code} on {number.name} after step {line}: {stderr}")
  else:
    # Once the last epoch is evaluated the run ends by itself.
    require(code in (SIGNAL_EXITS[number], -number, 0), f"exit {code} on {number.name} at the end: {stderr}")
  if "Saved step" in stderr:
    step = _saved_step(stderr)
    require(newest_state(run_dir)[0] == step, f"step {step} is said to be saved, and is not")
  elif code == SIGNAL_EXITS[number]:
    require(line < 0 or line >= LAST_LINE_BUT_ONE, f"nothing was saved after step {line}: {stderr}")
  sandbox.require_end(run_dir, *cache)
  return [moment]


def _saved_step(stderr: str) -> int:
  return int(stderr.split("Saved step ")[1].split(" ")[0].replace(",", ""))


def fill_disk(sandbox: Sandbox, rng: random.Random, folder: Path) -> list[str]:
  """Any write may be the one for which there is no room."""
  # A whole run takes about half a megabyte, and a save asks for a quarter of one beforehand.
  with _tmpfs(folder, rng.randint(16, 1000)):
    run_dir = folder / "run"
    with sandbox.started(run_dir) as (process,):
      code, stderr = finish(process), process.stderr
    if code:
      lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
      require(len(lines) == 1 and code in (2, 3, 4), f"no clear error, exit {code}: {stderr}")
      # The first step is saved long before the first epoch ends.
      is_saved = any((run_dir / "manifests").glob("*.json"))
      require(is_saved or last_line(run_dir) < 20, "all steps were lost")
      if (run_dir / "checkpoints").is_dir():
        for path in (run_dir / "manifests").glob("*.json"):
          problem = manifest.problem(run_dir / "checkpoints" / path.stem, path)
          require(problem is None, f"step {path.stem} was lost: {problem}")
    subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
    sandbox.require_end(run_dir)
  return []


@contextlib.contextmanager
def _tmpfs(folder: Path, kilobytes: int) -> Iterator[None]:
  done = subprocess.run(
    ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)], capture_output=True, text=True
  )
  if done.returncode:
    raise PermissionError(done.stderr.strip())
  try:
    yield
  finally:
    subprocess.run(["umount", "-l", str(folder)], check=True)


def damage(sandbox: Sandbox, rng: random.Random, folder: Path) -> list[str]:
  """One file of the newest checkpoint; it must be noticed, and the step before used, unaltered."""
  run_dir = sandbox.copy_of_whole(folder)
  before, newest = sorted(int(path.name) for path in (run_dir / "checkpoints").iterdir())[-2:]
  files = sorted(path for path in (run_dir / "checkpoints" / str(newest)).rglob("*") if path.is_file())
  files.append(run_dir / "manifests" / f"{newest}.json")
  path = rng.choice(files)
  content = path.read_bytes()
  how = rng.choice(["flip", "truncate", "remove", "link", "grow"])
  if how == "flip" and content:
    changed = bytearray(content)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    path.write_bytes(changed)
  elif how == "truncate" and content:
    os.truncate(path, rng.randrange(len(content)))
  elif how == "link":
    path.rename(run_dir / "elsewhere")
    path.symlink_to(run_dir / "elsewhere")
  elif how == "grow":
    path.write_bytes(content + rng.randbytes(1))
  else:
    path.unlink()
  step, _ = newest_state(run_dir)
  require(step == before, f"{how} of {path.name}: step {step} is used instead of {before}")
  return []


def stop_one_of_two(sandbox: Sandbox, rng: random.Random, folder: Path) -> list[str]:
  run_dir = folder / "run"
  with sandbox.two_started(run_dir) as processes:
    _wait_for_line(run_dir, rng)
    stopped = rng.choice(processes)
    moment = stopped.moment
    stopped.send_signal(signal.SIGTERM)
    # Read afterwards, as above.
    is_late = last_line(run_dir) >= LAST_AGREEMENT
    codes = [finish(process) for process in processes]
    errors = [process.stderr for process in processes]
  if codes == [143, 143]:
    saved = set(map(_saved_step, errors))
    require(len(saved) == 1, f"different steps were saved: {saved}")
  else:
    require(is_late, f"exits {codes}: {errors}")
  sandbox.require_end_of_two(run_dir)
  return [moment]


def kill_one_of_two(sandbox: Sandbox, rng: random.Random, folder: Path) -> list[str]:
  run_dir = folder / "run"
  with sandbox.two_started(run_dir) as processes:
    if rng.random() < 0.5:
      _wait_for_line(run_dir, rng)
    else:
      time.sleep(rng.uniform(0, 3))
    victim = rng.randrange(2)
    processes[victim].send_signal(signal.SIGKILL)
    is_late = last_line(run_dir) >= LAST_AGREEMENT
    processes[victim].wait(HANGS)
    moment = processes[victim].moment
    other = processes[1 - victim]
    code, stderr = finish(other, NEVER_JOINED if moment == "start" else LEFT_ALONE), other.stderr
    # Of one that loses the coordinator, or waits for a partner that never comes, JAX makes an abort, unless an error of
    # ours is faster.
    aborts = [-signal.SIGABRT] if victim == 0 or moment == "start" else []
    exits = (CheckpointError.exit_code, PlatformError.exit_code, *aborts)
    require(code in exits or is_late, f"exit {code} though process {victim} was killed at {moment}: {stderr}")
  sandbox.require_end_of_two(run_dir)
  return [moment]


def _wait_for_line(run_dir: Path, rng: random.Random) -> None:
  """Until training has begun, and a little longer."""
  deadline = time.monotonic() + HANGS
  while last_line(run_dir) < 0:
    if time.monotonic() > deadline:
      raise Failure("training does not begin")
    time.sleep(0.01)
  time.sleep(rng.uniform(0, 2))


# Name of the count: what is done, the trial, and how many at a time.
TRIALS: Mapping[str, tuple[str, Callable[[Sandbox, random.Random, Path], list[str]], int]] = {
  "kills": ("SIGKILL at a random moment, up to three times, then resumed", kill, 2),
  "signals": ("SIGINT or SIGTERM at a random moment, then resumed", stop, 2),
  "damages": ("a file of the newest checkpoint damaged", damage, 1),
  "disk_full": ("disk full at a random write, then resumed", fill_disk, 2),
  "process_stops": ("one of two processes gets SIGTERM, then both resumed", stop_one_of_two, 1),
  "process_kills": ("one of two processes killed, then both resumed", kill_one_of_two, 1),
}
