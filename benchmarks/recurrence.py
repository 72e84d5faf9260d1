"""Compare the recurrence alone, forward and with its gradients: our implementations, Keras and PyTorch.

Every axis varies one size; the others are those of the article. The inputs are as wide as the state.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import measuring
import systems
from measuring import Options, Save, Worker

_BASE = {"batch_size": 32, "num_steps": 400, "hidden_size": 128}

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


def _points(options: Options) -> Iterator[dict[str, Any]]:
  """Yield the sizes along each axis, forward and with gradients; the article's sizes come once."""
  sizes = [_BASE | {axis: value} for axis in _BASE for value in getattr(options, axis)]
  for items in dict.fromkeys(tuple(size.items()) for size in sizes):
    for gradients in (False, True):
      yield {**dict(items), "gradients": gradients}


def floor_ms(point: dict[str, Any], clock_ghz: float) -> float:
  """Return the time of a GPU kernel that reads the recurrent weights from shared memory at every position.

  The weights are bfloat16, and a multiprocessor reads 128 bytes per clock. The gradients read them once more. More
  rows than a tile run in parallel.
  """
  directions = 2 if point["gradients"] else 1
  return directions * point["num_steps"] * 2 * 4 * point["hidden_size"] ** 2 / (128 * clock_ghz * 1e6)


def _measure_point(options: Options, point: dict[str, Any], workers: dict[str, Worker]) -> list[dict[str, Any]]:
  """Return the results of all systems at a point."""
  b, t, h, gradients = point.values()
  sizes = {"batch_size": b, "sequence_length": t, "embedding_size": h, "hidden_size": h}
  for name, worker in workers.items():
    worker.prepare(measuring.make_job(options, name, gradients=gradients, **sizes))
  measuring.take_turns(tuple(workers.values()), options.windows, options.window_seconds)
  rows = []
  for name, worker in workers.items():
    row = {**point, "recurrent_dropout": systems.RECURRENCES[name], **worker.timings()}
    is_gpu = row["device"] is not None and ("gpu" in row["device"] or "cuda" in row["device"])
    rows.append(row | {"floor_ms": floor_ms(point, options.clock_ghz) if is_gpu else None})
  return rows


def measure(options: Options, save: Save) -> None:
  """Measure all points, and save the results after each of them."""
  rows, ready = [], []
  with contextlib.ExitStack() as stack:
    names = dict.fromkeys(options.systems)
    workers = {name: stack.enter_context(measuring.start(options, name)) for name in names}
    for point in _points(options):
      new = _measure_point(options, point, workers)
      shown = ", ".join(f"{row['system']} {row['ms_per_step']:.3g} ms" for row in new if not row["problem"])
      measuring.say(f"{', '.join(f'{name} {value}' for name, value in point.items())}: {shown or 'nothing'}")
      rows += new
      ready += [worker.ready for worker in workers.values()]
      device = ", ".join(sorted({row["device"] for row in rows if row["device"]}))
      machine = measuring.describe_machine(ready, "random numbers") | {"device": device}
      save({"machine": machine, "windows": options.windows, "rows": rows})


if __name__ == "__main__":
  measuring.run(__doc__, FLAGS, measure)
