"""A small corpus, its token cache, and comparisons of what is read from it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from imdb_jax.config import DataConfig
from imdb_jax.data import reviews, tokens
from imdb_jax.data.sources import Source

CONFIG = DataConfig(vocabulary_size=20, sequence_length=6)
HELD_OUT = dataclasses.replace(CONFIG, validation="split", validation_fraction=0.3)


class Corpus:
  """A small corpus and a source of it, which counts how often it is read."""

  def __init__(self, fingerprint: str | None = None, word: str = "fine", content: str | None = None):
    """By default the source is identified by its content, like the official reviews."""
    self.num_loads, self.splits = 0, {}
    for name, num_rows in {"train": 12, "test": 6}.items():
      texts = [f"{name} review {row} is {word}" for row in range(num_rows)]
      self.splits[name] = reviews.canonical(
        texts, [row % 2 for row in range(num_rows)], [row // 2 for row in range(num_rows)]
      )
    self.content = content or reviews.content(self.splits)
    fingerprint = fingerprint or self.content
    self.source = Source(name="a corpus", content=self.content, fingerprint=lambda: fingerprint, load=self.load)

  def load(self, report: Callable[[str], None]) -> dict[str, reviews.Reviews]:
    self.num_loads += 1
    return self.splits


def load(corpus: Corpus, cache_dir: Path, config: DataConfig = CONFIG) -> tuple[tokens.TokenData, list[str]]:
  """Return the data and the reported lines."""
  lines = []
  return tokens.load(corpus.source, config, cache_dir=cache_dir, report=lines.append), lines


def assert_same(left: tokens.TokenData, right: tokens.TokenData) -> None:
  assert left.vocabulary == right.vocabulary
  assert (left.validation is left.test) == (right.validation is right.test)
  for (name, first), second in zip(left.arrays().items(), right.arrays().values(), strict=True):
    assert first.dtype == second.dtype, name
    np.testing.assert_array_equal(first, second)


def entry_of(cache_dir: Path) -> Path:
  """Return the only entry of a cache with one corpus."""
  (entry,) = [path for path in (cache_dir / "tokens").iterdir() if not path.is_symlink()]
  return entry
