"""The tutorial docs/own_data.md: its blocks run one after another in an empty folder."""

import csv
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Language and content of each fenced block.
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

pytestmark = [
  pytest.mark.slow,
  # Less than a minute on two idle cores.
  pytest.mark.timeout(600),
  pytest.mark.skipif(not (shutil.which("bash") and shutil.which("curl")), reason="the blocks need bash and curl"),
]


def free_port() -> int:
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    return listener.getsockname()[1]


def test_the_blocks_of_the_tutorial_work_one_after_another(tmp_path):
  programs, folder, port = tmp_path / "bin", tmp_path / "empty", str(free_port())
  for each in (programs, folder):
    each.mkdir()
  command = programs / "imdb-jax"
  command.write_text(f"#!{sys.executable}\nfrom imdb_jax.cli import main\n\nmain()\n")
  command.chmod(0o755)
  environment = os.environ | {
    "PATH": f"{programs}:{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT),
    "IMDB_JAX_CACHE": str(tmp_path / "cache"),
  }
  settings = {"cwd": folder, "env": environment, "text": True, "stdin": subprocess.DEVNULL}
  printed, service = {}, None
  try:
    for language, block in BLOCK.findall((ROOT / "docs" / "own_data.md").read_text(encoding="utf-8")):
      block = block.replace("8000", port)
      program = [sys.executable, "-c"] if language == "python" else ["bash", "-ec"]
      if "imdb-jax serve" in block:
        # `exec`, so that the signal reaches the service.
        service = subprocess.Popen(
          [*program, f"exec {block}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **settings
        )
        assert any(port in line for line in service.stdout), "the service does not start"
        continue
      done = subprocess.run([*program, block], capture_output=True, **settings)
      assert done.returncode == 0, f"{block}{done.stdout}{done.stderr}"
      printed[block.split("\n")[0]] = done.stdout
  finally:
    if service is not None:
      service.terminate()
      service.communicate(timeout=30)
  assert service is not None
  answer = next(json.loads(text) for block, text in printed.items() if block.startswith("curl"))
  assert answer["class"] == "delivery"
  with (folder / "scored.csv").open(newline="", encoding="utf-8") as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == 600
  assert {"id", "text", "label", "class", "probability", "probability_account", "known_words"} <= set(rows[0])
  assert sum(row["class"] == row["label"] for row in rows) > 570
  assert (folder / "tickets-model").is_dir()
  accuracy = re.search(r"accuracy +(\S+)", printed["imdb-jax evaluate runs/tickets"])
  assert accuracy is not None
  assert float(accuracy[1]) > 0.95
