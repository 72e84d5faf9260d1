"""Parameters start as in Keras, logits agree with float64, and dropout masks have the right shape and scale."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lstm import cell_reference, reference

from imdb_jax.config import ModelConfig
from imdb_jax.model import TextClassifier, draw_dropout_masks

SMALL = {"embedding_size": 3, "hidden_size": 5}
VOCABULARY_SIZE = 11
# Padded at the front: from only padding to none.
LENGTHS = np.array([0, 1, 3, 7, 7, 5], np.int32)


@functools.cache
def initializer(config: ModelConfig, vocabulary_size: int):
  """Return the compiled function from a seed to initial parameters."""
  tokens, lengths = np.zeros((1, 2), np.int32), np.ones(1, np.int32)
  model = TextClassifier(config, vocabulary_size)
  return jax.jit(lambda seed: model.init(jax.random.key(seed), tokens, lengths)["params"])


def init(config: ModelConfig, vocabulary_size: int, seed: int = 0) -> dict:
  return jax.device_get(initializer(config, vocabulary_size)(seed))


def make_tokens(lengths: np.ndarray, sequence_length: int) -> np.ndarray:
  """Return random ids; those of a review do not depend on the length that it is padded to."""
  tokens = np.zeros((len(lengths), sequence_length), np.int32)
  for row, length in enumerate(lengths):
    ids = np.random.default_rng(row).integers(1, VOCABULARY_SIZE, length)
    tokens[row, sequence_length - length :] = ids
  return tokens


def random_params(config: ModelConfig) -> dict:
  """Return parameters far from their initial values, so that each of them affects the logits."""
  leaves, tree = jax.tree.flatten(jax.eval_shape(initializer(config, VOCABULARY_SIZE), 0))
  rng = np.random.default_rng(1)
  return jax.tree.unflatten(tree, [rng.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves])


def logits_of(config: ModelConfig, params: dict, tokens, lengths, masks=(None, None)) -> np.ndarray:
  """Return the logits [n] of a model with one logit."""
  model = TextClassifier(config, VOCABULARY_SIZE)
  # Operation by operation: compiling each setting would take far longer.
  with jax.disable_jit():
    return np.asarray(model.apply({"params": params}, tokens, lengths, masks))[:, 0]


def bag(inputs, *, input_dropout_mask, lengths, **others) -> np.ndarray:
  """Return word vectors; only the real ones count."""
  del others, lengths
  return inputs if input_dropout_mask is None else inputs * input_dropout_mask[:, None]


def float64_logits(config: ModelConfig, params: dict, tokens, lengths, masks) -> np.ndarray:
  input_mask, recurrent_mask = (mask if mask is None or mask.ndim == 2 else np.moveaxis(mask, 1, 0) for mask in masks)
  h, parts = config.hidden_size, []
  layer_of = functools.partial(reference.lstm, gate_activation=config.gate_activation)
  if config.cell == "bag":
    layer_of, h = bag, config.embedding_size
  elif config.cell != "lstm":
    layer_of = functools.partial(cell_reference.hidden, config.cell)
  for direction, layer in enumerate([config.cell, f"backward_{config.cell}"][: config.directions]):
    hidden = layer_of(
      params["embedding"]["embedding"].astype(np.float64)[tokens],
      **params.get(layer, {}),
      input_dropout_mask=input_mask,
      recurrent_dropout_mask=None if recurrent_mask is None else recurrent_mask[..., direction * h :][..., :h],
      lengths=lengths if config.mask_padding else None,
      reverse=direction == 1,
    )
    last = 0 if direction else -1
    for pooling in config.pooling.split("_"):
      part = np.zeros((len(tokens), h))
      for row, length in enumerate(lengths):
        states = hidden[row, -length or len(hidden[row]) :] if config.mask_padding else hidden[row]
        if len(states):
          part[row] = {"last": states[last], "mean": states.mean(0), "max": states.max(0)}[pooling]
      parts.append(part)
  pooled = np.concatenate(parts, axis=1)
  return (pooled @ params["dense"]["kernel"].astype(np.float64) + params["dense"]["bias"])[:, 0]


@functools.cache
def article_params() -> dict:
  return init(ModelConfig(), 4000)


def test_the_article_model_has_643_713_parameters_under_fixed_names():
  shapes = {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(article_params())
  }
  assert shapes == {
    "embedding/embedding": (4000, 128),
    "lstm/kernel": (128, 512),
    "lstm/recurrent_kernel": (128, 512),
    "lstm/bias": (512,),
    "dense/kernel": (128, 1),
    "dense/bias": (1,),
  }
  assert sum(leaf.size for leaf in jax.tree.leaves(article_params())) == 643_713


@pytest.mark.parametrize(("cell", "columns", "biases"), [("gru", 96, (2,)), ("rnn", 32, ())])
def test_other_cells_have_parameters_of_their_own_that_start_as_in_keras(cell, columns, biases):
  params = init(ModelConfig(cell=cell, directions=2, embedding_size=24, hidden_size=32), VOCABULARY_SIZE)
  assert params.keys() == {"embedding", cell, f"backward_{cell}", "dense"}
  for layer in (params[cell], params[f"backward_{cell}"]):
    assert layer["kernel"].shape == (24, columns)
    assert_uniform(layer["kernel"], np.sqrt(6 / (24 + columns)), rtol=0.1)
    recurrent_kernel = layer["recurrent_kernel"].astype(np.float64)
    assert recurrent_kernel.shape == (32, columns)
    np.testing.assert_allclose(recurrent_kernel @ recurrent_kernel.T, np.eye(32), atol=1e-5)
    np.testing.assert_array_equal(layer["bias"], np.zeros((*biases, columns)))
  assert (params[cell]["kernel"] != params[f"backward_{cell}"]["kernel"]).all(), "directions share their weights"


def test_a_bag_of_words_has_no_parameters_but_vectors_and_head():
  params = init(ModelConfig(cell="bag", pooling="mean_max", **SMALL), VOCABULARY_SIZE)
  assert jax.tree.map(np.shape, params) == {
    "embedding": {"embedding": (VOCABULARY_SIZE, 3)},
    "dense": {"kernel": (6, 1), "bias": (1,)},
  }


def test_a_bag_of_words_does_not_know_their_order():
  config = ModelConfig(cell="bag", pooling="mean_max", mask_padding=True, **SMALL)
  params, tokens = random_params(config), make_tokens(LENGTHS, 7)
  shuffled = tokens.copy()
  shuffled[3:5] = shuffled[3:5, ::-1]
  found, expected = (logits_of(config, params, each, LENGTHS) for each in (shuffled, tokens))
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def assert_uniform(values: np.ndarray, bound: float, rtol: float) -> None:
  assert np.abs(values).max() <= bound
  assert np.abs(values).max() > 0.9 * bound
  np.testing.assert_allclose(values.std(), bound / np.sqrt(3), rtol=rtol)
  assert abs(values.mean()) < 5 * bound / np.sqrt(3 * values.size)


def test_embedding_starts_uniform():
  assert_uniform(article_params()["embedding"]["embedding"], 0.05, rtol=0.01)


def test_kernel_starts_glorot_uniform_over_all_gates():
  assert_uniform(article_params()["lstm"]["kernel"], np.sqrt(6 / (128 + 512)), rtol=0.01)


def test_recurrent_kernel_starts_with_orthogonal_rows():
  recurrent_kernel = article_params()["lstm"]["recurrent_kernel"].astype(np.float64)
  np.testing.assert_allclose(recurrent_kernel @ recurrent_kernel.T, np.eye(128), atol=1e-5)


def test_bias_starts_at_zero_except_one_for_the_forget_gate():
  np.testing.assert_array_equal(article_params()["lstm"]["bias"].reshape(4, 128).T, [[0, 1, 0, 0]] * 128)


def test_dense_layer_starts_glorot_uniform():
  dense = article_params()["dense"]
  assert_uniform(dense["kernel"], np.sqrt(6 / (128 + 1)), rtol=0.15)
  assert not dense["bias"].any()


def test_seeds_differ():
  first, second = init(ModelConfig(**SMALL), VOCABULARY_SIZE, 0), init(ModelConfig(**SMALL), VOCABULARY_SIZE, 1)
  assert (first["lstm"]["kernel"] != second["lstm"]["kernel"]).all()


@pytest.mark.parametrize(
  ("directions", "pooling", "mask_padding", "dropout_masks", "gate_activation"),
  [
    (1, "last", False, "shared", "sigmoid"),
    (1, "last", True, "per_gate", "hard_sigmoid"),
    (1, "mean", False, "per_gate", "sigmoid"),
    (1, "mean", True, "shared", "sigmoid"),
    (1, "max", False, "shared", "hard_sigmoid"),
    (1, "max", True, "per_gate", "sigmoid"),
    (1, "last", True, None, "sigmoid"),
    (1, "mean_max", True, "shared", "sigmoid"),
    (2, "last", False, "shared", "sigmoid"),
    (2, "last", True, "per_gate", "hard_sigmoid"),
    (2, "mean_max", True, "shared", "sigmoid"),
    (2, "mean_max", False, None, "sigmoid"),
  ],
)
def test_logits_agree_with_float64(directions, pooling, mask_padding, dropout_masks, gate_activation):
  config = ModelConfig(
    **SMALL,
    directions=directions,
    pooling=pooling,
    mask_padding=mask_padding,
    dropout_masks=dropout_masks or "shared",
    gate_activation=gate_activation,
  )
  assert_logits_agree_with_float64(config, has_masks=dropout_masks is not None)


@pytest.mark.parametrize(
  ("cell", "directions", "pooling", "mask_padding", "has_masks"),
  [
    ("gru", 1, "last", False, True),
    ("gru", 2, "mean_max", True, True),
    ("gru", 2, "last", True, False),
    ("rnn", 1, "last", True, True),
    ("rnn", 2, "mean", False, False),
    ("rnn", 2, "max", True, True),
    ("bag", 1, "mean", True, True),
    ("bag", 1, "mean_max", False, True),
    ("bag", 1, "max", True, False),
  ],
)
def test_logits_of_other_cells_agree_with_float64(cell, directions, pooling, mask_padding, has_masks):
  config = ModelConfig(**SMALL, cell=cell, directions=directions, pooling=pooling, mask_padding=mask_padding)
  assert_logits_agree_with_float64(config, has_masks)


def assert_logits_agree_with_float64(config: ModelConfig, has_masks: bool) -> None:
  params, tokens = random_params(config), make_tokens(LENGTHS, 7)
  masks = (None, None)
  if has_masks:
    masks = jax.device_get(draw_dropout_masks(jax.random.key(2), config, len(LENGTHS)))
  expected = float64_logits(config, params, tokens, LENGTHS, masks)
  np.testing.assert_allclose(logits_of(config, params, tokens, LENGTHS, masks), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("pooling", ["last", "mean", "max", "mean_max"])
def test_masked_padding_changes_nothing(directions, pooling):
  config = ModelConfig(**SMALL, mask_padding=True, pooling=pooling, directions=directions)
  params = random_params(config)
  tight, wide = (logits_of(config, params, make_tokens(LENGTHS, t), LENGTHS) for t in (7, 12))
  np.testing.assert_allclose(tight, wide, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("pooling", ["last", "mean", "max", "mean_max"])
def test_the_logit_of_a_masked_empty_review_is_the_bias(directions, pooling):
  config = ModelConfig(**SMALL, mask_padding=True, pooling=pooling, directions=directions)
  params = random_params(config)
  logits = logits_of(config, params, make_tokens(LENGTHS, 7), LENGTHS)
  assert logits[0] == params["dense"]["bias"][0]


def test_padding_that_is_not_masked_matters():
  """In the article's model, padding is processed like a word."""
  config = ModelConfig(**SMALL)
  params = random_params(config)
  tight, wide = (logits_of(config, params, make_tokens(LENGTHS, t), LENGTHS) for t in (7, 12))
  assert (np.abs(tight - wide) > 1e-3).all()


def test_tokens_may_be_int16_or_int32():
  config = ModelConfig(**SMALL)
  params, tokens = random_params(config), make_tokens(LENGTHS, 7)
  narrow, wide = (logits_of(config, params, tokens.astype(dtype), LENGTHS) for dtype in (np.int16, np.int32))
  np.testing.assert_array_equal(narrow, wide)


@pytest.mark.parametrize(("dropout_masks", "gates"), [("shared", ()), ("per_gate", (4,))])
def test_masks_keep_the_right_share_and_scale_it_up(dropout_masks, gates):
  config = ModelConfig(dropout_masks=dropout_masks, input_dropout_rate=0.2, recurrent_dropout_rate=0.5)
  masks = jax.device_get(draw_dropout_masks(jax.random.key(0), config, 500))
  for mask, rate, size in zip(masks, (0.2, 0.5), (128, 128), strict=True):
    # One value per review and unit, constant over time.
    assert mask.shape == (500, *gates, size)
    assert mask.dtype == np.float32
    np.testing.assert_array_equal(np.unique(mask), np.array([0, 1 / (1 - rate)], np.float32))
    # Five standard errors of the share.
    assert abs(np.mean(mask > 0) - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / mask.size)
    assert len(np.unique(mask.reshape(500, -1), axis=0)) == 500, "reviews share a mask"
  if gates:
    assert (masks[0][:, 0] != masks[0][:, 1]).any(axis=1).all(), "gates share a mask"


def test_each_direction_has_a_recurrent_mask_of_its_own_and_both_share_the_input_mask():
  inputs, recurrent = draw_dropout_masks(jax.random.key(0), ModelConfig(directions=2), 8)
  assert inputs is not None and recurrent is not None
  assert (inputs.shape, recurrent.shape) == ((8, 128), (8, 256))
  assert jnp.any(recurrent[:, :128] != recurrent[:, 128:], axis=1).all()


def test_input_and_recurrent_masks_differ():
  inputs, recurrent = draw_dropout_masks(jax.random.key(0), ModelConfig(), 8)
  assert jnp.any(inputs != recurrent)


@pytest.mark.parametrize(("rates", "drawn"), [((0, 0), (False, False)), ((0.2, 0), (True, False))])
def test_no_mask_is_drawn_at_rate_0(rates, drawn):
  config = ModelConfig(input_dropout_rate=rates[0], recurrent_dropout_rate=rates[1])
  masks = draw_dropout_masks(jax.random.key(0), config, 2)
  assert tuple(mask is not None for mask in masks) == drawn


@pytest.mark.parametrize("dropout_masks", ["shared", "per_gate"])
def test_a_padded_batch_starts_with_the_same_masks(dropout_masks):
  """On 3 devices, 32 reviews are padded to 33; they must train as on 1, 2 or 4."""
  config = ModelConfig(dropout_masks=dropout_masks)
  for exact, padded in zip(*(draw_dropout_masks(jax.random.key(0), config, size) for size in (32, 33)), strict=True):
    np.testing.assert_array_equal(exact, padded[:32])


def test_the_parts_of_the_model_give_the_logits_of_the_whole():
  """`embed`, then `encode`, then `head`; gradients with respect to word vectors need the parts."""
  config = ModelConfig(**SMALL, mask_padding=True, pooling="max")
  params, tokens = random_params(config), make_tokens(LENGTHS, 7)
  masks = jax.device_get(draw_dropout_masks(jax.random.key(2), config, len(LENGTHS)))
  model, variables = TextClassifier(config, VOCABULARY_SIZE, head_size=1), {"params": params}
  with jax.disable_jit():
    vectors = model.apply(variables, tokens, method="embed")
    encoded = model.apply(variables, vectors, LENGTHS, masks, method="encode")
    logits = model.apply(variables, encoded, method="head")
  assert (vectors.shape, encoded.shape, logits.shape) == ((6, 7, 3), (6, 5), (6, 1))
  np.testing.assert_array_equal(vectors, params["embedding"]["embedding"][tokens])
  np.testing.assert_array_equal(logits[:, 0], logits_of(config, params, tokens, LENGTHS, masks))


def test_the_head_has_the_size_of_the_task():
  model = TextClassifier(ModelConfig(**SMALL), VOCABULARY_SIZE, head_size=3)
  shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((2, 4), np.int32), np.ones(2, np.int32))["params"]
  assert shapes["dense"]["kernel"].shape == (5, 3)
