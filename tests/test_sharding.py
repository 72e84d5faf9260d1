"""What the platform is told before it starts."""

import socket
import subprocess
import sys

import pytest

from imdb_jax import sharding
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
