"""Trials in which the commands read a run directory from a stranger."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

from reliability.forgery import SECRET, forge
from reliability.sandbox import NUM_STEPS, Failure, Trial, require
from reliability.watch import untouched


def lie(trial: Trial) -> list[str]:
  """Give a forged run directory to each command: it must refuse the directory, or answer from what is legal in it."""
  run_dir, outside = trial.sandbox.copy_of_whole(trial.folder), trial.folder / "outside"
  outside.mkdir()
  (outside / "secret").write_text(SECRET, encoding="utf-8")
  if trial.number % 2:
    # A run that has steps left.
    shutil.rmtree(run_dir / "checkpoints" / str(NUM_STEPS))
    (run_dir / "manifests" / f"{NUM_STEPS}.json").unlink()
  changed = forge(run_dir, trial.rng)
  outcomes = []
  for name in ("evaluate", "predict", "plot", "train"):
    try:
      with untouched(outside):
        code, stdout, stderr = trial.sandbox.ask(name, run_dir)
      require(SECRET not in stdout + stderr, "it shows the content of a file outside")
      if code == 0:
        _require_legal(name, stdout, run_dir)
      else:
        errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
        require(2 <= code <= 6 and len(errors) == 1, f"no clear error, exit {code}: {stderr}")
    except Failure as error:
      raise Failure(f"{name} after {changed}: {error}") from None
    outcomes.append(f"{name}: {'answered' if code == 0 else 'refused'}")
  return outcomes


def _require_legal(name: str, stdout: str, run_dir: Path) -> None:
  if name == "plot":
    require((run_dir / "history.png").read_bytes().startswith(b"\x89PNG"), "no plot")
  elif name == "train":
    require((run_dir / "manifests" / f"{NUM_STEPS}.json").exists(), "the run has not ended")
  else:
    found = _answers(stdout)
    shares = [each["accuracy"] for each in found] if name == "evaluate" else _probabilities(found)
    is_legal = shares and all(type(share) is float and math.isfinite(share) and 0 <= share <= 1 for share in shares)
    require(bool(is_legal), f"{shares} are not from 0 to 1")


def _probabilities(answers: list[dict[str, Any]]) -> list[float]:
  return [value for answer in answers for value in answer["probabilities"].values()]


def _answers(stdout: str) -> list[dict[str, Any]]:
  try:
    return [json.loads(line) for line in stdout.splitlines()]
  except ValueError:
    raise Failure(f"not JSON: {stdout:.300}") from None
