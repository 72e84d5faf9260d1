"""The benchmark commands on tiny shapes: what they measure, write and draw, and how they fail."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from imdb_jax import devices
from imdb_jax.errors import UsageError

# Each test starts processes that compile and train.
pytestmark = pytest.mark.slow

PNG = b"\x89PNG\r\n\x1a\n"
DOCS = Path(__file__).parent.parent.parent / "docs"
TINY = ("--quick", "--windows", "2", "--num-reviews", "40", "--batch-size", "8", "--sequence-length", "12")
TINY += ("--embedding-size", "4", "--hidden-size", "4", "--vocabulary-size", "30", "--matmul-size", "64")
FIGURES = {"ms_per_step", "seconds_per_epoch", "compile_seconds", "peak_memory_mb"}


@pytest.fixture(scope="module")
def measured(run, tmp_path_factory):
  """Output of epoch_time.py, its results and its figure."""
  folder = tmp_path_factory.mktemp("benchmarks")
  done = run(
    "epoch_time.py",
    *TINY,
    *("--platform", "cpu", "--num-devices", "2", "--bench-python", folder / "absent" / "python"),
    *("--systems", "ours-chunked", "ours-bucketed", "torch"),
    *("--json", folder / "new" / "results.json", "--plot", folder / "figure.png"),
  )
  assert done.returncode == 0, done.stderr[-2000:]
  return done, json.loads((folder / "new" / "results.json").read_text()), (folder / "figure.png").read_bytes()


def test_the_results_have_all_figures_of_a_system(measured):
  rows = {row["system"]: row for row in measured[1]["rows"]}
  assert list(rows) == ["ours-chunked", "ours-bucketed", "torch"]
  for name in ("ours-chunked", "ours-bucketed"):
    row = rows[name]
    assert row["problem"] is None
    assert row["device"] == "2 x cpu (cpu)"
    assert all(row[figure] > 0 for figure in FIGURES), row
    assert row["ms_per_step_min"] <= row["ms_per_step"] <= row["ms_per_step_max"]
    assert len(row["ms_per_step_windows"]) == 2
    assert row["seconds_per_epoch"] == pytest.approx(5 * row["ms_per_step"] / 1000)
    assert 0.6 < row["loss"] < 0.8, "labels are random: ln 2"
    assert row["ratio_to_ours"] == pytest.approx(row["ms_per_step"] / rows["ours-chunked"]["ms_per_step"])


def test_only_systems_that_do_the_counted_work_have_a_share_of_the_ceiling(measured):
  machine, rows = measured[1]["machine"], {row["system"]: row for row in measured[1]["rows"]}
  assert machine["gflop_per_step"] == pytest.approx(3 * 2 * 8 * 12 * (4 + 4) * 16 / 1e9)
  chunked = rows["ours-chunked"]
  share = machine["gflop_per_step"] / (chunked["ms_per_step"] / 1000) / machine["sgemm_gflops"]
  assert chunked["share_of_ceiling"] == pytest.approx(share)
  assert rows["ours-bucketed"]["share_of_ceiling"] is None


def test_the_results_describe_the_machine(measured):
  machine = measured[1]["machine"]
  assert {"processor", "cores", "command", "sizes", "windows", "steps_per_epoch"} <= set(machine)
  assert {"python", "numpy", "jax", "flax"} <= set(machine["versions"])
  assert machine["precision"] == "float32"
  assert "random words" in machine["data"], "nobody may take the figures for those of the real reviews"


def test_a_missing_system_is_named_with_its_remedy(measured):
  done, results, figure = measured
  torch = results["rows"][-1]
  assert torch["problem"] == "missing: make bench"
  assert torch["ms_per_step"] is torch["seconds_per_epoch"] is None
  assert "torch: missing: make bench.\n" in done.stdout
  assert figure.startswith(PNG)


def test_the_windows_of_a_whole_epoch_are_its_parts(run, tmp_path):
  done = run(
    "epoch_time.py",
    *(argument for argument in TINY if argument != "--quick"),
    *("--platform", "cpu", "--num-devices", "1", "--systems", "ours-scan", "--json", tmp_path / "results.json"),
  )
  assert done.returncode == 0, done.stderr[-2000:]
  (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
  two_steps, three_steps = row["ms_per_step_windows"]
  assert row["seconds_per_epoch"] == pytest.approx((2 * two_steps + 3 * three_steps) / 1e3), "five steps per epoch"


def test_a_worker_that_crashes_is_a_failure(run, tmp_path):
  done = run("epoch_time.py", *TINY, *("--platform", "tpu", "--systems", "ours-chunked", "--json", tmp_path / "r.json"))
  assert done.returncode == 1
  assert done.stderr.splitlines()[-1] == "error: failed: ours-chunked, sgemm"
  (row,) = json.loads((tmp_path / "r.json").read_text())["rows"]
  assert "--platform tpu: JAX sees only cpu" in row["problem"]


@pytest.mark.parametrize(
  ("script", "name", "nearest"),
  [
    ("epoch_time", "ours-chunkd", "ours-chunked"),
    ("time_to_accuracy", "keras-jaxx", "keras-jax"),
    ("cost_curves", "our-scan", "ours-scan"),
    ("recurrence", "mosaic", "mosaic_gpu"),
  ],
)
def test_an_unknown_system_gets_a_suggestion(module, script, name, nearest):
  with pytest.raises(UsageError, match=f"--systems: {name}: unknown. Did you mean {nearest}\\?"):
    module("measuring").parse(None, module(script).FLAGS, ["--systems", name])


def test_a_wrong_flag_is_one_line(run):
  done = run("time_to_accuracy.py", "--target", "1.5")
  assert (done.returncode, done.stderr) == (2, "error: --target 1.5: must be above 0 and at most 1.\n")
  done = run("breakdown.py", "--windows", "0")
  assert done.returncode == 2
  assert done.stderr.startswith("error: --windows: 0: must be a whole number of at least 1.")
  assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("script", ["epoch_time", "time_to_accuracy"])
def test_the_cache_may_be_in_the_home_folder(script, module, monkeypatch):
  monkeypatch.setenv("HOME", "/home/me")
  options = module("measuring").parse(None, module(script).FLAGS, ["--cache-dir=~/cache"])
  assert options.cache_dir == Path("/home/me/cache")


def test_cost_curves_vary_one_size(run, tmp_path):
  done = run(
    "cost_curves.py",
    *("--axes", "length", "devices", "--length", "3", "--devices", "2"),
    *("--windows", "3", "--window-seconds", "0.02", "--platform", "cpu", "--num-devices", "1", "--matmul-size", "64"),
    *("--systems", "ours-chunked", "keras-jax", "--bench-python", tmp_path / "absent"),
    *("--json", tmp_path / "results.json", "--plot-dir", tmp_path / "figures"),
  )
  assert done.returncode == 0, done.stderr[-2000:]
  results = json.loads((tmp_path / "results.json").read_text())
  assert [(row["axis"], row["value"], row["system"]) for row in results["points"]] == [
    ("length", 3, "ours-chunked"),
    ("length", 3, "keras-jax"),
    ("devices", 2, "ours-chunked"),
  ]
  article = {"batch_size": 32, "sequence_length": 400, "embedding_size": 128, "hidden_size": 128}
  length, keras, on_devices = results["points"]
  for row, expected, device in (
    (length, article | {"sequence_length": 3}, "1 x cpu"),
    (on_devices, article, "2 x cpu"),
  ):
    assert row["sizes"] == expected | {"vocabulary_size": 4000}
    assert row["device"].startswith(device)
    assert row["problem"] is None
    assert len(row["ms_per_step_windows"]) == 3
    assert 0 < row["ms_per_step_min"] <= row["ms_per_step"] <= row["ms_per_step_max"]
    b, t, e, h = (expected[name] for name in article)
    assert row["gflop_per_step"] == pytest.approx(3 * 2 * b * t * (e + h) * 4 * h / 1e9)
    ceiling = 1e3 * row["gflop_per_step"] / results["machine"]["sgemm_gflops"]
    assert row["ceiling_ms"] == pytest.approx(ceiling)
  assert keras["problem"] == "missing: make bench"
  assert "keras-jax length 3: missing: make bench" in done.stdout
  figures = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
  assert set(figures) == {"length.png", "devices.png"}
  assert all(figure.startswith(PNG) for figure in figures.values())


def test_the_devices_of_the_curves_end_with_all_cores(module, monkeypatch):
  cost_curves = module("cost_curves")
  options = module("measuring").parse(None, cost_curves.FLAGS, ["--axes", "devices"])
  for num_cores, expected in ((1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6])):
    monkeypatch.setattr(devices, "num_cores", lambda num_cores=num_cores: num_cores)
    assert cost_curves.points(options) == [("devices", number) for number in expected]


def test_the_breakdown_times_parts_in_turns(module, tmp_path, monkeypatch):
  ours, breakdown, saved = module("ours"), module("breakdown"), {}
  monkeypatch.setattr(ours, "PARTS", dict.fromkeys(("step", "recurrence, forward")))
  arguments = ["--platform", "cpu", "--num-devices", "2", "--batch-size", "4", "--sequence-length", "20"]
  arguments += ["--windows", "2", "--window-seconds", "0.01"]
  options = module("measuring").parse(None, breakdown.FLAGS, arguments)
  options.scratch = tmp_path
  breakdown.measure(options, saved.update)
  assert list(saved["ms"]) == ["step", "recurrence, forward"]
  assert all(len(times) == 2 and min(times) > 0 for times in saved["ms"].values())


def test_the_recurrence_is_timed_point_by_point(run, tmp_path):
  done = run(
    "recurrence.py",
    *("--systems", "chunked", "mosaic_gpu", "torch-float32", "--platform", "cpu"),
    *("--bench-python", tmp_path / "absent"),
    *("--batch-size", "2", "--num-steps", "3", "--hidden-size", "4", "--windows", "2", "--window-seconds", "0.01"),
    *("--json", tmp_path / "results.json", "--plot", tmp_path / "figure.png"),
  )
  assert done.returncode == 0, done.stderr[-2000:]
  results = json.loads((tmp_path / "results.json").read_text())
  sizes = [(row["batch_size"], row["num_steps"], row["hidden_size"], row["gradients"]) for row in results["rows"][::3]]
  assert sizes == [
    (*size, gradients) for size in ((2, 400, 128), (32, 3, 128), (32, 400, 4)) for gradients in (False, True)
  ]
  for chunked, kernel, torch in zip(*(results["rows"][k::3] for k in range(3)), strict=True):
    assert chunked["ms_per_step"] == np.median(chunked["ms_per_step_windows"]) > 0
    assert len(chunked["ms_per_step_windows"]) == 2
    assert chunked["recurrent_dropout"]
    assert chunked["floor_ms"] is None, "there is no GPU"
    assert (kernel["ms_per_step"], torch["ms_per_step"]) == (None, None)
  assert "mosaic_gpu: it " in done.stdout
  assert "torch-float32: missing: make bench" in done.stdout
  assert (tmp_path / "figure.png").read_bytes().startswith(PNG)


def test_the_floor_of_the_recurrence_is_a_read_of_the_weights_per_position(module):
  """bfloat16 [128, 512] at 128 bytes per clock take 1,024 clocks; 400 positions, forward and backward, at 2 GHz."""
  point = {"batch_size": 32, "num_steps": 400, "hidden_size": 128, "gradients": True}
  assert module("recurrence").floor_ms(point, clock_ghz=2.0) == pytest.approx(2 * 400 * 1024 / 2e9 * 1e3)


def test_ctrl_c_keeps_what_was_measured(module, tmp_path):
  """It arrives while the second point is being measured, for which a window takes minutes."""
  output = tmp_path / "results.json"
  script = str(Path(module("cost_curves").__file__))
  arguments = ["--axes", "length", "--length", "3", "1600", "--systems", "ours-scan", "--json", str(output)]
  arguments += ["--platform", "cpu", "--windows", "1", "--window-seconds", "1", "--matmul-size", "8"]
  with subprocess.Popen([sys.executable, script, *arguments], stdout=subprocess.PIPE, text=True) as process:
    while not output.exists():
      time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
  assert process.returncode == 130
  assert [row["value"] for row in json.loads(output.read_text())["points"]] == [3]
  assert "ours-scan" in printed


@pytest.mark.parametrize("name", ["epoch_time", "time_to_accuracy", "cost_curves", "breakdown"])
def test_published_results_are_shown_again(run, name, tmp_path):
  figure = {"cost_curves": [tmp_path], "breakdown": []}.get(name, [tmp_path / "figure.png"])
  done = run("reporting.py", DOCS / f"{name}.json", *figure)
  assert done.returncode == 0, done.stderr[-2000:]
  machine = json.loads((DOCS / f"{name}.json").read_text())["machine"]
  assert f"Machine: {machine['processor']}, {machine['cores']} cores" in done.stdout
  assert bool(figure) == bool(list(tmp_path.glob("*.png")))
