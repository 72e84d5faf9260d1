"""Checkpoints of a run. The only user of orbax.

Kept are the two newest steps, for resuming, and the one with the best validation accuracy, for use.
"""

import math
from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from orbax.checkpoint import checkpoint_managers as managers

from imdb_jax.errors import CheckpointError
from imdb_jax.state import TrainState

_METRIC = "val_accuracy"


def _rank(metrics: dict[str, float]) -> float:
  """Higher is better; a value that is not a number is worst."""
  value = metrics[_METRIC]
  return -math.inf if math.isnan(value) else value


class Checkpoints:
  """The checkpoints below `RUN_DIR/checkpoints`."""

  def __init__(self, run_dir: Path, *, read_only: bool):
    """Opens them. A reader neither creates nor cleans up anything, so it may look at a live run.

    Raises:
      CheckpointError: a reader finds no folder, or the folder cannot be used.
    """
    # Orbax logs several lines a save at INFO.
    absl_logging.set_verbosity(absl_logging.ERROR)
    self.directory = run_dir.absolute() / "checkpoints"
    if read_only and not self.directory.is_dir():
      raise CheckpointError(f"{run_dir}: there are no checkpoints. Is this the folder of a run?")
    options = ocp.CheckpointManagerOptions(
      best_fn=_rank,
      preservation_policy=managers.AnyPreservationPolicy(
        [
          managers.LatestN(2),
          managers.BestN(get_metric_fn=_rank, n=1, keep_checkpoints_without_metrics=False),
        ]
      ),
      cleanup_tmp_directories=not read_only,
      read_only=read_only,
      create=not read_only,
    )
    handlers = {"state": ocp.StandardCheckpointHandler(), "progress": ocp.JsonCheckpointHandler()}
    try:
      self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)
    except (OSError, ValueError) as error:
      raise CheckpointError(f"{self.directory}: cannot be used for checkpoints: {error}") from error

  def steps(self) -> list[int]:
    return sorted(self._manager.all_steps())

  def find(self, which: int | Literal["best", "latest"]) -> int:
    """The step that is meant.

    Raises:
      CheckpointError: there is none, or not that one.
    """
    steps = self.steps()
    if not steps:
      raise CheckpointError(f"{self.directory}: no checkpoint has been saved yet.")
    if which == "latest":
      return steps[-1]
    if which == "best":
      best = self._manager.best_step()
      return steps[-1] if best is None else best
    if which not in steps:
      raise CheckpointError(f"{self.directory}: there is no step {which}; there are {', '.join(map(str, steps))}.")
    return which

  def save(self, step: int, state: TrainState, progress: dict[str, Any], val_accuracy: float | None = None) -> None:
    """Saves and waits until it is committed.

    Args:
      step: updates made. A step that is already there is left as it is, or, if it was saved before its evaluation,
        replaced by one with its accuracy.
      state: on all devices.
      progress: JSON, what else resuming needs.
      val_accuracy: what the best step is chosen by; None for a step between evaluations.

    Raises:
      CheckpointError: it could not be written; earlier steps are untouched.
    """
    if step in self._manager.all_steps():
      if val_accuracy is None:
        return
      self._manager.delete(step)
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress))
    metrics = None if val_accuracy is None else {_METRIC: val_accuracy}
    try:
      self._manager.save(step, args=items, metrics=metrics)
      self._manager.wait_until_finished()
      self._manager.check_for_errors()
    except (OSError, ValueError) as error:
      reason = str(error).splitlines()[0]
      raise CheckpointError(f"Step {step} could not be saved in {self.directory}: {reason}") from error

  def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """State and progress of a step.

    Args:
      step: from `find`.
      abstract: shapes, dtypes and shardings to restore into, from `state.abstract`.

    Raises:
      CheckpointError: it is damaged or does not fit.
    """
    where = f"{self.directory / str(step)}"
    try:
      self._check_shapes(step, abstract, where)
      items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore())
      restored = self._manager.restore(step, args=items)
    except (OSError, ValueError, KeyError, TypeError) as error:
      reason = str(error).splitlines()[0][:300]
      raise CheckpointError(f"{where}: the checkpoint cannot be restored: {reason}") from error
    return restored["state"], restored["progress"]

  def _check_shapes(self, step: int, abstract: TrainState, where: str) -> None:
    saved = self._manager.item_metadata(step)["state"]
    if saved is None:
      raise CheckpointError(f"{where}: the checkpoint holds no state.")
    expected = {
      jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape
      for path, leaf in jax.tree_util.tree_leaves_with_path(abstract.params)
    }
    found = {
      jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape)
      for path, leaf in jax.tree_util.tree_leaves_with_path(dict(saved)["params"])
    }
    for name in sorted(expected.keys() | found.keys()):
      if expected.get(name) != found.get(name):
        raise CheckpointError(
          f"{where}: {name} has shape {found.get(name)}, but config and vocabulary ask for {expected.get(name)}."
        )

  def close(self) -> None:
    self._manager.close()
