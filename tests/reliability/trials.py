"""All kinds of trials, by the name of the option that says how many to run."""

import dataclasses
import os
from collections.abc import Callable, Mapping

from reliability import disks, lies, stops
from reliability.sandbox import Trial, newest_state, require


@dataclasses.dataclass(frozen=True)
class Kind:
  """A kind of trial.

  Attributes:
    title: what is done and required.
    run: the trial. It raises `Failure` if the outcome is wrong, and PermissionError if it cannot run here. It returns
      what was hit, once per hit.
    at_once: how many run at a time.
  """

  title: str
  run: Callable[[Trial], list[str]]
  at_once: int = 2


def damage(trial: Trial) -> list[str]:
  """Damage one file of the newest checkpoint. The step before must be used."""
  run_dir, rng = trial.sandbox.copy_of_whole(trial.folder), trial.rng
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


TRIALS: Mapping[str, Kind] = {
  "kills": Kind(
    f"SIGKILL, {stops.RANDOM_KILLS} times per run: half of them in a save, the others at any moment, sometimes while "
    "SIGTERM was being handled; then resumed: bit-identical end",
    stops.kill,
  ),
  "save_kills": Kind(
    f"SIGKILL just before a system call of a save, {stops.SAVE_KILLS} times per run, each call in turn; then resumed: "
    "no promised step lost, bit-identical end",
    stops.kill_in_save,
  ),
  "signals": Kind(
    "SIGINT or SIGTERM at a random moment, then resumed: right exit code, the reported step is saved, "
    "bit-identical end",
    stops.stop,
  ),
  "damages": Kind(
    "one file of the newest checkpoint or its manifest changed, truncated, extended, removed or replaced by a link: "
    "the step before is used",
    damage,
    at_once=1,
  ),
  "lies": Kind(
    "any part of a run directory forged and all digests renewed, then evaluate, predict, plot and train: a legal "
    "answer or one clear line; time, memory, files outside",
    lies.lie,
  ),
  "disk_full": Kind(
    "disk full at each size in turn (tmpfs), then resumed: one clear line, no older step lost, bit-identical end",
    disks.fill_disk,
  ),
  "failed_writes": Kind(
    f"disk full at a system call of a save, {disks.FAILURES} times per run, each call in turn; then resumed: one clear "
    "line, no promised step lost, bit-identical end",
    disks.fail_write,
  ),
  "power_cuts": Kind(
    "power cut (ext4 image copied unsynced), half of the runs with frequent saves; then resumed: no promised step "
    "lost, bit-identical end",
    disks.cut_power,
  ),
  "process_stops": Kind(
    "SIGTERM to one of two processes, then both resumed: both exit with 143 and the same step, bit-identical end",
    stops.stop_one_of_two,
    at_once=1,
  ),
  "process_kills": Kind(
    "SIGKILL to one of two processes, then both resumed: the other exits with an error, bit-identical end",
    stops.kill_one_of_two,
  ),
}
