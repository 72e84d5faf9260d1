"""`examples/slurm/train.sbatch` on a cluster: a run that is stopped is requeued, and ends like one that is not."""

import contextlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from reliability import slurm
from reliability.slurm import Cluster
from training.tiny import final_state, without_times

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "slurm" / "train.sbatch"
# One task on each of two nodes. Seconds of training.
TRAIN = ("--preset", "sample", "--platform", "cpu", "--num-devices", "1", "--epochs", "5", "--log-every", "40")
TRAIN += ("--save-every-steps", "20")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
  if (problem := slurm.missing()) is not None:
    pytest.skip(problem)
  with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
    command = Path(folder) / "imdb-jax"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -c "from imdb_jax import cli; cli.main()" "$@"\n')
    command.chmod(0o700)
    with contextlib.closing(Cluster(Path(folder))) as cluster:
      yield cluster


def submit(cluster: Cluster, run_dir: Path, *options: str, flags: tuple[str, ...] = TRAIN) -> str:
  """Submit a run in two tasks, and return the number of the job."""
  log = f"--output={run_dir}.log"
  command = ("sbatch", "--parsable", "--nodes=2", log, *options, SCRIPT, "--run-dir", run_dir, *flags)
  return cluster.run(*command, environment={"PYTHONPATH": str(ROOT)})


def wait_for_step(cluster: Cluster, run_dir: Path) -> None:
  """Wait until a run trains."""
  metrics = run_dir / "metrics.jsonl"
  cluster.wait_for(lambda: metrics.exists() and metrics.read_text().count('"step"') > 2, 120)


def wait_for_end(cluster: Cluster, job: str, run_dir: Path) -> dict[str, str]:
  """Wait until a job has ended and will not start again; return what SLURM reports about it."""
  ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
  cluster.wait_for(lambda: cluster.state(job)["JobState"] in ends, 400)
  return cluster.state(job)


@pytest.fixture(scope="module")
def whole(cluster, tmp_path_factory) -> Path:
  """A run that nothing stops."""
  run_dir = tmp_path_factory.mktemp("slurm") / "whole"
  job = submit(cluster, run_dir)
  assert wait_for_end(cluster, job, run_dir)["JobState"] == "COMPLETED"
  return run_dir


def preempt(cluster: Cluster, job: str) -> None:
  """Take the nodes away for a second; the partition gives the job a minute to save."""
  cluster.run("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")


def requeue(cluster: Cluster, job: str) -> None:
  """Requeue the job from outside; SLURM gives it KillWait, 30 s by default."""
  cluster.run("scontrol", "requeue", job)


def kill_a_task(cluster: Cluster, job: str) -> None:
  """Kill the second task, as the kernel does if memory runs out."""
  wanted = {f"SLURM_JOB_ID={job}", "SLURM_PROCID=1", f"SLURM_CONF={cluster.folder}/slurm.conf"}
  for process in Path("/proc").glob("[0-9]*"):
    with contextlib.suppress(OSError):
      if wanted <= {*(process / "environ").read_text(errors="replace").split("\0")}:
        os.kill(int(process.name), signal.SIGKILL)


@pytest.mark.parametrize("stop", [preempt, requeue, kill_a_task])
def test_a_stopped_run_is_requeued_and_ends_with_the_same_bits(stop, whole, cluster, tmp_path):
  run_dir = tmp_path / "run"
  job = submit(cluster, run_dir)
  wait_for_step(cluster, run_dir)
  stop(cluster, job)
  state = wait_for_end(cluster, job, run_dir)
  assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1")
  first, second = (start["step"] for start in json.loads((run_dir / "provenance.json").read_text())["starts"])
  assert first == 0 < second, "the second start continues"
  assert without_times(run_dir) == without_times(whole)
  found, expected = final_state(run_dir), final_state(whole)
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_a_run_continues_after_its_time_limit(cluster, tmp_path):
  """SLURM looks at time limits every half minute."""
  job = submit(cluster, tmp_path / "run", flags=(*TRAIN, "--epochs", "1000"))
  wait_for_step(cluster, tmp_path / "run")
  # All of the minute that it may take is left for the signal.
  cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=1")
  cluster.wait_for(lambda: "resumed at step" in (tmp_path / "run.log").read_text(), 200)
  assert cluster.state(job)["Restarts"] == "1"
  assert (tmp_path / "run.log").read_text().count("Saved step") == 2
  cluster.run("scancel", job)
  wait_for_end(cluster, job, tmp_path / "run")


def test_a_cancelled_run_is_saved_and_not_requeued(cluster, tmp_path):
  job = submit(cluster, tmp_path / "run", flags=(*TRAIN, "--epochs", "1000"))
  wait_for_step(cluster, tmp_path / "run")
  cluster.run("scancel", job)
  state = wait_for_end(cluster, job, tmp_path / "run")
  assert (state["JobState"], state["Restarts"]) == ("CANCELLED", "0")
  assert (tmp_path / "run.log").read_text().count("Saved step") == 2


def test_a_run_with_a_wrong_flag_fails_once(cluster, tmp_path):
  job = submit(cluster, tmp_path / "run", flags=("--epochs", "0"))
  state = wait_for_end(cluster, job, tmp_path / "run")
  assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("FAILED", "2:0", "0")
  assert "--epochs 0: must be" in (tmp_path / "run.log").read_text()


@pytest.mark.parametrize(
  ("options", "expected"),
  [
    (("--ntasks-per-node=1", "--gpus-per-node=4"), ["[]"] * 2),
    (("--ntasks-per-node=4", "--gpus-per-task=1"), ["[]"] * 8),
    (("--ntasks-per-node=4", "--gpus-per-node=4"), ["None"] * 8),
  ],
)
def test_tasks_see_the_gpus_that_are_theirs(options, expected, cluster, tmp_path):
  """The GPUs do not exist: SLURM sets the variables that decide which of them a task uses. [] is all it sees."""
  code = "import os; from imdb_jax import processes; print(processes.local_device_ids(os.environ))"
  command = ("srun", "--nodes=2", *options, sys.executable, "-c", code)
  assert cluster.run(*command, environment={"PYTHONPATH": str(ROOT)}).split() == expected
