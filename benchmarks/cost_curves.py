"""Show how the time of a training step grows with its sizes.

Every axis varies one size; the others are those of the article. The reviews are random words.
"""

from pathlib import Path
from typing import Any

import measuring
import systems
from measuring import Options, Save, Worker

_SYSTEMS = tuple(name for name, system in systems.ALL.items() if system.work == "article")
# What the axes vary.
_FIELDS = {"length": "sequence_length", "batch": "batch_size", "hidden_size": "hidden_size", "devices": "num_devices"}
# Each epoch has whole batches only.
_BATCHES_PER_EPOCH = 8

FLAGS: list[measuring.Flag] = [
  ("--axes", tuple(_FIELDS), tuple(_FIELDS), "Axes to measure."),
  ("--systems", _SYSTEMS, ("ours-chunked", "ours-scan"), "Systems to measure; by devices, only ours."),
  ("--length", int, (25, 50, 100, 200, 400, 800, 1600), "Positions of a review, with its padding."),
  ("--batch", int, (4, 8, 16, 32, 64, 128, 256), "Reviews per step."),
  ("--hidden-size", int, (32, 64, 128, 256, 512), "Numbers of LSTM units."),
  ("--devices", int, (), "Numbers of devices; by default 1, 2, 4 and so on up to all cores."),
  measuring.WINDOWS,
  measuring.WINDOW_SECONDS,
  ("--plot-dir", Path, None, "Draw one PNG file per axis into this folder."),
  measuring.MATMUL_SIZE,
]


def points(options: Options) -> list[tuple[str, int]]:
  """Return axis and value of every point."""
  # This imports JAX, which `--help` does without.
  from imdb_jax import devices

  values = {axis: getattr(options, axis) for axis in options.axes}
  if "devices" in values and not options.devices:
    cores = devices.num_cores()
    values["devices"] = [2**power for power in range(cores.bit_length()) if 2**power < cores] + [cores]
  return [(axis, value) for axis in values for value in values[axis]]


def measure_point(options: Options, axis: str, value: int) -> list[Worker]:
  """Return the workers of all systems with their windows at a point."""
  fields: dict[str, Any] = {_FIELDS[axis]: value, "num_steps": _BATCHES_PER_EPOCH}
  b, t, v = ((measuring.ARTICLE_SIZES | fields)[name] for name in ("batch_size", "sequence_length", "vocabulary_size"))
  names = [name for name in dict.fromkeys(options.systems) if axis != "devices" or name in systems.OURS]
  split = measuring.random_reviews(_BATCHES_PER_EPOCH * b, t, v)
  fields["arrays"] = measuring.write_arrays(options.scratch / "reviews.npz", split)
  with measuring.prepared(options, [measuring.make_job(options, name, **fields) for name in names]) as workers:
    measuring.take_turns(workers, options.windows, options.window_seconds)
  return workers


def measure(options: Options, save: Save) -> None:
  rows, ready = [], []
  sgemm = measuring.make_job(options, "sgemm", matmul_size=options.matmul_size)
  with measuring.prepared(options, [sgemm]) as (ceiling,):
    for axis, value in points(options):
      workers = measure_point(options, axis, value)
      measuring.take_turns([ceiling], 1, options.window_seconds)
      for worker in workers:
        sizes = {name: getattr(worker.job, name) for name in measuring.SIZES}
        row = {"axis": axis, "value": value, "sizes": sizes, **worker.timings()}
        rows.append(row | {"gflop_per_step": measuring.gflop_per_step(worker.job)})
        ready.append(worker.ready)
        spent = row["problem"] or f"{row['ms_per_step']:.2f} ms/step"
        measuring.say(f"{axis} {value}, {row['system']}: {spent}")
      machine = measuring.describe_machine([ceiling.ready, *ready], measuring.RANDOM_REVIEWS)
      machine |= measuring.describe_ceiling(ceiling)
      for row in rows:
        gflops = machine["sgemm_gflops"]
        row["ceiling_ms"] = 1e3 * row["gflop_per_step"] / gflops if gflops else None
      save({"machine": machine, "windows": options.windows, "points": rows})


if __name__ == "__main__":
  measuring.run(__doc__, FLAGS, measure)
