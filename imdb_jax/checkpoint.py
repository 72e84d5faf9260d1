"""Checkpoints of a run. The only user of orbax.

Kept are the two newest steps, for resuming, and the one with the best validation accuracy, for use. Each has a
manifest that is written once it is whole, and only a step that agrees with its manifest is ever read.
"""

import json
import logging
import math
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as managers

from imdb_jax import manifest
from imdb_jax.errors import CheckpointError
from imdb_jax.state import TrainState

_METRIC = "val_accuracy"
_LOG = logging.getLogger(__name__)


def _rank(metrics: dict[str, float]) -> float:
  """Higher is better; a value that is not a number is worst."""
  value = metrics[_METRIC]
  return -math.inf if math.isnan(value) else value


class Checkpoints:
  """The checkpoints below `RUN_DIR/checkpoints`, and their manifests in `RUN_DIR/manifests`."""

  def __init__(self, run_dir: Path, *, read_only: bool):
    """Opens them, and warns of damaged ones.

    A reader neither creates nor cleans up anything, so it may look at a live run. A writer moves damaged steps to
    `RUN_DIR/damaged`: such a step can then be saved anew, and nothing is lost that somebody may want to look at.

    Raises:
      CheckpointError: a reader finds no folder, or the folder cannot be used.
    """
    # Orbax logs several lines a save at INFO, and at ERROR a traceback of what it raises all the same.
    absl_logging.set_verbosity(absl_logging.FATAL)
    self.directory = run_dir.absolute() / "checkpoints"
    self._manifests = run_dir.absolute() / "manifests"
    if read_only and not self.directory.is_dir():
      raise CheckpointError(f"{run_dir}: there are no checkpoints. Is this the folder of a run?")
    try:
      found = _steps_in(self.directory)
      problems = {step: manifest.problem(self.directory / str(step), self._manifest(step)) for step in found}
      bad = {step: problem for step, problem in problems.items() if problem is not None}
      self._steps = [step for step in found if step not in bad]
      for step, problem in bad.items():
        _LOG.warning("%s: not used: %s", self.directory / str(step), problem)
      if not read_only:
        self._set_aside(list(bad))
      self._manager = None if read_only else self._make_manager()
    except (OSError, ValueError) as error:
      raise CheckpointError(f"{self.directory}: cannot be used for checkpoints: {error}") from error
    # The newest step without a manifest is no loss: its save was interrupted, and its time is trained again.
    self._damaged = {step: bad[step] for step in bad if step != found[-1] or self._manifest(step).exists()}
    self._reader = ocp.Checkpointer(ocp.StandardCheckpointHandler())

  def _make_manager(self) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
      best_fn=_rank,
      preservation_policy=managers.AnyPreservationPolicy(
        [
          managers.LatestN(2),
          managers.BestN(get_metric_fn=_rank, n=1, keep_checkpoints_without_metrics=False),
        ]
      ),
      cleanup_tmp_directories=True,
    )
    handlers = {"state": ocp.StandardCheckpointHandler(), "progress": ocp.JsonCheckpointHandler()}
    return ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

  def _manifest(self, step: int) -> Path:
    return self._manifests / f"{step}.json"

  def _set_aside(self, steps: list[int]) -> None:
    """Of several processes the first does it, once all have looked and before any looks again."""
    _wait_for_all("all have looked for damaged steps")
    if jax.process_index() == 0:
      for step in steps:
        folder = self.directory.parent / "damaged"
        folder.mkdir(exist_ok=True)
        number = len(list(folder.iterdir())) + 1
        (self.directory / str(step)).rename(folder / f"{step}-{number}")
    _wait_for_all("damaged steps are set aside")

  def steps(self) -> list[int]:
    """Those that can be used, in order."""
    return list(self._steps)

  def is_empty(self) -> bool:
    """Nothing has been saved yet: there are not even damaged steps."""
    return not self._steps and not self._damaged

  def find(self, which: int | Literal["best", "latest"]) -> int:
    """The step that is meant, among those that can be used.

    Raises:
      CheckpointError: there is none, or not that one.
    """
    if which in self._damaged:
      raise CheckpointError(f"{self.directory / str(which)}: damaged: {self._damaged[which]}.")
    if not self._steps:
      reasons = "; ".join(f"step {step}: {problem}" for step, problem in self._damaged.items())
      raise CheckpointError(f"{self.directory}: no checkpoint can be used: {reasons or 'none has been saved yet'}.")
    if which == "latest":
      return self._steps[-1]
    if which == "best":
      ranks = {step: rank for step in self._steps if (rank := self._saved_rank(step)) is not None}
      return max(ranks, key=lambda step: (ranks[step], step)) if ranks else self._steps[-1]
    if which not in self._steps:
      raise CheckpointError(
        f"{self.directory}: there is no step {which}; there are {', '.join(map(str, self._steps))}."
      )
    return which

  def _saved_rank(self, step: int) -> float | None:
    """None for a step that was saved between evaluations."""
    path = self.directory / str(step) / "metrics" / "metrics"
    try:
      return _rank(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None
    except (ValueError, KeyError, TypeError) as error:
      raise CheckpointError(f"{path}: holds no {_METRIC}: {error!r}") from error

  def save(self, step: int, state: TrainState, progress: dict[str, Any], val_accuracy: float | None = None) -> None:
    """Saves, waits until it is committed, and writes its manifest.

    Args:
      step: updates made. A step that is already there is left as it is, or, if it was saved before its evaluation,
        replaced by one with its accuracy.
      state: on all devices.
      progress: JSON, what else resuming needs.
      val_accuracy: what the best step is chosen by; None for a step between evaluations.

    Raises:
      CheckpointError: it could not be written; earlier steps are untouched.
    """
    assert self._manager is not None, "opened to read only"
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress))
    metrics = None if val_accuracy is None else {_METRIC: val_accuracy}
    try:
      if step in self._steps:
        if val_accuracy is None:
          return
        self._manager.delete(step)
      self._manager.save(step, args=items, metrics=metrics)
      self._manager.wait_until_finished()
      self._manager.check_for_errors()
      self._steps = sorted(self._manager.all_steps())
      if jax.process_index() == 0:
        manifest.write(self.directory / str(step), self._manifest(step))
        for path in self._manifests.iterdir():
          if path.stem.isdecimal() and int(path.stem) not in self._steps:
            path.unlink()
    # Orbax, tensorstore and the file system each fail with errors of their own.
    except Exception as error:
      reason = str(error).splitlines()[0][:300]
      raise CheckpointError(
        f"Step {step} could not be saved in {self.directory}: {reason.rstrip('.')}. Earlier steps are intact."
      ) from error

  def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """State and progress of a step.

    Args:
      step: from `find`.
      abstract: shapes, dtypes and shardings to restore into, from `state.abstract`.

    Raises:
      CheckpointError: it does not fit, or holds values that are not finite.
    """
    folder = self.directory / str(step)
    try:
      self._check_shapes(folder, abstract)
      state = self._reader.restore(folder / "state", args=ocp.args.StandardRestore(abstract))
      progress = json.loads((folder / "progress" / "metadata").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError) as error:
      reason = str(error).splitlines()[0][:300]
      raise CheckpointError(f"{folder}: the checkpoint cannot be restored: {reason}") from error
    if not all(jax.tree.leaves(jax.jit(_are_finite)((state.params, state.opt_state)))):
      raise CheckpointError(f"{folder}: the checkpoint holds values that are not finite.")
    return state, progress

  def _check_shapes(self, folder: Path, abstract: TrainState) -> None:
    """Before anything is allocated."""
    saved = self._reader.metadata(folder / "state").item_metadata
    if saved is None:
      raise CheckpointError(f"{folder}: the checkpoint holds no state.")
    expected, found = _shapes(abstract.params), _shapes(dict(saved)["params"])
    for name in sorted(expected.keys() | found.keys()):
      if expected.get(name) != found.get(name):
        raise CheckpointError(
          f"{folder}: {name} has shape {found.get(name)}, but config and vocabulary ask for {expected.get(name)}."
        )

  def close(self) -> None:
    self._reader.close()
    if self._manager is not None:
      self._manager.close()


def _steps_in(directory: Path) -> list[int]:
  if not directory.exists():
    return []
  return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())


def _shapes(params) -> dict[str, tuple[int, ...]]:
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return {jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape) for path, leaf in leaves}


def _are_finite(tree):
  return jax.tree.map(lambda leaf: jnp.all(jnp.isfinite(leaf)), tree)


def _wait_for_all(what: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)
