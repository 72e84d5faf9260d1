"""The contribution of each word to an answer: integrated gradients (Sundararajan et al. 2017)."""

import dataclasses
import html
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from imdb_jax import devices
from imdb_jax.data import batches
from imdb_jax.data.tokenizer import PADDING_ID, Vocabulary
from imdb_jax.data.tokens import TokenSplit
from imdb_jax.errors import printable
from imdb_jax.program import Program

# The number of steps is doubled until an explanation keeps both, or the steps are `_MAX_STEPS`.
MAX_ERROR, MAX_CHANGE = 1e-3, 0.02
_MIN_STEPS, _MAX_STEPS = 16, 512
# Texts whose slopes are in memory at once, and slopes that are computed at once.
_NUM_TEXTS, _BATCH_SIZE = 32, 32
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
    logit: logarithm of p / (1 - p), where p is the model's probability of the class.
    baseline_logit: the same for as many padding tokens.
    words: the words and tags of the text, in order.
    error: by how much the sum of the contributions misses; above `MAX_ERROR` if no number of steps was enough.
    change: the largest change of a contribution when the steps were last doubled; above `MAX_CHANGE` likewise.
  """

  text: str
  label: str
  logit: float
  baseline_logit: float
  words: tuple[Word, ...]
  error: float
  change: float


def explain(
  program: Program, params: Any, temperature: float, vocabulary: Vocabulary, texts: Sequence[str], split: TokenSplit
) -> list[Explanation]:
  """Return the contributions of the words of each text to the log odds of a class.

  All words fade in together, from padding to themselves. The contribution of a word is the integral of the derivative
  of the log odds by the presence of this word, see `Program.slopes`.

  Args:
    program, params, temperature, vocabulary: those of a classifier.
    texts: n texts.
    split: the encoded texts; its labels are the classes to explain.
  """
  found: list[Any] = [None] * len(texts)
  for rows in batches.prediction_batches(split.lengths, batch_size=_NUM_TEXTS):
    slopes = _slopes(program, params, temperature, split, rows, np.linspace(0, 1, _MIN_STEPS + 1))
    while len(rows):
      contributions = _integrate(slopes)
      errors = np.abs(contributions.sum(axis=1) - (slopes[:, -1, 0] - slopes[:, 0, 0]))
      changes = np.abs(contributions - _integrate(slopes[:, ::2])).max(axis=1)
      num_steps = slopes.shape[1] - 1
      is_done = ((errors <= MAX_ERROR) & (changes <= MAX_CHANGE)) | (num_steps == _MAX_STEPS)
      for i in np.flatnonzero(is_done):
        row, (baseline_logit, logit) = int(rows[i]), slopes[i, [0, -1], 0].tolist()
        found[row] = Explanation(
          text=texts[row],
          label=program.task.classes[split.labels[row]],
          logit=logit,
          baseline_logit=baseline_logit,
          words=_words(texts[row], vocabulary, contributions[i].tolist()[len(contributions[i]) - split.lengths[row] :]),
          error=float(errors[i]),
          change=float(changes[i]),
        )
      rows, before = rows[~is_done], slopes[~is_done]
      slopes = np.empty((len(rows), 2 * num_steps + 1, before.shape[2]), np.float32)
      slopes[:, ::2] = before
      middles = (np.arange(num_steps) + 0.5) / num_steps
      slopes[:, 1::2] = _slopes(program, params, temperature, split, rows, middles)
  return found


def _slopes(
  program: Program, params: Any, temperature: float, split: TokenSplit, rows: np.ndarray, presence: np.ndarray
) -> np.ndarray:
  """Return `Program.slopes` of n rows of a split for each of m presences, f32[n, m, 1 + t]."""
  size = devices.padded_size(_BATCH_SIZE, program.mesh)
  of_row, of_presence = np.repeat(rows, len(presence)), np.tile(presence.astype(np.float32), len(rows))
  found = np.empty((len(of_row), 1 + split.tokens.shape[1]), np.float32)
  for start in range(0, len(found), size):
    some = of_row[start : start + size]
    padding = 0, size - len(some)
    labels, faded = np.pad(split.labels[some], padding), np.pad(of_presence[start : start + size], padding)
    batch = devices.put((*split.batch(some, size), labels, faded), devices.over_rows(program.mesh))
    found[start : start + size] = jax.device_get(program.slopes(params, temperature, *batch))[: len(some)]
  return found.reshape(len(rows), len(presence), found.shape[1])


def _integrate(slopes: np.ndarray) -> np.ndarray:
  """Return contributions f32[n, t] from values and slopes f32[n, m + 1, 1 + t] at the ends of m equal steps.

  Within a step, the mean slope of each word is taken between its slopes at the two ends, at the same fraction for all
  words, such that their sum is the change of the value. With the trapezoidal rule, which always takes the middle, the
  sum would need many more steps: max pooling makes slopes jump.
  """
  values, slopes, num_steps = slopes[:, :, 0], slopes[:, :, 1:], slopes.shape[1] - 1
  middle, reach = (slopes[:, 1:] + slopes[:, :-1]) / 2, np.abs(slopes[:, 1:] - slopes[:, :-1]) / 2
  missing, most = np.diff(values) * num_steps - middle.sum(axis=2), reach.sum(axis=2)
  fraction = np.clip(missing / np.where(most > 0, most, 1), -1, 1)
  return (middle + fraction[:, :, None] * reach).mean(axis=1)


def _words(text: str, vocabulary: Vocabulary, contributions: list[float]) -> tuple[Word, ...]:
  spans = vocabulary.spans(text)
  num_earlier = sum(number != PADDING_ID for number, _, _ in spans) - len(contributions)
  values = iter([None] * num_earlier + contributions)
  return tuple(
    Word(text[start:end], start, end, next(values) if number != PADDING_ID else None) for number, start, end in spans
  )


def to_html(explanation: Explanation) -> str:
  """Return a paragraph of the text in which the background of each word shows its contribution."""
  parts = []
  for text, value, share in _pieces(explanation):
    shown = html.escape(text)
    if value is None:
      shown = f'<span style="opacity: 0.65; text-decoration: underline dotted" title="not seen">{shown}</span>'
    elif value:
      color = f"rgba({_FOR if value > 0 else _AGAINST}, {0.6 * abs(share):.3f})"
      shown = f'<span style="background: {color}" title="{value:+.3f}">{shown}</span>'
    parts.append(shown)
  return f'<p class="explained" style="white-space: pre-wrap">{"".join(parts)}</p>'


def page(explanations: Sequence[Explanation]) -> str:
  """Return a whole HTML document of texts with coloured words."""
  parts = [f"<h2>{html.escape(_summary(each))}</h2>\n{to_html(each)}" for each in explanations]
  style = (
    "body { max-width: 44rem; margin: 2rem auto; padding: 0 1rem; font: 1rem/1.5 sans-serif } h2 { font-size: 1rem }"
  )
  head = (
    '<meta charset="utf-8">\n<meta name="color-scheme" content="light dark">\n<title>Contributions of words</title>'
  )
  return "\n".join(['<!DOCTYPE html>\n<html lang="en">', head, f"<style>{style}</style>", *parts, ""])


def to_terminal(explanation: Explanation, *, is_colored: bool) -> str:
  """Return lines: logits, the text with words for the class in blue, against it in red, and the main contributions."""
  parts = []
  for text, value, share in _pieces(explanation):
    shown = printable(text)
    if is_colored and (value is None or abs(share) > 0.05):
      style = "2" if value is None else f"{int(abs(share) > 0.3)};{34 if value > 0 else 31}"
      shown = f"\033[{style}m{shown}\033[0m"
    parts.append(shown)
  seen = [(word.contribution, word.text) for word in explanation.words if word.contribution is not None]
  ranked = sorted(seen, key=lambda each: -abs(each[0]))[:10]
  lines = (f"{value:+8.3f}  {printable(text)}" for value, text in ranked)
  return "\n".join([printable(_summary(explanation)), "".join(parts), *lines])


def _summary(explanation: Explanation) -> str:
  label, logit, baseline_logit = explanation.label, explanation.logit, explanation.baseline_logit
  shown = f"{label}: logit {logit:+.3f}, {logit - baseline_logit:+.3f} from the words"
  unseen = sum(word.contribution is None for word in explanation.words)
  shown += f"; {unseen:,} of {len(explanation.words):,} words and tags not seen" * (unseen > 0)
  is_exact = explanation.error <= MAX_ERROR and explanation.change <= MAX_CHANGE
  return shown + f"; not exact: error {explanation.error:.2g}, change {explanation.change:.2g}" * (not is_exact)


def _pieces(explanation: Explanation) -> Iterator[tuple[str, float | None, float]]:
  """Yield the whole text in pieces, with the contribution and its share in the largest one.

  The contribution is None for what was not seen, which is joined, and 0 for what is between words.
  """
  text, done = explanation.text, 0
  largest = max((abs(word.contribution or 0) for word in explanation.words), default=0) or 1
  for is_unseen, group in itertools.groupby(explanation.words, lambda word: word.contribution is None):
    words = [*group]
    spans = [(words[0].start, words[-1].end)] if is_unseen else [(word.start, word.end) for word in words]
    for word, (start, end) in zip(words, spans, strict=False):
      yield text[done:start], 0, 0
      yield text[start:end], word.contribution, (word.contribution or 0) / largest
      done = end
  yield text[done:], 0, 0
