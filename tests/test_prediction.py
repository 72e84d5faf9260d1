"""What a classifier takes for texts. Its answers are tested where runs are: `tests/training`, `tests/test_scripts.py`."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from imdb_jax import sharding
from imdb_jax.config import Config, DataConfig, ModelConfig
from imdb_jax.data.tokenizer import Vocabulary
from imdb_jax.model import SentimentLSTM
from imdb_jax.prediction import Classifier


@pytest.fixture(scope="module")
def classifier() -> Classifier:
  config = Config(
    dataset=DataConfig(vocabulary_size=4, sequence_length=3), model=ModelConfig(embedding_size=2, hidden_size=2)
  )
  tokens, lengths = np.zeros((1, 3), np.int32), np.ones(1, np.int32)
  params = SentimentLSTM.of_run(config).init(jax.random.key(0), tokens, lengths)["params"]
  vocabulary = Vocabulary(size=4, strip_html=True, words=("good", "bad", "film"))
  return Classifier(config, vocabulary, params, Mesh(np.array(jax.devices()[:1]), (sharding.AXIS,)), step=0)


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
