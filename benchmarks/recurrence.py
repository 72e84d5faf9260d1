"""Compare the recurrence alone, forward and with its gradients: our implementations, Keras and PyTorch.

Every axis varies one size; the others are those of the article. The inputs are as wide as the state.
"""

import contextlib
from typing import Any

import measuring
import systems
from measuring import Options, Save

FLAGS: list[measuring.Flag] = [
  ("--systems", tuple(systems.RECURRENCES), tuple(systems.RECURRENCES), "Systems to measure."),
  ("--batch-size", int, (16, 32, 64, 128, 256, 512, 1024), "Rows."),
  ("--num-steps", int, (100, 200, 400, 800, 1600), "Positions."),
  ("--hidden-size", int, (64, 128, 256), "LSTM units, and as many inputs."),
  measuring.WINDOWS,
  ("--window-seconds", float, 0.2, "Approximate length of a window, which has at least one call."),
  ("--clock-ghz", float, 1.98, "Clock of a GPU's multiprocessor, for the floor; an H200 has 1.98."),
  measuring.PLOT,
]


def _points(options: Options) -> list[dict[str, Any]]:
  """Return the sizes along each axis, forward and with gradients; the article's sizes come once."""
  base = systems.RECURRENCE_SIZES
  sizes = [base | {axis: value} for axis in base for value in getattr(options, axis)]
  different = dict.fromkeys(tuple(size.items()) for size in sizes)
  return [dict(size) | {"gradients": gradients} for size in different for gradients in (False, True)]


def floor_ms(point: dict[str, Any], clock_ghz: float) -> float:
  """Return the time of a GPU kernel that reads the recurrent weights from shared memory at every position.

  The weights are bfloat16, and a multiprocessor reads 128 bytes per clock. The gradients read them once more. More
  rows than a tile run in parallel.
  """
  directions = 2 if point["gradients"] else 1
  return directions * point["num_steps"] * 2 * 4 * point["hidden_size"] ** 2 / (128 * clock_ghz * 1e6)


def measure(options: Options, save: Save) -> None:
  rows, ready = [], []
  with contextlib.ExitStack() as stack:
    names = list(dict.fromkeys(options.systems))
    workers = [stack.enter_context(measuring.start(options, name)) for name in names]
    for point in _points(options):
      b, t, h, gradients = point.values()
      sizes = {"batch_size": b, "sequence_length": t, "embedding_size": h, "hidden_size": h}
      for name, worker in zip(names, workers, strict=True):
        worker.prepare(measuring.make_job(options, name, gradients=gradients, **sizes))
      measuring.take_turns(workers, options.windows, options.window_seconds)
      for worker in workers:
        ready.append(worker.ready)
        row = {**point, "recurrent_dropout": systems.RECURRENCES[worker.job.system], **worker.timings()}
        is_gpu = any(kind in (row["device"] or "") for kind in ("gpu", "cuda"))
        rows.append(row | {"floor_ms": floor_ms(point, options.clock_ghz) if is_gpu else None})
      found = [row for row in rows[-len(workers) :] if not row["problem"]]
      shown = ", ".join(f"{row['system']} {row['ms_per_step']:.3g} ms" for row in found)
      measuring.say(f"{', '.join(f'{name} {value}' for name, value in point.items())}: {shown or 'nothing'}")
      device = ", ".join(sorted({row["device"] for row in rows if row["device"]}))
      machine = measuring.describe_machine(ready, "random numbers") | {"device": device}
      save({"machine": machine, "windows": options.windows, "rows": rows})


if __name__ == "__main__":
  measuring.run(__doc__, FLAGS, measure)
