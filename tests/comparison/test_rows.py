"""A comparison is computed row by row, resumes, and survives rows that fail."""

import dataclasses
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import filelock
import jax
import numpy as np
import pytest
from comparison.few import RECURRENT, TINY, base, few_reviews
from training.tiny import lines

from imdb_jax import Classifier
from imdb_jax.comparison import results, rows, table
from imdb_jax.config import Config, DataConfig
from imdb_jax.data import sample, sources, tokens
from imdb_jax.data.reviews import canonical
from imdb_jax.errors import PlatformError, UsageError
from imdb_jax.processes import Interrupted
from imdb_jax.report import page
from imdb_jax.store import files
from imdb_jax.training import loop

# Models are trained. The command is tested in tests/commands/test_compare.py.
pytestmark = pytest.mark.slow

MOST = ["majority", "tfidf", "nb-svm", "lstm", "fast"]


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory) -> Path:
  """A comparison of most rows with two seeds, which nobody changes."""
  run_dir = tmp_path_factory.mktemp("comparisons") / "all"
  rows.compare(base(run_dir, num_seeds=2), MOST)
  return run_dir


@pytest.fixture
def copied(finished, tmp_path) -> Path:
  return Path(shutil.copytree(finished, tmp_path / "copy"))


@pytest.fixture
def computed(monkeypatch) -> list[str]:
  """The rows that are computed from now on."""
  found = []
  fit = rows.fit

  def fitted(config: Config):
    found.append(config.run_dir.name)
    return fit(config)

  monkeypatch.setattr(rows, "fit", fitted)
  for row, compute in rows.LINEAR.items():
    monkeypatch.setitem(rows.LINEAR, row, lambda *reviews, row=row, go=compute: (found.append(row), go(*reviews))[1])
  return found


def table_of(run_dir: Path) -> dict[str, dict]:
  return {row["name"]: row for row in json.loads((run_dir / "comparison.json").read_text())["rows"]}


def test_every_row_is_computed_for_every_seed(finished):
  table = table_of(finished)
  assert list(table) == MOST
  assert {name: len(row["accuracies"]) for name, row in table.items()} == {
    **dict.fromkeys(("majority", "tfidf", "nb-svm"), 1),
    **dict.fromkeys(("lstm", "fast"), 2),
  }
  train, test = few_reviews()["train"], few_reviews()["test"]
  assert table["majority"]["accuracy"] == np.mean(test.labels == (train.labels.mean() > 0.5))
  assert table["lstm"]["difference"] == 0
  for name, row in table.items():
    expected = row["accuracy"] - table["lstm"]["accuracy"]
    assert row["difference"] == pytest.approx(expected), name


def test_a_recurrent_row_is_the_last_step_of_its_runs(finished):
  seeds = {"lstm": [[0], [1]], "fast": [[0, 1], [2, 3]]}
  for name, row in table_of(finished).items():
    for number, expected in enumerate(seeds.get(name, [])):
      run_dir = finished / f"{name}-seed{number}"
      classifier = Classifier.load(run_dir, step="latest", runtime=base(None).runtime)
      config = classifier.config
      data = tokens.load(sources.find(config.data, None, finished), config.data, cache_dir=finished)
      assert [*config.training.seeds] == expected
      assert row["accuracies"][number] == classifier.evaluate(data.test).accuracy
      assert row["num_parameters"] == sum(leaf.size for leaf in jax.tree.leaves(classifier.params))
      epochs = [line for line in lines(run_dir) if line["kind"] == "epoch"]
      result = json.loads((finished / f"{name}-seed{number}.json").read_text())
      assert result["val_accuracy"] == [line["val_accuracy"] for line in epochs]
      assert result["predict_seconds"] > 0
      assert result["train_seconds"] == sum(line["seconds"] for line in epochs)


def test_the_written_table_states_reviews_machine_and_versions(finished):
  text = (finished / "comparison.md").read_text()
  for words in ("60 test reviews of sample", "cores, python 3.", f"jax {jax.__version__}", "paired bootstrap"):
    assert words in text
  page = (finished / "comparison.html").read_text()
  assert page.count("<svg") == 2
  assert page.count("label: ") == 20


def test_a_language_model_is_trained_once_for_all_seeds_and_its_time_counts(tmp_path, computed):
  rows.compare(base(tmp_path, num_seeds=2), ["pretrained"])
  assert computed == ["language-seed0", "pretrained-seed0", "pretrained-seed1"]
  seconds = []
  for name in ("language-seed0", "pretrained-seed0", "pretrained-seed1"):
    seconds.append(sum(line["seconds"] for line in lines(tmp_path / name) if line["kind"] == "epoch"))
    (start,) = files.read_json(tmp_path / name / "provenance.json")["starts"]
    assert name == "language-seed0" or start["init_from"]["run_dir"] == str(tmp_path / "language-seed0")
  assert table_of(tmp_path)["pretrained"]["train_seconds"] == pytest.approx(seconds[0] + np.mean(seconds[1:]))


def test_a_finished_comparison_computes_nothing(copied, computed):
  before = {path.name: path.stat().st_mtime_ns for path in copied.glob("*-seed*")}
  table = (copied / "comparison.json").read_text()
  rows.compare(base(copied, num_seeds=2), MOST)
  assert computed == []
  assert {path.name: path.stat().st_mtime_ns for path in copied.glob("*-seed*")} == before
  assert (copied / "comparison.json").read_text() == table


def test_only_missing_results_are_computed_and_all_are_shown(copied, computed):
  shutil.rmtree(copied / "fast-seed1")
  for name in ("tfidf-seed0.json", "lstm-seed1.json", "fast-seed1.json"):
    (copied / name).unlink()
  rows.compare(base(copied, num_seeds=2), ["fast"])
  assert computed == ["fast-seed1"]
  assert {name: len(row["accuracies"]) for name, row in table_of(copied).items()} == {
    **dict.fromkeys(("majority", "nb-svm", "lstm"), 1),
    "fast": 2,
  }
  computed.clear()
  rows.compare(base(copied), MOST)
  assert computed == ["tfidf"]
  assert [len(row["accuracies"]) for row in table_of(copied).values()] == [1] * 5


def test_a_row_that_was_interrupted_continues(finished, tmp_path, computed, monkeypatch):
  run_dir, show, stopped = tmp_path / "run", loop.show_header, []

  def show_then_stop(*arguments):
    show(*arguments)
    if not stopped:
      stopped.append(True)
      os.kill(os.getpid(), signal.SIGINT)

  monkeypatch.setattr(loop, "show_header", show_then_stop)
  with pytest.raises(Interrupted):
    rows.compare(base(run_dir), ["majority", "lstm"])
  assert {path.name for path in run_dir.glob("*.json")} == {"settings.json", "majority-seed0.json"}
  assert [path.name for path in (run_dir / "lstm-seed0" / "checkpoints").iterdir()] == ["0"]
  computed.clear()
  rows.compare(base(run_dir), ["majority", "lstm"])
  assert computed == ["lstm-seed0"]
  first = json.loads((finished / "lstm-seed0.json").read_text())
  assert json.loads((run_dir / "lstm-seed0.json").read_text())["logits"] == first["logits"]


def test_a_signal_during_the_last_epoch_stops_before_the_next_row(tmp_path, computed, monkeypatch):
  write = page.write

  def write_then_stop(*arguments):
    write(*arguments)
    os.kill(os.getpid(), signal.SIGTERM)

  monkeypatch.setattr(page, "write", write_then_stop)
  with pytest.raises(Interrupted) as stop:
    rows.compare(base(tmp_path / "run"), ["lstm", "fast"])
  assert stop.value.signal == signal.SIGTERM
  assert computed == ["lstm-seed0"]


def test_a_row_that_fails_leaves_the_others_and_its_reason_in_the_table(tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(rows.RECURRENT, "lstm", ("sample", {**TINY, "optimizer": {"learning_rate": 1e38}}))

  def too_large(train, validation):
    raise MemoryError("Unable to allocate 9 TiB")

  monkeypatch.setitem(rows.LINEAR, "tfidf", too_large)
  # The first failure gives the exit code.
  with pytest.raises(PlatformError, match="2 of 4 rows failed; tfidf: Not enough memory: Unable to allocate 9 TiB"):
    rows.compare(base(tmp_path), ["majority", "tfidf", "lstm", "fast"])
  shown = capsys.readouterr().out.splitlines()
  (failed,) = [line for line in shown if line.startswith("lstm  ")]
  assert "failed: Step " in failed
  assert "is not finite" in failed
  assert list(table_of(tmp_path)) == ["majority", "fast"]
  assert json.loads((tmp_path / "comparison.json").read_text())["failures"].keys() == {"tfidf", "lstm"}


def test_without_scikit_learn_its_rows_say_so(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "sklearn", None)
  with pytest.raises(UsageError, match=r"2 of 3 rows failed; tfidf: scikit-learn is missing: pip install 'imdb_jax"):
    rows.compare(base(tmp_path), ["majority", "tfidf", "nb-svm"])
  assert "| nb-svm |  | failed: scikit-learn is missing" in (tmp_path / "comparison.md").read_text()
  assert list(table_of(tmp_path)) == ["majority"]


def change(**fields):
  def damage(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))

  return damage


def cut(path: Path) -> None:
  path.write_bytes(path.read_bytes()[:-20])


LOGITS = [0.5] * 60


@pytest.mark.parametrize(
  "damage",
  [
    *(cut, lambda path: path.write_text("[" * 10**5), lambda path: path.write_text("{}")),
    *(
      change(more=1),
      change(model=7),
      change(logits=[*LOGITS[:-1], 1e40]),
      change(logits=[*LOGITS[:-1], -1e40]),
      change(logits=LOGITS[:-1]),
      change(logits=[*LOGITS[:-1], float("nan")]),
    ),
    *(change(logits=[*LOGITS[:-1], "0.5"]), change(logits=7), change(val_accuracy=[1.5]), change(train_seconds=-1)),
    *(
      change(val_accuracy=[0.5]),
      change(num_parameters="many"),
      change(computed_on="x" * 2**21),
      change(has_probabilities=1),
    ),
  ],
)
def test_a_damaged_result_is_computed_again(damage, copied, computed, capsys, monkeypatch):
  # The figures take most of the time.
  monkeypatch.setattr(table, "write", lambda *_: None)
  path = copied / "nb-svm-seed0.json"
  before = json.loads(path.read_text())
  damage(path)
  rows.compare(base(copied, num_seeds=2), MOST)
  assert computed == ["nb-svm"]
  assert f"{path}: damaged and not used: " in capsys.readouterr().out
  assert json.loads(path.read_text())["logits"] == before["logits"]


def test_the_result_of_a_large_split_is_read_again(tmp_path):
  logits = np.random.default_rng(0).standard_normal(100_000).tolist()
  result = results.Result(model="majority", logits=logits)
  (tmp_path / "result.json").write_text(json.dumps(vars(result)))
  assert results.read(tmp_path / "result.json", "majority", 100_000, pytest.fail) == result


def test_links_in_the_folder_are_refused(copied):
  outside = (copied / "nb-svm-seed0.json").rename(copied.parent / "outside")
  (copied / "nb-svm-seed0.json").symlink_to(outside)
  before = outside.read_text()
  with pytest.raises(UsageError, match=r"holds links or devices \(nb-svm-seed0\.json\)"):
    rows.compare(base(copied, num_seeds=2), MOST)
  assert outside.read_text() == before


def test_a_result_of_other_settings_is_neither_used_nor_overwritten(copied, monkeypatch):
  monkeypatch.setitem(rows.RECURRENT, "lstm", ("sample", {**TINY, "optimizer": {"learning_rate": 0.5}}))
  before = (copied / "lstm-seed0.json").read_bytes()
  with pytest.raises(
    UsageError, match=r"lstm: --run-dir .*: holds a run with other settings \(optimizer.learning_rate"
  ):
    rows.compare(base(copied, num_seeds=2), MOST)
  assert (copied / "lstm-seed0.json").read_bytes() == before
  table = table_of(copied)
  assert "lstm" not in table
  assert table["fast"]["difference"] is None


def test_a_folder_of_something_else_is_refused_and_untouched(finished, tmp_path, monkeypatch):
  (tmp_path / "thesis.txt").write_text("dear")
  refused = "holds something else, or a comparison on other reviews or with another --quick; nothing was touched"
  for run_dir, validation, quick in (
    (tmp_path, "test", False),
    (finished / "lstm-seed0", "test", False),
    (finished, "split", False),
    (finished, "test", True),
  ):
    before = sorted(path.name for path in run_dir.iterdir())
    with pytest.raises(UsageError, match=refused):
      rows.compare(base(run_dir, validation=validation), quick=quick)
    assert sorted(path.name for path in run_dir.iterdir()) == before


def test_a_comparison_on_other_training_reviews_is_refused(copied, monkeypatch):
  splits = few_reviews()
  monkeypatch.setattr(sample, "load", lambda: {**splits, "train": splits["train"].take(range(59))})
  with pytest.raises(UsageError, match="a comparison on other reviews"):
    rows.compare(base(copied, num_seeds=2), MOST)


def test_a_second_comparison_in_the_same_folder_is_refused(copied):
  with filelock.FileLock(copied / "lock"), pytest.raises(UsageError, match="another trainer is using it"):
    rows.compare(base(copied, num_seeds=2), MOST)


def test_an_unknown_row_is_refused_before_anything_is_read(tmp_path, monkeypatch):
  monkeypatch.setattr(sample, "load", lambda: pytest.fail("was read"))
  with pytest.raises(
    UsageError,
    match=r"--rows ltsm: unknown\. There are majority, tfidf, nb-svm, fasttext, bag, rnn, .*, strong, pretrained\.$",
  ):
    rows.compare(base(tmp_path / "run"), ["majority", "ltsm"])
  assert not (tmp_path / "run").exists()


def test_held_out_reviews_are_predicted_on_request(tmp_path):
  rows.compare(base(tmp_path, validation="split"), ["majority", "tfidf", "lstm"])
  rest, held = tokens.hold_out(few_reviews()["train"], 0.1)
  summary = json.loads((tmp_path / "comparison.json").read_text())
  assert summary["num_reviews"] == len(held)
  assert summary["rows"][0]["accuracy"] == np.mean(held.labels == (rest.labels.mean() > 0.5))
  assert f"{len(held)} reviews held out of training" in (tmp_path / "comparison.md").read_text()


@pytest.mark.parametrize("validation", ["test", "split"])
def test_reviews_that_also_occur_in_training_are_counted(validation, tmp_path, monkeypatch):
  train, test = few_reviews()["train"], few_reviews()["test"]
  # Each training review is there twice, once per film; seven of them are test reviews, too.
  doubled = canonical([*train.texts * 2], [*train.labels] * 2, range(120))
  copied = canonical([*train.texts[:7], *test.texts[7:]], [*train.labels[:7], *test.labels[7:]])
  monkeypatch.setattr(sample, "load", lambda: {"train": doubled, "test": copied})
  rows.compare(base(tmp_path, validation=validation), ["majority"])
  rest, reviews = (doubled, copied) if validation == "test" else tokens.hold_out(doubled, 0.1)
  is_new = [text not in rest.texts for text in reviews.texts]
  num_copies = len(reviews) - sum(is_new)
  assert num_copies == 7 if validation == "test" else num_copies > 0
  summary = json.loads((tmp_path / "comparison.json").read_text())
  assert summary["num_copies"] == num_copies
  (row,) = summary["rows"]
  expected = np.mean((reviews.labels == (rest.labels.mean() > 0.5))[is_new]) if any(is_new) else None
  assert row["accuracy_without_copies"] == expected
  change = 100 * abs(expected - row["accuracy"]) if any(is_new) else 0
  note = f"{num_copies} of these reviews are also among the training reviews, word for word. Without them, accuracies"
  assert f"{note} change by up to {change:.2f} points" in (tmp_path / "comparison.md").read_text()


def test_a_quick_comparison_uses_the_small_preset(tmp_path, monkeypatch):
  monkeypatch.setitem(rows.RECURRENT, "lstm", ("article", RECURRENT["lstm"]))
  config = rows._configure(base(tmp_path), "lstm", 0, True)
  assert (config.preset, config.data.sequence_length, config.model.hidden_size) == ("sample", 64, 4)
  monkeypatch.setitem(rows.RECURRENT, "fast", ("fast", {}))
  config = rows._configure(base(tmp_path), "fast", 0, True)
  assert (config.preset, config.data.sequence_length, config.data.vocabulary_size) == ("fast", 64, 1000)
  monkeypatch.delitem(rows.RECURRENT, "language")
  for source, is_used in (("sample", False), ("imdb", True)):
    given = dataclasses.replace(base(tmp_path), data=DataConfig(source=source))
    assert rows._configure(given, "language", 0, False).model.unlabelled == is_used
  assert rows._configure(base(tmp_path), "language", 0, True).model.hidden_size == 64
  config = rows._configure(base(tmp_path), "lstm", 3, False)
  assert (config.preset, config.data.sequence_length, config.training.seed) == ("article", 400, 3)
