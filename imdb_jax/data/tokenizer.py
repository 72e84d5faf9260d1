"""Words to ids exactly as Keras's `Tokenizer` and `pad_sequences` do it (Keras 2.3 to 3, defaults)."""

import collections
import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from imdb_jax.errors import UsageError

PADDING_ID = 0
# The apostrophe is not among them, so "don't" is one word.
_SEPARATORS = str.maketrans(dict.fromkeys('!"#$%&()*+,-./:;<=>?@[\\]^_`{|}~\t\n', " "))
_TAG = re.compile(r"<[^>]+>")
_FORMAT = "imdb_jax vocabulary 1"
_MAX_FILE_BYTES = 64 * 2**20


def split_words(text: str, *, strip_html: bool) -> list[str]:
  """Lower-cases `text`, turns separators into spaces and splits on them. A tag becomes a space."""
  if strip_html:
    text = _TAG.sub(" ", text)
  return [word for word in text.lower().translate(_SEPARATORS).split(" ") if word]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
  """The known words, most frequent first: `words[i]` has id i + 1, and id 0 is padding.

  Attributes:
    size: ids are below this; at most `size - 1` words are known.
    strip_html: whether tags are removed from a text first.
    words: the known words.
  """

  size: int
  strip_html: bool
  words: tuple[str, ...]

  @functools.cached_property
  def _ids(self) -> dict[str, int]:
    return {word: i for i, word in enumerate(self.words, start=1)}

  @classmethod
  def fit(cls, texts: Iterable[str], *, size: int, strip_html: bool) -> "Vocabulary":
    """Ranks the words of `texts` by count; among equals the one that appears first has the lower id."""
    counts = collections.Counter()
    for text in texts:
      counts.update(split_words(text, strip_html=strip_html))
    # sorted() is stable and a Counter keeps the order of first appearance; most_common(n) would not be stable.
    ranked = sorted(counts, key=lambda word: -counts[word])
    return cls(size=size, strip_html=strip_html, words=tuple(ranked[: size - 1]))

  def ids(self, text: str) -> list[int]:
    """The ids of the known words of `text`; unknown words are dropped, so the result may be empty."""
    known = self._ids
    return [known[word] for word in split_words(text, strip_html=self.strip_html) if word in known]

  def encode(self, texts: Sequence[str], sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Texts as padded ids.

    Args:
      texts: n texts.
      sequence_length: t; of a longer text the last t known words are kept, a shorter one is padded at the front.

    Returns:
      tokens int16[n, t] (int32 where ids do not fit) and lengths int32[n], the known words kept of each text.
    """
    tokens = np.full((len(texts), sequence_length), PADDING_ID, np.int16 if self.size <= 2**15 else np.int32)
    lengths = np.zeros(len(texts), np.int32)
    for row, text in enumerate(texts):
      kept = self.ids(text)[-sequence_length:]
      lengths[row] = len(kept)
      if kept:
        tokens[row, -len(kept) :] = kept
    return tokens, lengths

  def to_json(self) -> str:
    fields = {"format": _FORMAT, "size": self.size, "strip_html": self.strip_html, "words": self.words}
    return json.dumps(fields, ensure_ascii=False, indent=0)

  @classmethod
  def load(cls, path: Path) -> "Vocabulary":
    """Reads a file that holds `to_json`.

    Raises:
      UsageError: the file is absent or is not a vocabulary.
    """
    try:
      if path.stat().st_size > _MAX_FILE_BYTES:
        raise ValueError(f"larger than {_MAX_FILE_BYTES:,} bytes")
      fields: Any = json.loads(path.read_text(encoding="utf-8"))
      if not isinstance(fields, dict) or set(fields) != {"format", "size", "strip_html", "words"}:
        raise ValueError("not a JSON object with the keys format, size, strip_html, words")
      if fields["format"] != _FORMAT:
        raise ValueError(f"format is not {_FORMAT!r}")
      size, strip_html, words = fields["size"], fields["strip_html"], fields["words"]
      if type(size) is not int or type(strip_html) is not bool or not isinstance(words, list):
        raise ValueError("size, strip_html or words has the wrong type")
      if len(words) >= size or not all(isinstance(word, str) for word in words):
        raise ValueError("words must be texts, and fewer than size")
      if len(set(words)) != len(words):
        raise ValueError("a word stands twice")
    except (OSError, ValueError, RecursionError) as error:
      raise UsageError(f"{path}: not a usable vocabulary: {error}") from error
    return cls(size=size, strip_html=strip_html, words=tuple(words))
