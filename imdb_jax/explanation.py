"""The contribution of each word to an answer."""

import dataclasses
import html
from collections.abc import Iterator

# Blue for, vermilion against: readers with colour blindness tell them apart (Okabe and Ito 2008).
_FOR, _AGAINST = "0, 114, 178", "213, 94, 0"


@dataclasses.dataclass(frozen=True)
class Word:
  """A word of a text, or an HTML tag: `text` is written from `start` to `end`.

  `contribution` is None if the model has not seen it: a tag, an unknown word, or one before the last t known words.
  """

  text: str
  start: int
  end: int
  contribution: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Explanation:
  """The contributions of the words of a text to the logit of a class; they add up to `logit - baseline_logit`.

  Attributes:
    text: the text.
    label: name of the class.
    logit: logarithm of p / (1 - p), where p is the probability that the model gives to the class.
    baseline_logit: that of the same number of padding tokens.
    words: the words and tags of the text, in order.
    error: by how much the sum of the contributions misses `logit - baseline_logit`.
  """

  text: str
  label: str
  logit: float
  baseline_logit: float
  words: tuple[Word, ...]
  error: float


def to_html(explanation: Explanation) -> str:
  """Return a paragraph of the text in which the background of each word shows its contribution, see `pieces`."""
  largest = max((abs(word.contribution or 0) for word in explanation.words), default=0) or 1
  parts = []
  for text, word in pieces(explanation):
    shown = html.escape(text)
    if word is not None and word.contribution is None:
      shown = f'<span style="opacity: 0.65; text-decoration: underline dotted" title="not seen">{shown}</span>'
    elif word is not None:
      value = word.contribution or 0.0
      color = f"rgba({_FOR if value > 0 else _AGAINST}, {0.6 * abs(value) / largest:.3f})"
      shown = f'<span style="background: {color}" title="{value:+.3f}">{shown}</span>'
    parts.append(shown)
  return f'<p class="explained" style="white-space: pre-wrap">{"".join(parts)}</p>'


def pieces(explanation: Explanation) -> Iterator[tuple[str, Word | None]]:
  """Yield the whole text in pieces: words, and None with what is between them. What was not seen is joined."""
  text, end, unseen = explanation.text, 0, None
  for word in explanation.words:
    if word.contribution is None:
      if unseen is None:
        yield text[end : word.start], None
        unseen = word.start
    else:
      if unseen is not None:
        yield text[unseen:end], Word(text[unseen:end], unseen, end, None)
        unseen = None
      yield text[end : word.start], None
      yield word.text, word
    end = word.end
  if unseen is not None:
    yield text[unseen:end], Word(text[unseen:end], unseen, end, None)
  yield text[end:], None
