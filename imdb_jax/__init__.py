"""A fast, exact and dependable JAX trainer for the IMDB sentiment LSTM."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from imdb_jax.config import PRESETS as PRESETS
  from imdb_jax.config import Config as Config
  from imdb_jax.prediction import Classifier as Classifier
  from imdb_jax.training.loop import fit as fit
  from imdb_jax.training.signals import Interrupted as Interrupted

_HOMES = {
  "Config": "imdb_jax.config",
  "PRESETS": "imdb_jax.config",
  "Classifier": "imdb_jax.prediction",
  "Interrupted": "imdb_jax.training.signals",
  "fit": "imdb_jax.training.loop",
}
__all__ = ["PRESETS", "Classifier", "Config", "Interrupted", "fit"]


def __getattr__(name: str) -> Any:
  # JAX and Flax take a second to import; `--help` and the data tools do without them.
  if name not in _HOMES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
