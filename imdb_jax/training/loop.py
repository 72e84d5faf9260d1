"""Training from a config to a run directory.

The order of events is a contract: step ... step -> evaluate -> write the epoch's line -> save -> next epoch. A
checkpoint therefore never lacks its line; a line whose checkpoint was lost is dropped on resume and written again.
"""

import contextlib
import dataclasses
import itertools
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from imdb_jax import evaluation, lstm, run_directory, sharding, state, steps
from imdb_jax.checkpoint import Checkpoints, Saved
from imdb_jax.config import Config
from imdb_jax.data import batches, tokens
from imdb_jax.errors import CheckpointError, DivergenceError, UsageError, first_line
from imdb_jax.model import SentimentLSTM
from imdb_jax.training import report
from imdb_jax.training.console import Console
from imdb_jax.training.recorder import Recorder, write_history
from imdb_jax.training.signals import Interrupted, StopRequest

# Dispatches of training or evaluation between two agreements of several processes, which wait for each other then.
_POLL_EVERY = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitResult:
  """Attributes:
  run_dir: everything about the run.
  history: a dict an epoch, see `recorder.EPOCH_FIELDS`.
  compile_seconds: of the training and the prediction step, in none of the seconds of `history`.
  """

  run_dir: Path
  history: list[dict[str, Any]]
  compile_seconds: float


def fit(config: Config) -> FitResult:
  """Trains, or resumes, the run that `config` describes.

  It changes the whole program: on a CPU glibc keeps freed memory from then on (`sharding.keep_freed_memory`), and see
  `sharding.start`.

  Raises:
    UsageError: the run directory holds something else, or another trainer is at work there, or a setting does not
      fit the data.
    DataError: the reviews are missing or damaged.
    CheckpointError: the run's checkpoints cannot be read or written.
    DivergenceError: a loss or gradient is not finite.
    PlatformError: the platform or devices are not there.
    Interrupted: after a signal, once the state is saved.
  """
  if not config.runtime.distributed and config.runtime.coordinator_address is None:
    # Before JAX starts, which takes longer than to see that the folder is another run's. Several processes join first,
    # or one that is refused here would be waited for.
    run_directory.check(config)
  sharding.keep_freed_memory(config.runtime)
  mesh = sharding.start(config.runtime, config.training.batch_size)
  is_first = jax.process_index() == 0
  console = Console(is_quiet=not is_first)
  with contextlib.ExitStack() as stack:
    stack.enter_context(sharding.device_errors())
    stack.enter_context(jax.default_matmul_precision(config.training.matmul_precision))
    with sharding.together():
      # What cannot be computed here is refused before there is a folder with such settings.
      model = SentimentLSTM.of_run(config)
    sharding.require_alike(_shared_settings(config, model, mesh))
    with sharding.together():
      data = tokens.load(
        config.dataset, archive=config.runtime.archive, cache_dir=config.runtime.cache_dir, report=console.line
      )
      if is_first:
        stack.enter_context(run_directory.locked(config.run_dir))
        # Once more: until it was locked, another trainer may have been at work.
        if not run_directory.check(config):
          run_directory.create(config, data.vocabulary, data.digest(), mesh)
    with sharding.together():
      # Each process has reviews and a view of the folder of its own.
      if not run_directory.check(config):
        raise UsageError(f"--run-dir {config.run_dir}: not the folder in which process 0 has made the run.")
      run_directory.check_data(config.run_dir, data.digest())
      run_directory.load_vocabulary(config.run_dir)
    stop = stack.enter_context(StopRequest())
    try:
      return _Trainer(config, model, mesh, console, data, stop, stack).run()
    except OSError as error:
      raise UsageError(f"--run-dir {config.run_dir}: {first_line(error)}. What was saved is intact.") from error


def _shared_settings(config: Config, model: SentimentLSTM, mesh: Mesh) -> dict[str, Any]:
  """What decides which computations the processes share, and when; by the names of flags."""
  settings = {
    name: value for section in config.to_dict().values() if isinstance(section, dict) for name, value in section.items()
  }
  for name in ("steps_per_dispatch", "evaluation_batch_size", "save_every_steps", "deterministic"):
    settings[name] = getattr(config.runtime, name)
  settings["implementation"] = model.implementation
  settings["num_devices"] = [device.id for device in mesh.devices.flat]
  return {f"--{name.replace('_', '-')}": value for name, value in settings.items()}


class _Trainer:
  """One run in progress."""

  def __init__(
    self,
    config: Config,
    model: SentimentLSTM,
    mesh: Mesh,
    console: Console,
    data: tokens.TokenData,
    stop: StopRequest,
    stack: contextlib.ExitStack,
  ):
    """What is opened is closed by `stack`."""
    self._config, self._mesh, self._console, self._data = config, mesh, console, data
    self._stop = stop
    self._batch_size = sharding.padded_batch_size(min(config.training.batch_size, len(data.train)), mesh)
    self._steps_per_epoch = batches.num_batches(len(data.train), config.training.batch_size)
    self._last_step = config.training.epochs * self._steps_per_epoch

    optimizer = state.make_optimizer(config.optimizer, self._last_step)
    self._checkpoints = Checkpoints(config.run_dir, read_only=False)
    stack.callback(self._checkpoints.close)
    if self._checkpoints.is_empty():
      saved = Saved(step=0, progress={}, val_accuracy=None)
      self._state = state.create(model, optimizer, config.training.seed, mesh, config.training.num_seeds)
    else:
      abstract = state.abstract(model, optimizer, mesh, config.training.num_seeds)
      saved, self._state = self._checkpoints.restore_latest(abstract)
    self._step, self._progress = saved.step, saved.progress
    self._saved_at = time.monotonic()
    self._print_header(model)
    self._reviews = sharding.put(vars(data.train), sharding.replicated(mesh))
    self._compile(model, optimizer)
    # Without an accuracy the last step of an epoch still has its evaluation before it.
    evaluated = saved.step if saved.val_accuracy is not None else max(saved.step - 1, 0)
    self._recorder = Recorder(
      config.run_dir,
      console,
      seeds=config.training.seeds,
      log_every=config.runtime.log_every,
      steps_per_epoch=self._steps_per_epoch,
      step=self._step,
      finished_epochs=evaluated // self._steps_per_epoch,
      is_writer=jax.process_index() == 0,
      skips_non_finite=config.optimizer.non_finite == "skip",
      num_skipped=state.num_skipped(self._state),
    )
    stack.callback(self._recorder.close)
    stack.callback(console.end_epoch)

  def _print_header(self, model: SentimentLSTM) -> None:
    config, data, seeds = self._config, self._data, self._config.training.seeds
    device = self._mesh.devices.flat[0]
    position = f"resumed at step {self._step:,}" if self._step else "new"
    rounded = ", those of the recurrence bfloat16" if model.implementation == "mosaic_gpu" else ""
    several = {"Seeds": f"{seeds[0]} to {seeds[-1]}: {len(seeds)} models at once"} if len(seeds) > 1 else {}
    self._console.header(
      {
        "Preset": config.preset,
        **several,
        "Devices": f"{self._mesh.size} x {device.device_kind} ({device.platform}), {jax.process_count()} process(es)",
        "Recurrence": self._recurrence(model),
        "Precision": f"float32, matrix products {config.training.matmul_precision}{rounded}",
        "Parameters": f"{state.num_parameters(self._state):,}",
        "Examples": f"{len(data.train):,} train, {len(data.validation):,} validation ({config.dataset.validation})",
        "Steps": f"{self._steps_per_epoch:,} an epoch, {config.training.epochs} epoch(s)",
        "Positions": f"{self._wasted_share(model):.1%} of those processed hold no word",
        "Run": f"{config.run_dir} ({position})",
      }
    )

  def _recurrence(self, model: SentimentLSTM) -> str:
    if self._config.runtime.implementation != "auto":
      return f"{model.implementation} (--implementation)"
    name, reason = lstm.choose(model.config.hidden_size)
    return f"{name} ({reason})"

  def _wasted_share(self, model: SentimentLSTM) -> float:
    """Of the positions that the first epoch processes."""
    lengths, t = self._data.train.lengths, self._config.dataset.sequence_length
    processed = 0
    for rows in itertools.chain.from_iterable(self._plan(1)):
      longest = int(lengths[rows].max()) if model.config.mask_padding else t
      processed += len(rows) * lstm.num_processed(t, longest, model.implementation)
    return 1 - self._config.training.num_seeds * int(lengths.sum()) / processed

  def _compile(self, model: SentimentLSTM, optimizer) -> None:
    """Compiles both steps ahead, so that no time of training or evaluation holds a compilation."""
    started = time.perf_counter()
    num_seeds = self._config.training.num_seeds
    train_step = steps.make_train_step(model, optimizer, self._mesh, num_seeds)
    train_steps = steps.make_train_steps(train_step, self._mesh, num_seeds)
    self._train_steps = train_steps.lower(self._state, self._reviews, *self._rows([])).compile()
    size = sharding.padded_batch_size(self._config.runtime.evaluation_batch_size, self._mesh)
    examples = sharding.put(self._data.validation.gather(np.arange(0), size), sharding.over_reviews(self._mesh))
    predict_step = steps.make_predict_step(model, self._mesh, num_seeds)
    self._predict_step = predict_step.lower(self._state.params, examples["tokens"], examples["lengths"]).compile()
    self._compile_seconds = time.perf_counter() - started
    self._console.line(f"Compiled in {self._compile_seconds:.1f} s")

  def run(self) -> FitResult:
    first_epoch = len(self._recorder.history) + 1
    try:
      for epoch in range(first_epoch, self._config.training.epochs + 1):
        self._run_epoch(epoch)
        number, _ = self._agree()
        if number and epoch < self._config.training.epochs:
          raise Interrupted(number, self._step)
    except DivergenceError as error:
      steps = self._checkpoints.steps()
      saved = f"The last good checkpoint is step {steps[-1]:,}." if steps else "No checkpoint had been saved."
      raise DivergenceError(
        f"{error} {saved} The same settings would come here again: "
        "try a lower --learning-rate, or --non-finite skip, in a new --run-dir."
      ) from error
    self._console.end_epoch()
    if jax.process_index() == 0:
      report.write(self._config, self._recorder.history)
    report.show(self._config, self._recorder.history, self._console)
    return FitResult(
      run_dir=self._config.run_dir, history=self._recorder.history, compile_seconds=self._compile_seconds
    )

  def _agree(self) -> tuple[signal.Signals | None, bool]:
    """The signal that any of the processes got, and whether it is time to save. All of them must ask at once."""
    limit = self._config.runtime.save_every_seconds
    is_due = limit is not None and time.monotonic() - self._saved_at >= limit
    if jax.process_count() == 1:
      return self._stop.signal, is_due
    mine = np.array([self._stop.signal or 0, is_due and jax.process_index() == 0], np.int32)
    number, is_due = np.max(multihost_utils.process_allgather(mine), axis=0).tolist()
    return signal.Signals(number) if number else None, bool(is_due)

  def _plan(self, epoch: int) -> list[tuple[np.ndarray, ...]]:
    """The batches of an epoch, one of each seed a step."""
    training, lengths = self._config.training, self._data.train.lengths

    def of_seed(seed: int) -> list[np.ndarray]:
      if training.bucket_by_length:
        return batches.epoch_batches_by_length(lengths, batch_size=training.batch_size, seed=seed, epoch=epoch)
      return batches.epoch_batches(len(lengths), batch_size=training.batch_size, seed=seed, epoch=epoch)

    return list(zip(*map(of_seed, training.seeds), strict=True))

  def _rows(self, plan: Sequence[tuple[np.ndarray, ...]]) -> tuple[jax.Array, jax.Array]:
    """The rows of some batches and their number, as `steps.make_train_steps` takes them."""
    num_seeds, num_steps = self._config.training.num_seeds, self._config.runtime.steps_per_dispatch
    of_seeds = [batches.filled([step[i] for step in plan], num_steps, self._batch_size) for i in range(num_seeds)]
    rows = of_seeds[0] if num_seeds == 1 else np.stack(of_seeds, axis=1)
    place = sharding.over_reviews(self._mesh, rows.ndim - 1)
    return sharding.put(rows, place), sharding.put(np.array(len(plan), np.int32), sharding.replicated(self._mesh))

  def _num_steps(self, left: int) -> int:
    """How many of the steps left in the epoch come next: no more than to the next save that is due."""
    runtime = self._config.runtime
    num_steps = min(left, runtime.steps_per_dispatch)
    if runtime.save_every_steps is not None:
      num_steps = min(num_steps, runtime.save_every_steps - self._step % runtime.save_every_steps)
    return num_steps

  def _run_epoch(self, epoch: int) -> None:
    training, runtime = self._config.training, self._config.runtime
    plan = self._plan(epoch)
    done = self._step - (epoch - 1) * self._steps_per_epoch
    try:
      seconds_before = float(self._progress["seconds"]) if done else 0.0
      self._recorder.start_epoch(epoch, self._progress if done else None)
    except (KeyError, TypeError, ValueError) as error:
      raise CheckpointError(f"Step {self._step:,} was saved without what its epoch needs: {error!r}.") from error
    self._console.start_epoch(epoch, training.epochs, num_steps=len(plan), done=done)
    poll_every = 1 if jax.process_count() == 1 else _POLL_EVERY

    started = time.perf_counter()
    dispatches = itertools.count()
    while done < len(plan):
      number, is_due = self._agree() if next(dispatches) % poll_every == 0 else (None, False)
      if runtime.save_every_steps is not None and self._step % runtime.save_every_steps == 0:
        is_due = True
      # At the beginning of an epoch the end of the last one has just been saved.
      if number or (is_due and self._step > (epoch - 1) * self._steps_per_epoch):
        self._save_within_epoch(number, seconds_before + time.perf_counter() - started)
      num_steps = self._num_steps(len(plan) - done)
      rows = self._rows(plan[done : done + num_steps])
      with jax.transfer_guard("disallow"):
        self._state, metrics = self._train_steps(self._state, self._reviews, *rows)
      self._recorder.record_steps(range(self._step + 1, self._step + num_steps + 1), metrics)
      self._step, done = self._step + num_steps, done + num_steps
    self._recorder.flush()
    seconds = seconds_before + time.perf_counter() - started

    num_batches = 0

    def on_progress(num_reviews: int) -> None:
      nonlocal num_batches
      num_batches += 1
      self._console.show_evaluation(num_reviews, len(self._data.validation))
      if num_batches % poll_every == 0 and (number := self._agree()[0]):
        self._save_within_epoch(number, seconds)

    started = time.perf_counter()
    result = evaluation.evaluate(
      self._predict_step,
      self._state.params,
      self._data.validation,
      self._mesh,
      runtime.evaluation_batch_size,
      on_progress,
      training.num_seeds,
    )
    line = self._recorder.record_epoch(
      self._step, result, seconds=seconds, evaluation_seconds=time.perf_counter() - started
    )
    self._console.end_epoch()
    self._console.line(report.epoch_line(line, training.epochs))
    self._save({}, val_accuracy=line["val_accuracy"])
    if jax.process_index() == 0:
      write_history(self._config.run_dir, self._recorder.history)

  def _save_within_epoch(self, number: signal.Signals | None, seconds: float) -> None:
    """Saves what continuing within the epoch needs, and leaves if there was a signal."""
    self._recorder.flush()
    if number:
      self._console.end_epoch()
      self._console.line(f"{number.name}: saving step {self._step:,}")
    self._save({**self._recorder.progress(), "seconds": seconds}, val_accuracy=None)
    if number:
      raise Interrupted(number, self._step)

  def _save(self, progress: dict[str, Any], val_accuracy: float | None) -> None:
    self._recorder.sync()
    self._checkpoints.save(self._step, self._state, progress, val_accuracy)
    self._saved_at = time.monotonic()
