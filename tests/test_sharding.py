"""What the platform is told before it starts."""

import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from imdb_jax import sharding
from imdb_jax.config import RuntimeConfig
from imdb_jax.errors import PlatformError

# Page faults of three calls with a temporary array of 48 MB on each of two devices, once the heap has grown. glibc
# keeps smaller ones by itself.
FAULTS = """
import resource, sys
import jax, jax.numpy as jnp
from imdb_jax import sharding
from imdb_jax.config import RuntimeConfig

runtime = RuntimeConfig(platform="cpu", num_devices=2)
if sys.argv[1] == "kept":
  sharding.keep_freed_memory(runtime)
mesh = sharding.start(runtime)
x = jax.device_put(jnp.ones((2, 4_000, 3_000)), sharding.over_reviews(mesh))
step = jax.jit(lambda x: jnp.sin(x) @ jnp.ones(3_000), out_shardings=sharding.over_reviews(mesh))
for _ in range(20):
  step(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
  step(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*arguments: str) -> int:
  done = subprocess.run([sys.executable, "-c", FAULTS, *arguments], capture_output=True, text=True, check=True)
  return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_memory_is_not_faulted_in_again():
  page_kilobytes = 4
  pages = 3 * 2 * 4_000 * 3_000 * 4 // (1024 * page_kilobytes)
  assert faults("freed") > pages / 2, "else the check proves nothing"
  assert faults("kept") < pages / 100


def test_a_first_process_that_does_not_answer_is_named(monkeypatch):
  """JAX would end this process with a stack trace."""
  monkeypatch.setattr(sharding, "_PATIENCE", 0.5)
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(PlatformError, match=f"{address}: the first process does not answer: .*refused"):
      sharding._await_coordinator(address)
    probe.listen()
    sharding._await_coordinator(address)


@pytest.mark.parametrize(
  ("named", "batch_size", "expected"), [(None, 32, 32), (None, 128, 64), (None, None, 64), (4, 2, 4)]
)
def test_no_more_cores_become_devices_than_there_are_rows(named, batch_size, expected, monkeypatch):
  requested = []
  monkeypatch.setattr(sharding, "num_cores", lambda: 64)
  monkeypatch.setattr(sharding, "_request_cpu_devices", requested.append)
  monkeypatch.setattr(sharding, "_devices", lambda runtime: jax.devices())
  sharding.start(RuntimeConfig(platform="cpu", num_devices=named), batch_size)
  assert requested == [expected]


@pytest.mark.parametrize("of_the_program", [None, "its own"])
def test_programs_are_kept_where_the_program_says(of_the_program, tmp_path):
  """Else below the cache of the run, if that can be written."""
  before = jax.config.values["jax_compilation_cache_dir"]
  try:
    for place, expected in (tmp_path / "cache", str(tmp_path / "cache" / "xla")), (Path("/dev/null"), None):
      jax.config.update("jax_compilation_cache_dir", of_the_program)
      sharding.start(RuntimeConfig(platform="cpu", cache_dir=place))
      assert jax.config.values["jax_compilation_cache_dir"] == (of_the_program or expected)
  finally:
    jax.config.update("jax_compilation_cache_dir", before)
