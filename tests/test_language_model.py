"""The language model against NumPy in float64: all words, random words, and how often these are drawn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lstm import cell_reference, reference
from scipy import special

from imdb_jax.config import ModelConfig
from imdb_jax.language_model import LanguageModel, NextWord

SIZE = 11
TOKENS = np.random.default_rng(0).integers(0, SIZE, (4, 9)).astype(np.int32)
# Of each sequence; nothing depends on it.
LENGTHS = np.full(4, 9, np.int32)


def model_of(**settings) -> LanguageModel:
  return LanguageModel(ModelConfig(**{"embedding_size": 3, "hidden_size": 5, "directions": 2} | settings), SIZE)


@functools.cache
def params_of(model: LanguageModel) -> dict:
  """Return parameters far from their initial values."""
  shapes = jax.eval_shape(lambda key: model.init(key, TOKENS, LENGTHS)["params"], jax.random.key(0))
  leaves, tree = jax.tree.flatten(shapes)
  rng = np.random.default_rng(1)
  return jax.tree.unflatten(tree, [rng.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves])


def scores_of(model: LanguageModel) -> list[tuple[np.ndarray, np.ndarray]]:
  """Return the scores f64[b, t - 1, v] of each direction, and the words to predict."""
  params, found = params_of(model), []
  vectors = params["embedding"]["embedding"].astype(np.float64)
  for direction, layer in enumerate(model.layers):
    read, expected = (TOKENS[:, :-1], TOKENS[:, 1:]) if direction == 0 else (TOKENS[:, 1:], TOKENS[:, :-1])
    layer_of = reference.lstm
    if model.config.cell != "lstm":
      layer_of = functools.partial(cell_reference.hidden, model.config.cell)
    nothing = {"input_dropout_mask": None, "recurrent_dropout_mask": None, "lengths": None}
    hidden = layer_of(vectors[read], **params[layer], **nothing, reverse=direction == 1)
    states = hidden @ params[f"queries_{direction}"]["kernel"].astype(np.float64)
    found.append((states @ vectors.T + params["word_bias"], expected))
  return found


@pytest.mark.parametrize("settings", [{}, {"directions": 1}, {"cell": "gru"}])
def test_loss_and_accuracy_over_all_words_agree_with_float64(settings):
  model = model_of(**settings)
  parts = []
  for scores, expected in scores_of(model):
    losses = -np.take_along_axis(special.log_softmax(scores, axis=2), expected[:, :, None], axis=2)
    parts.append(np.stack([losses.mean(axis=(1, 2)), (scores.argmax(axis=2) == expected).mean(axis=1)], axis=1))
  found = model.apply({"params": params_of(model)}, TOKENS, LENGTHS, method="predict")
  np.testing.assert_allclose(found, np.mean(parts, axis=0), rtol=2e-5)


def test_loss_over_random_words_weighs_each_by_how_rarely_it_is_drawn(monkeypatch):
  monkeypatch.setattr("imdb_jax.language_model._SAMPLES", 6)
  model, sampled = model_of(), np.array([0, 3, 3, 7, 10, 1], np.int32)
  shares = np.log((np.arange(SIZE) + 2) / (np.arange(SIZE) + 1)) / np.log(SIZE + 1)
  assert shares.sum() == pytest.approx(1)
  parts = []
  for scores, expected in scores_of(model):
    answers = np.zeros((*expected.shape, 2))
    for place in np.ndindex(expected.shape):
      word, score = expected[place], np.exp(scores[place])
      others = [other for other in sampled if other != word]
      total = score[word] + sum(score[other] / (6 * shares[other]) for other in others)
      answers[place] = np.log(total) - np.log(score[word]), score[word] > max(score[other] for other in others)
    parts.append(answers.mean(axis=1))
  found = model.apply({"params": params_of(model)}, TOKENS, LENGTHS, sampled=sampled)
  np.testing.assert_allclose(found, np.mean(parts, axis=0), rtol=2e-5)


def test_words_are_drawn_by_zipfs_law():
  model = model_of()
  drawn = np.concatenate([model.draw(jax.random.key(seed))["sampled"] for seed in range(40)])
  shares = np.log((np.arange(SIZE) + 2) / (np.arange(SIZE) + 1)) / np.log(SIZE + 1)
  found = np.bincount(drawn, minlength=SIZE) / len(drawn)
  # Five standard errors.
  np.testing.assert_allclose(found, shares, atol=5 * np.sqrt(0.25 / len(drawn)))


def test_every_sequence_counts_as_its_weight_says():
  answers = jnp.array([[2.0, 0.5], [4.0, 0.25], [9.0, 1.0]])
  sums = NextWord().sums(answers, jnp.zeros(3, jnp.int32), jnp.array([1.0, 1.0, 0.0]), None)
  assert {name: float(value) for name, value in sums.items()} == {"loss": 6, "correct": 0.75, "weight": 2}


def test_seeds_are_averaged():
  result = NextWord().evaluate(np.array([[[2, 0.5], [4, 0.25]], [[1, 0], [1, 1]]], np.float32), np.zeros(2))
  assert (result.loss, result.accuracy) == (2, 0.4375)
  assert [(each.loss, each.accuracy) for each in result.seeds] == [(3, 0.375), (1, 0.5)]
