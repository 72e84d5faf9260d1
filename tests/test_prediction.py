"""What a classifier takes for texts, and what it leaves open. Its answers are tested where runs are."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from imdb_jax import run_directory, sharding
from imdb_jax.checkpoint import Checkpoints
from imdb_jax.config import Config, DataConfig, ModelConfig, RuntimeConfig
from imdb_jax.data.tokenizer import Vocabulary
from imdb_jax.errors import CheckpointError
from imdb_jax.model import SentimentLSTM
from imdb_jax.prediction import Classifier

CONFIG = Config(
  dataset=DataConfig(vocabulary_size=4, sequence_length=3), model=ModelConfig(embedding_size=2, hidden_size=2)
)
VOCABULARY = Vocabulary(size=4, strip_html=True, words=("good", "bad", "film"))


def one_device() -> Mesh:
  return Mesh(np.array(jax.devices()[:1]), (sharding.AXIS,))


@pytest.fixture(scope="module")
def classifier() -> Classifier:
  tokens, lengths = np.zeros((1, 3), np.int32), np.ones(1, np.int32)
  params = jax.jit(SentimentLSTM.of_run(CONFIG).init)(jax.random.key(0), tokens, lengths)["params"]
  return Classifier(CONFIG, VOCABULARY, params, one_device(), step=0)


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_any_sequence_of_texts_will_do(classifier, kind):
  assert classifier.predict(kind(["a good film", "bad"])).shape == (2,)


def test_one_text_is_not_taken_for_its_letters(classifier):
  with pytest.raises(TypeError, match="texts: must be a list of texts, not one text"):
    classifier.predict("bad film")


@pytest.mark.parametrize("other", [None, b"bad", 3, ["bad"]])
def test_what_is_no_text_is_named(classifier, other):
  with pytest.raises(TypeError, match=rf"texts\[1\]: must be a str, not {type(other).__name__}"):
    classifier.predict(["good", other])


def test_checkpoints_are_closed_where_none_can_be_restored(tmp_path, monkeypatch):
  runtime = RuntimeConfig(run_dir=tmp_path, platform="cpu", num_devices=1)
  run_directory.create(dataclasses.replace(CONFIG, runtime=runtime), VOCABULARY, "digest", one_device())
  (tmp_path / "checkpoints").mkdir()
  close, closed = Checkpoints.close, []
  monkeypatch.setattr(Checkpoints, "close", lambda checkpoints: closed.append(close(checkpoints)))
  with pytest.raises(CheckpointError, match="none has been saved yet"):
    Classifier.load(tmp_path, runtime=runtime)
  assert len(closed) == 1
