"""Trials that stop or kill a run, at random or at a chosen system call, and resume it.

A trial raises `Failure` unless the run ends like an undisturbed one, bit for bit in parameters, optimizer state and
metrics. It returns the moments at which it disturbed a process.
"""

import random
import shutil
import signal
import time
from pathlib import Path

from reliability import system_calls
from reliability.processes import Process
from reliability.sandbox import (
  HANGS,
  LAST_LINE_BUT_ONE,
  LEFT_ALONE,
  NEVER_JOINED,
  Failure,
  Trial,
  finish,
  last_line,
  newest_state,
  newest_visible,
  require,
  require_kept,
  wait_at_most,
)

from imdb_jax.errors import CheckpointError, PlatformError

SIGNAL_EXITS = {signal.SIGINT: 130, signal.SIGTERM: 143}
# Several processes agree on a signal before every fourth dispatch, of up to eight steps, and after every fourth batch
# of an evaluation. So after a later signal the run may end before they agree.
LAST_AGREEMENT = LAST_LINE_BUT_ONE - 16
# How often to kill a run before it may end: at random, and in its saves. The latter leave few saves for the rest.
RANDOM_KILLS, SAVE_KILLS = 4, 8


def _cache(trial: Trial) -> Path | None:
  """Return an empty cache for some runs, which then compile; the others use the common cache."""
  return trial.folder / "cache" if trial.rng.random() < 0.3 else None


def _wait_for_save(process: Process, rng: random.Random) -> None:
  """Wait for one of the next saves, and for a part of it."""
  for _ in range(rng.randint(1, 3)):
    for is_before in (True, False):
      while process.returncode is None and (process.moment == "save") != is_before:
        wait_at_most(process, 0.0005)
  wait_at_most(process, rng.uniform(0, 0.05))


def kill(trial: Trial) -> list[str]:
  """Kill a run several times: half of them in a save, the others at any moment, sometimes while it handles SIGTERM."""
  run_dir, cache, rng = trial.folder / "run", _cache(trial), trial.rng
  moments = []
  for _ in range(RANDOM_KILLS):
    with trial.sandbox.started(run_dir, cache=cache) as (process,):
      if rng.random() < 0.5:
        _wait_for_save(process, rng)
      else:
        wait_at_most(process, rng.uniform(0, trial.sandbox.seconds * 1.1))
        if rng.random() < 0.3:
          process.send_signal(signal.SIGTERM)
          wait_at_most(process, rng.uniform(0, 0.3))
      promised = newest_visible(run_dir)
      process.send_signal(signal.SIGKILL)
      if process.wait(HANGS) == -signal.SIGKILL:
        moments.append(process.moment)
    require_kept(run_dir, promised)
  trial.sandbox.require_end(run_dir, cache=cache)
  require(not (run_dir / "damaged").exists(), "a kill is taken for damage")
  return moments


def kill_in_save(trial: Trial) -> list[str]:
  """Kill a run several times, each time just before a system call of its next save, until all calls have had theirs."""
  begun, calls = system_calls.of_a_save(trial.sandbox)
  run_dir = Path(shutil.copytree(begun, trial.folder / "run"))
  moments = []
  for turn in range(SAVE_KILLS):
    call = calls[(turn * trial.count + trial.number) * len(calls) // (SAVE_KILLS * trial.count)]
    promised = newest_visible(run_dir)
    with trial.sandbox.started(run_dir, pause=True) as (process,):
      was_killed = system_calls.kill_at(call, process, run_dir)
    moments.append(call.name if was_killed else "missed")
    require_kept(run_dir, promised)
  trial.sandbox.require_end(run_dir)
  require(not (run_dir / "damaged").exists(), "a kill is taken for damage")
  return moments


def stop(trial: Trial) -> list[str]:
  """Send SIGINT or SIGTERM at any moment."""
  run_dir, cache = trial.folder / "run", _cache(trial)
  number = trial.rng.choice(list(SIGNAL_EXITS))
  with trial.sandbox.started(run_dir, cache=cache) as (process,):
    wait_at_most(process, trial.rng.uniform(0, trial.sandbox.seconds))
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
  trial.sandbox.require_end(run_dir, cache=cache)
  return [moment]


def _saved_step(stderr: str) -> int:
  return int(stderr.split("Saved step ")[1].split(" ")[0].replace(",", ""))


def stop_one_of_two(trial: Trial) -> list[str]:
  """Send SIGTERM to one of two processes during training."""
  run_dir = trial.folder / "run"
  with trial.sandbox.two_started(run_dir) as processes:
    _wait_for_line(run_dir, trial.rng)
    stopped = trial.rng.choice(processes)
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
  trial.sandbox.require_end_of_two(run_dir)
  return [moment]


def kill_one_of_two(trial: Trial) -> list[str]:
  """Kill one of two processes, while they start or during training."""
  run_dir = trial.folder / "run"
  with trial.sandbox.two_started(run_dir) as processes:
    if trial.rng.random() < 0.5:
      _wait_for_line(run_dir, trial.rng)
    else:
      time.sleep(trial.rng.uniform(0, 3))
    victim = trial.rng.randrange(2)
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
  trial.sandbox.require_end_of_two(run_dir)
  return [moment]


def _wait_for_line(run_dir: Path, rng: random.Random) -> None:
  """Wait until training has started, and a little longer."""
  deadline = time.monotonic() + HANGS
  while last_line(run_dir) < 0:
    if time.monotonic() > deadline:
      raise Failure("training does not start")
    time.sleep(0.01)
  time.sleep(rng.uniform(0, 2))
