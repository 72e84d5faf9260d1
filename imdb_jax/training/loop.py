"""Training from a config to a run directory.

The order of events is a contract: step ... step -> evaluate -> write the epoch's line -> save -> next epoch. A
checkpoint therefore never lacks its line; a line whose checkpoint was lost is dropped on resume and written again.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from imdb_jax import evaluation, lstm, run_directory, sharding, state, steps
from imdb_jax.checkpoint import Checkpoints
from imdb_jax.config import Config
from imdb_jax.data import batches, tokens
from imdb_jax.model import SentimentLSTM
from imdb_jax.training import report
from imdb_jax.training.console import Console
from imdb_jax.training.recorder import Recorder, write_history
from imdb_jax.training.signals import Interrupted, StopRequest


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

  Raises:
    UsageError: the run directory holds something else, or a setting does not fit the data.
    DataError: the reviews are missing or damaged.
    CheckpointError: the run's checkpoints cannot be read or written.
    DivergenceError: the loss is no longer finite.
    PlatformError: the platform or devices are not there.
    Interrupted: after a signal, once the state is saved.
  """
  is_resumed = run_directory.check(config)
  sharding.keep_freed_memory(config.runtime)
  mesh = sharding.start(config.runtime)
  jax.config.update("jax_default_matmul_precision", config.training.matmul_precision)
  console = Console(is_quiet=jax.process_index() != 0)
  data = tokens.load(
    config.dataset, archive=config.runtime.archive, cache_dir=config.runtime.cache_dir, report=console.line
  )
  if is_resumed:
    run_directory.check_data(config.run_dir, data.digest())
  elif jax.process_index() == 0:
    run_directory.create(config, data.vocabulary, data.digest(), mesh)
  return _Trainer(config, mesh, console, data).run()


class _Trainer:
  """One run in progress."""

  def __init__(self, config: Config, mesh: Mesh, console: Console, data: tokens.TokenData):
    self._config, self._mesh, self._console, self._data = config, mesh, console, data
    self._batch_size = sharding.padded_batch_size(config.training.batch_size, mesh)
    self._steps_per_epoch = batches.num_batches(len(data.train), config.training.batch_size)
    self._last_step = config.training.epochs * self._steps_per_epoch

    model = SentimentLSTM.of_run(config)
    optimizer = state.make_optimizer(config.optimizer, self._last_step)
    self._checkpoints = Checkpoints(config.run_dir, read_only=False)
    self._progress: dict[str, Any] = {}
    if self._checkpoints.steps():
      abstract = state.abstract(model, optimizer, mesh)
      self._state, self._progress = self._checkpoints.restore(self._checkpoints.find("latest"), abstract)
    else:
      self._state = state.create(model, optimizer, config.training.seed, mesh)
    self._step = int(self._state.step)
    self._recorder = Recorder(
      config.run_dir,
      console,
      log_every=config.runtime.log_every,
      steps_per_epoch=self._steps_per_epoch,
      step=self._step,
      is_writer=jax.process_index() == 0,
    )
    self._print_header(model)
    self._compile(model, optimizer)

  def _print_header(self, model: SentimentLSTM) -> None:
    config, data = self._config, self._data
    device = self._mesh.devices.flat[0]
    position = f"resumed at step {self._step:,}" if self._step else "new"
    self._console.header(
      {
        "Preset": config.preset,
        "Devices": f"{self._mesh.size} x {device.device_kind} ({device.platform}), {jax.process_count()} process(es)",
        "Precision": f"float32, matrix products {config.training.matmul_precision}",
        "Parameters": f"{state.num_parameters(self._state):,}",
        "Examples": f"{len(data.train):,} train, {len(data.validation):,} validation ({config.dataset.validation})",
        "Steps": f"{self._steps_per_epoch:,} an epoch, {config.training.epochs} epochs",
        "Positions": f"{self._wasted_share(model):.1%} of those processed hold no word",
        "Run": f"{config.run_dir} ({position})",
      }
    )

  def _wasted_share(self, model: SentimentLSTM) -> float:
    """Of the positions that the first epoch processes."""
    lengths, t = self._data.train.lengths, self._config.dataset.sequence_length
    processed = 0
    for rows in self._plan(1):
      longest = int(lengths[rows].max()) if model.config.mask_padding else t
      processed += len(rows) * lstm.num_processed(t, longest, model.implementation)
    return 1 - int(lengths.sum()) / processed

  def _compile(self, model: SentimentLSTM, optimizer) -> None:
    """Compiles both steps ahead, so that no time of training or evaluation holds a compilation."""
    started = time.perf_counter()
    nothing = np.arange(0)
    examples = sharding.shard_reviews(self._data.train.gather(nothing, self._batch_size), self._mesh)
    train_step = steps.make_train_step(model, optimizer, self._mesh)
    self._train_step = train_step.lower(self._state, examples).compile()
    size = sharding.padded_batch_size(self._config.runtime.evaluation_batch_size, self._mesh)
    examples = sharding.shard_reviews(self._data.validation.gather(nothing, size), self._mesh)
    predict_step = steps.make_predict_step(model, self._mesh)
    self._predict_step = predict_step.lower(self._state.params, examples["tokens"], examples["lengths"]).compile()
    self._compile_seconds = time.perf_counter() - started
    self._console.line(f"Compiled in {self._compile_seconds:.1f} s")

  def run(self) -> FitResult:
    try:
      with StopRequest() as stop:
        first_epoch = len(self._recorder.history) + 1
        for epoch in range(first_epoch, self._config.training.epochs + 1):
          self._run_epoch(epoch, stop)
          if stop.signal and epoch < self._config.training.epochs:
            raise Interrupted(stop.signal, self._step)
    finally:
      self._console.end_epoch()
      self._recorder.close()
      self._checkpoints.close()
    if jax.process_index() == 0:
      report.write(self._config, self._recorder.history)
    report.show(self._config, self._recorder.history, self._console)
    return FitResult(
      run_dir=self._config.run_dir, history=self._recorder.history, compile_seconds=self._compile_seconds
    )

  def _plan(self, epoch: int) -> list[np.ndarray]:
    """The batches of an epoch."""
    training, lengths = self._config.training, self._data.train.lengths
    if training.bucket_by_length:
      return batches.epoch_batches_by_length(lengths, batch_size=training.batch_size, seed=training.seed, epoch=epoch)
    return batches.epoch_batches(len(lengths), batch_size=training.batch_size, seed=training.seed, epoch=epoch)

  def _run_epoch(self, epoch: int, stop: StopRequest) -> None:
    training = self._config.training
    plan = self._plan(epoch)
    done = self._step - (epoch - 1) * self._steps_per_epoch
    seconds_before = self._progress["seconds"] if done else 0.0
    self._recorder.start_epoch(epoch, self._progress if done else None)
    self._console.start_epoch(epoch, training.epochs, num_steps=len(plan), done=done)

    started = time.perf_counter()
    for rows in plan[done:]:
      examples = sharding.shard_reviews(self._data.train.gather(rows, self._batch_size), self._mesh)
      with jax.transfer_guard("disallow"):
        self._state, metrics = self._train_step(self._state, examples)
      self._step += 1
      self._recorder.record_step(self._step, metrics)
      if stop.signal:
        self._save_and_leave(stop, seconds_before + time.perf_counter() - started)
    self._recorder.flush()
    seconds = seconds_before + time.perf_counter() - started

    def on_progress(num_reviews: int) -> None:
      self._console.show_evaluation(num_reviews, len(self._data.validation))
      if stop.signal:
        self._save_and_leave(stop, seconds)

    started = time.perf_counter()
    result = evaluation.evaluate(
      self._predict_step,
      self._state.params,
      self._data.validation,
      self._mesh,
      self._config.runtime.evaluation_batch_size,
      on_progress,
    )
    line = self._recorder.record_epoch(
      self._step,
      val_loss=result.loss,
      val_accuracy=result.accuracy,
      seconds=seconds,
      evaluation_seconds=time.perf_counter() - started,
    )
    self._console.end_epoch()
    self._console.line(report.epoch_line(line, training.epochs))
    self._checkpoints.save(self._step, self._state, {}, val_accuracy=result.accuracy)
    if jax.process_index() == 0:
      write_history(self._config.run_dir, self._recorder.history)

  def _save_and_leave(self, stop: StopRequest, seconds: float) -> None:
    assert stop.signal is not None
    self._recorder.flush()
    self._console.end_epoch()
    self._console.line(f"{stop.signal.name}: saving step {self._step:,}")
    self._checkpoints.save(self._step, self._state, {**self._recorder.progress(), "seconds": seconds})
    raise Interrupted(stop.signal, self._step)
