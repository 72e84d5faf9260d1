"""Reader of weights in a file of the package safetensors, which the extra `export` installs."""

from pathlib import Path
from typing import Any

import numpy as np

from imdb_jax.store import files


def load(path: Path, expected: dict[str, Any]) -> dict[str, np.ndarray]:
  """Return the arrays of a file, which must have the expected names, shapes and dtypes, and finite values.

  Raises:
    OSError, ValueError: the file cannot be read, or has other arrays.
    ImportError: the package is missing.
  """
  import safetensors.numpy

  size = sum(array.size * array.dtype.itemsize for array in expected.values())
  try:
    found = safetensors.numpy.load(files.read_bytes(path, size + files.MAX_JSON_BYTES))
  except safetensors.SafetensorError as error:
    raise ValueError(f"it is damaged: {error}") from error
  shapes = ({name: (array.shape, array.dtype) for name, array in arrays.items()} for arrays in (found, expected))
  if next(shapes) != next(shapes):
    raise ValueError("its arrays are not those of this model")
  if not all(np.isfinite(array).all() for array in found.values()):
    raise ValueError("it holds values that are not finite")
  return found
