"""A run's folder belongs to one run and one trainer, and holds nothing that is followed or trusted unseen."""

import dataclasses
import fcntl
import json
from pathlib import Path

import pytest
from training.tiny import tiny

import imdb_jax
from imdb_jax import run_directory
from imdb_jax.config import RuntimeConfig
from imdb_jax.errors import DataError, UsageError
from imdb_jax.training import recorder


def test_other_reviews_are_refused(tmp_path):
  config = tiny(tmp_path / "run")
  imdb_jax.fit(config)
  provenance = config.run_dir / "provenance.json"
  provenance.write_text(json.dumps(json.loads(provenance.read_text()) | {"data_digest": "0" * 64}))
  with pytest.raises(DataError, match="the reviews differ"):
    imdb_jax.fit(config)


@pytest.mark.parametrize("text", [None, ""])
def test_another_vocabulary_is_refused(text, tmp_path):
  """With its words in another order a model would answer, and wrongly."""
  config = tiny(tmp_path / "run")
  imdb_jax.fit(config)
  file = config.run_dir / "vocab.json"
  vocabulary = json.loads(file.read_text())
  vocabulary["words"].reverse()
  file.write_text(json.dumps(vocabulary) if text is None else text)
  for use in (imdb_jax.fit, lambda config: imdb_jax.Classifier.load(config.run_dir)):
    with pytest.raises(UsageError, match=r"vocab\.json: "):
      use(config)


def test_a_model_that_cannot_be_computed_here_leaves_no_folder(tmp_path):
  """Which other settings would find in their way."""
  config = tiny(tmp_path / "run")
  refused = dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, implementation="cudnn"))
  with pytest.raises(UsageError, match="cuDNN knows no recurrent dropout"):
    imdb_jax.fit(refused)
  assert not config.run_dir.exists()


def test_a_run_may_be_kept_at_home(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  imdb_jax.fit(tiny(Path("~/run")))
  assert run_directory.load_config(tmp_path / "run")
  imdb_jax.Classifier.load("~/run")


def test_a_second_trainer_is_refused_while_the_first_is_at_work(tmp_path):
  config = tiny(tmp_path / "run")
  config.run_dir.mkdir()
  with (config.run_dir / "lock").open("w") as held:
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(UsageError, match="another trainer is at work"):
      imdb_jax.fit(config)
  imdb_jax.fit(config)


def test_a_run_that_was_laid_while_the_lock_was_waited_for_is_not_written_over(tmp_path, monkeypatch):
  first, second = (tiny(tmp_path / "run", seed=seed) for seed in range(2))
  locked = run_directory.locked

  def late(run_dir):
    monkeypatch.setattr(run_directory, "locked", locked)
    imdb_jax.fit(first)
    return locked(run_dir)

  monkeypatch.setattr(run_directory, "locked", late)
  with pytest.raises(UsageError, match="other settings"):
    imdb_jax.fit(second)
  assert run_directory.load_config(first.run_dir) == dataclasses.replace(first, runtime=RuntimeConfig())


def test_what_is_too_large_is_not_read(tmp_path, monkeypatch):
  config = tiny(tmp_path / "run")
  imdb_jax.fit(config)
  with monkeypatch.context() as patch:
    patch.setattr(recorder, "_MAX_BYTES", 100)
    with pytest.raises(UsageError, match=r"metrics\.jsonl: .*larger than 100 bytes"):
      imdb_jax.fit(config)
  (config.run_dir / "config.json").write_text(" " * 2**20 + (config.run_dir / "config.json").read_text())
  with pytest.raises(UsageError, match=r"config\.json: .*larger than 1,048,576 bytes"):
    imdb_jax.fit(config)


@pytest.mark.parametrize("name", ["metrics.jsonl.new", ".laying", "lock", "config.json", "checkpoints"])
def test_a_run_that_holds_links_is_left_alone(name, tmp_path):
  config = tiny(tmp_path / "run")
  imdb_jax.fit(config)
  path, outside = config.run_dir / name, tmp_path / "outside"
  if path.exists():
    path.rename(outside)
  path.symlink_to(outside)
  for use in (lambda: imdb_jax.fit(config), lambda: imdb_jax.Classifier.load(config.run_dir)):
    with pytest.raises(UsageError, match="links"):
      use()
  assert outside.exists() == (name not in ("metrics.jsonl.new", ".laying")), "nothing is written through it"
