"""A run directory belongs to one run and one trainer, and none of its files is followed or trusted unchecked."""

import dataclasses
import errno
import json
import os
import types
from pathlib import Path

import filelock
import pytest
from training.tiny import change, tiny

import imdb_jax
from imdb_jax.config import RuntimeConfig
from imdb_jax.data.tokenizer import Vocabulary
from imdb_jax.errors import DataError, UsageError
from imdb_jax.program import Program
from imdb_jax.store import files, run_directory
from imdb_jax.training import loop


def load(config):
  imdb_jax.Classifier.load(config.run_dir)


def create(config, digest):
  run_directory.create(config, data_of(config, digest))


def data_of(config, digest):
  """Return what a run directory uses of the data."""
  facts = {"digest": digest, "summary": "1 row", "counts": {"a": 1, "b": 1}}
  vocabulary = Vocabulary(config=config.data, words=())
  return types.SimpleNamespace(**facts, vocabulary=vocabulary, left_out={"a.csv: 1 of 2": ["line 3"]})


def saved(config):
  """Return the config as a run directory gives it back: without where and how it was computed."""
  return dataclasses.replace(config, runtime=RuntimeConfig())


def test_other_reviews_are_refused(run):
  provenance = run.run_dir / "provenance.json"
  provenance.write_text(json.dumps(json.loads(provenance.read_text()) | {"data_digest": "0" * 64}))
  with pytest.raises(DataError, match="not the reviews that the run was trained on"):
    imdb_jax.fit(run)


@pytest.mark.parametrize("text", [None, ""])
def test_another_vocabulary_is_refused(text, run):
  """With its words in another order a model would answer, and wrongly."""
  path = run.run_dir / "vocab.json"
  vocabulary = json.loads(path.read_text())
  vocabulary["words"].reverse()
  path.write_text(json.dumps(vocabulary) if text is None else text)
  for use in (imdb_jax.fit, load):
    with pytest.raises(UsageError, match=r"vocab\.json: not the vocabulary"):
      use(run)


@pytest.mark.parametrize("is_folder_there", [False, True])
def test_a_model_that_cannot_be_computed_here_leaves_no_trace(is_folder_there, tmp_path):
  """Otherwise it would be in the way of the corrected settings."""
  config = tiny(tmp_path / "run")
  if is_folder_there:
    config.run_dir.mkdir()
  with pytest.raises(UsageError, match="mosaic_gpu: it supports hidden sizes"):
    imdb_jax.fit(change(config, "runtime", implementation="mosaic_gpu"))
  if is_folder_there:
    # A folder that holds only the lock is a new run.
    assert {path.name for path in config.run_dir.iterdir()} <= {"lock"}
  else:
    assert not config.run_dir.exists()
  with run_directory.opened(change(config, "model", hidden_size=3)):
    assert not run_directory.exists(change(config, "model", hidden_size=3))


@pytest.mark.parametrize("kind", [str, Path])
def test_a_run_directory_may_be_a_string_or_a_path_below_home(kind, finished, tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(finished.parent))
  config = tiny(kind("~/run"))
  assert config.runtime.run_dir == finished
  with run_directory.opened(config):
    assert run_directory.exists(config)
  assert imdb_jax.Classifier.load(kind("~/run"), step="latest").step == 8


def test_a_run_directory_of_another_type_is_refused_by_its_flag():
  with pytest.raises(UsageError, match=r"^--run-dir 3: must be a path .* or None\.$"):
    RuntimeConfig(run_dir=3)


@pytest.mark.parametrize("name", ["lr\\1", "gs:", "gs:/run"])
def test_a_folder_that_orbax_would_look_for_elsewhere_is_refused_before_training(name, tmp_path):
  with pytest.raises(UsageError, match="no folder of its path may be named gs: or have a backslash"):
    imdb_jax.fit(tiny(tmp_path / name))
  assert list(tmp_path.iterdir()) == []


def test_a_second_trainer_is_refused_while_the_first_is_at_work(run):
  with filelock.FileLock(run.run_dir / "lock"), pytest.raises(UsageError, match="another trainer is using it"):
    imdb_jax.fit(run)
  with run_directory.opened(run):
    assert run_directory.exists(run)


def test_a_run_that_appears_just_before_the_lock_is_taken_is_not_overwritten(tmp_path, monkeypatch):
  first, second = (tiny(tmp_path / "run", seed=seed) for seed in range(2))
  lock = filelock.FileLock

  def create_then_lock(path, timeout):
    first.run_dir.mkdir()
    create(first, "0" * 64)
    return lock(path, timeout=timeout)

  monkeypatch.setattr(filelock, "FileLock", create_then_lock)
  with pytest.raises(UsageError, match="other settings"):
    imdb_jax.fit(second)
  assert run_directory.load_config(first.run_dir) == saved(first)


def test_other_settings_are_named_and_nothing_is_touched(run):
  before = {path: path.read_bytes() for path in run.run_dir.iterdir() if path.is_file()}
  with pytest.raises(UsageError, match=r"other settings \(model\.hidden_size: 4 -> 5\); nothing was touched"):
    imdb_jax.fit(change(run, "model", hidden_size=5))
  assert {path: path.read_bytes() for path in run.run_dir.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("names", [["letter.txt"], ["vocab.json"], ["lock", "vocab.json", "letter.txt"]])
def test_a_folder_that_is_not_a_run_is_not_touched(names, tmp_path):
  config = tiny(tmp_path / "run")
  config.run_dir.mkdir()
  for name in names:
    (config.run_dir / name).write_text("dear")
  with pytest.raises(UsageError, match="not a run; nothing was touched"):
    imdb_jax.fit(config)
  assert {path.name: path.read_text() for path in config.run_dir.iterdir()} == dict.fromkeys(names, "dear")
  with pytest.raises(UsageError, match=r"not a run directory: it has no config\.json"):
    load(config)


@pytest.mark.parametrize("num_files", range(5))
@pytest.mark.parametrize("is_killed_before_replacing", [False, True])
def test_a_run_whose_creation_was_interrupted_is_created_anew(
  num_files, is_killed_before_replacing, tmp_path, monkeypatch
):
  config, replace, calls = tiny(tmp_path / "run"), Path.replace, []

  def interrupted(path, target):
    calls.append(target)
    if len(calls) == num_files + 1 and is_killed_before_replacing:
      raise OSError(errno.ENOSPC, "No space left on device")
    replace(path, target)
    if len(calls) == num_files and not is_killed_before_replacing:
      raise OSError(errno.ENOSPC, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr(Path, "replace", interrupted)
    with run_directory.opened(config):
      if num_files or is_killed_before_replacing:
        with pytest.raises(UsageError, match=r"cannot be written: .*No space left"):
          create(config, "0" * 64)
  with run_directory.opened(config):
    assert not run_directory.exists(config)
    create(config, "1" * 64)
  run_directory.check(config.run_dir, data=data_of(config, "1" * 64))
  assert run_directory.load_config(config.run_dir) == saved(config)


@pytest.mark.parametrize("name", ["config.json", "provenance.json"])
def test_a_file_that_is_too_large_is_not_read(name, run):
  path = run.run_dir / name
  path.write_text(" " * 2**20 + path.read_text())
  with pytest.raises(UsageError, match=rf"{name}: .*larger than 1,048,576 bytes"):
    imdb_jax.fit(run)


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", '{"data_digest": 1}', "[" * 10**5])
def test_a_damaged_provenance_is_named_in_one_line(text, run):
  (run.run_dir / "provenance.json").write_text(text)
  for use in (imdb_jax.fit, load):
    with pytest.raises(UsageError, match=r"provenance\.json: ") as caught:
      use(run)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("starts", [[1], ["a"], {}, None])
def test_starts_that_are_not_json_objects_are_refused(starts, run):
  path = run.run_dir / "provenance.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"starts": starts}))
  with pytest.raises(UsageError, match=r"provenance\.json: .*starts"):
    imdb_jax.fit(run)


@pytest.mark.parametrize("name", ["metrics.jsonl.new", "provenance.json.new", "lock", "config.json", "checkpoints"])
def test_a_run_that_holds_links_is_left_alone(name, run, tmp_path):
  path, outside = run.run_dir / name, tmp_path / "outside"
  is_new = not path.exists()
  if not is_new:
    path.rename(outside)
  path.symlink_to(outside)
  for use in (imdb_jax.fit, load):
    with pytest.raises(UsageError, match=f"holds links or devices .*{name}"):
      use(run)
  assert outside.exists() != is_new, "nothing is written through the link"


@pytest.mark.parametrize("name", ["lock", "metrics.jsonl"])
def test_a_file_outside_is_not_written_through_a_hard_link(name, run, tmp_path):
  outside = tmp_path / "outside"
  outside.write_text("dear")
  (run.run_dir / name).unlink()
  (run.run_dir / name).hardlink_to(outside)
  with pytest.raises(UsageError, match=rf"{name}: has further hard links"):
    imdb_jax.fit(run)
  assert outside.read_text() == "dear"


def test_a_report_replaces_hard_links_to_files_outside(run, tmp_path):
  names = ("history.csv", "history.png", "report.md")
  # An existing page would be kept, with what is beside it.
  (run.run_dir / "report.html").unlink()
  for name in names:
    (tmp_path / name).write_text("dear")
    (run.run_dir / name).unlink()
    (run.run_dir / name).hardlink_to(tmp_path / name)
  imdb_jax.fit(run)
  for name in names:
    assert (tmp_path / name).read_text() == "dear"
    assert len((run.run_dir / name).read_bytes()) > 100


@pytest.mark.parametrize("change", [Path.unlink, lambda path: path.rename(path.with_name("old"))])
def test_a_trainer_notices_that_it_has_lost_its_lock(change, run):
  """A second trainer could have started."""
  with run_directory.opened(run) as held:
    run_directory.require_held(held)
    change(run.run_dir / "lock")
    with run_directory.opened(run), pytest.raises(UsageError, match=r"lock: was moved, removed or replaced"):
      run_directory.require_held(held)
    with pytest.raises(UsageError, match=r"lock: was moved, removed or replaced"):
      run_directory.require_held(held)


def test_a_run_that_holds_a_pipe_is_refused_without_waiting_for_its_writer(run):
  os.mkfifo(run.run_dir / "odd")
  with pytest.raises(UsageError, match=r"holds links or devices \(odd\)"):
    imdb_jax.fit(run)


def test_every_start_is_recorded(run, monkeypatch):
  (first,) = files.read_json(run.run_dir / "provenance.json")["starts"]
  assert first | {"step": 0, "processes": 1, "implementation": "chunked", "precision": "float32"} == first
  assert first["devices"].startswith("1 x ")
  assert {"imdb_jax", "jax", "flax", "numpy"} <= set(first["versions"])
  # The run is finished, so that there is nothing to train.
  monkeypatch.setattr(loop._Trainer, "run", lambda *args: None)
  imdb_jax.fit(change(run, "runtime", num_devices=2, implementation="scan"))
  starts = files.read_json(run.run_dir / "provenance.json")["starts"]
  assert starts[0] == first
  assert [(start["step"], start["devices"][:4], start["implementation"]) for start in starts[1:]] == [
    (8, "2 x ", "scan")
  ]


def test_the_list_of_starts_is_bounded_and_keeps_the_first(run, monkeypatch):
  monkeypatch.setattr(run_directory, "_MAX_STARTS", 3)
  for step in range(1, 6):
    run_directory.record_start(run, {"step": step})
  starts = files.read_json(run.run_dir / "provenance.json")["starts"]
  assert [start["step"] for start in starts] == [0, 3, 4, 5]


def test_a_run_of_the_largest_number_of_starts_is_read_again(run):
  path = run.run_dir / "provenance.json"
  provenance = json.loads(path.read_text())
  files.write_json(path, provenance | {"starts": provenance["starts"] * 1001})
  run_directory.record_start(run, {"step": 8, "precision": "float32"})
  run_directory.check(run.run_dir, precision="float32")


def test_a_run_does_not_continue_in_another_precision(run, monkeypatch):
  monkeypatch.setattr(Program, "precision", "float32, recurrence bfloat16")
  with pytest.raises(UsageError, match=r"in float32, but would continue in float32, recurrence bfloat16 on") as caught:
    imdb_jax.fit(run)
  assert "--matmul-precision float32" in str(caught.value)
  assert len(files.read_json(run.run_dir / "provenance.json")["starts"]) == 1
  load(run)


def test_a_run_that_was_never_started_may_have_any_precision(tmp_path):
  config = tiny(tmp_path / "run")
  with run_directory.opened(config):
    create(config, "0" * 64)
  for precision in ("float32", "bfloat16"):
    run_directory.check(config.run_dir, precision=precision)


@pytest.mark.parametrize(
  ("content", "expected"),
  [
    ('{"b": 30, "a": 10}', {"b": 0.75, "a": 0.25}),
    ('["b", "a", "c", "d"]', {"b": 0.25, "a": 0.25, "c": 0.25, "d": 0.25}),
    (None, {"negative": 0.5, "positive": 0.5}),
  ],
)
def test_shares_of_classes_come_in_the_order_of_the_labels(tmp_path, content, expected):
  """Older runs have names alone, or no file."""
  if content is not None:
    (tmp_path / "classes.json").write_text(content)
  found = run_directory.load_classes(tmp_path)
  assert list(found.items()) == list(expected.items())


@pytest.mark.parametrize(
  "content", ['{"a": 1, "b": -1}', '{"a": 0, "b": 0}', '{"a": NaN, "b": 1}', '{"a": true, "b": 1}']
)
def test_impossible_numbers_of_texts_are_refused(tmp_path, content):
  (tmp_path / "classes.json").write_text(content)
  with pytest.raises(UsageError, match=r"classes\.json"):
    run_directory.load_classes(tmp_path)
