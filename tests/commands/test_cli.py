"""Behaviour that all commands share: help, versions, Ctrl-C and closed streams."""

import io
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version

import numpy as np
import pytest
from running import ROOT, TINY, assert_one_clear_line, copy_of, run

from imdb_jax import cli, exits

COMMANDS = (
  *("train", "evaluate", "predict", "explain", "report", "compare", "serve", "export", "check", "plot", "prepare"),
  "pretrain",
)


def test_help_answers_at_once():
  started = time.perf_counter()
  code, stdout, _ = run("train", "--help")
  assert code == 0
  assert "usage" in stdout
  # Generous: importing JAX alone takes longer on a busy machine.
  assert time.perf_counter() - started < 2


def test_no_help_imports_jax():
  code = f"""
import contextlib, sys
from imdb_jax import cli, exits
for name in {COMMANDS}:
  sys.argv = [name, "--help"]
  with contextlib.suppress(SystemExit):
    cli.run(name)
sys.exit("jax" in sys.modules)
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert done.stdout.count("usage: ") == len(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_scripts_and_the_installed_command_have_the_same_help(name, call):
  _, script, _ = call(name, "--help")
  code, installed, _ = call("imdb-jax", name, "--help")
  assert code == 0
  assert f"usage: imdb-jax {name}" in installed
  # The names differ in length, so the usage may wrap elsewhere.
  assert script.replace(f"python scripts/{name}.py", f"imdb-jax {name}").split() == installed.split()


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_the_installed_command_lists_its_commands(arguments, call):
  code, stdout, _ = call("imdb-jax", *arguments)
  assert code == 0
  assert [line.split()[0] for line in stdout.splitlines()[3:]] == list(COMMANDS)


def test_the_installed_command_refuses_unknown_commands(call):
  assert_one_clear_line(call("imdb-jax", "trian"), 2, "trian: unknown command", *COMMANDS)


@pytest.mark.parametrize("arguments", [("imdb-jax", "--version"), ("imdb-jax", "plot", "--version")])
def test_versions(arguments, call):
  assert call(*arguments) == (0, f"imdb_jax {version('imdb_jax')}\n", "")


# The first import is one of the command line, the second is within that of JAX.
@pytest.mark.parametrize(
  ("name", "module"), [("train", "platformdirs"), ("train", "jax._src.config"), ("predict", "jax._src.config")]
)
def test_ctrl_c_during_imports_ends_python_without_a_traceback(name, module, tmp_path):
  """There, an exception would be lost or crash JAX."""
  script = ROOT / "scripts" / f"{name}.py"
  # As in the foreground: background processes inherit that Ctrl-C is ignored.
  code = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
  code += f"runpy.run_path({str(script)!r}, run_name='__main__')"
  arguments = (*TINY, "--run-dir", str(tmp_path / "run")) if name == "train" else (str(tmp_path / "run"), "good")
  command = [sys.executable, "-X", "importtime", "-c", code, *arguments]
  process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
  assert process.stderr is not None
  with process.stderr:
    while process.stderr.readline().split()[-1:] != [module]:
      assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.stderr.read()
  # 130 if the imports had been done when the signal came.
  assert process.wait(timeout=60) in (-signal.SIGINT, 130)


def test_ctrl_c_during_slow_work_is_reported_in_one_line(capsys):
  previous = signal.signal(signal.SIGINT, signal.SIG_DFL)
  try:
    with pytest.raises(SystemExit) as leaving, exits.clear_errors(), exits.interruptible():
      # Otherwise the next line would end the tests.
      assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
      os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
  finally:
    signal.signal(signal.SIGINT, previous)
  assert leaving.value.code == 130
  assert capsys.readouterr().err == "Interrupted; there was nothing to save.\n"


@pytest.mark.parametrize("handler", [signal.SIG_DFL, signal.SIG_IGN])
def test_the_installed_command_leaves_ctrl_c_to_the_kernel_until_it_works(handler, monkeypatch, capsys):
  """As the scripts do; an ignored Ctrl-C, as after nohup, stays ignored."""
  monkeypatch.setattr(sys, "argv", ["imdb-jax", "--version"])
  previous = signal.signal(signal.SIGINT, handler)
  try:
    cli.main()
    assert signal.getsignal(signal.SIGINT) == handler
    signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.main()
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
  finally:
    signal.signal(signal.SIGINT, previous)


@pytest.fixture
def narrow(monkeypatch):
  """Give standard output another encoding; return a function that returns what was written."""

  def become(encoding: str) -> Callable[[], str]:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding))
    return lambda: written.getvalue().decode(encoding)

  return become


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_characters_that_standard_output_lacks_are_replaced(encoding, narrow, trained, tmp_path, monkeypatch, call):
  run_dir, written = copy_of(trained, tmp_path / "☃"), narrow(encoding)
  for command in (
    ("train", *TINY, "--run-dir", run_dir),
    ("predict", run_dir, "☃ good", "good " * 40, "\udcff", "--platform", "cpu"),
    ("plot", run_dir),
  ):
    code, _, stderr = call(*command)
    assert (code, stderr) == (0, "")
  snowman, ellipsis = ("☃", "…") if encoding == "utf-8" else ("?", "?")
  shown = written()
  for text in (f"evaluate.py '{run_dir}'".replace("☃", snowman), f"  {snowman} good\n", f" good good{ellipsis}\n"):
    assert text in shown


# JAX would fail while it is imported, wait forever, or abort while it computes.
@pytest.mark.parametrize("megabytes", [200, 500, 1000])
@pytest.mark.parametrize("command", ["train", "predict", "evaluate"])
def test_too_little_memory_is_reported_at_once_and_in_one_line(command, megabytes, trained, tmp_path):
  arguments = (*TINY, "--run-dir", tmp_path / "run") if command == "train" else (trained,)
  script = shlex.join([sys.executable, str(ROOT / "scripts" / f"{command}.py"), *map(str, arguments)])
  limited = f"ulimit -v {megabytes * 1024}; exec {script}"
  done = subprocess.run(["bash", "-c", limited], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30)
  assert_one_clear_line((done.returncode, "", done.stderr), 6, "Not enough memory", "2,000 MB", "ulimit -v")
  assert list(tmp_path.iterdir()) == []


def test_names_that_a_stranger_chose_cannot_write_lines_or_move_the_cursor(trained, tmp_path):
  copy = copy_of(trained, tmp_path / "a\n\x1b[2J")
  newest = max((copy / "checkpoints").iterdir(), key=lambda step: int(step.name))
  (newest / "\n\n\n\x1b[2J").touch()
  code, _, stderr = run("predict", copy, "good", "--platform", "cpu", "--step", newest.name)
  assert code == 4
  assert [line.split(":")[0] for line in stderr.splitlines()] == ["warning", "error"]
  assert "\x1b" not in stderr


def test_an_array_that_does_not_fit_into_the_memory_is_reported_in_one_line(capsys):
  with pytest.raises(SystemExit) as leaving, exits.clear_errors():
    np.zeros(2**60, np.int8)
  assert_one_clear_line((leaving.value.code, "", capsys.readouterr().err), 6, "Not enough memory: Unable to allocate")


def test_lines_of_one_of_several_processes_begin_with_time_and_name():
  code = (
    "import logging; from imdb_jax import exits, errors\n"
    "with exits.clear_errors(), exits.clear_errors('node2 process 1'):\n"
    "  logging.warning('low')\n"
    "  raise errors.DataError('none')\n"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert done.returncode == 3
  lines = [re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]{8}[+-]\d{4} (.*)", line) for line in done.stderr.splitlines()]
  assert [line and line[1] for line in lines] == ["node2 process 1: warning: low", "node2 process 1: error: none"]


def test_closed_streams_are_not_errors(trained):
  script = shlex.join([sys.executable, str(ROOT / "scripts" / "predict.py"), str(trained), "--platform", "cpu"])
  done = subprocess.run(f"{script} good >&-", shell=True, stderr=subprocess.PIPE, text=True)
  assert (done.returncode, done.stderr) == (0, "")
  done = subprocess.run(f"{script} <&-", shell=True, capture_output=True, text=True)
  assert_one_clear_line((done.returncode, done.stdout, done.stderr), 2, "--file -: ")
