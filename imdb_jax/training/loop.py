"""Training from a config to a run directory.

The order of events is a contract: step ... step -> evaluate -> write the epoch's line -> save -> next epoch. So a
checkpoint never lacks its line. A line whose checkpoint was lost is dropped on resume and written again.
"""

import contextlib
import dataclasses
import itertools
import math
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from imdb_jax import devices, evaluation, processes
from imdb_jax.config import Config
from imdb_jax.data import batches, sources, tokens
from imdb_jax.errors import CheckpointError, DivergenceError, UsageError, reraise_as
from imdb_jax.optimizer import make_optimizer, schedule
from imdb_jax.processes import Interrupted, StopRequest
from imdb_jax.program import Program, TrainState
from imdb_jax.report import page
from imdb_jax.store import metrics_log, run_directory
from imdb_jax.store.checkpoints import Checkpoints, Saved
from imdb_jax.training import start
from imdb_jax.training.console import Console, show_header, start_facts
from imdb_jax.training.metrics import Recorder

# Dispatches between two agreements of several processes, which wait for each other then.
_POLL_EVERY = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitResult:
  """The result of a run.

  Attributes:
    run_dir: the run directory.
    history: one dict per epoch, see `store.metrics_log.EPOCH_FIELDS`.
    compile_seconds: time to compile training and prediction, which no seconds in `history` include.
    late_signal: a signal that arrived when there was nothing left to stop; None if there was none.
  """

  run_dir: Path
  history: list[metrics_log.Line]
  compile_seconds: float
  late_signal: signal.Signals | None

  def _repr_html_(self) -> str:
    return page.notebook(self.run_dir)

  @property
  def best(self) -> metrics_log.Line:
    """The epoch with the highest validation accuracy, which `Classifier.load` restores by default."""
    return metrics_log.best_epoch(self.history)


def fit(config: Config, data: Mapping[str, Sequence[Any]] | None = None, model: nn.Module | None = None) -> FitResult:
  """Train or resume the run that a config describes.

  `data` holds texts of your own, as `{"train": (texts, labels), "test": (texts, labels)}`: lists, or columns of NumPy,
  pandas or Arrow. A third column has groups. Without "test", a part of "train" is for testing. `model` is any Flax
  module to train in place of the network of the settings; see `model.OwnModel`. Settings of JAX and glibc change for
  the whole process; see `devices.start` and `devices.keep_freed_memory`.

  Raises:
    UsageError: the run directory holds something else or is in use, or a setting does not fit data or device.
    DataError: the reviews are missing or damaged.
    CheckpointError: the run's checkpoints cannot be read or written.
    DivergenceError: a loss, gradient or parameter is not finite.
    PlatformError: the platform or devices are missing, or another process failed.
    Interrupted: a signal arrived; the state has been saved.
  """
  if data is not None:
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, source="python", test_data=None))
  devices.keep_freed_memory(config.runtime)
  mesh = devices.start(config.runtime, config.training.batch_size)
  is_first = jax.process_index() == 0
  console = Console(is_quiet=not is_first)
  with contextlib.ExitStack() as stack:
    stack.enter_context(processes.computing())
    with processes.together():
      # Only the first process writes.
      held = stack.enter_context(run_directory.opened(config)) if is_first else None
      is_resumed = is_first and run_directory.exists(config)
      if is_first and not is_resumed:
        start.check(config)
    with processes.together():
      source = sources.find(config.data, config.runtime.archive, config.runtime.cache_dir, data)
      loaded = start.data(config, source, console)
      num_steps = config.training.epochs * math.ceil(len(loaded.train) / config.training.batch_size)
      program = Program(config, mesh, make_optimizer(config.optimizer, num_steps), loaded.classes, model)
    processes.require_equal(_shared_settings(program))
    with processes.together():
      if is_first and not is_resumed:
        run_directory.create(config, loaded)
    with processes.together():
      # Each process has its own view of the folder and of the reviews.
      if not is_first and not run_directory.exists(config):
        raise UsageError(f"--run-dir {config.run_dir}: not the folder in which process 0 has created the run.")
      run_directory.check(config.run_dir, model=program.own_model, data=loaded, precision=program.precision)
    stop = stack.enter_context(StopRequest())
    checkpoints = Checkpoints(config.run_dir, program.abstract_state(), read_only=False)
    stack.callback(checkpoints.close)
    if checkpoints.is_empty():
      saved, state, facts = start.first(program, loaded, source, console, stop)
    else:
      saved, state, facts = *checkpoints.restore("latest"), {}
    show_header(program, loaded, saved.step, console)
    advice = "Saved steps were not touched."
    stack.enter_context(reraise_as(UsageError, f"--run-dir {config.run_dir}: cannot be written", advice=advice))
    log = stack.enter_context(contextlib.closing(_open_log(config, saved, num_steps, held)))
    if is_first:
      for change in run_directory.record_start(config, start_facts(program, saved.step) | facts):
        console.line(f"Changed {change}")
    recorder = Recorder(config, console, log, saved.progress, schedule(config.optimizer, num_steps))
    stack.callback(console.end_epoch)
    return _Trainer(program, loaded, checkpoints, recorder, stop).run(saved, state)


def _shared_settings(program: Program) -> dict[str, Any]:
  """Return what decides which computations the processes share, and when: settings by their flags, and versions."""
  config = program.config
  settings = {name: value for section in config.settings().values() for name, value in section.items()}
  for name in ("steps_per_dispatch", "evaluation_batch_size", "save_every_steps", "deterministic", "init_from"):
    settings[name] = getattr(config.runtime, name)
  settings["implementation"] = program.choice.name
  settings["num_devices"] = [device.id for device in program.mesh.devices.flat]
  return {f"--{name.replace('_', '-')}": value for name, value in settings.items()} | run_directory.versions()


def _open_log(config: Config, saved: Saved, num_steps: int, held: run_directory.Held | None) -> metrics_log.MetricsLog:
  # A step without a score may be the last of an epoch that has not been evaluated.
  steps_with_line = saved.step if saved.score is not None else max(saved.step - 1, 0)
  num_epochs = steps_with_line // (num_steps // config.training.epochs)
  log = metrics_log.MetricsLog(config, step=saved.step, num_epochs=num_epochs, held=held)
  patience = config.training.early_stopping
  end = metrics_log.early_end(log.history, patience)
  if end is not None and end["step"] < saved.step:
    log.close()
    raise UsageError(
      f"--early-stopping {patience}: the run has gone on after epoch {end['epoch']}, where this ends it."
    )
  return log


class _Trainer:
  """The training loop of a run."""

  def __init__(
    self, program: Program, data: tokens.TokenData, checkpoints: Checkpoints, recorder: Recorder, stop: StopRequest
  ):
    self._program, self._data, self._config = program, data, program.config
    self._checkpoints, self._recorder, self._stop = checkpoints, recorder, stop
    loss_weights = program.task.loss_weights(data.train.labels, program.config.training.class_weights)
    self._loss_weights = loss_weights.astype(np.float32)
    self._saved_at = time.monotonic()
    self._trace, self._traced_from = contextlib.ExitStack(), 0
    # Of the best epoch, unless that was before the run was resumed.
    self._answers: page.Answers | None = None

  def run(self, saved: Saved, state: TrainState) -> FitResult:
    """Train from a checkpoint to the end of the run."""
    self._step, self._state = saved.step, state
    seconds = saved.progress.get("seconds", 0.0)
    if type(seconds) is not float or not 0 <= seconds < 1e9:
      raise CheckpointError(f"Step {saved.step:,}: the checkpoint's progress has invalid seconds.")
    console, history = self._recorder.console, self._recorder.log.history
    is_over, page_path = self._is_over(), self._config.run_dir / "report.html"
    if is_over:
      console.line("Nothing is left to train")
    elif self._config.runtime.init_from is not None and self._checkpoints.is_empty():
      # From now on, the result does not depend on the other run.
      self._save({"seconds": seconds}, score=None)
    if not is_over and jax.process_index() == 0:
      page_path.unlink(missing_ok=True)
    compile_seconds = 0.0 if is_over else self._compile()
    try:
      with self._trace:
        while not is_over:
          self._train_epoch(len(history) + 1, seconds)
          seconds = 0.0
          number, _ = self._poll()
          is_over = self._is_over()
          if number and not is_over:
            raise Interrupted(number, self._step)
    except DivergenceError as error:
      steps = self._checkpoints.steps()
      last = f"The last good checkpoint is step {steps[-1]:,}." if steps else "No checkpoint had been saved."
      raise DivergenceError(
        f"{error} {last} The same settings would diverge again: "
        "try a lower --learning-rate, or --clip-norm, in a new --run-dir."
      ) from error
    console.end_epoch()
    if jax.process_index() == 0:
      metrics_log.write_csv(self._config.run_dir, history)
    if self._config.training.objective == "next_word":
      console.line(f"Perplexity {math.exp(history[-1]['val_loss']):,.1f}, validation")
    elif jax.process_index() == 0:
      # A report of all epochs may be one of `imdb-jax report`, which has more.
      if not page_path.exists():
        notes = [] if self._answers else ["All that depends on reviews: imdb-jax report computes it."]
        page.write(self._config, self._program.task, self._answers, notes)
      console.line("\n".join(page.summary(self._config, history)))
    return FitResult(
      run_dir=self._config.run_dir, history=history, compile_seconds=compile_seconds, late_signal=self._stop.signal
    )

  def _is_over(self) -> bool:
    """Return whether all epochs are done, or early stopping ends the run. All processes must call it."""
    history, training = self._recorder.log.history, self._config.training
    ends = len(history) == training.epochs or metrics_log.early_end(history, training.early_stopping) is not None
    # Other machines may round differently.
    return bool(processes.largest([int(ends and jax.process_index() == 0)])[0])

  def _compile(self) -> float:
    """Compile both programs ahead, so that no time of training or evaluation includes it; return the seconds."""
    started = time.perf_counter()
    no_batches = self._program.put_batches(self._data.train, self._loss_weights, self._rows(1)[:0])
    self._state, _ = self._program.train_steps(self._state, *no_batches)
    first = tokens.TokenSplit(**{name: array[:1] for name, array in vars(self._data.validation).items()})
    evaluation.predict(self._program, self._state.params, first, self._config.runtime.evaluation_batch_size)
    seconds = time.perf_counter() - started
    self._recorder.console.line(f"Compiled in {seconds:.1f} s")
    return seconds

  def _poll(self) -> tuple[signal.Signals | None, bool]:
    """Return the signal that any process has received, and whether it is time to save. All processes must call it."""
    limit = self._config.runtime.save_every_seconds
    is_due = limit is not None and time.monotonic() - self._saved_at >= limit
    number, is_due = processes.largest([self._stop.signal or 0, int(is_due and jax.process_index() == 0)])
    return signal.Signals(number) if number else None, bool(is_due)

  def _rows(self, epoch: int) -> np.ndarray:
    """Return the rows of each step of an epoch, i32[steps, seeds, b]."""
    lengths, training = self._data.train.lengths, self._config.training
    size, by_length = training.batch_size, training.bucket_by_length
    return batches.epoch_rows(lengths, seeds=training.seeds, epoch=epoch, batch_size=size, by_length=by_length)

  def _train_epoch(self, epoch: int, seconds: float) -> None:
    """Train for the rest of an epoch that has taken so many seconds, and evaluate."""
    runtime, rows, started = self._config.runtime, self._rows(epoch), time.perf_counter() - seconds
    first_step = (epoch - 1) * len(rows)
    self._recorder.start_epoch(epoch, self._step, len(rows))
    poll_every = 1 if jax.process_count() == 1 else _POLL_EVERY
    for dispatch in itertools.count():
      done = self._step - first_step
      if done == len(rows):
        break
      self._profile()
      number, is_due = self._poll() if dispatch % poll_every == 0 else (None, False)
      num_steps = min(len(rows) - done, runtime.steps_per_dispatch)
      if runtime.save_every_steps is not None:
        is_due |= self._step % runtime.save_every_steps == 0
        num_steps = min(num_steps, runtime.save_every_steps - self._step % runtime.save_every_steps)
      if number or (is_due and self._step):
        self._recorder.flush()
        seconds = time.perf_counter() - started
        self._save_within_epoch(number, seconds)
        # The time of a save does not count.
        started = time.perf_counter() - seconds
      chosen = self._program.put_batches(self._data.train, self._loss_weights, rows[done : done + num_steps])
      with jax.transfer_guard("disallow"):
        self._state, sums = self._program.train_steps(self._state, *chosen)
      self._recorder.record_steps(range(self._step + 1, self._step + num_steps + 1), sums)
      self._step += num_steps
    self._recorder.flush()
    self._evaluate(time.perf_counter() - started, poll_every)

  def _profile(self) -> None:
    """Trace the steps of `--profile`, from the first dispatch of this process."""
    num_steps, self._traced_from = self._config.runtime.profile, self._traced_from or self._step + 1
    if num_steps is None or jax.process_index() > 0:
      return
    if self._step + 1 == self._traced_from:
      folder = self._config.run_dir / "profile"
      self._trace.enter_context(jax.profiler.trace(folder, create_perfetto_trace=True))
    elif self._step + 1 >= self._traced_from + num_steps:
      jax.block_until_ready(self._state)
      self._trace.close()

  def _evaluate(self, seconds: float, poll_every: int) -> None:
    """Evaluate at the end of an epoch, write the epoch's line and save."""
    console, started, num_batches = self._recorder.console, time.perf_counter(), itertools.count(1)

    def on_progress(num_reviews: int) -> None:
      console.show_evaluation(num_reviews, len(self._data.validation))
      if next(num_batches) % poll_every == 0 and (number := self._poll()[0]):
        self._save_within_epoch(number, seconds)

    task, split, batch_size = self._program.task, self._data.validation, self._config.runtime.evaluation_batch_size
    result, logits = evaluation.evaluate(self._program, self._state.params, split, batch_size, on_progress)
    evaluation_seconds = time.perf_counter() - started
    line = self._recorder.record_epoch(self._step, result, seconds=seconds, evaluation_seconds=evaluation_seconds)
    console.show_epoch(self._recorder.log.history, self._config.training.epochs)
    # Not on the test reviews, which are for reporting.
    is_held_out, is_classifier = self._config.data.validation == "split", self._config.training.objective == "label"
    progress = {"temperature": task.calibrate(logits, split.labels)} if is_held_out and is_classifier else {}
    if is_classifier and line is metrics_log.best_epoch(self._recorder.log.history):
      self._answers = page.Answers(
        split="validation" if is_held_out else "test",
        encoded=split,
        logits=logits,
        step=self._step,
        temperature=progress.get("temperature", 1.0),
        vocabulary=self._data.vocabulary,
      )
    self._save(progress, score=getattr(result, task.monitor))

  def _save_within_epoch(self, number: signal.Signals | None, seconds: float) -> None:
    """Save a step, unless it is saved already, maybe with the last epoch's score; after a signal, raise Interrupted."""
    if number:
      self._recorder.console.end_epoch()
      self._recorder.console.line(f"{number.name}: saving step {self._step:,}")
    if self._step not in self._checkpoints.steps():
      self._save({"seconds": seconds}, score=None)
    if number:
      raise Interrupted(number, self._step)

  def _save(self, progress: dict[str, Any], score: float | None) -> None:
    with processes.together():
      self._recorder.log.sync()
    progress = {**self._recorder.progress(), **progress}
    self._checkpoints.save(Saved(step=self._step, progress=progress, score=score), self._state)
    self._saved_at = time.monotonic()
