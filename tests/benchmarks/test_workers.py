"""Worker processes: what they answer, whose step they time, and what a warm-up leaves behind."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from benchmarks.conftest import BENCHMARKS

from imdb_jax.program import Program

FAKE = """
import worker

class Fake(worker.System):
  device, num_steps = "none", 0

  def epoch(self, epoch): return [10 * epoch, 10 * epoch + 1]
  def shape(self, batch): return batch % 10
  def test_batches(self): return [3, 4, 3]
  def evaluate(self, batches): return len(batches) / 4
  def forget(self): self.num_steps = 0

  def train(self, batches):
    self.num_steps += len(batches)
    return batches[-1] + self.num_steps

def build(job):
  if job.system == "unable": raise worker.UnableError("it has no such device")
  if job.system == "missing": import no_such_package
  return Fake()

worker.serve(worker.Handlers(build), install="make it")
"""

# Weights, moments and dropout masks of Keras must start anew after the warm-up.
FORGETS = """
import baselines, json, sys, worker

system = baselines._build(worker.Job(**json.loads(sys.stdin.readline())["prepare"]))
losses = [system.train(system.epoch(1)) for _ in range(3)]
system.forget()
assert [system.train(system.epoch(1)) for _ in range(3)] == losses
assert len(set(losses)) == 3
"""

pytestmark = pytest.mark.slow


@pytest.fixture
def job(module, tmp_path):
  """A job on eight reviews of random words."""
  measuring = module("measuring")
  arrays = measuring.write_arrays(tmp_path / "reviews.npz", measuring.random_reviews(8, 8, 9))
  options = measuring.parse(None, [], ["--platform", "cpu", "--num-devices", "1"])
  sizes = {"batch_size": 4, "sequence_length": 8, "embedding_size": 3, "hidden_size": 3, "vocabulary_size": 9}
  return measuring.make_job(options, "keras-jax", num_steps=3, arrays=arrays, test_arrays=arrays, **sizes)


def ask(code: str, folder: Path, *requests: dict) -> list[dict]:
  """Return what a worker of that code answers."""
  code = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\n{code}"
  lines = "".join(json.dumps(request) + "\n" for request in requests)
  environment = os.environ | {"KERAS_HOME": str(folder)}
  command = [sys.executable, "-c", code]
  done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=60, env=environment)
  assert done.returncode == 0, done.stderr[-2000:]
  return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_worker_forgets_its_warm_up_and_repeats_its_plan(job, tmp_path):
  prepare = {"prepare": dataclasses.asdict(job)}
  ready, first, evaluation, second = ask(FAKE, tmp_path, prepare, {"run": 2}, {"evaluate": None}, {"run": 2})
  assert (ready["device"], ready["num_shapes"]) == ("none", 2)
  assert {"python", "numpy"} <= set(ready["versions"])
  # The plan is 10, 11, 20; two steps are done after the first window, four after the second.
  assert (first["loss"], second["loss"]) == (11 + 2, 10 + 4)
  assert first["peak_memory_mb"] > 1
  assert evaluation["accuracy"] == 3 / 4


def test_a_system_that_cannot_run_is_a_problem_and_the_worker_goes_on(job, tmp_path):
  jobs = [dataclasses.replace(job, system=name) for name in ("unable", "missing", "fake")]
  unable, missing, ready = ask(FAKE, tmp_path, *({"prepare": dataclasses.asdict(one)} for one in jobs))
  assert unable == {"problem": "it has no such device"}
  assert missing == {"problem": "missing no_such_package: make it"}
  assert "step_seconds" in ready


def test_a_worker_that_dies_is_a_problem_with_its_last_line(module, job, tmp_path):
  measuring = module("measuring")
  bad = dataclasses.replace(job, arrays=str(tmp_path / "absent.npz"))
  with measuring.Worker("ours.py") as worker:
    worker.prepare(dataclasses.replace(bad, system="ours-chunked"))
    assert worker.problem.startswith("failed: FileNotFoundError")
    worker.run_window(1)
    assert worker.timings()["ms_per_step"] is None
    assert worker.timings()["problem"] == worker.problem


def test_keras_forgets_its_warm_up(job, tmp_path):
  assert ask(FORGETS, tmp_path, {"prepare": dataclasses.asdict(job)}) == []


@pytest.mark.parametrize("name", ["ours-chunked", "ours-scan", "ours-masked", "ours-bucketed"])
def test_our_worker_times_the_program_of_the_package(name, module, job, monkeypatch):
  programs, num_steps, settings, initialize = [], [], {"ours-scan": "scan"}, Program.__init__

  def spied(program, *arguments):
    initialize(program, *arguments)
    programs.append(program)
    train_steps = program.train_steps
    program.train_steps = lambda *arrays: num_steps.append(int(arrays[-1])) or train_steps(*arrays)

  # Not the class: modules that are imported meanwhile would keep another one.
  monkeypatch.setattr(Program, "__init__", spied)
  system = module("ours").Training(dataclasses.replace(job, system=name))
  batches = system.epoch(1)
  assert sorted(np.concatenate(batches, axis=None)) == list(range(8))
  assert system.train(batches) == pytest.approx(np.log(2), abs=0.1)
  assert sum(num_steps) == len(batches) == 2
  (program,) = programs
  assert program.choice.name == settings.get(name, "chunked")
  assert program.config.model.mask_padding == (name in ("ours-masked", "ours-bucketed"))
  assert program.config.training.bucket_by_length == (name == "ours-bucketed")
  assert program.config.model.recurrent_dropout_rate == 0.2


def test_the_loss_is_the_mean_over_all_reviews_of_a_window(module, job):
  """A window of three dispatches, with smaller batches, and one step per window."""
  ours = module("ours")
  small = dataclasses.replace(job, system="ours-scan", batch_size=3)
  first, second = ours.Training(small), ours.Training(small)
  batches = first.epoch(1) * 7
  losses = [first.train([batch]) for batch in batches]
  assert losses[0] == pytest.approx(np.log(2), abs=0.1)
  assert second.train(batches) == pytest.approx(np.average(losses, weights=[3, 3, 2] * 7), rel=1e-5)


def test_a_gpu_that_is_missing_is_no_failure(module, job):
  ours, worker = module("ours"), module("worker")
  with pytest.raises(worker.UnableError, match=r"^it needs an NVIDIA GPU, and JAX computes on cpu$"):
    ours.Training(dataclasses.replace(job, system="ours-mosaic-gpu", hidden_size=64))


PARTS = ["step", "step without Adam", "recurrence, forward and backward", "recurrence, forward"]
PARTS += ["small products of the time loops", "large products of the chunks"]


def test_every_part_of_a_step_runs(module, job):
  ours = module("ours")
  assert list(ours.PARTS) == PARTS
  job = dataclasses.replace(job, embedding_size=4, hidden_size=4, sequence_length=20, num_devices=2)
  for name in PARTS:
    system = ours.build(dataclasses.replace(job, system=name))
    assert (system.device, system.precision) == ("2 x cpu (cpu)", "float32")
    system.train(system.epoch(1))


@pytest.mark.parametrize(("name", "learns"), [("step", True), ("step without Adam", False)])
def test_a_step_without_adam_does_not_learn(name, learns, module, job):
  """The loss of the second step depends on the batch of the first only if that has changed the parameters."""
  ours, losses = module("ours"), []
  for first in (0, 1):
    system = ours.build(dataclasses.replace(job, system=name))
    batches = system.epoch(1)
    system.train([batches[first]])
    losses.append(system.train([batches[1]]))
  assert (losses[0] != losses[1]) == learns


def test_machines_without_proc_are_measured_and_described_too(module, monkeypatch):
  worker, measuring = module("worker"), module("measuring")
  exact = worker.peak_memory_mb()
  monkeypatch.setattr(Path, "exists", lambda path: False)
  monkeypatch.delattr(Path, "read_text")
  # The fallback may count memory of the parent process.
  assert 0.9 * exact < worker.peak_memory_mb() < 20 * exact
  facts = [{"versions": {"jax": "1"}, "precision": "float32"}, None]
  facts += [{"versions": {"jax": "2", "keras": "3"}, "precision": None}]
  machine = measuring.describe_machine(facts, "random numbers")
  assert machine["processor"]
  assert machine["cores"] >= 1
  assert machine["versions"] == {"jax": "1, 2", "keras": "3"}
  assert machine["precision"] == "float32"
