"""The embedded sample: generated film reviews that show within seconds, offline, whether training works.

Word order decides the sentiment. "It could have been dull, but it is charming" and "it could have been charming, but it
is dull" hold the same words. A bag of words therefore stays far below a model that reads the sequence, and a high test
accuracy proves that the recurrence learns, not only the embedding.

The sentences and words are in sample.toml.
"""

import importlib.resources
import itertools
import random
import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from imdb_jax.data import reviews

_NUM_FILMS = {"train": 160, "test": 40}
_REVIEWS_PER_FILM = 25
_WORDS_PER_REVIEW = range(10, 61)
_SEED = 1895


def load() -> dict[str, reviews.Reviews]:
  """Return the sample: 4,000 reviews under "train" and 1,000 under "test", half of each positive.

  The splits share no film and no text. Every call returns the same reviews, on every machine and Python version.
  """
  tables = tomllib.loads(importlib.resources.files("imdb_jax.data").joinpath("sample.toml").read_text("utf-8"))
  neutral = tables["neutral"]
  titles = [f'"The {epithet} {thing}"' for epithet in neutral["epithet"] for thing in neutral["thing"]]
  rng, films, seen, splits = random.Random(_SEED), itertools.count(), set(), {}
  for split, num_films in _NUM_FILMS.items():
    rows = []
    for film in itertools.islice(films, num_films):
      facts = {
        "title": [titles.pop(int(rng.random() * len(titles)))],
        "genre": [_expand(rng, "{genre}", tables, 0)],
        "actor": [_expand(rng, "{first} {last}", tables, 0)],
      }
      about_film = tables | {"neutral": neutral | facts}
      for _ in range(_REVIEWS_PER_FILM):
        text, label = "", len(rows) % 2
        while text in seen or len(text.split()) not in _WORDS_PER_REVIEW:
          text = _review(rng, about_film, label)
        seen.add(text)
        rows.append((text, label, film))
    splits[split] = reviews.canonical(*zip(*rows, strict=True))
  return splits


def _review(rng: random.Random, tables: Mapping[str, Any], label: int) -> str:
  """Return one review: one or two deciding sentences, anywhere among up to three others."""
  patterns = []
  for _ in range(1 + (rng.random() < 0.3)):
    table = "contrasts" if rng.random() < 0.6 else "negations" if rng.random() < 0.5 else "statements"
    patterns.append(_choice(rng, tables[table]))
  if rng.random() < 0.2:
    patterns.append(_choice(rng, tables["verdicts"]))
  for _ in range(int(rng.random() * 4)):
    patterns.insert(int(rng.random() * (len(patterns) + 1)), _choice(rng, tables["fillers"]))
  text = ""
  for pattern in patterns:
    if text:
      text += "<br /><br />" if rng.random() < 0.15 else " "
    sentence = _expand(rng, pattern, tables, label)
    text += sentence[0].upper() + sentence[1:] + _expand(rng, "{stop}", tables, label)
  return text


def _expand(rng: random.Random, pattern: str, tables: Mapping[str, Any], label: int) -> str:
  """Fill the slots of a pattern from left to right, including the slots within the words that fill them."""

  def fill(slot: re.Match[str]) -> str:
    name, side = slot.groups()
    if not side:
      return _expand(rng, _choice(rng, tables["neutral"][name]), tables, label)
    is_positive = (label == reviews.POSITIVE) == (side == "+")
    word = _choice(rng, tables["positive" if is_positive else "negative"][name])
    return word.upper() if rng.random() < 0.03 else word

  return re.sub(r"\{(\w+)([+-]?)\}", fill, pattern)


def _choice(rng: random.Random, options: Sequence[str]) -> str:
  # Python keeps the numbers of `random()` for a seed the same in all versions, but not those of `choice`.
  return options[int(rng.random() * len(options))]
