"""The benchmarks on tiny shapes: what they write, what they say of a missing system, and whose step they time."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from imdb_jax import sharding, steps
from imdb_jax.config import preset
from imdb_jax.data import imdb, reviews, tokens

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TINY = ("--quick", "--windows", "2", "--num-reviews", "40", "--batch-size", "8", "--sequence-length", "12")
TINY += ("--embedding-size", "4", "--hidden-size", "4", "--vocabulary-size", "30", "--matmul-size", "64")
FIGURES = {"ms_per_step", "seconds_per_epoch", "compile_seconds", "peak_memory_mb"}


def run(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
  command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
  return subprocess.run(command, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[subprocess.CompletedProcess[str], dict, bytes]:
  """What was printed, the JSON and the figure."""
  folder = tmp_path_factory.mktemp("benchmarks")
  done = run(
    "epoch_time.py",
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


def test_windows_of_a_whole_epoch_are_its_parts(tmp_path):
  done = run(
    "epoch_time.py",
    *(argument for argument in TINY if argument != "--quick"),
    *("--platform", "cpu", "--num-devices", "1", "--systems", "ours-chunked", "--json", tmp_path / "results.json"),
  )
  assert done.returncode == 0, done.stderr[-2000:]
  (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
  two_steps, three_steps = row["ms_per_step_windows"]
  assert row["seconds_per_epoch"] == pytest.approx((2 * two_steps + 3 * three_steps) / 1e3), "five steps an epoch"


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


@pytest.mark.parametrize(
  ("script", "name", "nearest"),
  [
    ("epoch_time.py", "ours-chunkd", "ours-chunked"),
    ("time_to_accuracy.py", "keras-jaxx", "keras-jax"),
    ("cost_curves.py", "our-scan", "ours-scan"),
  ],
)
def test_an_unknown_system_is_one_clear_line(script, name, nearest):
  done = run(script, "--systems", name)
  assert done.returncode != 0
  assert f"Did you mean {nearest}?" in done.stderr
  assert len(done.stderr.strip().splitlines()) == 1


@pytest.fixture
def module(monkeypatch):
  """Imports a module of the benchmarks."""
  monkeypatch.syspath_prepend(str(BENCHMARKS))
  return importlib.import_module


@pytest.mark.parametrize("script", ["breakdown", "epoch_time", "time_to_accuracy"])
def test_the_cache_may_be_at_home(script, module, monkeypatch):
  monkeypatch.setenv("HOME", "/home/me")
  assert module(script).Options(cache_dir=Path("~/cache")).cache_dir == Path("/home/me/cache")


def test_machines_without_proc_are_measured_and_described_too(module, monkeypatch):
  worker, measuring = module("worker"), module("measuring")
  exact = worker._peak_memory_mb()
  monkeypatch.setattr(Path, "exists", lambda path: False)
  monkeypatch.delattr(Path, "read_text")
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

  def make_train_steps(*arguments):
    real = make_real(*arguments)
    return lambda *state_and_rows: calls.append(int(state_and_rows[-1])) or real(*state_and_rows)

  make_real = steps.make_train_steps
  monkeypatch.setattr(steps, "make_train_steps", make_train_steps)
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
  assert sum(calls) == len(batches) == 2


# --- how a system learns ---

FAKE = """
import worker

class Fake:
  device, modules, num_steps = "none", (), 0

  def epoch(self, epoch): return [1, 2]
  def shape(self, batch): return batch
  def test_batches(self): return [3, 4, 3]
  def evaluate(self, batches): return len(batches) / 4
  def forget(self): self.num_steps = 0

  def train(self, batches):
    self.num_steps += len(batches)
    return self.num_steps

worker.serve(lambda job: Fake())
"""

# Trains, forgets, trains again: weights, moments and dropout of Keras must begin anew.
FORGETS = """
import baselines, json, sys, worker

system = baselines.build(worker.Job(**json.loads(sys.argv[1])))
losses = [system.train(system.epoch(1)) for _ in range(3)]
system.forget()
assert [system.train(system.epoch(1)) for _ in range(3)] == losses
assert len(set(losses)) == 3
"""


def run_worker(module, code: str, folder: Path, lines: str, system: str) -> list[dict]:
  """What a worker of that code answers to the lines."""
  measuring = module("measuring")
  split = measuring.random_reviews(8, 4, 9)
  measuring.write_arrays(folder / "reviews.npz", split)
  arrays = folder / "reviews.npz"
  sizes = measuring.ARTICLE_SIZES | {"batch_size": 4}
  job = measuring.make_job(measuring.Options(), system, arrays, num_steps=3, sizes=sizes, test_arrays=str(arrays))
  code = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\n{code}"
  command = [sys.executable, "-c", code, json.dumps(dataclasses.asdict(job))]
  environment = os.environ | {"KERAS_HOME": str(folder)}
  done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=60, env=environment)
  assert done.returncode == 0, done.stderr[-2000:]
  return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_worker_evaluates_when_it_is_asked_and_forgets_its_warm_up(module, tmp_path):
  ready, first, evaluation, second = run_worker(module, FAKE, tmp_path, "2\nevaluate\n1\n", "fake")
  assert ready["num_shapes"] == 2
  assert (first["loss"], second["loss"]) == (2, 3)
  assert evaluation["accuracy"] == 3 / 4


def test_keras_forgets_its_warm_up(module, tmp_path):
  assert run_worker(module, FORGETS, tmp_path, "", "keras-jax") == []


# --- time to accuracy ---


def history(module, *epochs: tuple[float, float]) -> list:
  """Epochs of so many seconds of training and such test accuracies; a second of evaluation each."""
  make = module("time_to_accuracy").Epoch
  return [make(training_seconds=seconds, evaluation_seconds=1.0, test_accuracy=value) for seconds, value in epochs]


def finished(module, system: str, *histories: list) -> list:
  """Runs that have come to their end."""
  make = module("time_to_accuracy").Run
  return [
    make(system=system, seed=seed, num_epochs=len(epochs), epochs=epochs, compile_seconds=2.0)
    for seed, epochs in enumerate(histories)
  ]


def test_turns_are_spread_evenly(module):
  turns = module("time_to_accuracy").turns
  assert turns({"keras": 4, "ours": 2}) == ["keras", "ours", "keras", "keras", "ours", "keras"]
  assert turns({"ours": 3, "keras": 1}) == ["ours", "ours", "keras", "ours"]


def test_the_target_is_reached_at_the_end_of_the_first_epoch_that_has_it(module):
  epochs = history(module, (10, 0.80), (11, 0.88), (12, 0.86), (13, 0.89))
  epochs_to = module("time_to_accuracy").epochs_to
  assert epochs_to(0.88, epochs) == (epochs[:2], True)
  assert epochs_to(0.90, epochs) == (epochs, False)


def test_a_summary_is_of_seconds_to_the_target_and_of_the_last_epoch(module):
  runs = finished(
    module, "fast", history(module, (10, 0.90), (20, 0.87)), history(module, (10, 0.80), (20, 0.91), (30, 0.89))
  )
  row = module("time_to_accuracy").summarize("fast", runs, 0.9)
  assert (row["seeds"], row["reached"]) == (2, 2)
  # 10 and 30 seconds; their standard deviation has n - 1 in its denominator.
  assert row["training_seconds"] == {"mean": 20, "std": pytest.approx(200**0.5), "n": 2}
  assert row["evaluation_seconds"]["mean"] == 1.5
  assert row["compile_seconds"] == {"mean": 2, "std": 0, "n": 2}
  assert row["last_accuracy"]["mean"] == pytest.approx(0.88), "the last epoch's, not the best"


def test_a_target_that_is_never_reached_counts_all_training_and_gives_no_ratio_to_it(module):
  time_to_accuracy = module("time_to_accuracy")
  fast = finished(module, "fast", history(module, (10, 0.90), (10, 0.91)))
  keras = finished(module, "keras-jax", history(module, (100, 0.80), (140, 0.85)))
  row = time_to_accuracy.summary(["fast", "keras-jax"], fast + keras, 0.9)[1]
  assert (row["seeds"], row["reached"]) == (1, 0)
  assert row["training_seconds"] == {"mean": 240, "std": None, "n": 1}
  assert row["ratio_to_fast"] == 24
  rows = time_to_accuracy.summary(["fast", "keras-jax"], fast + keras, 0.95)
  assert [row["ratio_to_fast"] for row in rows] == [None, None], "ours has not got there"


def test_a_run_that_was_cut_short_counts_for_what_it_had_come_to(module):
  summarize = module("time_to_accuracy").summarize
  runs = finished(module, "keras-jax", history(module, (100, 0.80), (100, 0.90)))
  runs[0].num_epochs = 10
  row = summarize("keras-jax", runs, 0.9)
  assert (row["reached"], row["training_seconds"]["mean"], row["last_accuracy"]) == (1, 200, None)
  row = summarize("keras-jax", runs, 0.95)
  assert (row["seeds"], row["training_seconds"]) == (0, None)


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory) -> Path:
  """Holds 24 encoded reviews of each split, which pass for the official ones."""
  splits = {}
  for name in ("train", "test"):
    texts = [f"{name} film {'good' if row % 2 else 'bad'} {row}" for row in range(24)]
    splits[name] = reviews.canonical(texts, [row % 2 for row in range(24)], list(range(24)))
  digests = {name: reviews.content_digest(split) for name, split in splits.items()}
  folder = tmp_path_factory.mktemp("cache")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(imdb, "load", lambda *arguments, **options: splits)
    patch.setattr(imdb, "OFFICIAL_CONTENT", digests)
    tokens.load(dataclasses.replace(preset("article").dataset, limit=24, sequence_length=6), cache_dir=folder)
  return folder


def test_both_train_to_the_end_in_turns_on_the_same_reviews(cache_dir, tmp_path):
  done = run(
    "time_to_accuracy.py",
    *("--cache-dir", cache_dir, "--limit", "24", "--sequence-length", "6", "--platform", "cpu", "--num-devices", "1"),
    *("--seeds", "1", "--epochs", "2", "--keras-epochs", "2", "--target", "1", "--bench-python", sys.executable),
    *("--json", tmp_path / "results.json", "--plot", tmp_path / "figure.png"),
  )
  assert done.returncode == 0, done.stderr[-2000:]
  progress = [line.partition(":")[0] for line in done.stderr.splitlines() if ", epoch" in line]
  ours = [f"fast, seed 0, epoch {epoch} of 2" for epoch in (1, 2)]
  keras = [f"keras-jax, seed 0, epoch {epoch} of 2" for epoch in (1, 2)]
  assert progress == [keras[0], *ours, keras[1]]
  results = json.loads((tmp_path / "results.json").read_text())
  assert {"flax", "keras"} <= set(results["machine"]["versions"])
  assert "24 IMDB training reviews" in results["machine"]["data"]
  assert {run["system"] for run in results["runs"]} == {"fast", "keras-jax"}
  for one in results["runs"]:
    assert one["is_finished"]
    assert one["compile_seconds"] > 0
    for epoch in one["epochs"]:
      assert epoch["training_seconds"] > 0
      assert epoch["evaluation_seconds"] > 0
      assert round(24 * epoch["test_accuracy"], 6) % 1 == 0, "of all 24 test reviews"
    assert one["reached"] == (max(epoch["test_accuracy"] for epoch in one["epochs"]) == 1)
  assert ("not reached: 1" in done.stdout) == any(not one["reached"] for one in results["runs"])
  assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_keras_without_its_environment_is_named_and_the_others_go_on(module, cache_dir, tmp_path):
  time_to_accuracy = module("time_to_accuracy")
  options = time_to_accuracy.Options(systems=("keras-jax", "keras-tensorflow"), bench_python=tmp_path / "absent")
  data = tokens.load(dataclasses.replace(preset("article").dataset, limit=24, sequence_length=6), cache_dir=cache_dir)
  runs = []
  time_to_accuracy.measure(options, data, runs, lambda: None)
  assert [run.system for run in runs] == ["keras-jax", "keras-tensorflow"]
  assert all(run.problem.startswith("missing: make bench") for run in runs)
  rows = time_to_accuracy.summary(options.systems, runs, options.target)
  assert all(row["problem"].startswith("missing: make bench") for row in rows)


# --- cost curves ---


def test_points_of_the_curves_hold_the_sizes_that_were_asked_for(tmp_path):
  done = run(
    "cost_curves.py",
    *("--axes", "length", "hidden_size", "devices", "--length", "3", "--hidden-size", "4", "--devices", "2"),
    *("--windows", "3", "--window-seconds", "0.02", "--platform", "cpu", "--num-devices", "1", "--matmul-size", "64"),
    *("--systems", "ours-chunked", "keras-jax", "--bench-python", tmp_path / "absent"),
    *("--json", tmp_path / "results.json", "--plot-dir", tmp_path / "figures"),
  )
  assert done.returncode == 0, done.stderr[-2000:]
  results = json.loads((tmp_path / "results.json").read_text())
  points = {(point["axis"], point["value"], point["system"]): point for point in results["points"]}
  ours = [("length", 3), ("hidden_size", 4), ("devices", 2)]
  assert [key for key in points if key[2] == "ours-chunked"] == [(*key, "ours-chunked") for key in ours]
  assert [key for key in points if key[2] == "keras-jax"] == [(*key, "keras-jax") for key in ours[:-1]]
  article = {"batch_size": 32, "sequence_length": 400, "embedding_size": 128, "hidden_size": 128}
  sizes = [article | {"sequence_length": 3}, article | {"hidden_size": 4}, article]
  for key, expected, device in zip(ours, sizes, ("1 x cpu", "1 x cpu", "2 x cpu"), strict=True):
    point = points[(*key, "ours-chunked")]
    assert point["sizes"] == expected | {"vocabulary_size": 4000}
    assert point["device"].startswith(device)
    assert point["problem"] is None
    assert len(point["ms_per_step_windows"]) == 3
    assert 0 < point["ms_per_step_min"] <= point["ms_per_step"] <= point["ms_per_step_max"]
    b, t, e, h = (expected[name] for name in article)
    assert point["gflop_per_step"] == pytest.approx(3 * 2 * b * t * (e + h) * 4 * h / 1e9)
    ceiling = 1e3 * point["gflop_per_step"] / results["machine"]["sgemm_gflops"]
    assert point["ceiling_ms"] == pytest.approx(ceiling)
  assert points["length", 3, "keras-jax"]["problem"].startswith("missing: make bench")
  assert "missing: make bench" in done.stdout
  figures = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
  assert set(figures) == {"length.png", "hidden_size.png", "devices.png"}
  assert all(figure.startswith(b"\x89PNG") for figure in figures.values())


def test_devices_of_the_curves_end_with_all_cores(module, monkeypatch):
  options = module("cost_curves").Options(axes=("devices",))
  for num_cores, expected in ((1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6])):
    monkeypatch.setattr(sharding, "num_cores", lambda num_cores=num_cores: num_cores)
    assert options.points() == [("devices", number) for number in expected]


def test_what_was_measured_before_an_interruption_is_kept(module, monkeypatch, tmp_path):
  """Ctrl-C in the second point."""
  cost_curves = module("cost_curves")
  measure_point, saved = cost_curves._measure_point, []

  def interrupted(options, axis, value, folder):
    if value == 5:
      raise KeyboardInterrupt
    return measure_point(options, axis, value, folder)

  monkeypatch.setattr(cost_curves, "_measure_point", interrupted)
  options = cost_curves.Options(
    axes=("length",), length=(3, 5), systems=("keras-jax",), bench_python=tmp_path / "absent", matmul_size=8
  )
  assert module("measuring").is_interrupted(lambda: cost_curves.measure(options, saved.append))
  assert [point["value"] for point in saved[-1]["points"]] == [3]


def test_the_breakdown_times_every_part_in_every_window(tmp_path):
  done = run(
    "breakdown.py",
    *("--platform", "cpu", "--num-devices", "2", "--batch-size", "4", "--sequence-length", "20"),
    *("--windows", "2", "--window-seconds", "0.01", "--cache-dir", tmp_path, "--json", tmp_path / "results.json"),
  )
  assert done.returncode == 0, done.stderr[-2000:]
  parts = json.loads((tmp_path / "results.json").read_text())["ms"]
  assert [name.split(" ")[0] for name in parts] == ["step", "step", "recurrence,", "recurrence,", "small", "large"]
  assert all(len(times) == 2 and min(times) > 0 for times in parts.values())
  assert all(name in done.stdout for name in parts)


def test_the_recurrence_is_timed_point_by_point_and_who_cannot_serve_is_named(tmp_path):
  done = run(
    "recurrence.py",
    *("--platform", "cpu", "--systems", "chunked", "cudnn", "torch-float32", "--bench-python", tmp_path / "absent"),
    *("--batch-size", "2", "--num-steps", "3", "--hidden-size", "4", "--windows", "2", "--window-seconds", "0.01"),
    *("--json", tmp_path / "results.json", "--plot", tmp_path / "figure.png"),
  )
  assert done.returncode == 0, done.stderr[-2000:]
  results = json.loads((tmp_path / "results.json").read_text())
  sizes = [(row["batch_size"], row["num_steps"], row["hidden_size"], row["gradients"]) for row in results["rows"][::3]]
  assert sizes == [
    (*size, gradients) for size in ((2, 400, 128), (32, 3, 128), (32, 400, 4)) for gradients in (False, True)
  ]
  for chunked, cudnn, torch in zip(*(results["rows"][k::3] for k in range(3)), strict=True):
    assert chunked["ms"] == np.median(chunked["ms_windows"]) > 0
    assert len(chunked["ms_windows"]) == 2
    assert chunked["floor_ms"] is None, "there is no GPU"
    assert (cudnn["ms"], torch["ms"]) == (None, None)
  assert "cudnn: it needs an NVIDIA GPU" in done.stdout
  assert "torch-float32: missing: make bench" in done.stdout
  assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_the_floor_of_the_recurrence_is_a_read_of_the_weights_a_position(module):
  """bfloat16 [128, 512] at 128 bytes a clock are 1,024 clocks; 400 positions at 2 GHz."""
  recurrence = module("recurrence")
  point = recurrence.Point(batch_size=32, num_steps=400, hidden_size=128, gradients=True)
  assert recurrence.Options(clock_ghz=2.0).floor_ms(point) == pytest.approx(2 * 400 * 1024 / 2e9 * 1e3)
