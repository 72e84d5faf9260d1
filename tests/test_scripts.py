"""The commands as people type them, in processes of their own."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from imdb_jax import cli

ROOT = Path(__file__).parent.parent
TINY = ("--data", "sample", "--platform", "cpu", "--sequence-length", "24", "--embedding-size", "4")
TINY += ("--hidden-size", "4", "--vocabulary-size", "200", "--limit", "200", "--epochs", "2")


def start(script: str, *arguments: str | Path, **options) -> subprocess.Popen:
  command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *map(str, arguments)]
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
  return subprocess.Popen(command, **(pipes | {"stdin": subprocess.DEVNULL} | options))


def finish(process: subprocess.Popen, stdin: bytes | None = None) -> tuple[int, str, str]:
  stdout, stderr = process.communicate(stdin, timeout=120)
  return process.returncode, stdout.decode(), stderr.decode()


def run(script: str, *arguments: str | Path, stdin: bytes | None = None) -> tuple[int, str, str]:
  options = {} if stdin is None else {"stdin": subprocess.PIPE}
  return finish(start(script, *arguments, **options), stdin)


def assert_one_clear_line(result: tuple[int, str, str], exit_code: int, *words: str) -> None:
  code, _, stderr = result
  assert code == exit_code, stderr
  assert "Traceback" not in stderr
  assert len(stderr.strip().splitlines()) == 1, stderr
  for word in words:
    assert word in stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
  run_dir = tmp_path_factory.mktemp("scripts") / "run"
  code, stdout, stderr = run("train", *TINY, "--run-dir", run_dir)
  assert (code, stderr) == (0, "")
  assert "Compiled in" in stdout
  assert "Epoch 2/2" in stdout
  return run_dir


def history(run_dir: Path) -> list[dict]:
  """The lines of metrics.jsonl without their times."""
  lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
  return [{name: value for name, value in line.items() if "seconds" not in name} for line in lines]


def test_a_run_directory_is_self_contained(trained):
  names = {path.name for path in trained.iterdir()}
  assert names == {
    "config.json", "vocab.json", "provenance.json", "metrics.jsonl", "history.csv", "history.png", "report.md",
    "checkpoints", "manifests", "lock",
  }  # fmt: skip
  assert (trained / "history.png").read_bytes().startswith(b"\x89PNG")
  assert "Last epoch" in (trained / "report.md").read_text()


def test_evaluation_agrees_with_what_training_recorded(trained):
  code, stdout, _ = run("evaluate", trained, "--step", "latest", "--json", "--platform", "cpu")
  assert code == 0
  result, last = json.loads(stdout), history(trained)[-1]
  assert result["num_reviews"] == 200
  assert result["accuracy"] == last["val_accuracy"]
  assert result["loss"] == pytest.approx(last["val_loss"], rel=1e-6)
  cells = ("true_negatives", "false_positives", "false_negatives", "true_positives")
  assert sum(result[cell] for cell in cells) == 200


def test_every_text_gets_an_answer(trained, tmp_path):
  texts = ["A film I will not forget.", "", "zzzz qqqq", "good " * 200_000]
  code, stdout, stderr = run("predict", trained, "--platform", "cpu", "--json", stdin="\n".join(texts).encode())
  assert code == 0, stderr
  answers = [json.loads(line) for line in stdout.splitlines()]
  assert [answer["text"] for answer in answers] == texts
  assert all(0 < answer["probability"] < 1 for answer in answers)
  assert answers[1]["known_words"] == answers[2]["known_words"] == 0

  (tmp_path / "reviews.txt").write_bytes(b"caf\xff\xfe\n" + texts[0].encode() + b"\n")
  code, stdout, stderr = run("predict", trained, "--platform", "cpu", "--file", tmp_path / "reviews.txt")
  assert code == 0, stderr
  # The same text in another company and through another way in has the same probability.
  assert float(stdout.splitlines()[1].split()[0]) == pytest.approx(answers[0]["probability"], abs=1e-4)


def test_a_pipe_is_answered_line_by_line(trained):
  process = start("predict", trained, "--platform", "cpu", stdin=subprocess.PIPE)
  assert process.stdin is not None
  assert process.stdout is not None
  for text in ("good", "bad"):
    process.stdin.write(f"{text}\r\n".encode())
    process.stdin.flush()
    # Before the pipe is closed; a program at its other end may wait for this.
    assert f"  {text}" in process.stdout.readline().decode().rstrip()
  assert finish(process)[0] == 0


def test_many_short_reviews_are_not_encoded_at_once(tmp_path, monkeypatch, capsys):
  """A piece of a file holds a million empty lines, whose tokens would take a gigabyte."""
  sizes = []

  def predict(texts):
    sizes.append(len(texts))
    return [0.0] * len(texts)

  classifier = types.SimpleNamespace(predict=predict, vocabulary=types.SimpleNamespace(ids=str.split))
  monkeypatch.setattr(cli._Predict, "load", lambda self: classifier)
  (tmp_path / "reviews.txt").write_text("bad\n" * 1_000)
  cli._Predict(run_dir=tmp_path, file=str(tmp_path / "reviews.txt"))()
  assert sum(sizes) == len(capsys.readouterr().out.splitlines()) == 1_000
  assert max(sizes) <= 256


def test_a_review_is_one_line_without_control_characters(trained):
  code, stdout, stderr = run("predict", trained, "--platform", "cpu", "good\nfilm \x1b[31m\a")
  assert code == 0, stderr
  assert stdout.splitlines() == [stdout.removesuffix("\n")]
  assert "good film  [31m" in stdout
  assert "\x1b" not in stdout


def test_closed_streams_are_no_errors(trained):
  script = shlex.join([sys.executable, str(ROOT / "scripts" / "predict.py"), str(trained), "--platform", "cpu"])
  done = subprocess.run(f"{script} good >&-", shell=True, stderr=subprocess.PIPE, text=True)
  assert (done.returncode, done.stderr) == (0, "")
  done = subprocess.run(f"{script} <&-", shell=True, capture_output=True, text=True)
  assert_one_clear_line((done.returncode, done.stdout, done.stderr), 2, "--file -: ")


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (("predict", "RUN", "good", "--file", "reviews.txt"), "not together with reviews on the command line"),
    (("predict", "RUN", "--file", "/dev/zero"), "a line of more than 67,108,864 bytes"),
    (("train", "--preset", "sample", "--archive", "none"), "--archive none: only with --data imdb"),
  ],
)
def test_what_cannot_be_meant_is_refused(trained, arguments, words):
  result = run(*(str(trained) if argument == "RUN" else argument for argument in arguments), "--platform", "cpu")
  assert_one_clear_line(result, 2, words)


def test_plot_draws_where_it_is_told(trained, tmp_path):
  assert run("plot", trained, "--output", tmp_path / "curves.png")[0] == 0
  assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_command_again_changes_nothing_and_other_settings_are_refused(trained):
  before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
  code, stdout, _ = run("train", *TINY, "--run-dir", trained)
  assert code == 0
  assert "resumed at step 14" in stdout
  result = run("train", *TINY, "--run-dir", trained, "--learning-rate", "0.01", "--seed", "7")
  assert_one_clear_line(result, 2, "optimizer.learning_rate: 0.001 -> 0.01", "training.seed: 0 -> 7", "--run-dir")
  after = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
  assert set(after) == set(before)
  assert after[trained / "metrics.jsonl"] == before[trained / "metrics.jsonl"]
  changed = {path.name for path in before if "checkpoints" in path.parts and after[path] != before[path]}
  assert not changed


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_stopped_run_resumes_to_the_same_end(tmp_path, number, exit_code):
  arguments = (*TINY, "--epochs", "15", "--log-every", "3")
  process = start("train", *arguments, "--run-dir", tmp_path / "stopped")
  metrics = tmp_path / "stopped" / "metrics.jsonl"
  deadline = time.monotonic() + 60
  while not (metrics.exists() and metrics.read_text().count("\n") > 8):
    assert process.poll() is None, finish(process)
    assert time.monotonic() < deadline
    time.sleep(0.01)
  process.send_signal(number)
  code, _, stderr = finish(process)
  assert code == exit_code, stderr
  assert "Saved step" in stderr
  assert "--epochs 15" in stderr
  assert run("train", *arguments, "--run-dir", tmp_path / "stopped")[0] == 0
  assert run("train", *arguments, "--run-dir", tmp_path / "whole")[0] == 0
  assert history(tmp_path / "stopped") == history(tmp_path / "whole")


@pytest.mark.parametrize("module", ["tyro", "jax._src.config"])
@pytest.mark.parametrize("name", ["train", "predict"])
def test_ctrl_c_while_python_imports_ends_it_without_a_traceback(name, module, tmp_path):
  """An exception there would be lost, or crash JAX."""
  script = ROOT / "scripts" / f"{name}.py"
  # As in the foreground: tests in the background have their children ignore Ctrl-C.
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
  # 130 where the imports were done before the signal came.
  assert process.wait(timeout=60) in (-signal.SIGINT, 130)


def test_ctrl_c_in_slow_work_is_told_in_one_line(capsys):
  previous = signal.signal(signal.SIGINT, signal.SIG_DFL)
  try:
    with pytest.raises(SystemExit) as leaving, cli._clear_errors(), cli._unwinding():
      # Else the next line would end the tests.
      assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
      os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
  finally:
    signal.signal(signal.SIGINT, previous)
  assert leaving.value.code == 130
  assert capsys.readouterr().err == "Interrupted; there was nothing to save.\n"


def train_in_two(run_dir: Path, *of_second: str | Path, second: str = "train") -> list[tuple[int, str, str]]:
  """Trains in two processes, of which the second gets arguments of its own."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{probe.getsockname()[1]}"
  shared = (*TINY, "--num-devices", "1", "--run-dir", run_dir, "--coordinator-address", address, "--num-processes", "2")
  first = start("train", *shared, "--process-id", "0")
  return [finish(process) for process in (first, start(second, *shared, "--process-id", "1", *of_second))]


def test_where_one_process_cannot_go_on_the_other_leaves_too(tmp_path):
  first, second = train_in_two(tmp_path / "run", "--run-dir", tmp_path / "another")
  assert_one_clear_line(second, 2, "not the folder in which process 0 has made the run")
  assert_one_clear_line(first, 6, "Another process could not go on")


@pytest.mark.parametrize(
  ("flags", "exit_code", "words"),
  [
    (("--seed", "7"), 2, "different values of --seed."),
    (("--steps-per-dispatch", "4"), 2, "different values of --steps-per-dispatch."),
    (("--num-devices", "2"), 6, "different numbers of devices (process 0: 1, process 1: 2)"),
  ],
)
def test_processes_that_would_wait_for_each_other_for_good_are_refused(flags, exit_code, words, tmp_path):
  for result in train_in_two(tmp_path / "run", *flags):
    assert_one_clear_line(result, exit_code, words)


def test_where_one_process_is_killed_before_training_the_other_leaves_in_one_line(tmp_path):
  (tmp_path / "killed.py").write_text(
    "import os, signal\n"
    "from imdb_jax import cli\n"
    "from imdb_jax.data import tokens\n"
    "tokens.load = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)\n"
    "cli.train()\n"
  )
  started = time.perf_counter()
  first, second = train_in_two(tmp_path / "run", second=str(tmp_path / "killed"))
  assert second[0] == -signal.SIGKILL
  assert_one_clear_line(first, 6, "Another process has gone")
  assert time.perf_counter() - started < 40, "JAX would wait for a minute"


def test_two_processes_train_as_one(tmp_path):
  results = train_in_two(tmp_path / "two")
  assert [result[0] for result in results] == [0, 0], results
  # Gloo, which carries JAX's messages between CPUs, writes lines of its own to standard output.
  assert all(line.startswith("[Gloo]") for line in results[1][1].splitlines()), "only the first process writes"
  assert run("train", *TINY, "--num-devices", "1", "--run-dir", tmp_path / "one")[0] == 0
  for two, one in zip(history(tmp_path / "two"), history(tmp_path / "one"), strict=True):
    assert two.pop("kind") == one.pop("kind")
    assert two == pytest.approx(one, rel=1e-4)
  code, stdout, _ = run("evaluate", tmp_path / "two", "--platform", "cpu", "--json", "--step", "latest")
  assert code == 0
  assert json.loads(stdout)["loss"] == pytest.approx(history(tmp_path / "one")[-1]["val_loss"], rel=1e-4)


@pytest.mark.parametrize("script", ["train", "evaluate", "predict", "plot", "prepare"])
def test_help_answers_in_under_a_second(script):
  started = time.perf_counter()
  code, stdout, _ = run(script, "--help")
  assert code == 0
  assert "usage" in stdout
  # Bounded generously: the point is that nothing imports JAX, which takes longer than this on a busy machine.
  assert time.perf_counter() - started < 2


def test_help_does_not_import_jax():
  code = "import sys, imdb_jax.cli; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (("--epochs", "0"), ("--epochs 0", "from 1")),
    (("--learning-rate", "-1"), ("--learning-rate", "positive")),
    (("--input-dropout-rate", "1"), ("--input-dropout-rate", "below 1")),
    (("--preset", "articel"), ("--preset articel", "article")),
    (("--num-processes", "2"), ("--coordinator-address",)),
  ],
)
def test_a_flag_out_of_range(arguments, words, tmp_path):
  assert_one_clear_line(run("train", *arguments, "--run-dir", tmp_path / "run"), 2, *words)
  assert not (tmp_path / "run").exists()


def test_a_misspelt_flag_names_the_nearest():
  code, _, stderr = run("train", "--epoch", "3")
  assert code == 2
  assert "--epochs" in stderr
  assert "Traceback" not in stderr


def test_no_gpu_is_an_error_and_not_a_cpu_run(tmp_path):
  result = run("train", "--data", "sample", "--platform", "tpu", "--run-dir", tmp_path / "run")
  assert_one_clear_line(result, 6, "--platform tpu", "JAX sees only", "imdb_jax[tpu]")


def test_a_foreign_folder_is_not_touched(tmp_path):
  (tmp_path / "letters").mkdir()
  (tmp_path / "letters" / "love.txt").write_text("dear")
  result = run("train", *TINY, "--run-dir", tmp_path / "letters")
  assert_one_clear_line(result, 2, "letters", "nothing was touched")
  assert [path.name for path in (tmp_path / "letters").iterdir()] == ["love.txt"]


def test_an_unwritable_run_directory(tmp_path):
  (tmp_path / "file").write_text("in the way")
  assert_one_clear_line(run("train", *TINY, "--run-dir", tmp_path / "file" / "run"), 2, "--run-dir")


def test_a_plot_that_cannot_be_written(trained, tmp_path):
  (tmp_path / "folder.png").mkdir()
  for output in (tmp_path / "absent" / "curves.png", tmp_path / "folder.png"):
    assert_one_clear_line(run("plot", trained, "--output", output), 2, f"--output {output}: cannot be written")


def test_a_store_that_cannot_be_written(tmp_path):
  """It is noticed before the archive is read."""
  (tmp_path / "file").write_text("in the way")
  for data_dir in (tmp_path / "file" / "store", "/proc"):
    result = run("prepare", "--archive", tmp_path / "none.tar.gz", "--data-dir", data_dir)
    assert_one_clear_line(result, 2, f"--data-dir {data_dir}: cannot be written")
  result = run("prepare", "--archive", tmp_path / "none.tar.gz", "--data-dir", tmp_path / "new" / "store")
  assert_one_clear_line(result, 3, "none.tar.gz")


def test_no_run_and_no_checkpoint(tmp_path, trained):
  assert_one_clear_line(run("evaluate", tmp_path), 2, "not the folder of a run")
  assert_one_clear_line(run("plot", tmp_path), 2, "not the folder of a run")
  assert_one_clear_line(run("evaluate", trained, "--step", "3", "--platform", "cpu"), 4, "no step 3", "14")


def copy_of(run_dir: Path, target: Path) -> Path:
  subprocess.run(["cp", "-r", run_dir, target], check=True)
  return target


def test_a_config_that_does_not_fit_the_checkpoint(trained, tmp_path):
  copy = copy_of(trained, tmp_path / "copy")
  config = json.loads((copy / "config.json").read_text())
  config["dataset"]["vocabulary_size"] = 300
  (copy / "config.json").write_text(json.dumps(config))
  assert_one_clear_line(run("predict", copy, "good", "--platform", "cpu"), 4, "embedding", "(200, 4)", "(300, 4)")


def test_a_damaged_config(trained, tmp_path):
  copy = copy_of(trained, tmp_path / "copy")
  config = json.loads((copy / "config.json").read_text())
  config["model"]["hidden_size"] = "4; rm -rf /"
  (copy / "config.json").write_text(json.dumps(config))
  assert_one_clear_line(run("predict", copy, "good"), 2, "config.json", "--hidden-size", "whole number")


def test_missing_and_damaged_archives(tmp_path):
  missing = run("train", "--archive", tmp_path / "none.tar.gz", "--run-dir", tmp_path / "run")
  assert_one_clear_line(missing, 3, "none.tar.gz", "--archive")
  (tmp_path / "bad.tar.xz").write_bytes(b"not an archive")
  damaged = run("train", "--archive", tmp_path / "bad.tar.xz", "--run-dir", tmp_path / "run", "--platform", "cpu")
  assert_one_clear_line(damaged, 3, "bad.tar.xz")
  assert not (tmp_path / "run").exists()


def test_a_reader_that_has_had_enough(trained):
  process = start("predict", trained, "--platform", "cpu", *["good"] * 5000)
  assert process.stdout is not None
  process.stdout.readline()
  process.stdout.close()
  assert process.stderr is not None
  with process.stderr:
    assert process.stderr.read() == b""
  assert process.wait(timeout=60) == 0


@pytest.mark.skipif("IMDB_ARCHIVE" not in os.environ, reason="IMDB_ARCHIVE names no archive of the real reviews")
def test_the_real_reviews(tmp_path):
  # Its own cache, so that both the first and the second start are seen.
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
