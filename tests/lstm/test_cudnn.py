"""The cuDNN adapter's calls, with the reference in JAX instead of cuDNN unless there is a GPU."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import rnn
from lstm import contract

from imdb_jax.lstm import choice, cudnn, lstm

ARRAYS = jnp.ones((2, 3, 5)), jnp.ones((5, 16)), jnp.ones((4, 16)), jnp.ones(16)


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
  monkeypatch.setattr(choice, "gpu_problem", lambda device, capability: None)


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("case", contract.cases(["odd"], ("none", "shared_inputs")), ids=str)
def test_agrees_with_float64(case):
  contract.check(functools.partial(lstm, implementation="cudnn"), case)


@pytest.mark.usefixtures("reference")
def test_recurrent_dropout_is_refused():
  with pytest.raises(ValueError, match="'cudnn': cuDNN has no recurrent dropout"):
    lstm(*ARRAYS, implementation="cudnn", recurrent_dropout_mask=jnp.ones((2, 4)))


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="has a GPU")
def test_device_that_cannot_run_it_is_named():
  with pytest.raises(ValueError, match="'cudnn': it needs an NVIDIA GPU, and JAX computes on cpu"):
    lstm(*ARRAYS, implementation="cudnn")
