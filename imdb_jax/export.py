"""Models for use elsewhere: a folder with weights or a compiled program, see docs/export.md."""

import contextlib
import tempfile
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from imdb_jax.errors import CheckpointError, UsageError, reraise_as
from imdb_jax.prediction import Classifier
from imdb_jax.store import arrays, files

# What was written must answer so many random texts as the run does, with probabilities no further apart.
_NUM_TEXTS, _TOLERANCE = 64, 1e-5


def export(classifier: Classifier, format: Literal["safetensors", "stablehlo"], folder: Path) -> None:
  """Write a model to a new folder, which appears when it is complete and has been compared with the classifier.

  Raises:
    UsageError: the folder exists or cannot be written, or a package is missing.
    CheckpointError: what was written answers otherwise than the classifier.
  """
  if folder.exists():
    raise UsageError(f"--output {folder}: exists; name a new folder.")
  with contextlib.ExitStack() as stack:
    stack.enter_context(reraise_as(UsageError, f"--output {folder}: cannot be written"))
    stack.enter_context(
      reraise_as(UsageError, f"--format {format}: requires pip install 'imdb_jax[export]'", ImportError)
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    place = stack.enter_context(tempfile.TemporaryDirectory(prefix=".export-", dir=folder.parent))
    unfinished = Path(place) / folder.name
    unfinished.mkdir()
    _write(classifier, format, unfinished)
    difference = _difference(classifier, format, unfinished)
    # NaN is not below the tolerance either.
    if not difference < _TOLERANCE:
      raise CheckpointError(f"The exported model's probabilities differ from the run's by {difference:.1e}.")
    unfinished.rename(folder)


def _write(classifier: Classifier, format: str, folder: Path) -> None:
  files.write_json(folder / "model.json", {"step": classifier.step, "temperature": classifier.temperature})
  files.write_json(folder / "classes.json", dict(zip(classifier.classes, classifier.prior.tolist(), strict=True)))
  files.write_json(folder / "config.json", classifier.config.to_dict())
  files.write(folder / "vocab.json", classifier.vocabulary.json)
  if format == "safetensors":
    import safetensors.numpy

    weights = arrays.by_name(jax.device_get(classifier.params))
    safetensors.numpy.save_file(weights, folder / "model.safetensors")
  else:
    exported = classifier.program.exported(classifier.params, classifier.temperature, classifier.prior)
    (folder / "model.stablehlo").write_bytes(exported.serialize())


def _difference(classifier: Classifier, format: str, folder: Path) -> float:
  """Return by how much probabilities of random texts differ at most."""
  rng, length, vocabulary = np.random.default_rng(0), classifier.config.data.sequence_length, classifier.vocabulary
  words = vocabulary.words or ("",)
  texts = [" ".join(rng.choice(words, size)) for size in rng.integers(0, length + 1, _NUM_TEXTS)]
  if format == "safetensors":
    found = Classifier.from_safetensors(folder, runtime=classifier.config.runtime).predict_proba(texts)
  else:
    program = jax.export.deserialize(bytearray((folder / "model.stablehlo").read_bytes()))
    found = program.call(vocabulary.encode(texts)[0].astype(np.int32))
  return float(np.abs(found - classifier.predict_proba(texts)).max())
