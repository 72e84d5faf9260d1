"""Trials: functions that each disturb a run once, at a random moment or in a random way. See `TRIALS`.

A trial raises `Failure` unless the run ends like an undisturbed one, bit for bit in parameters, optimizer state and
metrics. It returns the moments at which it disturbed a process.
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

from imdb_jax.errors import CheckpointError, PlatformError
from imdb_jax.store import manifest

SIGNAL_EXITS = {signal.SIGINT: 130, signal.SIGTERM: 143}
# Several processes agree on a signal before every fourth dispatch, of up to eight steps, and after every fourth batch
# of an evaluation. So after a later signal the run may end before they agree.
LAST_AGREEMENT = LAST_LINE_BUT_ONE - 16
# Seconds within which a process must exit after its partner was killed. It takes about seven.
LEFT_ALONE = 30
# The same if the partner may have been killed before they joined: a process waits a minute for others to join.
NEVER_JOINED = 90


def _cache(rng: random.Random, folder: Path) -> tuple[str, ...]:
  """Return the flags for an empty cache for some runs, which then compile; the others use the common cache."""
  return ("--cache-dir", str(folder / "cache")) if rng.random() < 0.3 else ()


def _wait_at_most(process: Process, seconds: float) -> None:
  with contextlib.suppress(TimeoutError):
    process.wait(seconds)


def kill(sandbox: Sandbox, rng: random.Random, folder: Path) -> list[str]:
  """Kill a run up to three times, at any moment from its start to its last save, sometimes while it handles SIGTERM."""
  run_dir, cache = folder / "run", _cache(rng, folder)
  moments = []
  for _ in range(rng.randint(1, 3)):
    with sandbox.started(run_dir, *cache) as (process,):
      _wait_at_most(process, rng.uniform(0, sandbox.seconds * 1.1))
      if rng.random() < 0.3:
        process.send_signal(signal.SIGTERM)
        _wait_at_most(process, rng.uniform(0, 0.3))
      process.send_signal(signal.SIGKILL)
      if process.wait(HANGS) == -signal.SIGKILL:
        moments.append(process.moment)
  sandbox.require_end(run_dir, *cache)
  require(not (run_dir / "damaged").exists(), "a kill is taken for damage")
  return moments


def stop(sandbox: Sandbox, rng: random.Random, folder: Path) -> list[str]:
  """Send SIGINT or SIGTERM at any moment."""
  run_dir, cache = folder / "run", _cache(rng, folder)
  number = rng.choice(list(SIGNAL_EXITS))
  with sandbox.started(run_dir, *cache) as (process,):
    _wait_at_most(process, rng.uniform(0, sandbox.seconds))
    moment = process.moment
    process.send_signal(number)
    # Read after the signal was sent: training may have written more lines, but never fewer.
    line = last_line(run_dir)
    code, stderr = finish(process), process.stderr
  if line < 0:
    # Before there is anything to save, the signal ends Python itself.
    require(code in (SIGNAL_EXITS[number], -number), f"exit {code} on {number.name} at the start: {stderr}")
  elif line < LAST_LINE_BUT_ONE:
    require(code == SIGNAL_EXITS[number], f"exit {code} on {number.name} after step {line}: {stderr}")
  else:
    # After the last evaluation the run ends by itself.
    require(code in (SIGNAL_EXITS[number], -number, 0), f"exit {code} on {number.name} at the end: {stderr}")
  if "Saved step" in stderr:
    step = _saved_step(stderr)
    require(newest_state(run_dir)[0] == step, f"step {step} is reported as saved, but is not")
  elif code == SIGNAL_EXITS[number]:
    require(line < 0 or line >= LAST_LINE_BUT_ONE, f"nothing was saved after step {line}: {stderr}")
  sandbox.require_end(run_dir, *cache)
  return [moment]


def _saved_step(stderr: str) -> int:
  return int(stderr.split("Saved step ")[1].split(" ")[0].replace(",", ""))


def fill_disk(sandbox: Sandbox, rng: random.Random, folder: Path) -> list[str]:
  """Run on a disk that is full at a random write, then on a larger one."""
  # A whole run takes about half a megabyte, and a save requires a quarter of one to be free.
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
          _require_intact(run_dir / "checkpoints" / path.stem, path)
    subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
    sandbox.require_end(run_dir)
  return []


def _require_intact(folder: Path, path: Path) -> None:
  try:
    manifest.check(folder, path)
  except (OSError, ValueError) as error:
    raise Failure(f"step {path.stem} was lost: {error}") from None


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
  """Damage one file of the newest checkpoint. The step before must be used."""
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
  """Send SIGTERM to one of two processes during training."""
  run_dir = folder / "run"
  with sandbox.two_started(run_dir) as processes:
    _wait_for_line(run_dir, rng)
    stopped = rng.choice(processes)
    moment = stopped.moment
    stopped.send_signal(signal.SIGTERM)
    # Read after the signal was sent, as in `stop`.
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
  """Kill one of two processes, while they start or during training."""
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
    # JAX aborts a process that loses the coordinator or waits for a partner that never joins, unless our own error is
    # faster.
    aborts = [-signal.SIGABRT] if victim == 0 or moment == "start" else []
    exits = (CheckpointError.exit_code, PlatformError.exit_code, *aborts)
    require(code in exits or is_late, f"exit {code} though process {victim} was killed at {moment}: {stderr}")
  sandbox.require_end_of_two(run_dir)
  return [moment]


def _wait_for_line(run_dir: Path, rng: random.Random) -> None:
  """Wait until training has started, and a little longer."""
  deadline = time.monotonic() + HANGS
  while last_line(run_dir) < 0:
    if time.monotonic() > deadline:
      raise Failure("training does not start")
    time.sleep(0.01)
  time.sleep(rng.uniform(0, 2))


# By the name of the option: a description, the trial, and how many run at a time.
TRIALS: Mapping[str, tuple[str, Callable[[Sandbox, random.Random, Path], list[str]], int]] = {
  "kills": (
    "SIGKILL at a random moment, up to three times, sometimes while SIGTERM was being handled; then resumed: "
    "bit-identical end",
    kill,
    2,
  ),
  "signals": (
    "SIGINT or SIGTERM at a random moment, then resumed: right exit code, the reported step is saved, "
    "bit-identical end",
    stop,
    2,
  ),
  "damages": (
    "one file of the newest checkpoint or its manifest changed, truncated, extended, removed or replaced by a link: "
    "the step before is used",
    damage,
    1,
  ),
  "disk_full": (
    "disk full at a random write (tmpfs), then resumed: one clear line, no older step lost, bit-identical end",
    fill_disk,
    2,
  ),
  "process_stops": (
    "SIGTERM to one of two processes, then both resumed: both exit with 143 and the same step, bit-identical end",
    stop_one_of_two,
    1,
  ),
  "process_kills": (
    "SIGKILL to one of two processes, then both resumed: the other exits with an error, bit-identical end",
    kill_one_of_two,
    1,
  ),
}
