"""The benchmark on tiny shapes: what it writes, what it says of a system that is missing, and whose step it times."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from imdb_jax import steps

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TINY = ("--quick", "--windows", "2", "--num-reviews", "40", "--batch-size", "8", "--sequence-length", "12")
TINY += ("--embedding-size", "4", "--hidden-size", "4", "--vocabulary-size", "30", "--matmul-size", "64")
FIGURES = {"ms_per_step", "seconds_per_epoch", "compile_seconds", "peak_memory_mb"}


def epoch_time(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
  command = [sys.executable, str(BENCHMARKS / "epoch_time.py"), *map(str, arguments)]
  return subprocess.run(command, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[subprocess.CompletedProcess[str], dict, bytes]:
  """What was printed, the JSON and the figure."""
  folder = tmp_path_factory.mktemp("benchmarks")
  done = epoch_time(
    *TINY,
    *("--platform", "cpu", "--num-devices", "2", "--bench-python", folder / "absent" / "python"),
    *("--systems", "ours-chunked", "ours-scan", "ours-bucketed", "torch"),
    *("--json", folder / "new" / "results.json", "--plot", folder / "figure.png"),
  )
  assert done.returncode == 0, done.stderr[-2000:]
  return done, json.loads((folder / "new" / "results.json").read_text()), (folder / "figure.png").read_bytes()


def test_results_hold_what_was_measured(measured):
  rows = {row["system"]: row for row in measured[1]["rows"]}
  assert list(rows) == ["ours-chunked", "ours-scan", "ours-bucketed", "torch"]
  for name in ("ours-chunked", "ours-scan", "ours-bucketed"):
    row = rows[name]
    assert row["problem"] is None
    assert all(row[figure] > 0 for figure in FIGURES), row
    assert row["ms_per_step_min"] <= row["ms_per_step"] <= row["ms_per_step_max"]
    assert len(row["ms_per_step_windows"]) == 2
    assert row["seconds_per_epoch"] == pytest.approx(5 * row["ms_per_step"] / 1000)
    assert 0.6 < row["loss"] < 0.8, "labels are random: ln 2"
  assert rows["ours-chunked"]["ratio_to_ours"] == 1


def test_only_the_work_that_is_counted_has_a_share_of_the_ceiling(measured):
  machine, rows = measured[1]["machine"], {row["system"]: row for row in measured[1]["rows"]}
  assert machine["gflop_per_step"] == pytest.approx(3 * 2 * 8 * 12 * (4 + 4) * 16 / 1e9)
  chunked = rows["ours-chunked"]
  share = machine["gflop_per_step"] / (chunked["ms_per_step"] / 1000) / machine["sgemm_gflops"]
  assert chunked["share_of_ceiling"] == pytest.approx(share)
  assert rows["ours-bucketed"]["share_of_ceiling"] is None


def test_the_machine_is_described(measured):
  machine = measured[1]["machine"]
  assert {"processor", "cores", "versions", "precision", "command", "data"} <= set(machine)
  assert {"python", "numpy", "jax", "flax"} <= set(machine["versions"])
  assert "random words" in machine["data"], "no one may take the figures for those of the real reviews"


def test_a_missing_system_is_named_with_its_remedy(measured):
  done, results, _ = measured
  assert results["rows"][-1]["problem"].startswith("missing: make bench")
  assert results["rows"][-1]["ms_per_step"] is None
  assert "missing: make bench" in " ".join(done.stdout.split())


def test_the_figure_is_a_png(measured):
  assert measured[2].startswith(b"\x89PNG\r\n\x1a\n")


def test_an_unknown_system_is_one_clear_line():
  done = epoch_time("--systems", "ours-chunkd")
  assert done.returncode != 0
  assert "Did you mean ours-chunked?" in done.stderr
  assert len(done.stderr.strip().splitlines()) == 1


@pytest.fixture
def module(monkeypatch):
  """Imports a module of the benchmarks."""
  monkeypatch.syspath_prepend(str(BENCHMARKS))
  return importlib.import_module


def test_machines_without_proc_are_measured_and_described_too(module, monkeypatch):
  worker, measuring = module("worker"), module("measuring")
  exact = worker._peak_memory_mb()
  monkeypatch.setattr(Path, "exists", lambda path: False)
  # Tests may have a parent larger than they are, which the fallback counts in.
  assert 0.9 * exact < worker._peak_memory_mb() < 20 * exact
  machine = measuring.describe_machine([{"jax": "1"}, {"jax": "2", "keras": "3"}])
  assert machine["processor"]
  assert machine["cores"] >= 1
  assert machine["versions"] == {"jax": "1, 2", "keras": "3"}


@pytest.mark.parametrize("name", ["ours-chunked", "ours-scan", "ours-masked", "ours-bucketed"])
def test_a_worker_times_the_step_of_the_package(name, module, monkeypatch, tmp_path):
  ours, worker = module("ours"), module("worker")
  calls = []

  def make_train_step(*arguments):
    real = make_real(*arguments)
    return lambda *state_and_examples: calls.append(real) or real(*state_and_examples)

  make_real = steps.make_train_step
  monkeypatch.setattr(steps, "make_train_step", make_train_step)
  lengths = np.arange(1, 9, dtype=np.int32)
  tokens = np.where(np.arange(8) < 8 - lengths[:, None], 0, 5).astype(np.int16)
  np.savez(tmp_path / "reviews.npz", tokens=tokens, lengths=lengths, labels=lengths % 2)
  job = worker.Job(
    system=name,
    arrays=str(tmp_path / "reviews.npz"),
    scratch=str(tmp_path),
    num_steps=2,
    batch_size=4,
    vocabulary_size=9,
    embedding_size=3,
    hidden_size=3,
    seed=0,
    platform="cpu",
    num_devices=1,
    matmul_size=1,
  )
  system = ours.build(job)
  batches = system.epoch(1)
  assert sorted(np.concatenate(batches)) == list(range(8))
  assert system.train(batches) == pytest.approx(np.log(2), abs=0.1)
  assert len(calls) == len(batches) == 2
