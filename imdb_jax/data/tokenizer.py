"""Words to ids exactly as Keras's `Tokenizer` and `pad_sequences` (Keras 2.3 to 3, default settings)."""

import array
import collections
import dataclasses
import functools
import itertools
import json
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from imdb_jax.config import DataConfig
from imdb_jax.errors import DataError, UsageError, reraise_as
from imdb_jax.store import files

PADDING_ID = 0
# The apostrophe is not a separator: "don't" is one word. Unlike in Keras, a byte order mark is one, because a file may
# begin with it; no official review contains one.
_MARKS, _BLANKS = '!"#$%&()*+,-./:;<=>?@[\\]^_`{|}~', str.maketrans(dict.fromkeys("\t\n\ufeff", " "))
_SEPARATORS = _BLANKS | str.maketrans(dict.fromkeys(_MARKS, " "))
_MARKS_APART = _BLANKS | str.maketrans({mark: f" {mark} " for mark in _MARKS})
_TAG = re.compile(r"<[^>]+>")
_WORD, _WORD_OR_MARK = re.compile("[^ ]+"), re.compile("[{0}]|[^ {0}]+".format(re.escape(_MARKS)))
_FORMAT = "imdb_jax vocabulary 1"
# The official training reviews have 88,576 different words, which take 1 MB in a file.
_MAX_WORDS, _MAX_FILE_BYTES = 2**22, 2**24


def split_words(text: str, *, strip_html: bool, punctuation: bool = False) -> list[str]:
  """Return the words of a text: replace tags by a space, lower-case, and split at separators.

  With `punctuation`, each punctuation mark but the apostrophe is a word, too.
  """
  if strip_html:
    text = _replace_tags(text, " ")
  return [*filter(None, text.lower().translate(_MARKS_APART if punctuation else _SEPARATORS).split(" "))]


def _replace_tags(text: str, replacement: str | Callable[[re.Match[str]], str]) -> str:
  # After the last ">" there is no tag, but the pattern would search the whole rest again for each "<".
  end = text.rfind(">") + 1
  return _TAG.sub(replacement, text[:end]) + text[end:]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
  """The known words, most frequent first: `words[i]` has id i + 1, and id 0 is padding.

  Attributes:
    config: `vocabulary_size` is the exclusive upper bound of the ids, so one word fewer is known at most. Others say
      what is a word, and how many are kept of a text.
    words: the known words.
  """

  config: DataConfig
  words: tuple[str, ...]

  @functools.cached_property
  def _ids(self) -> dict[str, int]:
    return {word: i for i, word in enumerate(self.words, start=1)}

  @property
  def dtype(self) -> type[np.signedinteger]:
    """The type of ids in arrays."""
    return np.int16 if self.config.vocabulary_size <= 2**15 else np.int32

  @functools.cached_property
  def json(self) -> str:
    """JSON text that `load` reads."""
    return json.dumps(_fields(self.config, self.words), ensure_ascii=False, indent=0)

  @classmethod
  def fit(cls, texts: Sequence[str], config: DataConfig) -> tuple["Vocabulary", np.ndarray, np.ndarray]:
    """Return a vocabulary, the words of `texts` by count, and what its `encode` returns for the texts.

    Of words with equal counts, the one that appears first has the lower id. Raises DataError if there are too many
    different words to be counted in memory, or too long ones for a file.
    """
    # Words are numbered as they appear. Each text is split only once.
    numbers = collections.defaultdict(itertools.count().__next__)
    found, ends, empty = array.array("i"), [0], cls(config=config, words=())
    for text in texts:
      found.extend(map(numbers.__getitem__, empty.split(text)))
      ends.append(len(found))
      if len(numbers) > _MAX_WORDS:
        raise DataError(f"the reviews have more than {_MAX_WORDS:,} different words; use the official archive")
    counts, words = np.bincount(found, minlength=len(numbers)), [*numbers]
    ranked = np.argsort(-counts, kind="stable")[: config.vocabulary_size - 1]
    vocabulary = cls(config=config, words=tuple(words[number] for number in ranked))
    if len(vocabulary.json.encode()) > _MAX_FILE_BYTES:
      raise DataError(f"the words of the reviews take more than {_MAX_FILE_BYTES:,} bytes; use the official archive")
    ids = np.full(len(words), PADDING_ID, vocabulary.dtype)
    ids[ranked] = np.arange(1, len(ranked) + 1)
    rows = (ids[np.asarray(found[start:end])] for start, end in itertools.pairwise(ends))
    return vocabulary, *vocabulary._padded((row[row != PADDING_ID] for row in rows), len(texts))

  def split(self, text: str) -> list[str]:
    """Return the words of `text`, known and unknown."""
    return split_words(text, strip_html=self.config.strip_html, punctuation=self.config.punctuation)

  def ids(self, text: str) -> list[int]:
    """Return the ids of the known words of `text`. Unknown words are dropped, so the result may be empty."""
    # No id is 0.
    return [*filter(None, map(self._ids.get, self.split(text)))]

  def spans(self, text: str) -> list[tuple[int, int, int]]:
    """Return (id, start, end) of each word, and of each tag that is removed, in order; it is `text[start:end]`.

    Tags and unknown words have the id of padding. The other ids are those of `ids(text)`.
    """
    found = []
    if self.config.strip_html:

      def remove(tag: re.Match[str]) -> str:
        found.append((PADDING_ID, *tag.span()))
        # As many spaces as the tag has characters, so that all positions are those in `text`.
        return " " * len(tag[0])

      text = _replace_tags(text, remove)
    # Lower-cased as a whole, because a final sigma depends on its neighbours.
    table, pattern = (_BLANKS, _WORD_OR_MARK) if self.config.punctuation else (_SEPARATORS, _WORD)
    lowered = text.lower().translate(table)
    # A lower-cased character may be several: "İ" becomes "i" and a combining dot.
    origins = [i for i, character in enumerate(text) for _ in character.lower()]
    for word in pattern.finditer(lowered):
      found.append((self._ids.get(word[0], PADDING_ID), origins[word.start()], origins[word.end() - 1] + 1))
    return sorted(found, key=operator.itemgetter(1))

  def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Encode n texts as padded ids.

    Of a text, the last `sequence_length` t known words are kept; a shorter one is padded at the front.

    Returns:
      tokens int16[n, t] (int32 if the ids do not fit) and lengths int32[n], the number of known words kept.
    """
    return self._padded(map(self.ids, texts), len(texts))

  def _padded(self, texts: Iterable[Sequence[int] | np.ndarray], n: int) -> tuple[np.ndarray, np.ndarray]:
    sequence_length = self.config.sequence_length
    tokens, lengths = np.full((n, sequence_length), PADDING_ID, self.dtype), np.zeros(n, np.int32)
    for row, ids in enumerate(texts):
      kept = ids[-sequence_length:]
      lengths[row] = len(kept)
      tokens[row, sequence_length - len(kept) :] = kept
    return tokens, lengths

  @classmethod
  def load(cls, path: Path, config: DataConfig) -> "Vocabulary":
    """Read a JSON file; raise UsageError if it is absent, not a vocabulary, or not one for this config."""
    with reraise_as(UsageError, f"{path}: not a usable vocabulary", (OSError, ValueError)):
      fields = files.read_json(path, _MAX_FILE_BYTES)
      expected = _fields(config, [])
      if not isinstance(fields, dict) or fields.keys() != expected.keys():
        raise ValueError(f"not a JSON object with the keys {', '.join(sorted(expected))}")
      words, size = fields["words"], config.vocabulary_size
      for name, value in (expected | {"words": words}).items():
        if type(fields[name]) is not type(value) or fields[name] != value:
          raise ValueError(f"{name} must be {value!r}")
      if not isinstance(words, list) or len(words) >= size or not all(isinstance(word, str) for word in words):
        raise ValueError("words must be texts, and fewer than size")
      if len({*words}) < len(words):
        raise ValueError("a word occurs twice")
      # JSON can hold half of a surrogate pair, which is no character and cannot be encoded.
      "".join(words).encode()
    return cls(config=config, words=tuple(words))


def _fields(config: DataConfig, words: Sequence[str]) -> dict[str, Any]:
  """Return the fields of a vocabulary's file, in their order: the digest of a run's data depends on it."""
  fields = {"format": _FORMAT, "size": config.vocabulary_size, "strip_html": config.strip_html, "words": words}
  # Files of older versions lack the field.
  return fields | ({"punctuation": True} if config.punctuation else {})
