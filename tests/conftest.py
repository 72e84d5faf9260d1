"""What every test runs under: four CPU devices, strict promotion, and a cache of its own.

With IMDB_JAX_TEST_PLATFORM=cuda in the environment a GPU instead, for the tests that ask for one.
"""

import os
import signal
import tempfile

import absl.logging
import jax
import pytest

# Asserts in a module that is no test file explain themselves only when asked to.
pytest.register_assert_rewrite("lstm.contract", "training.tiny")

PLATFORM = os.environ.get("IMDB_JAX_TEST_PLATFORM", "cpu")
# Also for the commands that tests start. Must precede JAX's first computation.
os.environ["JAX_PLATFORMS"] = PLATFORM
jax.config.update("jax_platforms", PLATFORM)
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# In the background and under nohup, tests and the commands that they start would ignore signals that they are to heed.
# A handler of Python's is not handed down.
for number in (signal.SIGINT, signal.SIGHUP):
  if signal.getsignal(number) == signal.SIG_IGN:
    signal.signal(number, lambda *_: None)

# Starts JAX, so that no test can change the number of devices for those after it.
assert PLATFORM != "cpu" or jax.device_count() == 4

absl.logging.set_verbosity(absl.logging.ERROR)


def pytest_configure(config):
  """Points the cache to a folder that is gone after the session; each worker of pytest-xdist has its own."""
  folder = tempfile.TemporaryDirectory(prefix="imdb_jax-tests-")
  os.environ["IMDB_JAX_CACHE"] = folder.name
  config.add_cleanup(folder.cleanup)
