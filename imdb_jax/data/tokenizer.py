"""Words to ids exactly as Keras's `Tokenizer` and `pad_sequences` (Keras 2.3 to 3, default settings)."""

import collections
import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from imdb_jax.errors import UsageError
from imdb_jax.store import files

PADDING_ID = 0
# The apostrophe is not a separator: "don't" is one word.
_SEPARATORS = str.maketrans(dict.fromkeys('!"#$%&()*+,-./:;<=>?@[\\]^_`{|}~\t\n', " "))
_TAG = re.compile(r"<[^>]+>")
_WORD = re.compile("[^ ]+")
_FORMAT = "imdb_jax vocabulary 1"
_MAX_FILE_BYTES = 64 * 2**20


def split_words(text: str, *, strip_html: bool) -> list[str]:
  """Return the words of a text: replace tags by a space, lower-case, and split at separators."""
  if strip_html:
    text = _TAG.sub(" ", text)
  return [word for word in text.lower().translate(_SEPARATORS).split(" ") if word]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
  """The known words, most frequent first: `words[i]` has id i + 1, and id 0 is padding.

  Attributes:
    size: upper bound of the ids, exclusive; at most `size - 1` words are known.
    strip_html: whether to remove HTML tags from a text first.
    words: the known words.
  """

  size: int
  strip_html: bool
  words: tuple[str, ...]

  @functools.cached_property
  def _ids(self) -> dict[str, int]:
    return {word: i for i, word in enumerate(self.words, start=1)}

  @functools.cached_property
  def json(self) -> str:
    """JSON text that `load` reads."""
    fields = {"format": _FORMAT, "size": self.size, "strip_html": self.strip_html, "words": self.words}
    return json.dumps(fields, ensure_ascii=False, indent=0)

  @classmethod
  def fit(cls, texts: Iterable[str], *, size: int, strip_html: bool) -> "Vocabulary":
    """Rank the words of `texts` by count. Of words with equal counts, the one that appears first has the lower id."""
    counts = collections.Counter()
    for text in texts:
      counts.update(split_words(text, strip_html=strip_html))
    # sorted() is stable and a Counter keeps the order of first appearance. most_common(n) is not stable.
    ranked = sorted(counts, key=lambda word: -counts[word])
    return cls(size=size, strip_html=strip_html, words=tuple(ranked[: size - 1]))

  def ids(self, text: str) -> list[int]:
    """Return the ids of the known words of `text`. Unknown words are dropped, so the result may be empty."""
    known = self._ids
    return [known[word] for word in split_words(text, strip_html=self.strip_html) if word in known]

  def spans(self, text: str) -> list[tuple[int, int, int]]:
    """Return (id, start, end) of each known word, in order; the word is written as `text[start:end]`.

    The ids are those of `ids(text)`.
    """
    if self.strip_html:
      # As many spaces as the tag has characters, so that all positions are those in `text`.
      text = _TAG.sub(lambda tag: " " * len(tag[0]), text)
    # Lower-cased as a whole, because a final sigma depends on its neighbours.
    lowered = text.lower().translate(_SEPARATORS)
    # A lower-cased character may be several: "İ" becomes "i" and a combining dot.
    origins = [i for i, character in enumerate(text) for _ in character.lower()]
    return [
      (self._ids[word[0]], origins[word.start()], origins[word.end() - 1] + 1)
      for word in _WORD.finditer(lowered)
      if word[0] in self._ids
    ]

  def encode(self, texts: Sequence[str], sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Encode texts as padded ids.

    Args:
      texts: n texts.
      sequence_length: t. Of a longer text the last t known words are kept; a shorter one is padded at the front.

    Returns:
      tokens int16[n, t] (int32 if the ids do not fit) and lengths int32[n], the number of known words kept.
    """
    tokens = np.full((len(texts), sequence_length), PADDING_ID, np.int16 if self.size <= 2**15 else np.int32)
    lengths = np.zeros(len(texts), np.int32)
    for row, text in enumerate(texts):
      kept = self.ids(text)[-sequence_length:]
      lengths[row] = len(kept)
      if kept:
        tokens[row, -len(kept) :] = kept
    return tokens, lengths

  @classmethod
  def load(cls, path: Path) -> "Vocabulary":
    """Read a vocabulary from its JSON file.

    Raises:
      UsageError: the file is absent or not a vocabulary.
    """
    try:
      fields = files.read_json(path, _MAX_FILE_BYTES)
      if not isinstance(fields, dict) or fields.keys() != {"format", "size", "strip_html", "words"}:
        raise ValueError("not a JSON object with the keys format, size, strip_html, words")
      if fields["format"] != _FORMAT:
        raise ValueError(f"format is not {_FORMAT!r}")
      size, strip_html, words = fields["size"], fields["strip_html"], fields["words"]
      if type(size) is not int or type(strip_html) is not bool or not isinstance(words, list):
        raise ValueError("size, strip_html or words has the wrong type")
      if not all(isinstance(word, str) for word in words) or len({*words}) < len(words) or len(words) >= size:
        raise ValueError("words must be different texts, and fewer than size")
    except (OSError, ValueError) as error:
      raise UsageError(f"{path}: not a usable vocabulary: {error}") from error
    return cls(size=size, strip_html=strip_html, words=tuple(words))
