"""The picture of a step shows the operations of each device that a trace holds."""

import gzip
import json

import pytest


def event(thread: int, name: str, start: float, duration: float) -> dict:
  return {"ph": "X", "tid": thread, "name": name, "ts": 1000 * start, "dur": 1000 * duration}


@pytest.fixture
def trace_figure(module):
  return module("trace_figure")


@pytest.fixture
def run_dir(tmp_path):
  """A run with a trace of four steps of 10 ms on two devices, whose threads also wait and hold loops."""
  events = [{"name": "thread_name", "tid": 1}, event(3, "python", 0, 40)]
  for thread, step in ((thread, step) for thread in (1, 2) for step in range(4)):
    start = 10 * step
    events += [event(thread, "while.1", start, 8), event(thread, "Wait: pending_threads=1", start, 1)]
    events += [event(thread, "tanh_fusion", start, 3), event(thread, "ynn_fusion.7", start + 3, 5)]
    events += [event(thread, "all-reduce.2", start + 8, 2)]
  folder = tmp_path / "profile" / "plugins" / "profile" / "2026_01_01"
  folder.mkdir(parents=True)
  (folder / "perfetto_trace.json.gz").write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
  return tmp_path


def test_operations_are_told_from_what_holds_them(trace_figure, run_dir):
  first, second = trace_figure.operations(run_dir)
  assert first == second and len(first) == 12
  assert first[:3] == [(0, 3, "other"), (3, 5, "matrix product"), (8, 2, "sum over devices")]


def test_a_whole_step_is_drawn(trace_figure, run_dir):
  step, part = trace_figure.draw(trace_figure.operations(run_dir)).axes
  # From the end of one sum over the devices to the end of the next one.
  assert step.get_xlim() == (0, 10) and part.get_xlim() == (0, 2)
  bars = {each.get_label(): each.get_paths()[0].get_extents().intervalx.tolist() for each in step.collections[:3]}
  assert bars == {"matrix product": [3, 8], "sum over devices": [-2, 0], "other": [0, 3]}
