"""The command `compare`: flags, exit codes and signals."""

import json
import os
import signal
from pathlib import Path

import pytest
from running import Call, assert_one_clear_line

from imdb_jax.comparison import rows
from imdb_jax.data import sample
from imdb_jax.errors import DivergenceError

TINY = {"model": {"embedding_size": 4, "hidden_size": 4}, "training": {"epochs": 1, "batch_size": 20}}
FLAGS = ("--data", "sample", "--platform", "cpu", "--rows", "majority,lstm")


@pytest.fixture(autouse=True)
def few_reviews(monkeypatch):
  reviews = {name: each.take(range(40)) for name, each in sample.load().items()}
  monkeypatch.setattr(sample, "load", lambda: reviews)
  monkeypatch.setitem(rows.RECURRENT, "lstm", ("sample", TINY))


@pytest.mark.slow
def test_a_comparison_prints_its_table_and_repeats_it_at_once(call: Call, tmp_path):
  code, first, stderr = call("compare", *FLAGS, "--run-dir", tmp_path)
  assert (code, stderr) == (0, "")
  assert "Epoch 1/1" in first
  code, second, stderr = call("compare", *FLAGS, "--run-dir", tmp_path)
  assert (code, stderr) == (0, "")
  assert "Epoch" not in second
  table = first[first.index("Model") :]
  assert second.endswith(table)
  assert [line.split()[0] for line in table.splitlines()[:3]] == ["Model", "majority", "lstm"]


@pytest.mark.parametrize("stop", [signal.SIGINT, KeyboardInterrupt, signal.SIGTERM])
def test_a_signal_stops_it_with_the_command_that_resumes(stop, call: Call, tmp_path, monkeypatch):
  fit = rows.fit

  def stopped(config):
    # During the import or a linear row, Ctrl-C is an exception; during training, a signal.
    if stop is KeyboardInterrupt:
      raise KeyboardInterrupt
    monkeypatch.setattr("imdb_jax.training.loop.show_header", lambda *_: os.kill(os.getpid(), stop))
    return fit(config)

  monkeypatch.setattr(rows, "fit", stopped)
  code, _, stderr = call("compare", *FLAGS, "--run-dir", tmp_path)
  assert code == (143 if stop == signal.SIGTERM else 130)
  assert f"Saved in {tmp_path}. Resume with:\n  python scripts/compare.py --data sample" in stderr
  monkeypatch.undo()
  assert (tmp_path / "majority-seed0.json").exists()


def test_a_failed_row_gives_its_exit_code_after_the_others(call: Call, tmp_path, monkeypatch):
  def diverge(config):
    raise DivergenceError("Step 3 is not finite.")

  monkeypatch.setattr(rows, "fit", diverge)
  result = call("compare", *FLAGS, "--run-dir", tmp_path)
  assert_one_clear_line(result, 5, "1 of 2 rows failed; lstm: Step 3 is not finite.")
  assert [row["name"] for row in json.loads((tmp_path / "comparison.json").read_text())["rows"]] == ["majority"]


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (("--rows", "majority,ltsm"), ("--rows ltsm: unknown", "lstm")),
    (("--rows", ""), ("--rows : unknown",)),
    (("--num-seeds", "0"), ("--num-seeds 0: must be",)),
    (("--num-seeds", "x"), ("--num-seeds: invalid int value",)),
    (("--validation", "train"), ("--validation 'train': must be one of test, split",)),
    (("--quick", "--archive", "x"), ("--archive x: requires --data imdb",)),
    (("--qiuck",), ("--qiuck: unknown", "--quick")),
  ],
)
def test_wrong_flags_are_refused_in_one_line(flags, words, call: Call, tmp_path):
  assert_one_clear_line(call("compare", *flags, "--run-dir", tmp_path / "run"), 2, *words)
  assert not (tmp_path / "run").exists()


def test_texts_of_ones_own_are_compared(call: Call, tmp_path):
  rows = [f"{'good' if row % 3 else 'bad'} film {row},{'up' if row % 3 else 'down'}" for row in range(60)]
  (tmp_path / "own.csv").write_text("\n".join(["text,label", *rows]))
  flags = ("--data", tmp_path / "own.csv", "--rows", "majority,tfidf", "--run-dir", tmp_path / "run")
  assert call("compare", *flags)[0] == 0
  found = json.loads((tmp_path / "run" / "comparison.json").read_text())
  assert [row["name"] for row in found["rows"]] == ["majority", "tfidf"]
  assert found["rows"][1]["accuracy"] == 1 > found["rows"][0]["accuracy"]
  assert_one_clear_line(
    call("compare", "--data", "imbd", *flags[2:4], "--run-dir", tmp_path / "other"), 3, "imbd: no such file or folder"
  )


@pytest.mark.parametrize("columns", [45, 60, 100])
def test_the_table_fits_the_terminal(columns, call: Call, tmp_path, monkeypatch):
  for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": str(columns)}.items():
    monkeypatch.setenv(name, value)
  code, stdout, _ = call("compare", *FLAGS[:4], "--rows", "majority,tfidf", "--run-dir", Path(tmp_path))
  assert code == 0
  assert max(map(len, stdout.splitlines())) <= columns
  (heading,) = (line for line in stdout.splitlines() if line.startswith("Model"))
  assert ("Rev/s" in heading) == (columns >= 60)
