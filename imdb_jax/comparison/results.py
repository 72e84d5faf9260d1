"""What is kept of each trained model, so that no row of a comparison is computed twice."""

import dataclasses
import math
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result(Settings):
  """A trained model's predictions and costs."""

  model: dict | str = setting("", "Settings or name of the model.")
  logits: list = setting(list, "Log-odds of a positive review, by review; of an SVM, the margin.")
  has_probabilities: bool = setting(True, "Whether the logits are log-odds.")
  num_parameters: int = setting(0, "Number of parameters.", ge=0, le=10**12)
  train_seconds: float = setting(
    0.0, "Time to train, with features or word vectors, without compilation.", ge=0, le=1e10
  )
  predict_seconds: float = setting(0.0, "Time from encoded reviews to logits.", ge=0, le=1e10)
  val_accuracy: list = setting(list, "Validation accuracy after each epoch, if there are epochs.")
  computed_on: str = setting("", "Machine and versions.")


def read(path: Path, num_reviews: int, report: Callable[[str], None]) -> Result | None:
  """Return the result in a file; None if it is absent, and also if it is damaged or a link, which is reported."""
  try:
    value = files.read_json(path, _OTHER_BYTES + _LOGIT_BYTES * num_reviews)
    if not isinstance(value, dict) or value.keys() != {field.name for field in dataclasses.fields(Result)}:
      raise ValueError("not a JSON object with the fields of a result")
    result = Result(**value)
    if len(result.logits) != num_reviews or not all(type(x) is float and math.isfinite(x) for x in result.logits):
      raise ValueError(f"logits must be {num_reviews:,} finite numbers")
    if not all(type(x) is float and 0 <= x <= 1 for x in result.val_accuracy):
      raise ValueError("val_accuracy must be numbers from 0 to 1")
    return result
  except FileNotFoundError:
    return None
  except (OSError, ValueError, UsageError) as error:
    report(f"{path} is damaged ({first_line(error)}); it is computed again")
    return None


def describe_machine(accelerator: str | None) -> str:
  """Return processor, cores, accelerator, and the versions of Python and packages."""
  info = Path("/proc/cpuinfo")
  found = re.search(r"model name\s*: (.+)", info.read_text(encoding="utf-8")) if info.exists() else None
  processor = found[1] if found else platform.processor() or platform.machine()
  shown = [processor, f"{devices.num_cores()} cores", *([accelerator] if accelerator else [])]
  versions = run_directory.versions()
  return ", ".join(shown + [f"{name} {versions[name]}" for name in ("python", "imdb_jax", "jax", "numpy")])
