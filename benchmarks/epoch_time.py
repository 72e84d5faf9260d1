"""Compare the time of a training step and of an epoch: ours, Keras and PyTorch, in one run."""

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
  ("--archive", Path, None, "Local aclImdb archive; without it, random words in reviews of similar lengths."),
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


def _measure(options: Options, fields: dict[str, Any], steps_per_epoch: int) -> list[Worker]:
  """Return the workers of the machine's ceiling and of all systems, with their windows."""
  # Short windows end before the smaller batch at the end of an epoch.
  num_steps = max(steps_per_epoch - 1 if options.quick else steps_per_epoch, options.windows)
  fields = {**fields, "num_steps": num_steps, "matmul_size": options.matmul_size}
  jobs = [measuring.make_job(options, name, **fields) for name in dict.fromkeys(("sgemm", *options.systems))]
  with measuring.prepared(options, jobs) as workers:
    for window in range(options.windows):
      measuring.say(f"Window {window + 1} of {options.windows}")
      share = num_steps * (window + 1) // options.windows - num_steps * window // options.windows
      for worker in workers:
        is_short = options.quick or worker is workers[0]
        worker.run_window(min(worker.steps_within(_WINDOW_SECONDS), share) if is_short else share)
  return workers


def _row(worker: Worker, machine: dict[str, Any], reference: float | None, is_quick: bool) -> dict[str, Any]:
  """Return a row of the results; figures are None if there is a problem. `reference` is the ms/step of ours."""
  system, timings = systems.ALL[worker.job.system], worker.timings()
  names = ("seconds_per_epoch", "compile_seconds", "peak_memory_mb", "loss", "ratio_to_ours", "share_of_ceiling")
  row = {"work": system.work, "computes": system.computes, **timings, **dict.fromkeys(names)}
  ms, gflops = timings["ms_per_step"], machine["sgemm_gflops"]
  if ms is None:
    return row
  windows = [window for _, window in worker.windows]
  seconds = machine["steps_per_epoch"] * ms / 1e3 if is_quick else sum(window["seconds"] for window in windows)
  return row | {
    "seconds_per_epoch": seconds,
    "compile_seconds": worker.compile_seconds(),
    "peak_memory_mb": windows[-1]["peak_memory_mb"],
    "loss": windows[-1]["loss"],
    "ratio_to_ours": ms / reference if reference else None,
    "share_of_ceiling": 1e3 * machine["gflop_per_step"] / gflops / ms if gflops and system.work == "article" else None,
  }


def measure(options: Options, save: Save) -> None:
  sizes = {name: getattr(options, name) for name in measuring.SIZES}
  split, data = _load(options)
  arrays = measuring.write_arrays(options.scratch / "reviews.npz", split)
  steps_per_epoch = -(-len(split) // options.batch_size)
  ceiling, *workers = _measure(options, sizes | {"arrays": arrays}, steps_per_epoch)
  machine = measuring.describe_machine([worker.ready for worker in (ceiling, *workers)], data)
  machine |= measuring.describe_ceiling(ceiling)
  machine |= {"sizes": sizes, "windows": options.windows, "steps_per_epoch": steps_per_epoch}
  machine["gflop_per_step"] = measuring.gflop_per_step(ceiling.job)
  reference = next((each.timings()["ms_per_step"] for each in workers if each.job.system == _REFERENCE), None)
  rows = [_row(worker, machine, reference, options.quick) for worker in workers]
  save({"machine": machine, "works": systems.WORKS, "rows": rows})


if __name__ == "__main__":
  measuring.run(__doc__, FLAGS, measure)
