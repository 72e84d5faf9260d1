"""The arrays in the folder of a step, written and read by Orbax.

Every array is a zarr array of its own, in one uncompressed chunk. Orbax and tensorstore do what the metadata of a
folder tells them, however much memory it takes, so `check` permits this one layout before they read anything.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers

from imdb_jax.errors import reraise_as
from imdb_jax.store import files

# Orbax's description of the tree. It tells Orbax where to look for each array, and in which format.
_METADATA, _KEYS = "_METADATA", ("tree_metadata", "use_ocdbt", "use_zarr3")


def checkpointer() -> ocp.Checkpointer:
  """Return a checkpointer that writes and reads this layout only."""
  handler = type_handlers.ArrayHandler(
    # One process writes each array, as one chunk.
    use_replica_parallel=False,
    enable_write_sharding_file=False,
    array_metadata_store=None,
  )
  registry = type_handlers.create_type_handler_registry((jax.Array, handler))
  return ocp.Checkpointer(
    ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False, type_handler_registry=registry)
  )


def by_name(tree: Any) -> dict[str, Any]:
  """Return the leaves of a tree by names like `params.lstm.kernel`."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def check(folder: Path, arrays: dict[str, jax.ShapeDtypeStruct]) -> None:
  """Check that a folder holds these arrays in this layout, from the sizes of its files and its metadata alone.

  Raises OSError or ValueError, which name the file or array, if it does not, or contains a link or device.
  """
  expected = {}
  for name, array in arrays.items():
    expected[f"{name}/.zarray"] = None
    expected[f"{name}/{'.'.join('0' * len(array.shape)) or '0'}"] = array.size * array.dtype.itemsize
  found = files.walk(folder)
  # Orbax keeps some small files of its own beside the arrays.
  unknown = [
    name for name, size in found.items() if name not in expected and ("/" in name or size > files.MAX_JSON_BYTES)
  ]
  if unknown:
    raise ValueError(f"{min(unknown)} is not a file of this checkpoint")
  for name, size in expected.items():
    if name not in found:
      raise ValueError(f"{name} is missing, which config and vocabulary require")
    if size not in (None, found[name]):
      raise ValueError(f"{name} has {found[name]:,} bytes, but config and vocabulary require {size:,}")
  tree = files.read_json(folder / _METADATA)
  entry = {"value_type": "jax.Array", "skip_deserialize": False}
  entries = {str((name,)): {"key_metadata": [{"key": name, "key_type": 2}], "value_metadata": entry} for name in arrays}
  if not isinstance(tree, dict) or [tree.get(key) for key in _KEYS] != [entries, False, False]:
    raise ValueError(f"{_METADATA} is not that of these arrays")
  for name, array in arrays.items():
    shape = list(array.shape)
    layout = {"shape": shape, "chunks": shape, "dtype": array.dtype.str, "compressor": None, "filters": None}
    layout |= {"order": "C", "fill_value": None, "dimension_separator": ".", "zarr_format": 2}
    zarray = files.read_json(folder / name / ".zarray")
    if zarray != layout:
      raise ValueError(f"{name}/.zarray is {zarray!r:.300}, but config and vocabulary require {layout}")


def save(orbax: ocp.Checkpointer, folder: Path, state: Any) -> None:
  """Write the arrays of a state to a new folder. `files.write_manifest` flushes them to the disk."""
  orbax.save(folder, args=ocp.args.PyTreeSave(by_name(state)))


def restore(orbax: ocp.Checkpointer, folder: Path, abstract: Any) -> Any:
  """Return the state in a folder that `check` permits, with the shapes and shardings of `abstract`."""
  wanted = by_name(abstract)
  arguments = ocp.args.PyTreeRestore(item=wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted))
  found = orbax.restore(folder, args=arguments)
  return jax.tree.unflatten(jax.tree.structure(abstract), [found[name] for name in wanted])


def load_safetensors(path: Path, expected: dict[str, Any]) -> dict[str, np.ndarray]:
  """Return the arrays of a file of weights, which must have the expected names, shapes and dtypes, and finite values.

  Raises OSError or ValueError if the file cannot be read or has other arrays, ImportError if the package is missing.
  """
  import safetensors.numpy

  size = sum(array.size * array.dtype.itemsize for array in expected.values())
  with reraise_as(ValueError, "it is damaged", safetensors.SafetensorError):
    found = safetensors.numpy.load(files.read_bytes(path, size + files.MAX_JSON_BYTES))
  shapes = ({name: (array.shape, array.dtype) for name, array in arrays.items()} for arrays in (found, expected))
  if next(shapes) != next(shapes):
    raise ValueError("its arrays are not those of this model")
  if not all(np.isfinite(array).all() for array in found.values()):
    raise ValueError("it holds values that are not finite")
  return found
