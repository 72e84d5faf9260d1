"""Compare the time of a training step and of an epoch: ours, Keras and PyTorch, in one run."""

import contextlib
from pathlib import Path
from typing import Any

import measuring
import systems
from measuring import Options, Save, Worker

from imdb_jax.data.tokens import TokenSplit

_REFERENCE = "ours-chunked"
# Length of the windows with --quick, and of those of the ceiling.
_WINDOW_SECONDS = 2.5

FLAGS: list[measuring.Flag] = [
  ("--quick", bool, False, "Windows of a few seconds, instead of whole epochs: 5 minutes instead of 20."),
  measuring.WINDOWS,
  ("--systems", tuple(systems.ALL), tuple(systems.ALL), "Systems to measure."),
  measuring.PLOT,
  ("--archive", Path, None, "Local aclImdb archive or folder; without it, random words in reviews of similar lengths."),
  measuring.CACHE,
  ("--num-reviews", int, 25_000, "Reviews per epoch, if they are random."),
  *measuring.SIZE_FLAGS.values(),
  measuring.MATMUL_SIZE,
]


def _load(options: Options) -> tuple[TokenSplit, str]:
  """Return the reviews that all systems train on, and a description."""
  t, v = options.sequence_length, options.vocabulary_size
  if options.archive is None:
    split, name = measuring.random_reviews(options.num_reviews, t, v), measuring.RANDOM_REVIEWS
  else:
    split = measuring.load_reviews(options, sequence_length=t, vocabulary_size=v).train
    name = "IMDB training reviews"
  return split, f"{len(split):,} {name}, mean length {split.lengths.mean():.0f}"


def _measure(options: Options, arrays: str, sizes: dict[str, int], steps_per_epoch: int) -> list[Worker]:
  """Return the workers of all systems with their windows. The first is the machine's ceiling."""
  # Short windows end before the smaller batch at the end of an epoch.
  num_steps = max(steps_per_epoch - 1 if options.quick else steps_per_epoch, options.windows)
  with contextlib.ExitStack() as stack:
    ceiling = measuring.make_job(options, "sgemm", matmul_size=options.matmul_size)
    workers = [stack.enter_context(Worker("ours.py")).prepare(ceiling)]
    for name in dict.fromkeys(options.systems):
      job = measuring.make_job(options, name, num_steps=num_steps, arrays=arrays, **sizes)
      workers.append(stack.enter_context(measuring.start(options, name)).prepare(job))
      measuring.say(f"{name}: {workers[-1].problem or 'ready'}")
    for window in range(options.windows):
      measuring.say(f"Window {window + 1} of {options.windows}")
      share = num_steps * (window + 1) // options.windows - num_steps * window // options.windows
      for worker in workers:
        is_short = options.quick or worker is workers[0]
        worker.run_window(min(worker.steps_within(_WINDOW_SECONDS), share) if is_short else share)
  return workers


def _row(worker: Worker, steps_per_epoch: int, is_quick: bool) -> dict[str, Any]:
  """Return a row of the results; figures are None if there is a problem."""
  system, timings = systems.ALL[worker.job.system], worker.timings()
  names = ("seconds_per_epoch", "compile_seconds", "peak_memory_mb", "loss")
  row = {"work": system.work, "computes": system.computes, **timings, **dict.fromkeys(names)}
  if timings["ms_per_step"] is None:
    return row
  windows = [window for _, window in worker.windows]
  per_epoch = steps_per_epoch * timings["ms_per_step"] / 1e3
  return row | {
    "seconds_per_epoch": per_epoch if is_quick else sum(window["seconds"] for window in windows),
    "compile_seconds": worker.compile_seconds(),
    "peak_memory_mb": windows[-1]["peak_memory_mb"],
    "loss": windows[-1]["loss"],
  }


def measure(options: Options, save: Save) -> None:
  """Measure all systems, and save the results."""
  sizes = {name: getattr(options, name) for name in measuring.SIZES}
  split, data = _load(options)
  steps_per_epoch = -(-len(split) // options.batch_size)
  arrays = measuring.write_arrays(options.scratch / "reviews.npz", split)
  ceiling, *workers = _measure(options, arrays, sizes, steps_per_epoch)
  machine = measuring.describe_machine([ceiling.ready, *(worker.ready for worker in workers)], data)
  machine |= measuring.describe_ceiling(ceiling) | {
    "sizes": sizes,
    "windows": options.windows,
    "steps_per_epoch": steps_per_epoch,
    "gflop_per_step": measuring.gflop_per_step(measuring.make_job(options, _REFERENCE, **sizes)),
  }
  rows = [_row(worker, steps_per_epoch, options.quick) for worker in workers]
  reference = next((row["ms_per_step"] for row in rows if row["system"] == _REFERENCE), None)
  floor = 1e3 * machine["gflop_per_step"] / machine["sgemm_gflops"] if machine["sgemm_gflops"] else None
  for row in rows:
    ms = row["ms_per_step"]
    row["ratio_to_ours"] = ms / reference if ms and reference else None
    row["share_of_ceiling"] = floor / ms if ms and floor and row["work"] == "article" else None
  save({"machine": machine, "works": systems.WORKS, "rows": rows})


if __name__ == "__main__":
  measuring.run(__doc__, FLAGS, measure)
