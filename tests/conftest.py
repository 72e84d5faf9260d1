"""Environment of all tests: four CPU devices, strict promotion, and temporary cache folders.

IMDB_JAX_TEST_PLATFORM=cuda selects a GPU instead, for the tests that require one.
"""

import os
import signal
import tempfile

import absl.logging
import jax
import pytest

# By default, pytest explains failed asserts in test files only.
pytest.register_assert_rewrite("lstm.contract", "training.tiny", "data.archives", "data.corpus")

PLATFORM = os.environ.get("IMDB_JAX_TEST_PLATFORM", "cpu")
# The environment variable is for commands that tests start. Set it before JAX's first computation.
os.environ["JAX_PLATFORMS"] = PLATFORM
jax.config.update("jax_platforms", PLATFORM)
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# In the background and under nohup, tests and the commands that they start would inherit ignored signals. A handler in
# Python is not inherited.
for number in (signal.SIGINT, signal.SIGHUP):
  if signal.getsignal(number) == signal.SIG_IGN:
    signal.signal(number, lambda *_: None)

# This starts JAX, so that no test can change the number of devices for later tests.
assert PLATFORM != "cpu" or jax.device_count() == 4

absl.logging.set_verbosity(absl.logging.ERROR)


def pytest_configure(config):
  """Use temporary folders for reviews and compiled programs, one of each per worker of pytest-xdist."""
  folder = tempfile.TemporaryDirectory(prefix="imdb_jax-tests-")
  os.environ["XDG_CACHE_HOME"] = folder.name
  os.environ.pop("IMDB_JAX_CACHE", None)
  # Many tests compile the same small programs, which `imdb_jax.devices` would not keep.
  jax.config.update("jax_compilation_cache_dir", folder.name + "/programs")
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  config.add_cleanup(folder.cleanup)
