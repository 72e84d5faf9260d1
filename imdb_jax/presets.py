"""Named points in the space of settings."""

import dataclasses
import difflib

from imdb_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig
from imdb_jax.errors import UsageError

# With the test accuracy and the time of `imdb-jax train --preset NAME` on two cores, without evaluation.
PRESETS: dict[str, Config] = {
  # The reference article's recipe, as Keras 2.3 ran it: 87.5% ± 0.4 after 7 to 8 minutes (docs/article.md).
  "article": Config(),
  # The fastest way to the article's best accuracy: one small model that starts from word vectors of the training
  # reviews and reads them once: 90.4% ± 0.15 after 12 to 20 s (docs/benchmarks.md, docs/accuracy.md).
  "fast": Config(
    preset="fast",
    data=DataConfig(vocabulary_size=10_000),
    model=ModelConfig(
      embedding_size=64,
      hidden_size=64,
      input_dropout_rate=0.1,
      recurrent_dropout_rate=0.1,
      mask_padding=True,
      pooling="mean_max",
      embedding="svd",
    ),
    optimizer=OptimizerConfig(learning_rate=1.2e-2, embedding_rate=0.3, schedule="one_cycle"),
    training=TrainingConfig(epochs=1, bucket_by_length=True),
  ),
  # Two directions, beside a linear model of phrases: 92.8% ± 0.03 after 2.7 minutes (docs/comparison.md).
  "strong": Config(
    preset="strong",
    data=DataConfig(vocabulary_size=30_000, sequence_length=700, punctuation=True),
    model=ModelConfig(
      hidden_size=64,
      input_dropout_rate=0.3,
      recurrent_dropout_rate=0.3,
      mask_padding=True,
      directions=2,
      pooling="mean_max",
      embedding="svd",
      ngrams=3,
    ),
    optimizer=OptimizerConfig(learning_rate=6e-3, embedding_rate=0.1, schedule="one_cycle"),
    training=TrainingConfig(epochs=4, bucket_by_length=True),
  ),
  # The corpus inside the package, learnt in seconds: for demonstrations and tests.
  "sample": Config(
    preset="sample",
    data=DataConfig(source="sample", vocabulary_size=1000, sequence_length=64),
    model=ModelConfig(embedding_size=64, hidden_size=64),
    optimizer=OptimizerConfig(learning_rate=3e-3),
    training=TrainingConfig(epochs=12),
  ),
}
# A language model of all 75,000 reviews without their labels, from which `pretrained` starts (docs/accuracy.md).
PRESETS["language"] = Config(
  preset="language",
  data=PRESETS["strong"].data,
  model=ModelConfig(
    hidden_size=256,
    input_dropout_rate=0.1,
    recurrent_dropout_rate=0.1,
    directions=2,
    embedding="skipgram",
    unlabelled=True,
  ),
  optimizer=OptimizerConfig(learning_rate=4e-3, schedule="one_cycle", b2=0.99, clip_norm=1.0),
  training=TrainingConfig(objective="next_word", epochs=4, batch_size=64),
)
# As `strong`, from the run of `language` that --init-from names: 93.65% ± 0.02 after ten minutes (docs/comparison.md).
PRESETS["pretrained"] = dataclasses.replace(
  PRESETS["strong"],
  preset="pretrained",
  model=dataclasses.replace(PRESETS["strong"].model, hidden_size=256),
  optimizer=dataclasses.replace(PRESETS["strong"].optimizer, learning_rate=3e-3, recurrent_rate=0.3),
)


def preset(name: str) -> Config:
  """Return the settings of a preset, or raise UsageError if there is none of that name."""
  if name not in PRESETS:
    nearest = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f" Did you mean {nearest[0]}?" if nearest else ""
    raise UsageError(f"--preset {name}: must be one of {', '.join(PRESETS)}.{hint}")
  return PRESETS[name]
