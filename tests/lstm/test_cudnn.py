"""What the adapter makes of a call, with JAX's own reference in place of cuDNN."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import rnn
from lstm import contract

from imdb_jax.lstm import choice, cudnn, lstm


@pytest.fixture
def reference(monkeypatch):
  if jax.default_backend() == "gpu":
    return

  def call(x, h_0, c_0, weights, seq_lengths, **sizes):
    parts = rnn.unpack_lstm_weights(
      weights, *(sizes[name] for name in ("input_size", "hidden_size", "num_layers")), False
    )
    return rnn.lstm_ref(x, h_0, c_0, *parts, seq_lengths, **sizes)

  monkeypatch.setattr(cudnn.rnn, "lstm", call)
  monkeypatch.setattr(choice, "gpu_problem", lambda capability: None)


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("input_masks", ["none", "shared_inputs", "per_gate_inputs"])
@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_agrees_with_float64(input_masks, with_lengths, reverse):
  case = contract.Case("odd", input_masks, with_lengths, reverse, "sigmoid")
  contract.check(functools.partial(lstm, implementation="cudnn"), case)


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize(
  ("settings", "reason"),
  [
    ({"recurrent_dropout_mask": jnp.ones((2, 4))}, "recurrent dropout"),
    ({"gate_activation": "hard_sigmoid"}, "hard_sigmoid"),
  ],
)
def test_what_cudnn_does_not_know_is_named(settings, reason):
  arrays = jnp.ones((2, 3, 5)), jnp.ones((5, 16)), jnp.ones((4, 16)), jnp.ones(16)
  with pytest.raises(ValueError, match=f"'cudnn': cuDNN knows no {reason}"):
    lstm(*arrays, implementation="cudnn", **settings)


def test_device_that_cannot_run_it_is_named():
  if jax.default_backend() == "gpu":
    pytest.skip("there is one that can")
  arrays = jnp.ones((2, 3, 5)), jnp.ones((5, 16)), jnp.ones((4, 16)), jnp.ones(16)
  with pytest.raises(ValueError, match="'cudnn': it needs an NVIDIA GPU, and JAX computes on cpu"):
    lstm(*arrays, implementation="cudnn")
