"""Train text classifiers with recurrent networks in JAX and Flax, fast."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from imdb_jax.config import Config as Config
  from imdb_jax.prediction import Classifier as Classifier
  from imdb_jax.prediction import Ensemble as Ensemble
  from imdb_jax.presets import PRESETS as PRESETS
  from imdb_jax.processes import Interrupted as Interrupted
  from imdb_jax.training.loop import fit as fit

_HOMES = {
  "Config": "imdb_jax.config",
  "PRESETS": "imdb_jax.presets",
  "Classifier": "imdb_jax.prediction",
  "Ensemble": "imdb_jax.prediction",
  "Interrupted": "imdb_jax.processes",
  "fit": "imdb_jax.training.loop",
}
__all__ = ["PRESETS", "Classifier", "Config", "Ensemble", "Interrupted", "fit"]


def __getattr__(name: str) -> Any:
  # JAX and Flax take a second to import, and `--help` and the data tools do not need them.
  if name not in _HOMES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
