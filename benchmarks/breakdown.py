"""Show where the time of our training step goes.

Parts of the article's step are compiled and timed on their own, in turns, each on all devices at once. The difference
between two parts is what the larger one adds. The step cannot be faster than its matrix products, which are parts too.
"""

import contextlib

import measuring
from measuring import ARTICLE_SIZES, Options, Save

FLAGS: list[measuring.Flag] = [
  ("--windows", int, 7, "Timed windows of each part."),
  ("--window-seconds", float, 1.0, "Approximate length of a window, which has at least one step."),
  measuring.SIZE_FLAGS["batch_size"],
  measuring.SIZE_FLAGS["sequence_length"],
  measuring.CACHE,
]


def measure(options: Options, save: Save) -> None:
  """Measure all parts, and save the results."""
  # This imports JAX, which `--help` does without.
  import ours

  b, t = options.batch_size, options.sequence_length
  with contextlib.ExitStack() as stack:
    arrays = measuring.write_arrays(
      options.scratch / "reviews.npz", measuring.random_reviews(b, t, ARTICLE_SIZES["vocabulary_size"])
    )
    workers = [stack.enter_context(measuring.Worker("ours.py", cache_dir=options.cache_dir)) for _ in ours.PARTS]
    for part, worker in zip(ours.PARTS, workers, strict=True):
      worker.prepare(measuring.make_job(options, part, batch_size=b, sequence_length=t, arrays=arrays))
    measuring.take_turns(workers, options.windows, options.window_seconds)
  machine = measuring.describe_machine([worker.ready for worker in workers], measuring.RANDOM_REVIEWS)
  times = {worker.job.system: worker.timings()["ms_per_step_windows"] for worker in workers}
  save({"machine": machine, "windows": options.windows, "ms": times})


if __name__ == "__main__":
  measuring.run(__doc__, FLAGS, measure)
