"""Checkpoints of a run. The only user of orbax.

A step exists if it has a manifest. That is written once Orbax has committed the step's folder, and removed before the
folder is, so whatever moment a process dies at, every step is whole or counts as never saved. What has a manifest and
does not agree with it has been damaged, and is not used.
"""

import dataclasses
import errno
import itertools
import logging
import math
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from jax.experimental import multihost_utils

from imdb_jax import manifest, sharding
from imdb_jax.errors import CheckpointError, first_line
from imdb_jax.state import TrainState

_LOG = logging.getLogger(__name__)
# The newest steps, for resuming; the best one is kept besides.
_NUM_KEPT = 2
# More than are ever kept: several processes compare arrays of one size.
_MOST_STEPS = 64
# Looks of a reader at a run whose trainer removes what it was about to read.
_MOST_LOOKS = 10
# Of a checkpoint's many small files and of Orbax's metadata, generously.
_OVERHEAD_BYTES = 2**18


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saved:
  """Attributes:
  step: updates made.
  progress: JSON, what resuming needs besides the state; {} for a step at which an epoch has ended.
  val_accuracy: None for a step that has not been evaluated: within an epoch, or at its end before the evaluation.
  """

  step: int
  progress: dict[str, Any]
  val_accuracy: float | None

  @property
  def rank(self) -> tuple[float, int]:
    """Higher is better, of equals the last; an accuracy that is none or not a number is worst."""
    if self.val_accuracy is None or math.isnan(self.val_accuracy):
      return -math.inf, self.step
    return self.val_accuracy, self.step


class Checkpoints:
  """The steps below `RUN_DIR/checkpoints`, and their manifests in `RUN_DIR/manifests`."""

  def __init__(self, run_dir: Path, *, read_only: bool):
    """Opens them, and warns of damaged ones.

    A reader changes nothing, so it may look at a live run. A writer removes what is left of interrupted saves and, if
    there is a step that can be used, moves damaged ones to `RUN_DIR/damaged`, so that they can be saved anew.

    Raises:
      CheckpointError: a reader finds no folder, or the folder cannot be used.
    """
    self.directory = run_dir.absolute() / "checkpoints"
    self._manifests = run_dir.absolute() / "manifests"
    if read_only and not self.directory.is_dir():
      raise CheckpointError(f"{run_dir}: there are no checkpoints. Is this the folder of a run?")
    self._saved: dict[int, Saved]
    self._damaged: dict[int, str]
    try:
      self._look()
      if not read_only:
        # Orbax logs several lines a save at INFO, and at ERROR a traceback of what it raises all the same.
        absl_logging.set_verbosity(absl_logging.FATAL)
        # All have looked before the first changes anything.
        with sharding.together():
          self._agree()
        with sharding.together():
          if jax.process_index() == 0:
            self._tidy()
    except OSError as error:
      raise CheckpointError(f"{self.directory}: cannot be used for checkpoints: {error}") from error
    self._orbax = ocp.Checkpointer(ocp.StandardCheckpointHandler())

  def _look(self) -> None:
    self._saved, self._damaged = {}, {}
    names = [path.stem for path in self._manifests.glob("*.json")]
    for step in sorted(int(name) for name in names if name.isdecimal() and name == str(int(name))):
      problem = manifest.problem(self.directory / str(step), self._manifest(step))
      if problem is None:
        facts = manifest.read(self._manifest(step))
        progress, val_accuracy = facts.get("progress"), facts.get("val_accuracy")
        if isinstance(progress, dict) and (val_accuracy is None or isinstance(val_accuracy, float | int)):
          self._saved[step] = Saved(step=step, progress=progress, val_accuracy=val_accuracy)
          continue
        problem = "its manifest lacks progress or accuracy"
      if not os.path.lexists(self._manifest(step)):
        # The trainer of a live run has removed it.
        continue
      self._damaged[step] = problem
      _LOG.warning("%s: damaged and not used: %s", self.directory / str(step), problem)

  def _agree(self) -> None:
    """Of several processes all go on from what the first sees."""
    if jax.process_count() == 1:
      return
    steps = np.full(_MOST_STEPS, -1, np.int32)
    newest = self.steps()[-_MOST_STEPS:]
    steps[: len(newest)] = newest
    first_sees = [step for step in multihost_utils.broadcast_one_to_all(steps).tolist() if step >= 0]
    missing = [step for step in first_sees if step not in self._saved]
    if missing:
      raise CheckpointError(
        f"{self.directory}: step {missing[0]} is not whole as process {jax.process_index()} sees it."
      )
    self._saved = {step: self._saved[step] for step in first_sees}

  def _manifest(self, step: int) -> Path:
    return self._manifests / f"{step}.json"

  def _tidy(self) -> None:
    self.directory.mkdir(parents=True, exist_ok=True)
    if self._saved:
      for step in self._damaged:
        self._set_aside(step)
    known = {str(step) for step in (*self._saved, *self._damaged)}
    for path in self.directory.iterdir():
      if path.name not in known:
        _remove(path)

  def _set_aside(self, step: int) -> None:
    """Nothing is lost that somebody may want to look at."""
    damaged = self.directory.parent / "damaged"
    damaged.mkdir(exist_ok=True)
    place = next(damaged / f"{step}-{n}" for n in itertools.count(1) if not os.path.lexists(damaged / f"{step}-{n}"))
    place.mkdir()
    for path, name in ((self._manifest(step), "manifest.json"), (self.directory / str(step), "checkpoint")):
      if os.path.lexists(path):
        path.rename(place / name)

  def steps(self) -> list[int]:
    """Those that can be used, in order."""
    return sorted(self._saved)

  def is_empty(self) -> bool:
    """Nothing has been saved yet: there are not even damaged steps."""
    return not self._saved and not self._damaged

  def find(self, which: int | Literal["best", "latest"]) -> Saved:
    """The step that is meant, among those that can be used.

    Raises:
      CheckpointError: there is none, or not that one.
    """
    if which in self._damaged:
      raise CheckpointError(f"{self.directory / str(which)}: damaged: {self._damaged[which]}.")
    if not self._saved:
      reasons = "; ".join(f"step {step}: {problem}" for step, problem in self._damaged.items())
      raise CheckpointError(f"{self.directory}: no checkpoint can be used: {reasons or 'none has been saved yet'}.")
    if which == "latest":
      return self._saved[max(self._saved)]
    if which == "best":
      return max(self._saved.values(), key=lambda saved: saved.rank)
    if which not in self._saved:
      raise CheckpointError(
        f"{self.directory}: there is no step {which}; there are {', '.join(map(str, self.steps()))}."
      )
    return self._saved[which]

  def save(self, step: int, state: TrainState, progress: dict[str, Any], val_accuracy: float | None = None) -> None:
    """Saves, and returns when that is safe; older steps that are no longer needed go after it.

    Args:
      step: updates made. Of a step that is already there only accuracy and progress are renewed.
      state: on all devices.
      progress: see `Saved`.
      val_accuracy: what the best step is chosen by; None for a step that has not been evaluated.

    Raises:
      CheckpointError: it could not be written; earlier steps are untouched.
    """
    try:
      if step not in self._saved:
        with sharding.together():
          self._require_room(state)
        self._orbax.save(self.directory / str(step), args=ocp.args.StandardSave(state))
      with sharding.together():
        if jax.process_index() == 0:
          facts = {"progress": progress, "val_accuracy": val_accuracy}
          manifest.write(self.directory / str(step), self._manifest(step), facts)
    # Orbax, tensorstore and the file system each fail with errors of their own.
    except Exception as error:
      raise CheckpointError(
        f"Step {step} could not be saved in {self.directory}: {first_line(error)}. Earlier steps are intact."
      ) from error
    self._saved[step] = Saved(step=step, progress=progress, val_accuracy=val_accuracy)
    kept = {*sorted(self._saved)[-_NUM_KEPT:], self.find("best").step}
    for old in self._saved.keys() - kept:
      del self._saved[old]
      if jax.process_index() == 0:
        self._manifest(old).unlink(missing_ok=True)
        _remove(self.directory / str(old))

  def _require_room(self, state: TrainState) -> None:
    """Raises OSError where the disk is as good as full: what tensorstore says of it in the middle of a save is long."""
    needed = 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + _OVERHEAD_BYTES
    free = shutil.disk_usage(self.directory).free
    if free < needed:
      raise OSError(errno.ENOSPC, f"No space left on device: {free:,} bytes are free, {needed:,} are wanted")

  def restore_latest(self, abstract: TrainState) -> tuple[Saved, TrainState]:
    """The newest step; one that holds values that are not finite is passed over and set aside.

    One that agrees with its manifest and cannot be read all the same is left where it is: nothing is wrong with it, but
    with memory, file system or another process, and the next attempt may have more luck.

    Raises:
      CheckpointError: there is none, or it cannot be read or does not fit.
    """
    while True:
      saved = self.find("latest")
      try:
        return saved, self.restore(saved, abstract)
      except _NotFiniteError as error:
        _LOG.warning("%s", error)
        self._damaged[saved.step] = str(error)
        del self._saved[saved.step]
        with sharding.together():
          if jax.process_index() == 0 and self._saved:
            self._set_aside(saved.step)

  def find_and_restore(self, which: int | Literal["best", "latest"], abstract: TrainState) -> tuple[Saved, TrainState]:
    """For a reader of a live run: looks again where the trainer removes the step that was found.

    Raises:
      CheckpointError: see `find` and `restore`.
    """
    for _ in range(_MOST_LOOKS):
      saved = self.find(which)
      try:
        state = self.restore(saved, abstract)
      except _UnreadableError:
        if os.path.lexists(self._manifest(saved.step)):
          raise
      else:
        # It is removed first, so everything that was read was still there.
        if os.path.lexists(self._manifest(saved.step)):
          return saved, state
      self._look()
    raise CheckpointError(f"{self.directory}: steps are removed faster than they can be read.")

  def restore(self, saved: Saved, abstract: TrainState) -> TrainState:
    """The state of a step.

    Args:
      saved: from `find`.
      abstract: shapes, dtypes and shardings to restore into, from `state.abstract`.

    Raises:
      CheckpointError: it does not fit, cannot be read, or holds values that are not finite.
    """
    folder = self.directory / str(saved.step)
    try:
      # Before anything is allocated.
      metadata: Any = self._orbax.metadata(folder).item_metadata
      expected, found = _shapes(abstract.params), _shapes(metadata["params"])
    # Orbax and tensorstore have no error in common for what they cannot make sense of.
    except Exception as error:
      raise _UnreadableError(f"{folder}: the checkpoint cannot be read: {first_line(error)}") from error
    for name in sorted(expected.keys() | found.keys()):
      if expected.get(name) != found.get(name):
        raise CheckpointError(
          f"{folder}: {name} has shape {found.get(name)}, but config and vocabulary ask for {expected.get(name)}."
        )
    try:
      state = self._orbax.restore(folder, args=ocp.args.StandardRestore(abstract))
    except Exception as error:
      raise _UnreadableError(f"{folder}: the checkpoint cannot be restored: {first_line(error)}") from error
    if not all(jax.tree.leaves(jax.jit(_are_finite)((state.params, state.opt_state)))):
      raise _NotFiniteError(f"{folder}: the checkpoint holds values that are not finite.")
    return state

  def close(self) -> None:
    self._orbax.close()


class _UnreadableError(CheckpointError):
  """A step that agrees with its manifest, or did when it was looked at, could not be read."""


class _NotFiniteError(CheckpointError):
  """A step agrees with its manifest, and is of no use all the same."""


def _remove(path: Path) -> None:
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)


def _shapes(params) -> dict[str, tuple[int, ...]]:
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return {jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape) for path, leaf in leaves}


def _are_finite(tree):
  return jax.tree.map(lambda leaf: jnp.all(jnp.isfinite(leaf)), tree)
