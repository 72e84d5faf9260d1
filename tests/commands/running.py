"""Running the commands: in this process, or as people do, in processes of their own."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
TINY = ("--data", "sample", "--platform", "cpu", "--num-devices", "1", "--sequence-length", "24", "--limit", "200")
TINY += ("--embedding-size", "4", "--hidden-size", "4", "--vocabulary-size", "200", "--epochs", "2")

# Exit code, standard output and standard error.
Result = tuple[int, str, str]
# Runs a command in this process: its name and its arguments.
Call = Callable[..., Result]


def start(name: str, *arguments: str | Path, **options) -> subprocess.Popen:
  """Start a script, or with a path another program in Python."""
  command = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *map(str, arguments)]
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
  return subprocess.Popen(command, **(pipes | {"stdin": subprocess.DEVNULL} | options))


def finish(process: subprocess.Popen, stdin: bytes | None = None) -> Result:
  """Wait for the end of a process."""
  stdout, stderr = process.communicate(stdin, timeout=120)
  return process.returncode, stdout.decode(), stderr.decode()


def run(name: str, *arguments: str | Path, stdin: bytes | None = None) -> Result:
  """Run a script to its end."""
  options = {} if stdin is None else {"stdin": subprocess.PIPE}
  return finish(start(name, *arguments, **options), stdin)


def assert_one_clear_line(result: Result, exit_code: int, *words: str) -> None:
  """Assert that a command failed with an exit code and one line that holds some words."""
  code, _, stderr = result
  assert code == exit_code, stderr
  assert "Traceback" not in stderr
  assert len(stderr.strip().splitlines()) == 1, stderr
  for word in words:
    assert word in stderr


def history(run_dir: Path) -> list[dict]:
  """Return the lines of metrics.jsonl without their times."""
  lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
  return [{name: value for name, value in line.items() if "second" not in name and name != "time"} for line in lines]


def copy_of(run_dir: Path, folder: Path) -> Path:
  """Copy a run into a folder."""
  return Path(shutil.copytree(run_dir, folder / run_dir.name))
