"""Files of weights are refused unless they hold exactly the arrays that are expected."""

import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from imdb_jax.store.arrays import load_safetensors as load

ARRAYS = {
  "lstm.kernel": np.arange(12, dtype=np.float32).reshape(2, 2, 3),
  "ngrams.keys": np.array([[0, 7, 2**32 - 1]], np.uint32),
  "ngrams.weights": np.array([[0, 0.25, -0.5]], np.float32),
  "dense.bias": np.array([[0.5]], np.float32),
}


@pytest.fixture
def path(tmp_path) -> Path:
  safetensors.numpy.save_file(ARRAYS, tmp_path / "model.safetensors")
  return tmp_path / "model.safetensors"


def test_arrays_come_back(path):
  found = load(path, ARRAYS)
  assert found.keys() == ARRAYS.keys()
  for name, array in ARRAYS.items():
    assert found[name].dtype == array.dtype
    np.testing.assert_array_equal(found[name], array)


def test_metadata_are_allowed(tmp_path):
  safetensors.numpy.save_file(ARRAYS, tmp_path / "other", metadata={"format": "np"})
  assert load(tmp_path / "other", ARRAYS).keys() == ARRAYS.keys()


def with_header(change: Callable[[dict], object]) -> Callable[[bytes], bytes]:
  """Return what changes the JSON header of a file's content."""

  def changed(content: bytes) -> bytes:
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(change(json.loads(content[8:start]))).encode()
    return len(header).to_bytes(8, "little") + header + content[start:]

  return changed


def entry(**changes: object) -> Callable[[bytes], bytes]:
  return with_header(lambda header: header | {"lstm.kernel": header["lstm.kernel"] | changes})


@pytest.mark.parametrize(
  "damage",
  [
    lambda content: b"",
    lambda content: content[:7],
    lambda content: content[:40],
    lambda content: content[:-1],
    lambda content: content + b"\0",
    lambda content: content.replace(np.float32(5).tobytes(), np.float32(np.nan).tobytes()),
    lambda content: b"\xff" * 8 + content[8:],
    lambda content: (2**20).to_bytes(8, "little") + b"[" * 2**20,
    with_header(lambda header: [header]),
    with_header(lambda header: None),
    with_header(lambda header: header | {"more": header["dense.bias"]}),
    with_header(lambda header: {name: header[name] for name in ("lstm.kernel", "dense.bias")}),
    entry(shape=[2, 3, 2]),
    entry(shape=[10**12]),
    entry(dtype="F64"),
    entry(data_offsets=[0, 10**15]),
    entry(data_offsets=[-48, 0]),
  ],
)
def test_anything_else_is_refused_without_much_memory(path, damage):
  path.write_bytes(damage(path.read_bytes()))
  tracemalloc.start()
  with pytest.raises(ValueError, match=r"\w") as raised:
    load(path, ARRAYS)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert "\n" not in str(raised.value)
  assert peak < 50e6


def test_links_and_pipes_are_refused(path, tmp_path):
  (tmp_path / "link").symlink_to(path)
  os.mkfifo(tmp_path / "pipe")
  for name in ("link", "pipe", "absent"):
    with pytest.raises(OSError, match=name):
      load(tmp_path / name, ARRAYS)
