"""Results of trained models, kept so that no row of a comparison is computed twice."""

import contextlib
import dataclasses
import importlib.metadata
import platform
import re
from collections.abc import Callable
from pathlib import Path

from imdb_jax import devices
from imdb_jax.errors import UsageError, first_line
from imdb_jax.store import files, run_directory
from imdb_jax.validation import Settings, setting

# Of a file, for each review, and for all else.
_LOGIT_BYTES, _OTHER_BYTES = 32, 2**20
# Above all float32 values.
_MAX_LOGIT = 1e39


def describe_machine(device: str = "cpu") -> str:
  """Return processor, cores, another device if there is one, and the versions of Python and packages."""
  info = Path("/proc/cpuinfo")
  found = re.search(r"model name\s*: (.+)", info.read_text(encoding="utf-8")) if info.exists() else None
  processor = found[1] if found else platform.processor() or platform.machine()
  shown = [processor, f"{devices.num_cores()} cores", *([device] if device != "cpu" else [])]
  versions = run_directory.versions()
  # The package is an extra.
  with contextlib.suppress(importlib.metadata.PackageNotFoundError):
    versions["scikit-learn"] = importlib.metadata.version("scikit-learn")
  names = ("python", "imdb_jax", "jax", "numpy", "scikit-learn")
  return ", ".join(shown + [f"{name} {versions[name]}" for name in names if name in versions])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result(Settings):
  """A trained model's predictions and costs."""

  model: dict | str = setting("", "Settings or name of the model.")
  logits: list = setting(list, "Log-odds of a positive review, by review; of an SVM, the margin.")
  has_probabilities: bool = setting(True, "Whether the logits are log-odds.")
  num_parameters: int = setting(0, "Number of parameters.", ge=0, le=10**12)
  train_seconds: float = setting(
    0.0, "Time to train, with features, word vectors or a language model, without compilation.", ge=0, le=1e10
  )
  predict_seconds: float = setting(0.0, "Time from encoded reviews to logits.", ge=0, le=1e10)
  val_accuracy: list = setting(list, "Validation accuracy after each epoch, if there are epochs.")
  computed_on: str = setting(describe_machine, "Machine and versions.")


def read(path: Path, model: dict | str, num_reviews: int, report: Callable[[str], None]) -> Result | None:
  """Return a model's result; None if the file is absent or another model's, or damaged, which is reported."""
  try:
    value = files.read_json(path, _OTHER_BYTES + _LOGIT_BYTES * num_reviews)
    if not isinstance(value, dict) or value.keys() != {field.name for field in dataclasses.fields(Result)}:
      raise ValueError("not a JSON object with the fields of a result")
    result = Result(**value)
    if result.model != model:
      return None
    num_epochs = model["training"]["epochs"] if isinstance(model, dict) else 0
    for name, size, least, most in (
      ("logits", num_reviews, -_MAX_LOGIT, _MAX_LOGIT),
      ("val_accuracy", num_epochs, 0, 1),
    ):
      numbers = value[name]
      if len(numbers) != size or not all(type(x) is float and least <= x <= most for x in numbers):
        raise ValueError(f"{name} must be {size:,} numbers from {least} to {most}")
    return result
  except FileNotFoundError:
    return None
  except (OSError, ValueError, UsageError) as error:
    report(f"{path}: damaged and not used: {first_line(error)}")
    return None
