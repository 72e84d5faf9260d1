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

from imdb_jax.lstm import Call, choice, choose, lstm


@pytest.fixture
def interpreter(monkeypatch):
  """Run kernels on the CPU: memory that nothing has written is NaN, and a race is a failure."""
  monkeypatch.setattr(choice, "gpu_problem", lambda device: None)
  # The interpreter of jax 0.10.2 supports only indexing with brackets.
  monkeypatch.setattr(plgpu, "load", lambda ref, *no_index, optimized: ref[...])
  set_gpu_interpret_mode(InterpretGPUParams(detect_races=True))
  try:
    yield
    # None if no kernel ran.
    assert gpu_callbacks._races is None or not gpu_callbacks.get_races().races_found
  finally:
    set_gpu_interpret_mode(None)
    gpu_callbacks.reset_gpu_interpret_mode_state()


class KernelContract(LstmContract):
  implementation = "mosaic_gpu"
  precision = "bfloat16"
  # The self-check does the same with fewer programs.
  test_vmap_computes_models_of_different_lengths = None

  @pytest.mark.parametrize("case", contract.KERNEL_CASES, ids=str)
  def test_agrees_with_float64(self, case):
    contract.check(self.call, case, self.precision)

  @pytest.mark.slow
  def test_passes_its_self_check(self):
    """Several warpgroups might exhaust the threads of the interpreter under `jax.vmap`; 64 units have one."""
    choice._self_check_problem.cache_clear()
    assert choose(Call(64)) == ("mosaic_gpu", "agrees with chunked on this device")


@pytest.mark.usefixtures("interpreter")
class TestInterpreted(KernelContract):
  pass


@pytest.mark.skipif(choice.gpu_problem(jax.local_devices()[0]) is not None, reason="no GPU for it")
class TestCompiled(KernelContract):
  @pytest.fixture(autouse=True)
  def poison(self):
    """Make memory that the kernel forgets to write hold NaN, and not the result of the call before."""
    jax.block_until_ready([jnp.full(2**22, jnp.nan) for _ in range(16)])


@pytest.mark.parametrize("num_models", [None, 3])
def test_compiles_to_one_launch_each_way(monkeypatch, num_models):
  """For a GPU that need not be there: the lowering checks layouts and sizes that the interpreter ignores."""
  monkeypatch.setattr(choice, "gpu_problem", lambda device: None)
  arrays, extras, _ = contract.arguments(Case("kernel_two_blocks", "shared", True))

  def loss(arrays):
    return jnp.sum(lstm(**arrays, **extras, implementation="mosaic_gpu") ** 2)

  gradient = jax.grad(loss)
  if num_models is not None:
    gradient = jax.vmap(gradient)
    arrays = {name: np.stack([array] * num_models) for name, array in arrays.items()}
  text = jax.jit(gradient).trace(arrays).lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("custom_call @mosaic_gpu") == 2
  assert "stablehlo.while" not in text


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="has a GPU")
def test_device_that_cannot_run_it_is_named():
  with pytest.raises(ValueError, match="'mosaic_gpu': it needs an NVIDIA GPU, and JAX computes on cpu"):
    lstm(*(jnp.ones(size) for size in ((2, 3, 5), (5, 256), (64, 256), (256,))), implementation="mosaic_gpu")
