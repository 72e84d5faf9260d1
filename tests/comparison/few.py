"""A comparison of tiny models on few reviews."""

import functools

from imdb_jax.config import Config, DataConfig, RuntimeConfig, TrainingConfig
from imdb_jax.data import sample
from imdb_jax.data.reviews import Reviews

TINY = {"model": {"embedding_size": 4, "hidden_size": 4}, "training": {"epochs": 2, "batch_size": 20}}
RECURRENT = {
  "lstm": TINY,
  "bi-lstm": {**TINY, "model": {**TINY["model"], "directions": 2}},
  "fast": {**TINY, "training": {**TINY["training"], "num_seeds": 2}},
  "pretrained": TINY,
  "language": {**TINY, "training": {**TINY["training"], "objective": "next_word"}},
}


@functools.cache
def few_reviews() -> dict[str, Reviews]:
  """Return the first reviews of the sample."""
  return {name: reviews.take(range(60)) for name, reviews in sample.load().items()}


def base(run_dir, *, validation="test", num_seeds=1) -> Config:
  """Return the settings of a comparison."""
  return Config(
    data=DataConfig(source="sample", validation=validation),
    training=TrainingConfig(num_seeds=num_seeds),
    runtime=RuntimeConfig(run_dir=run_dir, platform="cpu", num_devices=1),
  )
