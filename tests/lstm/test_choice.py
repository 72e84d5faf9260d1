"""Which implementation is chosen for which call, and when the kernel passes its self-check."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from imdb_jax.lstm import Call, choice, choose, recurrent_precision, unsupported
from imdb_jax.lstm.shared import known_lengths, real_positions

H = 64


@dataclasses.dataclass(frozen=True)
class Device:
  """The attributes of a device that a choice reads."""

  platform: str
  device_kind: str
  compute_capability: str = "0"
  process_index: int = 0

  def __str__(self) -> str:
    return self.device_kind


CPU, A100, H100 = Device("cpu", "cpu"), Device("gpu", "A100", "8.0"), Device("gpu", "H100", "9.0")


@pytest.mark.parametrize(
  ("name", "call", "device", "reason"),
  [
    ("mosaic_gpu", Call(64), H100, None),
    ("mosaic_gpu", Call(128), H100, None),
    ("mosaic_gpu", Call(128, precision="bfloat16"), H100, None),
    ("mosaic_gpu", Call(128, precision="float32"), H100, "in bfloat16; precision float32 excludes it"),
    ("mosaic_gpu", Call(128, precision="tensorfloat32"), H100, "in bfloat16; precision tensorfloat32"),
    ("mosaic_gpu", Call(96), H100, "sizes of 64 and 128, not 96"),
    ("mosaic_gpu", Call(256), H100, "sizes of 64 and 128, not 256"),
    ("mosaic_gpu", Call(64), A100, "it needs compute capability 9.0, and A100 has 8.0"),
    ("mosaic_gpu", Call(64), CPU, "it needs an NVIDIA GPU, and JAX computes on cpu"),
    ("chunked", Call(3, precision="float32"), CPU, None),
    ("chunked", Call(3, per_gate_masks=True), CPU, "only scan computes one mask per gate"),
    ("chunked", Call(3, gate_activation="hard_sigmoid"), CPU, "only scan computes hard_sigmoid"),
    ("scan", Call(3, per_gate_masks=True, gate_activation="hard_sigmoid"), CPU, None),
    ("mosaic_gpu", Call(64, cell="gru"), H100, "its cell is an LSTM; only scan computes gru"),
    ("chunked", Call(3, cell="rnn"), CPU, "only scan computes rnn"),
    ("scan", Call(3, cell="rnn"), CPU, None),
  ],
  ids=str,
)
def test_unsupported_call_is_explained(name, call, device, reason):
  found = unsupported(name, call, device)
  assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
  ("call", "device", "expected"),
  [
    (Call(128), H100, ("mosaic_gpu", "agrees with chunked on this device")),
    (Call(128, precision="float32"), H100, ("chunked", "bfloat16")),
    (Call(96), H100, ("chunked", "not 96")),
    (Call(128), A100, ("chunked", "A100 has 8.0")),
    (Call(128), CPU, ("chunked", "JAX computes on cpu")),
    (Call(128, per_gate_masks=True), H100, ("scan", "one mask per gate")),
    (Call(128, gate_activation="hard_sigmoid"), H100, ("scan", "hard_sigmoid")),
    (Call(128, cell="gru"), H100, ("scan", "only scan computes gru")),
  ],
  ids=str,
)
def test_fastest_implementation_that_supports_the_call_is_chosen(monkeypatch, call, device, expected):
  monkeypatch.setattr(choice, "_self_check_problem", lambda hidden_size, device: None)
  found = choose(call, device)
  assert found.name == expected[0]
  assert expected[1] in found.reason


def test_self_check_runs_on_the_given_device_or_for_another_process_on_a_local_one(monkeypatch):
  asked = []
  monkeypatch.setattr(choice, "gpu_problem", lambda device: None)
  monkeypatch.setattr(choice, "_self_check_problem", lambda hidden_size, device: asked.append(device))
  elsewhere = Device(jax.default_backend(), "elsewhere", process_index=1)
  for device in (jax.devices()[-1], None, elsewhere):
    choose(Call(H), device)
  assert asked == [jax.devices()[-1], jax.devices()[0], jax.devices()[0]]


@pytest.mark.parametrize(
  ("name", "precision", "expected"),
  [
    ("mosaic_gpu", "auto", "bfloat16"),
    ("mosaic_gpu", "bfloat16", "bfloat16"),
    ("chunked", "auto", "float32"),
    ("chunked", "tensorfloat32", "tensorfloat32"),
    ("scan", "float32", "float32"),
  ],
)
def test_precision_of_the_recurrent_products(name, precision, expected):
  assert recurrent_precision(name, precision) == expected


def recurrence(inputs, weights, masks, lengths, *, reverse, bias=None):
  """Compute something simpler than an LSTM that depends on every argument, and compiles fast."""
  real = real_positions(known_lengths(lengths, inputs), inputs.shape[1])[:, :, None]
  bias = weights.bias if bias is None else bias
  z = jnp.tanh((inputs * masks.inputs[:, None]) @ weights.kernel + bias[None, None, :])
  hidden = jax.lax.cumsum(jnp.where(real, z, 0), axis=1, reverse=reverse) @ weights.recurrent_kernel.T
  return jnp.where(real, hidden * masks.recurrent[:, None], 0)


@jax.custom_vjp
def nan_in_the_last_gradient(x):
  return x


nan_in_the_last_gradient.defvjp(lambda x: (x, None), lambda _, dx: (dx.at[-1].set(jnp.nan),))


@jax.custom_batching.custom_vmap
def mixed_up(lengths):
  return lengths


@mixed_up.def_vmap
def _(axis_size, in_batched, lengths):
  del axis_size, in_batched
  return lengths[::-1], True


# Kernels with one mistake each.
FAULTY = {
  "input mask": lambda x, w, m, n, *, reverse: recurrence(
    x, w, m._replace(inputs=m.recurrent[:, :5]), n, reverse=reverse
  ),
  "recurrent mask": lambda x, w, m, n, *, reverse: recurrence(
    x, w, m._replace(recurrent=jnp.ones_like(m.recurrent)), n, reverse=reverse
  ),
  "lengths": lambda x, w, m, n, *, reverse: recurrence(x, w, m, jnp.full_like(n, 3), reverse=reverse),
  "rows of no length": lambda x, w, m, n, *, reverse: recurrence(x, w, m, jnp.maximum(n, 1), reverse=reverse),
  "direction": lambda x, w, m, n, *, reverse: recurrence(x, w, m, n, reverse=False),
  "second tile": lambda x, w, m, n, *, reverse: recurrence(x, w, m, n, reverse=reverse).at[16:].set(0),
  "gradient": lambda x, w, m, n, *, reverse: recurrence(
    x, w, m, n, reverse=reverse, bias=jax.lax.stop_gradient(w.bias)
  ),
  "NaN": lambda x, w, m, n, *, reverse: recurrence(x, w, m, n, reverse=reverse, bias=nan_in_the_last_gradient(w.bias)),
  "models": lambda x, w, m, n, *, reverse: recurrence(x, w, m, mixed_up(n), reverse=reverse),
}


class TestSelfCheck:
  @pytest.fixture(autouse=True)
  def clean(self, monkeypatch):
    """Forget earlier checks."""
    monkeypatch.setattr(choice, "gpu_problem", lambda device: None)
    choice._self_check_problem.cache_clear()
    yield
    choice._self_check_problem.cache_clear()

  def use_kernel(self, monkeypatch, kernel):
    monkeypatch.setattr(choice, "implementation_of", {"chunked": recurrence, "mosaic_gpu": kernel}.get)

  def test_kernel_that_agrees_is_chosen_also_while_tracing(self, monkeypatch):
    self.use_kernel(monkeypatch, recurrence)
    found = []
    jax.eval_shape(lambda: found.append(choose(Call(H))))
    assert found == [("mosaic_gpu", "agrees with chunked on this device")]

  @pytest.mark.parametrize("kernel", FAULTY.values(), ids=FAULTY)
  def test_kernel_with_a_mistake_is_not_chosen(self, monkeypatch, kernel):
    self.use_kernel(monkeypatch, kernel)
    # Compiling would take far longer.
    monkeypatch.setattr(jax, "jit", lambda function: function)
    name, reason = choose(Call(H))
    assert name == "chunked"
    assert "mosaic_gpu: it differs from chunked on this device by" in reason

  def test_kernel_that_fails_without_a_message_is_not_chosen(self, monkeypatch):
    def fail(*args, **kwargs):
      raise AssertionError

    self.use_kernel(monkeypatch, fail)
    assert choose(Call(H)) == ("chunked", "mosaic_gpu: it failed its self-check: AssertionError")

  @pytest.mark.skipif(jax.default_backend() == "gpu", reason="has a GPU")
  def test_kernel_that_does_not_run_is_not_chosen(self):
    name, reason = choose(Call(H))
    assert name == "chunked"
    assert "it failed its self-check" in reason

  def test_a_process_checks_once_for_each_hidden_size(self, monkeypatch):
    checks = []
    monkeypatch.setattr(choice, "_self_check", lambda *arguments: checks.append(arguments))
    for hidden_size in (H, H, 2 * H):
      choose(Call(hidden_size))
    assert [hidden_size for hidden_size, _ in checks] == [H, 2 * H]
