"""A language model is trained, resumed and handed on like every other run."""

import signal

import jax
import numpy as np
import pytest
from reliability.sandbox import newest_state
from training.tiny import assert_same_end, change, lines, tiny

import imdb_jax
from imdb_jax.config import Config
from imdb_jax.data import tokens
from imdb_jax.errors import UsageError
from imdb_jax.processes import Interrupted
from imdb_jax.training import loop

pytestmark = pytest.mark.slow


def language(run_dir, **training) -> Config:
  """Return the settings of a tiny language model: sequences of 9 words, 10 per step."""
  config = tiny(run_dir, objective="next_word", **training)
  config = change(config, "model", directions=2)
  return change(config, "optimizer", learning_rate=0.03, schedule="one_cycle")


@pytest.fixture(autouse=True)
def short(monkeypatch):
  monkeypatch.setattr(tokens, "_SEQUENCE", 9)


@pytest.fixture
def whole(tmp_path) -> Config:
  config = language(tmp_path / "whole")
  imdb_jax.fit(config)
  return config


def test_it_learns_and_its_history_is_that_of_every_run(tmp_path, capsys):
  whole = language(tmp_path / "whole")
  imdb_jax.fit(whole)
  epochs = [line for line in lines(whole.run_dir) if line["kind"] == "epoch"]
  assert epochs[1]["val_loss"] < epochs[0]["val_loss"] < np.log(whole.data.vocabulary_size)
  assert 0 <= epochs[1]["val_accuracy"] <= 1
  assert f"Perplexity {np.exp(epochs[1]['val_loss']):,.1f}" in capsys.readouterr().out
  assert not (whole.run_dir / "report.html").exists()


def test_a_stopped_run_ends_with_the_same_bits(whole, tmp_path, monkeypatch):
  config = language(tmp_path / "stopped")
  poll = loop._Trainer._poll
  with monkeypatch.context() as patch:
    patch.setattr(loop._Trainer, "_poll", lambda self: (signal.SIGINT, False) if self._step == 5 else poll(self))
    with pytest.raises(Interrupted):
      imdb_jax.fit(config)
  imdb_jax.fit(config)
  assert_same_end(whole, config)


def test_two_devices_give_the_same_result_except_for_rounding(whole, tmp_path):
  config = change(language(tmp_path / "two"), "runtime", num_devices=2)
  imdb_jax.fit(config)
  found, expected = (newest_state(each.run_dir)[1].params for each in (config, whole))
  np.testing.assert_allclose(found["lstm"]["kernel"], expected["lstm"]["kernel"], rtol=1e-3, atol=1e-5)


def test_a_classifier_starts_from_its_vectors_and_layers(tmp_path, capsys):
  whole = language(tmp_path / "whole", epochs=1)
  imdb_jax.fit(whole)
  config = change(tiny(tmp_path / "classifier", epochs=1), "model", directions=2)
  config = change(config, "optimizer", learning_rate=1e-30)
  imdb_jax.fit(change(config, "runtime", init_from=whole.run_dir))
  ours, theirs = (newest_state(each.run_dir)[1].params for each in (config, whole))
  for name in ("lstm", "backward_lstm"):
    for field in theirs[name]:
      np.testing.assert_array_equal(ours[name][field], theirs[name][field], err_msg=name)
  shown = capsys.readouterr().out
  assert "264 of 264 word vectors, backward_lstm, lstm, not dense" in shown
  found, expected = (each["embedding"]["embedding"][:, :265] for each in (ours, theirs))
  np.testing.assert_array_equal(found, expected)


def test_recurrent_layers_learn_at_a_rate_of_their_own(tmp_path):
  states = {}
  for rate in (0.0, 1.0):
    config = change(tiny(tmp_path / str(rate), epochs=1), "optimizer", recurrent_rate=rate)
    imdb_jax.fit(config)
    states[rate] = jax.device_get(newest_state(config.run_dir)[1].params)
  assert (states[0.0]["lstm"]["kernel"] != states[1.0]["lstm"]["kernel"]).any()
  assert (states[0.0]["lstm"]["bias"].reshape(-1, 4, 4) == np.array([0, 1, 0, 0])[None, :, None]).all(), "as at first"
  assert states[0.0]["dense"]["bias"].any()


def test_it_classifies_nothing(whole):
  with pytest.raises(UsageError, match=r"holds a language model, which has no classes; a classifier takes it"):
    imdb_jax.Classifier.load(whole.run_dir)


def test_too_few_words_are_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(tokens, "_SEQUENCE", 1000)
  with pytest.raises(UsageError, match="--objective next_word: a split has fewer than 1000 words"):
    imdb_jax.fit(language(tmp_path / "run"))
