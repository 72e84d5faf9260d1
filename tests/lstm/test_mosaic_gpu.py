"""The kernel keeps the contract: interpreted on any machine, compiled where there is a GPU for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams, set_gpu_interpret_mode
from jax.experimental.pallas import mosaic_gpu as plgpu
from lstm import contract
from lstm.contract import Case, LstmContract

from imdb_jax.lstm import choice, choose, lstm, mosaic_gpu, unsupported

H = 64


@pytest.fixture
def interpreter(monkeypatch):
  """Runs kernels on the CPU: memory that nothing has written is NaN, and a race is a failure."""
  monkeypatch.setattr(choice, "gpu_problem", lambda capability: None)
  # The interpreter of jax 0.10.2 knows the brackets only.
  monkeypatch.setattr(plgpu, "load", lambda ref, *no_index, optimized: ref[...])
  set_gpu_interpret_mode(InterpretGPUParams(detect_races=True))
  try:
    yield
    # None where no kernel ran.
    assert gpu_callbacks._races is None or not gpu_callbacks.get_races().races_found
  finally:
    set_gpu_interpret_mode(None)
    gpu_callbacks.reset_gpu_interpret_mode_state()


class KernelContract(LstmContract):
  implementation = "mosaic_gpu"
  padded_shape = "kernel_two_tiles"

  @pytest.mark.parametrize("case", contract.KERNEL_CASES, ids=str)
  def test_agrees_with_float64(self, case):
    contract.check(self.call, case, "bfloat16")


@pytest.mark.usefixtures("interpreter")
class TestInterpreted(KernelContract):
  pass


@pytest.mark.skipif(choice.gpu_problem(9.0) is not None, reason="no GPU for it")
class TestCompiled(KernelContract):
  @pytest.fixture(autouse=True)
  def poison(self):
    """What the kernel forgets to write is NaN, and not what the call before left there."""
    jax.block_until_ready([jnp.full(2**22, jnp.nan) for _ in range(16)])


@pytest.mark.usefixtures("interpreter")
def test_vmap_runs_models_side_by_side():
  """Each with weights, masks and lengths of its own, as by itself."""
  arrays, extras, _ = contract.arguments(Case("kernel_two_tiles", "shared", True, False, "sigmoid"))
  names = (*contract.ARRAYS, *(name for name, value in extras.items() if value is not None))
  one = tuple(jnp.asarray((arrays | extras)[name]) for name in names)
  other = tuple(jnp.flip(array) for array in one[:-1]), jnp.flip(one[-1])
  models = [one, (*other[0], other[1])]

  def loss(*values):
    hidden = lstm(**dict(zip(names, values, strict=True)), implementation="mosaic_gpu")
    return jnp.sum(hidden**2), hidden

  gradient = jax.jit(jax.grad(loss, argnums=range(len(contract.ARRAYS)), has_aux=True))
  together = jax.jit(jax.vmap(jax.grad(loss, argnums=range(len(contract.ARRAYS)), has_aux=True)))
  found = together(*(jnp.stack(both) for both in zip(*models, strict=True)))
  expected = [gradient(*model) for model in models]
  for leaf, first, second in zip(*map(jax.tree.leaves, (found, *expected)), strict=True):
    np.testing.assert_allclose(leaf, jnp.stack([first, second]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masks", ["shared", "per_gate"])
@pytest.mark.parametrize("num_models", [None, 3])
def test_compiles_to_one_launch_each_way(monkeypatch, masks, num_models):
  """For a GPU that need not be there: the lowering checks layouts and sizes that the interpreter lets pass."""
  monkeypatch.setattr(choice, "gpu_problem", lambda capability: None)
  arrays, extras, _ = contract.arguments(Case("kernel_two_blocks", masks, True, False, "sigmoid"))

  def loss(arrays):
    return jnp.sum(lstm(**arrays, **extras, implementation="mosaic_gpu") ** 2)

  gradient = jax.grad(loss)
  if num_models is not None:
    gradient = jax.vmap(gradient)
    arrays = {name: np.stack([array] * num_models) for name, array in arrays.items()}
  text = jax.jit(gradient).trace(arrays).lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("custom_call @mosaic_gpu") == 2
  assert "stablehlo.while" not in text


@pytest.mark.parametrize(("hidden_size", "reason"), [(96, "64 and 128, not 96"), (256, "64 and 128, not 256")])
def test_hidden_size_that_does_not_fit_is_named(hidden_size, reason):
  call = {"recurrent_dropout": True, "gate_activation": "sigmoid"}
  assert reason in unsupported("mosaic_gpu", hidden_size=hidden_size, **call)
  name, why = choose(hidden_size)
  assert name == "chunked"
  assert reason in why


def test_device_that_cannot_run_it_is_named():
  if jax.default_backend() == "gpu":
    pytest.skip("there is one that can")
  with pytest.raises(ValueError, match="'mosaic_gpu': it needs an NVIDIA GPU, and JAX computes on cpu"):
    lstm(*(jnp.ones(size) for size in ((2, 3, 5), (5, 4 * H), (H, 4 * H), (4 * H,))), implementation="mosaic_gpu")


class TestChoice:
  @pytest.fixture(autouse=True)
  def clean(self, tmp_path):
    choice._self_check_problem.cache_clear()
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "cache"))
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    choice._self_check_problem.cache_clear()

  @pytest.mark.parametrize(("problem", "num_checks"), [(None, 1), ("it is wrong", 2)])
  @pytest.mark.parametrize("has_cache", [True, False])
  def test_a_kernel_that_has_agreed_is_not_tried_again(self, problem, num_checks, has_cache, monkeypatch):
    """By the next process; one that has not is."""
    if not has_cache:
      jax.config.update("jax_compilation_cache_dir", None)
    checks = []
    monkeypatch.setattr(choice, "_self_check", lambda hidden_size: checks.append(hidden_size) or problem)
    for _ in range(2):
      choice._self_check_problem.cache_clear()
      assert choice._self_check_problem(H) == choice._self_check_problem(H) == problem
    assert len(checks) == (num_checks if has_cache else 2)
    # Nor does it speak for another device, version or size.
    monkeypatch.setattr(jax, "__version__", "1")
    choice._self_check_problem.cache_clear()
    choice._self_check_problem(H)
    choice._self_check_problem(64 + H)
    assert len(checks) == (num_checks if has_cache else 2) + 2

  @pytest.mark.usefixtures("interpreter")
  def test_kernel_that_agrees_is_taken(self):
    assert choose(H) == ("mosaic_gpu", "agrees with chunked on this device")

  @pytest.mark.usefixtures("interpreter")
  def test_kernel_that_does_not_agree_is_not(self, monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "_tanh", lambda x: 0.9 * jnp.tanh(x))
    name, reason = choose(H)
    assert name == "chunked"
    assert "differs from chunked" in reason

  @pytest.mark.usefixtures("interpreter")
  def test_kernel_whose_gradient_is_not_a_number_is_not(self, monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "_slope", lambda gate, gate_activation: jnp.full_like(gate, jnp.nan))
    name, reason = choose(H)
    assert name == "chunked"
    assert "differs from chunked on this device by nan" in reason

  def test_kernel_that_fails_without_a_word_is_not(self, monkeypatch):
    def fail(*args, **kwargs):
      raise AssertionError

    monkeypatch.setattr(choice, "gpu_problem", lambda capability: None)
    monkeypatch.setattr(mosaic_gpu, "lstm", fail)
    assert choose(H) == ("chunked", "mosaic_gpu: it failed its self-check: AssertionError")

  def test_kernel_that_does_not_run_is_not(self, monkeypatch):
    """Here for want of a GPU."""
    monkeypatch.setattr(choice, "gpu_problem", lambda capability: None)
    name, reason = choose(H)
    assert name == "chunked"
    assert "failed its self-check" in reason
