"""Show where the time of our training step goes.

Parts of the article's step are compiled and timed on their own, in turns, each on all devices at once. The difference
between two parts is what the larger one adds. The step cannot be faster than its matrix products, which are parts too.
"""

import measuring
from measuring import Options, Save

FLAGS: list[measuring.Flag] = [
  ("--windows", int, 7, "Timed windows of each part."),
  measuring.WINDOW_SECONDS,
  measuring.SIZE_FLAGS["batch_size"],
  measuring.SIZE_FLAGS["sequence_length"],
]


def measure(options: Options, save: Save) -> None:
  # This imports JAX, which `--help` does without.
  import ours

  b, t = options.batch_size, options.sequence_length
  split = measuring.random_reviews(b, t, measuring.ARTICLE_SIZES["vocabulary_size"])
  arrays = measuring.write_arrays(options.scratch / "reviews.npz", split)
  jobs = [measuring.make_job(options, part, batch_size=b, sequence_length=t, arrays=arrays) for part in ours.PARTS]
  with measuring.prepared(options, jobs) as workers:
    measuring.take_turns(workers, options.windows, options.window_seconds)
  machine = measuring.describe_machine([worker.ready for worker in workers], measuring.RANDOM_REVIEWS)
  times = {worker.job.system: worker.timings()["ms_per_step_windows"] for worker in workers}
  save({"machine": machine, "windows": options.windows, "ms": times})


if __name__ == "__main__":
  measuring.run(__doc__, FLAGS, measure)
