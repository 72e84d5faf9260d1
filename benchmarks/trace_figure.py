"""Draw a training step from the trace of a run: `python benchmarks/trace_figure.py RUN_DIR FIGURE.png`.

The run is one of `imdb-jax train --profile N` on a CPU. A row is a device, a bar an operation of the program.
"""

import collections
import gzip
import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from imdb_jax.plots import COLORS

# By the beginning of an operation's name; of a CPU, in jaxlib 0.10.
KINDS = {
  "matrix product": (("ynn_fusion", "dot"), COLORS["accent"]),
  "sum over devices": (("all-reduce",), COLORS["other"]),
  "other": (("",), "#b9b9b2"),
}
# What holds or accompanies operations.
_NO_OPERATIONS = ("Thunk", "while", "call", "end: ", "Rendezvous", "Wait", "Invoke")

Operation = tuple[float, float, str]


def operations(run_dir: Path) -> list[list[Operation]]:
  """Return start and duration in ms and kind of each operation, in order, for each of the threads that compute most."""
  (path,) = run_dir.glob("profile/plugins/profile/*/perfetto_trace.json.gz")
  events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
  threads: Any = collections.defaultdict(list)
  for event in events:
    if event.get("ph") == "X" and not event["name"].startswith(_NO_OPERATIONS):
      kind = next(kind for kind, (names, _) in KINDS.items() if event["name"].startswith(names))
      threads[event["tid"]].append((event["ts"] / 1e3, event["dur"] / 1e3, kind))
  # A device has tens of thousands of operations, the others a few hundred.
  busy = sorted(threads.values(), key=len)
  return [sorted(each) for each in busy if len(each) > len(busy[-1]) / 2]


def draw(devices: list[list[Operation]]) -> Figure:
  """Return the figure of the last whole step, and of two milliseconds in the middle of its first half."""
  ends = [start + duration for start, duration, kind in devices[0] if kind == "sum over devices"]
  start, end = ends[-3], ends[-2]
  figure = Figure(figsize=(10, 4), layout="constrained")
  middle = start + (end - start) / 4
  for axes, (left, right), title in zip(
    figure.subplots(2, 1),
    ((start, end), (middle, middle + 2)),
    ("A training step of the article's model on two cores", "Two milliseconds of its forward pass"),
    strict=True,
  ):
    for row, found in enumerate(devices):
      for kind, (_, color) in KINDS.items():
        bars = [(at - left, size) for at, size, each in found if each == kind and left <= at + size and at < right]
        axes.broken_barh(bars, (row - 0.35, 0.7), facecolors=color, label=kind if row == 0 else None)
    axes.set_title(title, loc="left")
    axes.set(xlabel="ms", xlim=(0, right - left), yticks=range(len(devices)))
    axes.set_yticklabels([f"device {row}" for row in range(len(devices))])
    axes.spines[["top", "right"]].set_visible(False)
  figure.axes[0].legend(ncols=3, loc="lower right", bbox_to_anchor=(1, 0.98), frameon=False)
  return figure


if __name__ == "__main__":
  draw(operations(Path(sys.argv[1]))).savefig(sys.argv[2], dpi=150)
