"""Count the launches and bytes of a training step on an H200, without a GPU: compile it there and read the program.

It needs JAX's CUDA plugin (`pip install -e '.[gpu]'`) and no driver. XLA's autotuner needs a GPU; without one, matrix
products are compiled with default tiles.
"""

import argparse
import dataclasses
import importlib.util
import math
import re
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from imdb_jax import devices, lstm
from imdb_jax.lstm import choice
from imdb_jax.presets import PRESETS
from imdb_jax.program import Program

# The limits of an H200 in XLA's own words, a GpuTargetConfigProto.
H200 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H200 141GB HBM3e"
dnn_version_info { major: 9 minor: 10 }
gpu_device_info {
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  device_memory_size: 151397597184 memory_bandwidth: 4800000000000 l2_cache_size: 52428800
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}
"""
# Instructions that name a value and compute nothing.
_NAMES = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "all-reduce-done")


def compile_step(name: str = "article", implementation: str = "mosaic_gpu", seeds: int = 1, gpus: int = 1) -> str:
  """Return the compiled program of a dispatch of a preset, as HLO; that of each GPU, if there are several."""
  preset = PRESETS[name]
  config = dataclasses.replace(
    preset,
    runtime=dataclasses.replace(preset.runtime, implementation=implementation),
    training=dataclasses.replace(preset.training, num_seeds=seeds),
  )
  target: Any = topologies.get_topology_desc(platform="cuda", target_config=H200, topology=f"1x1x{gpus}")
  mesh = Mesh(np.array(target.devices), (devices.AXIS,))
  # The device that traces is a CPU.
  with mock.patch.object(choice, "gpu_problem", lambda device: None):
    program = Program(config, mesh)
    shape = seeds, config.runtime.steps_per_dispatch, config.training.batch_size

    def array(dtype: Any, *more: int) -> Any:
      return jax.ShapeDtypeStruct((*shape, *more), dtype, sharding=devices.over_rows(mesh, axis=2))

    batches = {name: array(jnp.int32) for name in ("lengths", "labels")}
    batches |= {name: array(jnp.float32) for name in ("weights", "loss_weights")}
    batches["tokens"] = array(jnp.int16, config.data.sequence_length)
    num_steps = jax.ShapeDtypeStruct((), jnp.int32, sharding=devices.replicated(mesh))
    compiled: Any = program.train_steps.lower(program.abstract_state(), batches, num_steps).compile()
  return compiled.as_text()


def _megabytes(shape: str) -> float:
  """Return the size of one array or of a tuple of arrays, such as `(f32[32,400]{1,0}, pred[])`."""
  found = re.findall(r"(pred|bf16|[a-z](\d+))\[([\d,]*)\]", shape)
  sizes = {"pred": 1, "bf16": 2}
  return (
    sum(
      (sizes.get(dtype) or int(bits) // 8) * math.prod(int(size) for size in dims.split(",") if size)
      for dtype, bits, dims in found
    )
    / 1e6
  )


def read(hlo: str, name: str) -> tuple[list[tuple[float, str]], list[str]]:
  """Return what one computation of a program launches, and the names of the loops in it.

  A launch is described by its size in MB, all operands and results, and by its name with the operation it comes from.
  """
  sizes, launches, loops = {}, [], []
  (body,) = re.findall(rf"^(?:ENTRY )?%{re.escape(name)} \(.*?\{{\n(.*?)^\}}", hlo, re.MULTILINE | re.DOTALL)
  for line in body.splitlines():
    match = re.match(r" *(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(?=, |$)(.*)", line)
    if match is None:
      raise ValueError(f"This line is no instruction: {line}")
    result, shape, kind, operands, details = match.groups()
    sizes[result] = _megabytes(shape)
    if kind == "while":
      loops += re.findall(r"body=%([\w.-]+)", details)
    if kind not in _NAMES:
      size = sizes[result] + sum(sizes[operand] for operand in re.findall(r"%([\w.-]+)", operands))
      source = "".join(re.findall(r'op_name="([^"]*)"', details))
      launches.append((size, f"{result}  {source[-60:]}"))
  return launches, loops


def show(hlo: str, name: str, title: str, indent: str = "") -> None:
  """Print the launches of a computation, one by one from 1 MB on, then those of the loops in it."""
  launches, loops = read(hlo, name)
  print(f"{indent}{title}: {len(launches)} launches, {sum(size for size, _ in launches):.1f} MB")
  for size, source in launches:
    if size >= 1:
      print(f"{indent}  {size:6.1f} MB  {source}")
  for loop in loops:
    show(hlo, loop, "each iteration", indent + "  ")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--preset", choices=PRESETS, default="article")
  parser.add_argument("--implementation", choices=lstm.IMPLEMENTATIONS, default="mosaic_gpu")
  parser.add_argument("--num-seeds", type=int, default=1, help="Models side by side.")
  parser.add_argument("--num-devices", type=int, default=1, help="GPUs that share a batch.")
  flags = parser.parse_args()
  jax.config.update("jax_platforms", "cpu")
  if importlib.util.find_spec("jax_cuda13_plugin") is None:
    parser.error("JAX's CUDA plugin is missing: pip install -e '.[gpu]'")
  hlo = compile_step(flags.preset, flags.implementation, flags.num_seeds, flags.num_devices)
  (entry,) = re.findall(r"^ENTRY %(\S+)", hlo, re.MULTILINE)
  show(hlo, entry, f"jax {jax.__version__}, a dispatch")


if __name__ == "__main__":
  main()
