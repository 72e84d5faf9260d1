"""Which texts a classifier accepts, what it compiles, and what it closes. Trained runs: training/test_seeds.py."""

import dataclasses

import numpy as np
import programs
import pytest
from programs import config_of

from imdb_jax.config import DataConfig, RuntimeConfig
from imdb_jax.data.tokenizer import Vocabulary
from imdb_jax.errors import CheckpointError
from imdb_jax.prediction import Classifier
from imdb_jax.program import Program
from imdb_jax.store import run_directory
from imdb_jax.store.checkpoints import Checkpoints

VOCABULARY = Vocabulary(size=4, strip_html=True, words=("good", "bad", "film"))
CONFIG = dataclasses.replace(config_of(), data=DataConfig(vocabulary_size=4, sequence_length=3))


def make_classifier(num_devices: int = 1, evaluation_batch_size: int = 40) -> Classifier:
  runtime = RuntimeConfig(evaluation_batch_size=evaluation_batch_size)
  program = Program(dataclasses.replace(CONFIG, runtime=runtime), programs.mesh_of(num_devices))
  return Classifier(program, VOCABULARY, programs.put(program, programs.initial_state(CONFIG).params), step=0)


@pytest.fixture(scope="module")
def classifier() -> Classifier:
  return make_classifier()


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_any_sequence_of_texts_is_accepted(classifier, kind):
  assert classifier.predict_proba(kind(["a good film", "bad"])).shape == (2, 2)


def test_a_text_is_of_its_most_probable_class(classifier):
  assert classifier.classes == ("negative", "positive")
  texts = ["a good film", "bad", "film", "good good"]
  likely = [max(zip(row, classifier.classes, strict=True))[1] for row in classifier.predict_proba(texts)]
  assert list(classifier.predict(texts)) == likely


def test_one_text_is_not_taken_for_its_letters(classifier):
  with pytest.raises(TypeError, match="texts: must be a list of texts, not one text"):
    classifier.predict_proba("bad film")


@pytest.mark.parametrize("other", [None, b"bad", 3, ["bad"]])
def test_an_item_that_is_no_text_is_named(classifier, other):
  with pytest.raises(TypeError, match=rf"texts\[1\]: must be a str, not {type(other).__name__}"):
    classifier.predict_proba(["good", other])


def test_the_probability_of_a_text_does_not_depend_on_the_other_texts(classifier):
  """Nor on the size of the batch; up to rounding, as each size is a program of its own."""
  texts = ["good film", "bad", "", "film film good", "unknown words"] * 20
  together = classifier.predict_proba(texts)
  assert (together.shape, together.dtype) == ((100, 2), np.float32)
  assert len(set(together[:3, 0])) == 3
  np.testing.assert_array_equal(together, np.tile(together[:5], (20, 1)))
  for num_texts in (1, 5, 16):
    np.testing.assert_allclose(classifier.predict_proba(texts[:num_texts]), together[:num_texts], rtol=1e-6)
  assert classifier.predict_proba([]).shape == (0, 2)


@pytest.mark.parametrize(
  ("num_devices", "evaluation_batch_size", "num_shapes"), [(1, 40, 3), (4, 40, 3), (1, 8, 2), (1, 1, 1)]
)
def test_warmup_compiles_all_that_predict_will_need(num_devices, evaluation_batch_size, num_shapes):
  """So that a server answers its first request at once, whatever the number of texts."""
  classifier = make_classifier(num_devices, evaluation_batch_size)
  with programs.compilations() as found:
    classifier.warmup()
  assert len(found) == num_shapes
  with programs.compilations() as found:
    for num_texts in (0, 1, 2, 8, 9, 15, 16, 17, 40, 41, 100):
      assert classifier.predict_proba(["good film"] * num_texts).shape == (num_texts, 2)
  assert not found


def test_checkpoints_are_closed_when_none_can_be_restored(tmp_path, monkeypatch):
  runtime = RuntimeConfig(run_dir=tmp_path, platform="cpu", num_devices=1)
  run_directory.create(dataclasses.replace(CONFIG, runtime=runtime), VOCABULARY.json, "digest")
  (tmp_path / "checkpoints").mkdir()
  close, closed = Checkpoints.close, []
  monkeypatch.setattr(Checkpoints, "close", lambda checkpoints: closed.append(close(checkpoints)))
  with pytest.raises(CheckpointError, match="none has been saved yet"):
    Classifier.load(tmp_path, runtime=runtime)
  assert len(closed) == 1
