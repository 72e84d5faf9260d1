"""Checkpoints of a run.

A step exists if it has a manifest. The manifest is written after Orbax has committed the step's folder, and removed
before the folder is, and each is flushed to the disk before the next. So whenever a process dies or the power fails,
each step is complete or counts as never saved. A step that differs from its manifest has been damaged and is not used.
"""

import dataclasses
import errno
import itertools
import logging
import math
import os
import re
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from absl import logging as absl_logging

from imdb_jax import processes
from imdb_jax.errors import CheckpointError, first_line, reraise_as
from imdb_jax.store import arrays, files

_LOG = logging.getLogger(__name__)
# The newest steps are kept for resuming, and the best one.
_NUM_KEPT = 2
# More than are ever kept.
_MAX_STEPS = 64
# How often a reader retries when the trainer of a live run removes the step that it is about to read.
_MAX_TRIES = 10
# Bytes per array for its metadata, for unfilled blocks of the disk, and for Orbax's and our description of it.
_OVERHEAD_BYTES = 2**14


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saved:
  """A saved step.

  Attributes:
    step: training steps done.
    progress: JSON, what resuming needs besides the state.
    score: value of the monitored metric; None for a step that has not been evaluated.
  """

  step: int
  progress: dict[str, Any]
  score: float | None

  @property
  def rank(self) -> tuple[float, int]:
    """Sort key: score, then the earliest step. A missing score ranks last, the newest step first."""
    return (-math.inf, self.step) if self.score is None else (self.score, -self.step)


class Checkpoints:
  """The steps in `RUN_DIR/checkpoints` and their manifests in `RUN_DIR/manifests`. Methods raise CheckpointError."""

  def __init__(self, run_dir: Path, abstract: Any, *, read_only: bool):
    """Find the steps of a run, and warn of damaged ones.

    A reader changes nothing, so it may look at a live run. A writer removes what interrupted saves left behind. If
    some step is usable, a writer also moves damaged steps to `RUN_DIR/damaged`, so that they can be saved again.
    `abstract` is the tree of shapes, dtypes and shardings of the state.
    """
    self._abstract, self._orbax = abstract, arrays.checkpointer()
    self._arrays = arrays.by_name(abstract)
    self.directory = run_dir.absolute() / "checkpoints"
    self._manifests = run_dir.absolute() / "manifests"
    if read_only and not self.directory.is_dir():
      raise CheckpointError(f"{run_dir}: there are no checkpoints. Is this a run directory?")
    self._saved: dict[int, Saved]
    self._damaged: dict[int, str]
    with reraise_as(CheckpointError, f"{self.directory}: cannot be used for checkpoints"):
      self._find_all()
      if self.is_empty():
        self._require_manifests()
      if not read_only:
        # Orbax logs several lines per save at INFO, and tracebacks of the exceptions that it raises at ERROR.
        absl_logging.set_verbosity(absl_logging.FATAL)
        # Of a save that fails, it reports each task.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        # With another view of the folder, a process would train from another step.
        processes.require_equal({f"the steps in {self.directory}": self.steps()})
        with processes.together():
          if jax.process_index() == 0:
            self._tidy()

  def _find_all(self) -> None:
    self._saved, self._damaged = {}, {}
    names = [path.stem for path in self._manifests.glob("*.json")]
    steps = sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]{0,8}", name))
    if len(steps) > _MAX_STEPS:
      raise CheckpointError(f"{self._manifests}: holds {len(steps):,} steps; a run has {_MAX_STEPS} at most.")
    for step in steps:
      try:
        # First, because it takes no longer for huge files.
        arrays.check(self._folder(step), self._arrays)
        facts = files.check_manifest(self._folder(step), self._manifest(step))
        progress, score = facts.get("progress"), facts.get("score")
        if not isinstance(progress, dict) or not (score is None or (type(score) is float and math.isfinite(score))):
          raise ValueError("its manifest lacks progress or score")
      except (OSError, ValueError) as error:
        # The trainer of a live run may have just removed the step.
        if os.path.lexists(self._manifest(step)):
          self._damaged[step] = str(error)
      else:
        self._saved[step] = Saved(step=step, progress=progress, score=score)
    if self._damaged:
      _LOG.warning("%s: damaged and not used: %s", self.directory, self._reasons())

  def _require_manifests(self) -> None:
    """Raise CheckpointError if there are saved steps whose manifests someone has removed."""
    folders = [path.name for path in self.directory.glob("*") if path.name.isdecimal()]
    # The folder is created before the first save, which leaves one step without a manifest if it is interrupted.
    if len(folders) > 1 or (folders and not self._manifests.is_dir()):
      raise CheckpointError(
        f"{self._manifests}: has no manifest of the saved steps {', '.join(sorted(folders, key=int))[:200]}. "
        "They cannot be used without. Put the manifests back, or name another folder."
      )

  def _reasons(self) -> str:
    return "; ".join(f"step {step}: {problem}" for step, problem in self._damaged.items())

  def _folder(self, step: int) -> Path:
    return self.directory / str(step)

  def _manifest(self, step: int) -> Path:
    return self._manifests / f"{step}.json"

  def _tidy(self) -> None:
    for folder in (self.directory, self._manifests):
      folder.mkdir(parents=True, exist_ok=True)
    files.sync(self.directory.parent)
    if self._saved:
      for step in self._damaged:
        self._set_aside(step)
    known = {str(step) for step in (*self._saved, *self._damaged)}
    for path in self.directory.iterdir():
      if path.name not in known:
        files.remove(path)

  def _set_aside(self, step: int) -> None:
    """Move a damaged step to a new folder in `RUN_DIR/damaged`, for people to look at."""
    damaged = self.directory.parent / "damaged"
    damaged.mkdir(exist_ok=True)
    place = next(damaged / f"{step}-{n}" for n in itertools.count(1) if not os.path.lexists(damaged / f"{step}-{n}"))
    place.mkdir()
    for path, name in ((self._manifest(step), "manifest.json"), (self._folder(step), "checkpoint")):
      if os.path.lexists(path):
        path.rename(place / name)

  def steps(self) -> list[int]:
    """Return the usable steps, in order."""
    return sorted(self._saved)

  def is_empty(self) -> bool:
    """Return whether nothing has been saved yet, not even steps that are damaged now."""
    return not self._saved and not self._damaged

  def find(self, which: int | Literal["best", "latest"]) -> Saved:
    """Return a usable step."""
    if which in self._damaged:
      raise CheckpointError(f"{self.directory / str(which)}: damaged: {self._damaged[which]}.")
    if not self._saved:
      reasons = self._reasons() or "none has been saved yet"
      raise CheckpointError(f"{self.directory}: no checkpoint can be used: {reasons}.")
    if which == "latest":
      return self._saved[max(self._saved)]
    if which == "best":
      return max(self._saved.values(), key=lambda saved: saved.rank)
    if which not in self._saved:
      steps = ", ".join(map(str, self.steps()))
      raise CheckpointError(f"{self.directory}: there is no step {which}; there are {steps}.")
    return self._saved[which]

  def save(self, saved: Saved, state: Any) -> None:
    """Save a step and wait until it is on disk; then remove older steps that are no longer needed.

    If the step exists already, only its facts are replaced. The state is a tree of arrays on all devices.
    """
    try:
      if saved.step not in self._saved:
        with processes.together():
          self._require_untouched()
          self._require_space(state)
        arrays.save(self._orbax, self._folder(saved.step), state)
      with processes.together():
        if jax.process_index() == 0:
          # Whatever the file system or Orbax makes of the path, the files must be where a reader looks for them.
          arrays.check(self._folder(saved.step), self._arrays)
          facts = {"progress": saved.progress, "score": saved.score}
          files.write_manifest(self._folder(saved.step), self._manifest(saved.step), facts)
    # Orbax, tensorstore and the file system raise errors without a common base class.
    except Exception as error:
      self._find_all()
      intact = ", ".join(map(str, self.steps())) or "none"
      raise CheckpointError(
        f"Step {saved.step} could not be saved in {self.directory}: {first_line(error)}. Intact steps: {intact}."
      ) from error
    self._saved[saved.step] = saved
    with reraise_as(
      CheckpointError, f"Step {saved.step} is saved in {self.directory}, but an older step could not be removed"
    ):
      for old in self._saved.keys() - {*self.steps()[-_NUM_KEPT:], self.find("best").step}:
        del self._saved[old]
        if jax.process_index() == 0:
          self._manifest(old).unlink(missing_ok=True)
          files.sync(self._manifests)
          files.remove(self._folder(old))

  def _require_untouched(self) -> None:
    """Raise OSError if someone has removed saved steps, or the whole folder, which Orbax would create anew."""
    for path in (self.directory, *(place(step) for step in self._saved for place in (self._folder, self._manifest))):
      if not path.exists():
        raise OSError(errno.ENOENT, f"{path} has been removed")

  def _require_space(self, state: Any) -> None:
    """Raise OSError if the disk is nearly full. On a full disk, Orbax and tensorstore print long messages."""
    sizes, disk = [leaf.nbytes for leaf in jax.tree.leaves(state)], os.statvfs(self.directory)
    needed = {"bytes": sum(sizes) + len(sizes) * _OVERHEAD_BYTES, "files": 4 * len(sizes)}
    # Some file systems do not count files.
    free = {"bytes": disk.f_bavail * disk.f_frsize, "files": disk.f_favail if disk.f_files else needed["files"]}
    for unit in needed:
      if free[unit] < needed[unit]:
        message = f"No space left on device: {free[unit]:,} {unit} are free, {needed[unit]:,} are needed"
        raise OSError(errno.ENOSPC, message)

  def restore(self, which: int | Literal["best", "latest"]) -> tuple[Saved, Any]:
    """Restore a step; if the trainer of a live run removes it meanwhile, look again.

    A step that cannot be read now stays where it is: the next attempt may succeed.
    """
    for _ in range(_MAX_TRIES):
      saved = self.find(which)
      try:
        state = self._restore(saved.step)
      except CheckpointError:
        if os.path.lexists(self._manifest(saved.step)):
          raise
      else:
        # The manifest is removed first, so all files were complete while they were read.
        if os.path.lexists(self._manifest(saved.step)):
          return saved, state
      self._find_all()
    raise CheckpointError(f"{self.directory}: steps are removed faster than they can be read.")

  def _restore(self, step: int) -> Any:
    folder = self._folder(step)
    # Orbax and tensorstore raise errors without a common base class.
    with reraise_as(CheckpointError, f"{folder}: the checkpoint cannot be restored", Exception):
      state = arrays.restore(self._orbax, folder, self._abstract)
    # Every device holds the whole state.
    if not all(np.isfinite(leaf.addressable_data(0)).all() for leaf in jax.tree.leaves(state)):
      raise CheckpointError(f"{folder}: the checkpoint holds values that are not finite.")
    return state

  def close(self) -> None:
    """Release Orbax's resources."""
    self._orbax.close()
