"""Arrays in a safetensors file. Unlike the package of that name, `load` refuses all arrays but those expected."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from imdb_jax.store import files


def _header(arrays: dict[str, Any]) -> dict[str, Any]:
  """Return type, shape and place of each array, in the order of the bytes."""
  header, end = {}, 0
  for name, array in sorted(arrays.items(), key=lambda item: (item[1].dtype.name, item[0])):
    start, end = end, end + array.size * array.dtype.itemsize
    dtype = {"float32": "F32", "uint32": "U32"}[array.dtype.name]
    header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [start, end]}
  return header


def save(path: Path, arrays: dict[str, np.ndarray]) -> None:
  """Write arrays of float32 and uint32 to a new file."""
  header = _header(arrays)
  text = json.dumps(header, separators=(",", ":")).encode()
  # The bytes of the arrays begin at a multiple of 8.
  text += b" " * (-len(text) % 8)
  with path.open("xb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    file.writelines(arrays[name].tobytes() for name in header)


def load(path: Path, expected: dict[str, Any]) -> dict[str, np.ndarray]:
  """Return the arrays of a file, which must have the expected names, shapes and dtypes, and finite values.

  Raises:
    OSError, ValueError: the file cannot be read, or has other arrays.
  """
  header = _header(expected)
  with files.open_regular(path) as file:
    size = int.from_bytes(file.read(8), "little")
    # The package adds metadata if it is given some.
    found = files.parse_json(file.read(size)) if size <= files.MAX_JSON_BYTES else None
    if not isinstance(found, dict) or {**found, "__metadata__": 0} != {**header, "__metadata__": 0}:
      raise ValueError("its header is not that of this model")
    if os.fstat(file.fileno()).st_size != file.tell() + max(entry["data_offsets"][1] for entry in header.values()):
      raise ValueError("it is cut off or too long")
    arrays = {}
    for name, array in ((name, expected[name]) for name in header):
      arrays[name] = np.fromfile(file, array.dtype, array.size).reshape(array.shape)
  if not all(np.isfinite(array).all() for array in arrays.values()):
    raise ValueError("it holds values that are not finite")
  return arrays
