"""`train`: the run directory, refusals, stops, and what a terminal shows."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from reliability.processes import Process, Server
from running import ROOT, TINY, assert_one_clear_line, copy_of, finish, history, run, start

TRAIN = ROOT / "scripts" / "train.py"


def test_a_run_directory_is_self_contained(trained):
  names = {path.name for path in trained.iterdir()}
  assert names == {
    "config.json", "classes.json", "vocab.json", "provenance.json", "metrics.jsonl", "history.csv", "history.png",
    "report.html", "report.md", "checkpoints", "manifests", "lock",
  }  # fmt: skip
  assert (trained / "history.png").read_bytes().startswith(b"\x89PNG")
  assert "Last epoch" in (trained / "report.md").read_text()


def test_the_same_command_again_changes_nothing_and_other_settings_are_refused(trained, tmp_path, call):
  run_dir = copy_of(trained, tmp_path)
  before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
  code, stdout, _ = call("train", *TINY, "--run-dir", run_dir)
  assert code == 0
  assert "resumed at step 14" in stdout
  result = call("train", *TINY, "--run-dir", run_dir, "--learning-rate", "0.01", "--seed", "7")
  assert_one_clear_line(result, 2, "optimizer.learning_rate: 0.001 -> 0.01", "training.seed: 0 -> 7", "--run-dir")
  after = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
  assert set(after) == set(before)
  # It records each start.
  assert [path.name for path in before if after[path] != before[path]] == ["provenance.json"]


@pytest.mark.slow
def test_a_finished_run_goes_on_for_more_epochs_and_another_starts_from_it(trained, tmp_path, call):
  run_dir = copy_of(trained, tmp_path)
  assert_one_clear_line(call("train", *TINY, "--run-dir", run_dir, "--epochs", "1"), 2, "--epochs 1", "only be raised")
  code, stdout, _ = call("train", *TINY, "--run-dir", run_dir, "--epochs", "3", "--early-stopping", "9")
  assert code == 0
  assert "Changed training.epochs: 2 -> 3\nChanged training.early_stopping: None -> 9\n" in stdout
  assert [line["epoch"] for line in history(run_dir) if line["kind"] == "epoch"] == [1, 2, 3]
  assert call("evaluate", run_dir, "--platform", "cpu")[0] == 0
  command = ("train", *TINY, "--run-dir", tmp_path / "next", "--init-from", run_dir, "--epochs", "1")
  assert_one_clear_line(call(*command, "--hidden-size", "5"), 2, "--hidden-size 5", f"--init-from {run_dir} has 4")
  code, stdout, _ = call(*command)
  assert code == 0
  assert re.search(r"^From .*/run, step \d+: 199 of 199 word vectors, dense, lstm$", stdout, re.MULTILINE)


@pytest.mark.slow
def test_a_language_model_is_trained_and_a_classifier_starts_from_it(tmp_path):
  settings = *TINY, "--directions", "2"
  code, shown, _ = run("pretrain", *settings, "--no-unlabelled", "--embedding", "svd", "--run-dir", tmp_path / "lm")
  assert code == 0 and "Perplexity " in shown
  again = f"python {ROOT}/scripts/train.py --preset pretrained --data sample --init-from {tmp_path}/lm"
  assert shown.splitlines()[-1].strip() == again
  code, shown, _ = run("train", *again.split()[2:], *settings, "--run-dir", tmp_path / "run")
  assert code == 0 and "word vectors, backward_lstm, lstm, not dense" in shown
  assert_one_clear_line(run("evaluate", tmp_path / "lm"), 2, "holds a language model", "--init-from")


def test_a_preset_for_classifiers_is_no_language_model(tmp_path, call):
  result = call("pretrain", "--preset", "fast", "--run-dir", tmp_path / "run")
  assert_one_clear_line(result, 2, "--preset fast: is no language model", "train")
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("command", "next_command"),
  [(("train",), "python scripts/{}.py"), (("imdb-jax", "train"), "imdb-jax {}")],
)
def test_the_next_commands_are_shown_as_they_were_typed(command, next_command, trained, tmp_path, call):
  run_dir = copy_of(trained, tmp_path)
  code, stdout, _ = call(*command, *TINY, "--run-dir", run_dir)
  assert code == 0
  for name in ("evaluate", "predict"):
    assert f"\n  {next_command.format(name)} {run_dir}" in stdout


@contextlib.contextmanager
def long_run(server: Server, run_dir: Path) -> Iterator[Process]:
  """Start or resume a run that is long enough to be stopped."""
  arguments = [*TINY, "--epochs", "15", "--log-every", "3", "--run-dir", str(run_dir)]
  with contextlib.closing(server.start([str(TRAIN), *arguments], run_dir.parent, {})) as process:
    yield process


@pytest.fixture(scope="module")
def undisturbed(server, tmp_path_factory) -> list[dict]:
  """The lines of the run if nothing stops it."""
  run_dir = tmp_path_factory.mktemp("long") / "whole"
  with long_run(server, run_dir) as process:
    assert process.wait(120) == 0, process.stderr
  return history(run_dir)


# `make torture` sends the other two at random.
@pytest.mark.parametrize(
  ("number", "exit_code"),
  [
    (signal.SIGHUP, 129),
    pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
    pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
  ],
)
def test_a_stopped_run_resumes_to_the_same_end(undisturbed, number, exit_code, server, tmp_path):
  run_dir = tmp_path / "stopped"
  with long_run(server, run_dir) as process:
    metrics, deadline = run_dir / "metrics.jsonl", time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") > 8):
      assert time.monotonic() < deadline, process.stderr
      time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(60) == exit_code, process.stderr
    assert re.search(r"Saved step \d+ in .*stopped\. Resume with:\n  python .*train\.py .*--epochs 15", process.stderr)
  with long_run(server, run_dir) as process:
    assert process.wait(120) == 0, process.stderr
  assert history(run_dir) == undisturbed


def on_terminal(columns: int, name: str, *arguments: str, cwd: Path) -> str:
  """Run a command on a terminal, and return what it shows without colors and cursor moves."""
  ours, theirs = os.openpty()
  termios.tcsetwinsize(theirs, (40, columns))
  environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "NO_COLOR")}
  streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
  process = start(name, *arguments, cwd=cwd, env=environment | {"TERM": "xterm"}, **streams)
  os.close(theirs)
  shown = b""
  # Linux raises EIO once the command has closed the terminal.
  with contextlib.suppress(OSError), open(ours, "rb", buffering=0) as terminal:  # noqa: PTH123
    while piece := terminal.read(2**16):
      shown += piece
  assert process.wait(60) == 0, shown
  return re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", shown.decode()).replace("\r", "")


def test_a_terminal_gets_lines_that_wrap_at_words_and_a_file_whole_lines(trained, server, tmp_path):
  copy_of(trained, tmp_path)
  command = ("train", *TINY, "--run-dir", "run")
  with contextlib.closing(server.start([str(TRAIN), *command[1:]], tmp_path, {})) as process:
    assert process.wait(60) == 0, process.stderr
    whole = process.stdout
  assert max(map(len, whole.splitlines())) > 60
  assert re.search("^Best epoch .* which flatters.$", whole, re.MULTILINE)
  shown, hints = on_terminal(60, *command, cwd=tmp_path).split("\nNext:\n")
  assert max(map(len, shown.splitlines())) <= 60
  # Shell commands are for copying, and stay whole.
  assert "evaluate.py run\n" in hints
  words = [re.sub(r"\d+\.\d s", "? s", text).split() for text in (shown, whole.split("\nNext:\n")[0])]
  assert words[0] == words[1]


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (("--epochs", "0"), ("--epochs 0", "from 1")),
    (("--learning-rate", "-1"), ("--learning-rate -1", "above 0")),
    (("--input-dropout-rate", "1"), ("--input-dropout-rate 1", "below 1")),
    (("--preset", "articel"), ("--preset articel", "Did you mean article?")),
    (("--num-processes", "2"), ("--coordinator-address", "all three")),
    (("--preset", "sample", "--archive", "none"), ("--archive none: requires --data imdb",)),
    (("--epoch", "3"), ("--epoch: unknown", "--epochs")),
    (("--early-stopping", "0"), ("--early-stopping 0", "at least 1")),
    (("--clip-norm", "0"), ("--clip-norm 0", "above 0")),
    (("--weight-decay", "-1"), ("--weight-decay -1", "from 0")),
    # It would be infinite as a float32, and each device of a CPU takes memory and two threads.
    (("--learning-rate", "1e39"), ("--learning-rate 1e+39", "at most 1e+38")),
    (("--num-devices", "65536"), ("--num-devices 65536", "from 1 to 1,024")),
    (("--cache-dir", "b\udcff"), ("--cache-dir", "in UTF-8")),
  ],
)
def test_wrong_flags_are_refused_before_anything_is_written(arguments, words, tmp_path, call):
  assert_one_clear_line(call("train", *arguments, "--run-dir", tmp_path / "run"), 2, *words)
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "environment"), [(b"b\xff", {}), ("bü".encode(), {"LC_ALL": "C", "PYTHONUTF8": "0"})])
def test_a_run_directory_that_could_not_be_saved_to_is_refused_before_training(name, environment, tmp_path):
  """JAX and Orbax take names in UTF-8 only."""
  run_dir = os.fsencode(tmp_path) + b"/" + name
  process = subprocess.Popen(
    [sys.executable, TRAIN, *TINY, "--run-dir", run_dir],
    env=os.environ | environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )
  assert_one_clear_line(finish(process), 2, "--run-dir", "UTF-8", "PYTHONUTF8=1")
  assert list(tmp_path.iterdir()) == []


def test_a_full_disk_behind_standard_output_is_not_blamed_on_the_run_directory(trained, tmp_path):
  with Path("/dev/full").open("w") as full:
    process = start("train", *TINY, "--run-dir", copy_of(trained, tmp_path), stdout=full)
    _, stderr = process.communicate(timeout=120)
  result = process.returncode, "", stderr.decode()
  assert_one_clear_line(result, 2, "Standard output cannot be written: No space left on device")
  assert "--run-dir" not in result[2]


def test_a_missing_platform_is_an_error_and_the_cpu_is_not_used_instead(tmp_path, call):
  result = call("train", "--data", "sample", "--platform", "tpu", "--run-dir", tmp_path / "run")
  assert_one_clear_line(result, 6, "--platform tpu", "JAX sees only", "imdb_jax[tpu]")
  assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_something_else_is_not_touched(tmp_path, call):
  (tmp_path / "letters").mkdir()
  (tmp_path / "letters" / "love.txt").write_text("dear")
  result = call("train", *TINY, "--run-dir", tmp_path / "letters")
  assert_one_clear_line(result, 2, "letters", "nothing was touched")
  assert [path.name for path in (tmp_path / "letters").iterdir()] == ["love.txt"]


def test_a_run_directory_that_cannot_be_written(tmp_path, call):
  (tmp_path / "file").write_text("in the way")
  assert_one_clear_line(call("train", *TINY, "--run-dir", tmp_path / "file" / "run"), 2, "--run-dir")


def test_missing_and_damaged_archives(tmp_path, call):
  command = ("train", "--platform", "cpu", "--run-dir", tmp_path / "run", "--archive")
  assert_one_clear_line(call(*command, tmp_path / "none.tar.gz"), 3, "none.tar.gz", "--archive")
  (tmp_path / "bad.tar.xz").write_bytes(b"not an archive")
  assert_one_clear_line(call(*command, tmp_path / "bad.tar.xz"), 3, "bad.tar.xz")
  assert not (tmp_path / "run").exists()


@pytest.mark.skipif(
  "IMDB_ARCHIVE" not in os.environ, reason="IMDB_ARCHIVE is not set to an archive of the real reviews"
)
def test_the_real_reviews(tmp_path):
  # A cache of its own, so that both the first and a later start are seen.
  arguments = ("--platform", "cpu", "--limit", "500", "--epochs", "1", "--hidden-size", "8", "--embedding-size", "8")
  arguments += ("--archive", os.environ["IMDB_ARCHIVE"], "--cache-dir", str(tmp_path / "cache"))
  first = run("train", *arguments, "--run-dir", tmp_path / "first")
  assert first[0] == 0, first[2]
  assert "Reading the reviews" in first[1]
  assert "not the texts" not in first[1]
  second = run("train", *arguments, "--run-dir", tmp_path / "second")
  assert second[0] == 0, second[2]
  assert "Reading the reviews" not in second[1]
  assert history(tmp_path / "first") == history(tmp_path / "second")
