"""The launches and bytes of a training step that is compiled for a GPU, on a machine without one."""

import importlib.util
import re

import pytest

PROGRAM = """HloModule jit_f

%body.1 (carry.1: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %carry.1 = (s32[], f32[8,4]{1,0}) parameter(0)
  %value.1 = f32[8,4]{1,0} get-tuple-element(%carry.1), index=1
  %half.1 = bf16[8,4]{1,0} fusion(%value.1), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/mul"}
  %call.1 = (f32[8,4]{1,0}, pred[]) custom-call(%half.1, %value.1), custom_call_target="mosaic_gpu_v2"
  ROOT %tuple.1 = (s32[], f32[8,4]{1,0}) tuple(%carry.1, %call.1)
}

ENTRY %main.2 (x.1: f32[8,4]) -> f32[8,4] {
  %x.1 = f32[8,4]{1,0} parameter(0)
  %copy.1 = f32[8,4]{1,0} copy(%x.1)
  %loop.1 = (s32[], f32[8,4]{1,0}) while(%copy.1), condition=%condition.1, body=%body.1
  ROOT %result.1 = f32[8,4]{1,0} get-tuple-element(%loop.1), index=1
}
"""


@pytest.fixture
def gpu_program(module):
  return module("gpu_program")


def test_sizes_are_those_of_all_operands_and_results(gpu_program):
  launches, loops = gpu_program.read(PROGRAM, "main.2")
  assert (launches, loops) == ([(256e-6, "copy.1  ")], ["body.1"])
  launches, loops = gpu_program.read(PROGRAM, "body.1")
  assert [source for _, source in launches] == ["half.1  jit(f)/mul", "call.1  "]
  assert [size for size, _ in launches] == pytest.approx([(128 + 64) / 1e6, (64 + 128 + 128 + 1) / 1e6])
  assert loops == []


needs_plugin = pytest.mark.skipif(
  importlib.util.find_spec("jax_cuda13_plugin") is None, reason="no CUDA plugin to compile with"
)


@pytest.mark.slow
@needs_plugin
@pytest.mark.parametrize("num_seeds", [1, 8])
def test_a_training_step_has_one_loop_and_few_launches(gpu_program, num_seeds):
  """More launches or bytes than docs/gpu.md says would be a copy that crept in."""
  hlo = gpu_program.compile_step(seeds=num_seeds)
  assert hlo.count('custom_call_target="mosaic_gpu') == 2
  assert "f64" not in hlo
  (entry,) = re.findall(r"^ENTRY %(\S+)", hlo, re.MULTILINE)
  _, (steps,) = gpu_program.read(hlo, entry)
  launches, loops = gpu_program.read(hlo, steps)
  assert loops == []
  assert len(launches) <= 50
  assert sum(size for size, _ in launches) / num_seeds < 450


@pytest.mark.slow
@needs_plugin
def test_two_gpus_communicate_once_per_step(gpu_program):
  """They sum all gradients, and the loss, the correct answers and the weight of the batch."""
  num_parameters = 4000 * 128 + (128 + 128 + 1) * 4 * 128 + 128 + 1
  hlo = gpu_program.compile_step(gpus=2)
  assert re.findall(r"= (.*?)\{0\} (?:all-reduce|all-gather|all-to-all|collective-permute)(?:-start)?\(", hlo) == [
    f"f32[{num_parameters + 3}]"
  ]
