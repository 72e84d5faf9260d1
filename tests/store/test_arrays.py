"""Folders whose metadata lie, with manifests that agree with them: Orbax reads the one layout that it writes."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from imdb_jax.errors import CheckpointError
from imdb_jax.store import files
from imdb_jax.store.checkpoints import Checkpoints, Saved

SHAPE = (1, 4, 6)


@pytest.fixture(scope="module")
def state() -> dict[str, Any]:
  kernel = np.arange(24, dtype=np.float32).reshape(SHAPE)
  return jax.device_put({"params": {"kernel": kernel}, "step": np.array([4], np.int32)}, jax.devices()[0])


@pytest.fixture(scope="module")
def abstract(state) -> dict[str, Any]:
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


@pytest.fixture
def step(tmp_path, state, abstract) -> Path:
  """The folder of a saved step."""
  checkpoints = Checkpoints(tmp_path / "run", abstract, read_only=False)
  checkpoints.save(Saved(step=4, progress={}, score=None), state)
  checkpoints.close()
  return tmp_path / "run" / "checkpoints" / "4"


def change(path: Path, **changes: Any) -> None:
  """Change values of a JSON file."""
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def array(**changes: Any) -> Callable[[Path], None]:
  """Return what changes the metadata of an array."""
  return lambda step: change(step / "params.kernel" / ".zarray", **changes)


def metadata(**changes: Any) -> Callable[[Path], None]:
  """Return what changes Orbax's metadata of the tree."""
  return lambda step: change(step / "_METADATA", **changes)


def rename_in_metadata(step: Path) -> None:
  text = (step / "_METADATA").read_text()
  (step / "_METADATA").write_text(text.replace("params.kernel", "../../../elsewhere"))


def change_type(step: Path) -> None:
  text = (step / "_METADATA").read_text()
  (step / "_METADATA").write_text(text.replace("jax.Array", "string"))


def write(name: str, content: bytes) -> Callable[[Path], None]:
  """Return what writes a file."""
  return lambda step: (step / name).write_bytes(content)


def giant(name: str) -> Callable[[Path], None]:
  """Return what makes a file huge, at no cost on the disk."""

  def make(step: Path) -> None:
    (step / name).touch()
    os.truncate(step / name, 2**40)

  return make


CHUNK, ZARRAY = "params.kernel/0.0.0", "params.kernel/.zarray"
LIES: dict[str, tuple[Callable[[Path], None], str]] = {
  "huge chunks": (array(chunks=[2**30, 4, 6]), ZARRAY),
  "huge shape": (array(shape=[2**30, 4, 6]), ZARRAY),
  "small chunks": (array(chunks=[1, 1, 1]), ZARRAY),
  "wide numbers": (array(dtype="<f8"), ZARRAY),
  "objects": (array(dtype="|O"), ZARRAY),
  "structures": (array(dtype=[["a", "<f4"]]), ZARRAY),
  "big-endian": (array(dtype=">f4"), ZARRAY),
  "compressed": (array(compressor={"id": "zstd", "level": 1}), ZARRAY),
  "unknown compressor": (array(compressor={"id": "no such"}), ZARRAY),
  "filtered": (array(filters=[{"id": "delta", "dtype": "<f4"}]), ZARRAY),
  "other order": (array(order="F"), ZARRAY),
  "filled": (array(fill_value=1.0), ZARRAY),
  "other separator": (array(dimension_separator="/"), ZARRAY),
  "nested too deeply": (write(ZARRAY, b"[" * 10**6), ZARRAY.split("/")[1]),
  "no JSON": (write(ZARRAY, b"\xff" * 100), "codec can't decode"),
  "huge metadata of an array": (giant(ZARRAY), "larger than"),
  "huge metadata": (giant("_METADATA"), "_METADATA"),
  "no metadata of an array": (lambda step: (step / ZARRAY).unlink(), ZARRAY),
  "no metadata": (lambda step: (step / "_METADATA").unlink(), "_METADATA"),
  "no chunk": (lambda step: (step / CHUNK).unlink(), CHUNK),
  "huge chunk": (giant(CHUNK), CHUNK),
  "short chunk": (write(CHUNK, b"\0" * 95), CHUNK),
  "another array": (lambda step: (step / "params.kernel").rename(step / "params.other"), "params.other"),
  "another file": (write("params.kernel/0.0.1", b"\0" * 96), "params.kernel/0.0.1"),
  "huge file": (giant("other"), "other"),
  "link": (lambda step: (step / "other").symlink_to("/etc/passwd"), "other is a link"),
  "database": (metadata(use_ocdbt=True), "_METADATA"),
  "zarr 3": (metadata(use_zarr3=True), "_METADATA"),
  "no tree": (metadata(tree_metadata=None), "_METADATA"),
  "list for an object": (write("_METADATA", b"[]"), "_METADATA"),
  "other names": (rename_in_metadata, "_METADATA"),
  "other types": (change_type, "_METADATA"),
}


@pytest.mark.parametrize(("lie", "named"), LIES.values(), ids=LIES)
def test_a_lie_is_named_before_orbax_reads_anything(step, abstract, lie, named, monkeypatch):
  lie(step)
  # A file of a terabyte would take half an hour to hash, so its manifest has some digest.
  with monkeypatch.context() as patch:
    if any(path.stat().st_size > 2**30 for path in step.rglob("*")):
      patch.setattr("imdb_jax.store.files.sha256", lambda path: "0" * 64)
    run_dir = step.parent.parent
    facts = {"progress": {}, "score": None}
    if not (step / "other").is_symlink():
      files.write_manifest(step, run_dir / "manifests" / "4.json", facts)
  for name in ("restore", "metadata"):
    monkeypatch.setattr(ocp.Checkpointer, name, lambda *arguments, **given: pytest.fail("Orbax reads"))
  with pytest.raises(CheckpointError, match="no checkpoint can be used") as caught:
    Checkpoints(run_dir, abstract, read_only=True).restore("latest")
  assert named in str(caught.value)
  assert len(str(caught.value).splitlines()) == 1


def test_numpy_alone_reads_the_arrays(step, state):
  layout = json.loads((step / ZARRAY).read_text())
  found = np.fromfile(step / CHUNK, layout["dtype"]).reshape(layout["shape"])
  np.testing.assert_array_equal(found, state["params"]["kernel"])


@pytest.mark.parametrize("name", ["lr[0.1]", "a*b", "a?b", "{a}", "50% #1", "s3:", "ü ☃", "$HOME", "~", "'\""])
def test_any_name_of_a_folder_can_be_saved_to(tmp_path, state, abstract, name):
  run_dir = tmp_path / name / "run"
  writer = Checkpoints(run_dir, abstract, read_only=False)
  writer.save(Saved(step=4, progress={}, score=0.5), state)
  _, found = Checkpoints(run_dir, abstract, read_only=True).restore("best")
  jax.tree.map(np.testing.assert_array_equal, found, state)


def test_a_save_that_lands_elsewhere_is_an_error(tmp_path, state, abstract):
  # tensorstore takes a backslash for a slash.
  checkpoints = Checkpoints(tmp_path / "a\\b", abstract, read_only=False)
  with pytest.raises(CheckpointError, match=r"Step 4 could not be saved .* is missing.*Intact steps: none"):
    checkpoints.save(Saved(step=4, progress={}, score=None), state)
