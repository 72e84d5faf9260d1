"""Which devices a run uses, and what the platform is told before it starts."""

import dataclasses
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from homeless import make_homeless
from training.tiny import tiny

from imdb_jax import devices
from imdb_jax.config import RuntimeConfig
from imdb_jax.data import sources, tokens
from imdb_jax.errors import PlatformError, UsageError
from imdb_jax.program import Program
from imdb_jax.training.console import Console, show_header

DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
CPU = RuntimeConfig(platform="cpu")

# Page faults of three calls with a temporary array of 36 MB on each of two devices, once the heap has grown. The least
# of five windows counts, because the arrays of both devices may exist at once for the first time in any of them. glibc
# keeps arrays below 32 MB by itself.
FAULTS = """
import resource, sys
import jax, jax.numpy as jnp
from imdb_jax import devices
from imdb_jax.config import RuntimeConfig

runtime = RuntimeConfig(platform="cpu", num_devices=2)
if sys.argv[1] == "kept":
  devices.keep_freed_memory(runtime)
mesh = devices.start(runtime, batch_size=2)
x = jax.device_put(jnp.ones((2, 3_000, 3_000)), devices.over_rows(mesh))
step = jax.jit(lambda x: jnp.sqrt(x) @ jnp.ones(3_000), out_shardings=devices.over_rows(mesh))
for _ in range(20):
  step(x).block_until_ready()
counts = []
for _ in range(5):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  for _ in range(3):
    step(x).block_until_ready()
  counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(counts))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_memory_causes_no_page_faults():
  commands = [[sys.executable, "-c", FAULTS, memory] for memory in ("freed", "kept")]
  running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
  freed, kept = [int(process.communicate()[0]) for process in running]
  page_kilobytes = 4
  pages = 3 * 2 * 3_000 * 3_000 * 4 // (1024 * page_kilobytes)
  assert freed > pages / 2, "otherwise the check proves nothing"
  assert kept < pages / 100


@pytest.mark.parametrize(("named", "batch_size", "expected"), [(None, 32, 32), (None, 128, 64), (4, 128, 4)])
def test_no_more_cores_become_devices_than_a_batch_has_rows(named, batch_size, expected, monkeypatch):
  requested = {}
  monkeypatch.setattr(devices, "num_cores", lambda: 64)
  monkeypatch.setattr(jax.config, "update", requested.__setitem__)
  devices.start(dataclasses.replace(CPU, num_devices=named), batch_size)
  assert requested["jax_num_cpu_devices"] == expected


@pytest.mark.parametrize(("batch_size", "expected"), [(1, 1), (3, 3), (4, 4), (32, 4)])
def test_no_more_devices_are_used_than_a_batch_has_rows(batch_size, expected):
  assert list(devices.start(CPU, batch_size).devices) == jax.devices()[:expected]


def test_a_named_number_of_devices_is_used_or_refused():
  assert devices.start(dataclasses.replace(CPU, num_devices=3), 32).size == 3
  with pytest.raises(PlatformError, match=r"^--num-devices 4: a batch of 3 has work for 3 per process at most\.$"):
    devices.start(dataclasses.replace(CPU, num_devices=4), 3)
  with pytest.raises(PlatformError, match=r"^--num-devices 5: JAX sees 4 on platform cpu\.$"):
    devices.start(dataclasses.replace(CPU, num_devices=5), 32)


@dataclasses.dataclass(frozen=True)
class Device:
  """A device of another machine."""

  id: int
  process_index: int
  platform: str = "gpu"


def pretend(monkeypatch, *counts: int) -> None:
  """Make JAX see so many devices in each process, those of the last process first."""
  found = [Device(8 * process + i, process) for process, count in enumerate(counts) for i in range(count)]
  monkeypatch.setattr(jax, "devices", lambda *platform: found[::-1])
  monkeypatch.setattr(devices, "require_arithmetic", lambda device: None)


@pytest.mark.parametrize(
  ("counts", "batch_size", "expected"), [((8, 8), 32, 8), ((8, 8), 4, 2), ((8, 8), 5, 2), ((1, 1, 1), 3, 1)]
)
def test_every_process_uses_the_same_number_of_devices(counts, batch_size, expected, monkeypatch):
  pretend(monkeypatch, *counts)
  found = devices.start(RuntimeConfig(platform="gpu"), batch_size).devices
  assert [device.process_index for device in found] == [i for i in range(len(counts)) for _ in range(expected)]


def test_more_processes_than_rows_are_refused(monkeypatch):
  pretend(monkeypatch, 1, 1, 1)
  with pytest.raises(PlatformError, match=r"^3 processes cannot share a batch of 2: raise --batch-size\.$"):
    devices.start(RuntimeConfig(platform="gpu"), 2)


def test_processes_with_different_numbers_of_devices_are_refused(monkeypatch):
  pretend(monkeypatch, 2, 1)
  with pytest.raises(PlatformError, match=r"process 0: 2, process 1: 1\)\. Give all the same --num-devices"):
    devices.start(RuntimeConfig(platform="gpu"), 32)


def test_a_missing_platform_is_an_error_and_not_a_cpu_run():
  with pytest.raises(PlatformError, match=r"^--platform tpu: JAX sees only cpu\. Install JAX for TPUs"):
    devices.start(RuntimeConfig(platform="tpu"), 32)


def test_the_header_tells_how_many_devices_are_used(tmp_path, capsys):
  config = tiny(tmp_path / "run", batch_size=2)
  data = tokens.load(sources.find(config.data, None, tmp_path), config.data, cache_dir=tmp_path, report=print)
  for num_rows, expected in ((2, r"2 x cpu (cpu) of 4, 1 process(es)"), (32, r"4 x cpu (cpu), 1 process(es)")):
    program = Program(config, devices.start(CPU, num_rows))
    show_header(program, data, 0, Console())
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Devices"))
    assert line.split(maxsplit=1)[1] == expected


def gpu_mesh(monkeypatch, flags: str | None):
  """Pretend that the devices are GPUs, and set XLA_FLAGS."""
  # Registers the variable, so that it is restored.
  monkeypatch.setenv("XLA_FLAGS", flags or "")
  if flags is None:
    monkeypatch.delenv("XLA_FLAGS")
  pretend(monkeypatch, 1)


@pytest.mark.parametrize("flags", [None, "--xla_dump_to=x"])
def test_deterministic_is_refused_on_a_gpu_once_jax_has_started(flags, monkeypatch):
  """XLA reads its flags only once, when JAX starts."""
  gpu_mesh(monkeypatch, flags)
  # A second attempt, as in a notebook, is refused as well.
  for _ in range(2):
    with pytest.raises(UsageError, match=f"^--deterministic: JAX has started already; set XLA_FLAGS={DETERMINISTIC}"):
      devices.start(RuntimeConfig(deterministic=True), 32)
  assert os.environ.get("XLA_FLAGS") == flags


def test_deterministic_works_if_the_flag_was_set_before_jax_started(monkeypatch):
  gpu_mesh(monkeypatch, f"--xla_dump_to=x {DETERMINISTIC}")
  devices.start(RuntimeConfig(deterministic=True), 32)
  assert os.environ["XLA_FLAGS"] == f"--xla_dump_to=x {DETERMINISTIC}"


@pytest.mark.parametrize(("flags", "expected"), [(None, DETERMINISTIC), ("--a=b", f"--a=b {DETERMINISTIC}")])
def test_deterministic_sets_the_flag_before_jax_starts(flags, expected, monkeypatch):
  gpu_mesh(monkeypatch, flags)
  # As if JAX had not started: it takes a number of CPU devices.
  monkeypatch.setattr(jax.config, "update", lambda name, value: None)
  devices.start(RuntimeConfig(deterministic=True), 32)
  assert os.environ["XLA_FLAGS"] == expected


def test_a_gpu_is_checked_before_it_is_used(monkeypatch):
  gpu_mesh(monkeypatch, None)
  monkeypatch.setattr(devices, "require_arithmetic", lambda device: pytest.fail(f"checked: {device.platform}"))
  with pytest.raises(pytest.fail.Exception, match="checked: gpu"):
    devices.start(RuntimeConfig(), 32)


WRONG = {
  "tanh": lambda right: lambda x: right(x) + 0.1,
  "sqrt": lambda right: lambda x: 0 * x,
  "sum": lambda right: lambda x, axis: right(x, axis=1 - axis),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_device_that_computes_wrongly_is_not_used(name, monkeypatch):
  devices.require_arithmetic(jax.devices()[0])
  monkeypatch.setattr(devices.jnp, name, WRONG[name](getattr(devices.jnp, name)))
  with pytest.raises(PlatformError, match=rf"^cpu computes wrongly: {name} \(jax {jax.__version__}, .*Try another jax"):
    devices.require_arithmetic(jax.devices()[0])


@pytest.mark.parametrize("wrong", [np.nan, 0.0])
def test_a_device_that_draws_wrongly_is_not_used(wrong, monkeypatch):
  monkeypatch.setattr(jax.random, "normal", lambda key, shape: np.full(shape, wrong, np.float32))
  with pytest.raises(PlatformError, match=r"computes wrongly: random\.normal"):
    devices.require_arithmetic(jax.devices()[0])


def test_a_cpu_is_deterministic_at_any_time(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "")
  assert devices.start(dataclasses.replace(CPU, deterministic=True), 32).size == 4


@pytest.fixture
def programs(tmp_path, monkeypatch) -> Iterator[Path]:
  """The folder for compiled programs of a user who has none yet."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
  before = jax.config.values["jax_compilation_cache_dir"]
  jax.config.update("jax_compilation_cache_dir", None)
  yield tmp_path / "home" / "imdb_jax-programs"
  jax.config.update("jax_compilation_cache_dir", before)


def folder_of_programs() -> str | None:
  devices.start(CPU, 32)
  return jax.config.values["jax_compilation_cache_dir"]


def test_compiled_programs_are_kept_apart_from_the_cache_folder_and_from_other_users(programs, tmp_path):
  """They are native code, and a cache folder is copied from machine to machine."""
  cache_dir = tmp_path / "home" / "imdb_jax"
  (cache_dir / "xla").mkdir(parents=True)
  before = os.umask(0)
  try:
    devices.start(dataclasses.replace(CPU, cache_dir=cache_dir), 32)
  finally:
    os.umask(before)
  assert jax.config.values["jax_compilation_cache_dir"] == str(programs)
  assert not programs.is_relative_to(cache_dir)
  assert stat.S_IMODE(programs.stat().st_mode) == 0o700
  jax.config.update("jax_compilation_cache_dir", None)
  assert folder_of_programs() == str(programs), "also the next time"


def test_a_folder_that_the_program_has_chosen_is_left_alone(programs):
  jax.config.update("jax_compilation_cache_dir", "its own")
  assert folder_of_programs() == "its own"
  assert not programs.exists()


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_programs_in_a_folder_that_others_can_use_are_not_run(programs, mode):
  programs.mkdir(parents=True)
  programs.chmod(mode)
  assert folder_of_programs() is None


def test_programs_in_a_folder_of_another_user_are_not_run(programs, monkeypatch):
  programs.mkdir(mode=0o700, parents=True)
  monkeypatch.setattr(os, "getuid", lambda: programs.stat().st_uid + 1)
  assert folder_of_programs() is None


def test_programs_behind_a_link_are_not_run(programs, tmp_path):
  (tmp_path / "elsewhere").mkdir(mode=0o700)
  programs.parent.mkdir()
  programs.symlink_to(tmp_path / "elsewhere")
  assert folder_of_programs() is None


@pytest.mark.parametrize("home", ["/dev/null", None])
def test_without_a_writable_home_programs_are_compiled_each_time(programs, home, monkeypatch):
  monkeypatch.delenv("XDG_CACHE_HOME")
  if home is None:
    make_homeless(monkeypatch)
  else:
    monkeypatch.setenv("HOME", home)
  assert folder_of_programs() is None


@pytest.mark.parametrize(("num_rows", "expected"), [(0, 0), (1, 4), (4, 4), (5, 8)])
def test_rows_are_padded_to_a_multiple_of_the_devices(num_rows, expected):
  assert devices.padded_size(num_rows, devices.start(CPU, 32)) == expected


def test_each_device_holds_its_rows_or_the_whole_array():
  mesh = devices.start(CPU, 32)
  array = np.arange(16).reshape(2, 8)
  placed = devices.put({"rows": array, "all": array}, devices.over_rows(mesh, axis=1))["rows"]
  assert [shard.data.tolist() for shard in placed.addressable_shards] == [
    array[:, 2 * i : 2 * i + 2].tolist() for i in range(4)
  ]
  placed = devices.put(array, devices.replicated(mesh))
  assert [shard.data.tolist() for shard in placed.addressable_shards] == [array.tolist()] * 4
