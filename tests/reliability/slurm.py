"""A SLURM cluster of two nodes on this machine, in namespaces of its own: it needs root, and leaves nothing behind."""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "ip", "nsenter", "setpriv", "unshare")
_UNSHARE = ("unshare", "--mount", "--net", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
# Both nodes are this machine, whose two cores each claims for itself.
_CONFIG = """
ClusterName=test
SlurmctldHost=node1
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
MailProg=/bin/true
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=bf_interval=1,sched_interval=1
NodeName=node1 NodeHostname=node1 Port=7001 CPUs=4 Gres=gpu:4
NodeName=node2 NodeHostname=node1 Port=7002 CPUs=4 Gres=gpu:4
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=2
"""
# Devices that exist everywhere and are not opened.
_GPUS = "Name=gpu File=/dev/tty[0-3]\n"


def missing() -> str | None:
  """Return why no cluster can be started here; None if one can."""
  absent = [name for name in _PROGRAMS if shutil.which(name, path=_path()) is None]
  if absent:
    return f"SLURM is not installed: {', '.join(absent)} not found (Debian: slurm-wlm, munge, iproute2, util-linux)"
  if subprocess.run([*_UNSHARE, "true"], capture_output=True).returncode != 0:
    return "SLURM needs namespaces of its own, which only root can create"
  return None


def _path() -> str:
  return f"{os.environ['PATH']}:/usr/sbin:/sbin"


class Cluster:
  """A controller and two nodes. All of their processes end with `close`.

  Attributes:
    folder: where the files of the cluster are.
  """

  def __init__(self, folder: Path):
    """Start the cluster; its files are written to a folder."""
    self.folder = folder
    self._environment = os.environ | {"PATH": f"{folder}:{_path()}", "SLURM_CONF": f"{folder}/slurm.conf"}
    # The cluster ends with the tests, also if they are killed.
    command = ["setpriv", "--pdeathsig", "KILL", *_UNSHARE, sys.executable, __file__, str(folder)]
    with (folder / "daemons.log").open("w") as log:
      self._init = subprocess.Popen(command, env=self._environment, stdout=log, stderr=log)
    try:
      self.wait_for(lambda: self.run("sinfo", "--noheader", "--states=idle", "--format=%D", check=False) == "2", 60)
    except TimeoutError:
      self.close()
      raise RuntimeError("\n".join(path.read_text() for path in sorted(folder.glob("*.log")))) from None

  def close(self) -> None:
    """Kill everything that runs in the cluster, and wait until it has gone."""
    # The first process of a namespace of processes ends after all others.
    children = Path(f"/proc/{self._init.pid}/task/{self._init.pid}/children").read_text().split()
    for pid in children or [str(self._init.pid)]:
      os.kill(int(pid), signal.SIGKILL)
    self._init.wait()

  def run(self, *command: str | Path, environment: Mapping[str, str] | None = None, check: bool = True) -> str:
    """Run a command on the cluster, and return what it prints."""
    inside = ("nsenter", "--mount", "--net", "--uts", f"--target={self._init.pid}")
    done = subprocess.run(
      [*inside, *map(str, command)], env=self._environment | (environment or {}), capture_output=True, text=True
    )
    if check and done.returncode:
      raise RuntimeError(f"{shlex.join(map(str, command))}: {done.stderr}")
    return done.stdout.strip()

  def state(self, job: str) -> dict[str, str]:
    """Return what SLURM knows of a job, such as JobState, Restarts and ExitCode."""
    fields = self.run("scontrol", "show", "--oneliner", "job", job).split()
    return dict(field.split("=", 1) for field in fields if "=" in field)

  @staticmethod
  def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    """Wait until a condition holds.

    Raises:
      TimeoutError: it does not hold in time.
    """
    give_up_at = time.monotonic() + seconds
    while not condition():
      if time.monotonic() > give_up_at:
        raise TimeoutError
      time.sleep(0.2)


def _start(folder: Path) -> None:
  """Start the daemons, as the first process of the namespaces."""
  socket.sethostname("node1")
  (folder / "hosts").write_text("127.0.0.1 localhost\n10.0.0.1 node1\n10.0.0.2 node2\n")
  subprocess.run(["mount", "--bind", folder / "hosts", "/etc/hosts"], check=True)
  for action in ("link set lo up", "address add 10.0.0.1/24 dev lo", "address add 10.0.0.2/24 dev lo"):
    subprocess.run(["ip", *action.split()], check=True)
  (folder / "slurm.conf").write_text(_CONFIG.format(folder=folder))
  (folder / "gres.conf").write_text(_GPUS)
  (folder / "state").mkdir()
  key = folder / "munge.key"
  key.touch(mode=0o600)
  key.write_bytes(os.urandom(128))
  files = {"key-file": key, "socket": folder / "munge.socket", "pid-file": folder / "munge.pid"}
  files |= {"seed-file": folder / "munge.seed"}
  # --force: a folder below /tmp will do.
  subprocess.Popen(["munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in files.items())])
  Cluster.wait_for(files["socket"].exists, 10)
  subprocess.Popen(["slurmctld", "-D"])
  for node in ("node1", "node2"):
    subprocess.Popen(["slurmd", "-D", "-N", node])
  # What loses its parent becomes a child of this process.
  while True:
    os.wait()


if __name__ == "__main__":
  _start(Path(sys.argv[1]))
