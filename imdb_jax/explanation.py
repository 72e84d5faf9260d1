"""The contribution of each word to an answer: integrated gradients (Sundararajan et al. 2017)."""

import dataclasses
import html
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from imdb_jax.errors import printable

# The number of steps is doubled until an explanation keeps both limits, or there are `_MAX_STEPS`.
MAX_ERROR, MAX_CHANGE, MIN_STEPS, _MAX_STEPS = 1e-3, 0.02, 16, 512
# Blue for, vermilion against: readers with colour blindness tell them apart (Okabe and Ito 2008).
_FOR, _AGAINST = "0, 114, 178", "213, 94, 0"


@dataclasses.dataclass(frozen=True)
class Word:
  """A word or an HTML tag at `start` to `end` of a text.

  The contribution is None if the model has not seen it: a tag, an unknown word, or one before the last t known words.
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
    error: by how much the sum misses; above `MAX_ERROR` if no number of steps was enough.
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
  text: str, label: str, spans: Sequence[tuple[int, int, int]], slopes: Callable[[np.ndarray], np.ndarray]
) -> Explanation:
  """Return the contributions of words: integrals of `Program.slopes` over the presence of all words, from 0 to 1.

  `label` is the name of the class; `spans` are those of `Vocabulary.spans`. `slopes` turns up to `MIN_STEPS` + 1
  presences f64[m] into `Program.slopes` f32[m, 1 + t].
  """
  found = slopes(np.linspace(0, 1, MIN_STEPS + 1))
  while True:
    contributions, num_steps = _integrate(found), len(found) - 1
    error = float(abs(contributions.sum() - (found[-1, 0] - found[0, 0])))
    change = float(np.abs(contributions - _integrate(found[::2])).max())
    if (error <= MAX_ERROR and change <= MAX_CHANGE) or num_steps == _MAX_STEPS:
      break
    middles = np.split((np.arange(num_steps) + 0.5) / num_steps, num_steps // MIN_STEPS)
    found = np.insert(found, range(1, num_steps + 1), np.concatenate([*map(slopes, middles)]), axis=0)
  # Only the last known words have been seen, at the last positions.
  known = [place for place, (number, _, _) in enumerate(spans) if number]
  values = dict(zip(known[::-1], contributions[::-1].tolist(), strict=False))
  words = tuple(Word(text[start:end], start, end, values.get(place)) for place, (_, start, end) in enumerate(spans))
  ends = {"baseline_logit": float(found[0, 0]), "logit": float(found[-1, 0])}
  return Explanation(text=text, label=label, words=words, error=error, change=change, **ends)


def _integrate(found: np.ndarray) -> np.ndarray:
  """Return the integrals f32[t] of slopes, from values and slopes f32[m + 1, 1 + t] at the ends of m equal steps.

  The mean slope of a word within a step is taken between those at its two ends, at the same fraction for all words,
  such that the sum is the change of the value. The trapezoidal rule, which always takes the middle, would need many
  more steps: slopes jump where the position of a maximum changes (`--pooling max`).
  """
  values, slopes, num_steps = found[:, 0], found[:, 1:], len(found) - 1
  middle, reach = (slopes[1:] + slopes[:-1]) / 2, np.abs(slopes[1:] - slopes[:-1]) / 2
  missing, most = np.diff(values) * num_steps - middle.sum(axis=1), reach.sum(axis=1)
  fraction = np.clip(missing / np.where(most > 0, most, 1), -1, 1)
  return (middle + fraction[:, None] * reach).mean(axis=0)


def joined(explanation: Explanation) -> Iterator[Word]:
  """Yield the words, with all neighbours that were not seen as one."""
  for is_unseen, group in itertools.groupby(explanation.words, lambda word: word.contribution is None):
    words = [*group]
    start, end = words[0].start, words[-1].end
    yield from [Word(explanation.text[start:end], start, end, None)] if is_unseen else words


def _pieces(explanation: Explanation) -> Iterator[tuple[str, float | None, float]]:
  """Yield the text in pieces, with the contribution, 0 between words, and its share in the largest one."""
  done, largest = 0, max((abs(word.contribution or 0) for word in explanation.words), default=0) or 1
  for word in joined(explanation):
    yield explanation.text[done : word.start], 0, 0
    yield word.text, word.contribution, (word.contribution or 0) / largest
    done = word.end
  yield explanation.text[done:], 0, 0


def to_html(explanation: Explanation) -> str:
  """Return a paragraph of the text in which the background of each word shows its contribution."""
  parts = []
  for text, value, share in _pieces(explanation):
    style, title = "opacity: 0.65; text-decoration: underline dotted", "not seen"
    if value is not None:
      style, title = f"background: rgba({_FOR if value > 0 else _AGAINST}, {0.6 * abs(share):.3f})", f"{value:+.3f}"
    shown = html.escape(text)
    parts.append(shown if value == 0 else f'<span style="{style}" title="{title}">{shown}</span>')
  return f'<p class="explained" style="white-space: pre-wrap">{"".join(parts)}</p>'


def to_terminal(explanation: Explanation, *, is_colored: bool) -> str:
  """Return lines: logits, the text with words for the class in blue and against it in red, and the main words."""
  parts = []
  for text, value, share in _pieces(explanation):
    style = "2" if value is None else f"{int(abs(share) > 0.3)};{34 if value > 0 else 31}"
    is_plain = not is_colored or (value is not None and abs(share) < 0.05)
    parts.append(printable(text) if is_plain else f"\033[{style}m{printable(text)}\033[0m")
  seen = [(word.contribution, word.text) for word in explanation.words if word.contribution is not None]
  ranked = sorted(seen, key=lambda each: -abs(each[0]))[:10]
  lines = (f"{value:+8.3f}  {printable(text)}" for value, text in ranked)
  return "\n".join([printable(summary(explanation)), "".join(parts), *lines])


def summary(explanation: Explanation) -> str:
  """Return the logit and how much of the text was seen, in one line."""
  difference, num_words = explanation.logit - explanation.baseline_logit, len(explanation.words)
  num_unseen = sum(word.contribution is None for word in explanation.words)
  shown = f"{explanation.label}: logit {explanation.logit:+.3f}, {difference:+.3f} from the words"
  shown += f"; {num_unseen:,} of {num_words:,} words and tags not seen" if num_unseen else ""
  if explanation.error <= MAX_ERROR and explanation.change <= MAX_CHANGE:
    return shown
  return f"{shown}; not exact: error {explanation.error:.2g}, change {explanation.change:.2g}"
