"""The weights of a model in a folder, for use elsewhere: see docs/export.md."""

import tempfile
from pathlib import Path

import jax

from imdb_jax.errors import UsageError
from imdb_jax.prediction import Classifier
from imdb_jax.store import arrays, files


def export(classifier: Classifier, folder: Path) -> None:
  """Write a model to a new folder, which appears when it is complete; `Classifier.from_safetensors` reads it.

  Raises:
    UsageError: the folder exists or cannot be written, or the package safetensors is missing.
  """
  if folder.exists():
    raise UsageError(f"--output {folder}: exists; name a new folder.")
  try:
    import safetensors.numpy
  except ImportError as error:
    raise UsageError(f"safetensors is missing: pip install 'imdb_jax[export]' ({error}).") from error
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder.parent) as place:
      unfinished = Path(place) / folder.name
      unfinished.mkdir()
      files.write_json(unfinished / "model.json", {"step": classifier.step, "temperature": classifier.temperature})
      shares = dict(zip(classifier.classes, classifier.prior.tolist(), strict=True))
      files.write_json(unfinished / "classes.json", shares)
      files.write_json(unfinished / "config.json", classifier.config.to_dict())
      files.write(unfinished / "vocab.json", classifier.vocabulary.json)
      weights = arrays.by_name(jax.device_get(classifier.params))
      safetensors.numpy.save_file(weights, unfinished / "model.safetensors")
      unfinished.rename(folder)
  except OSError as error:
    raise UsageError(f"--output {folder}: cannot be written: {error}.") from error
