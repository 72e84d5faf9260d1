"""Words and ids are those of Keras, and take linear time.

Run as a script, this file is Keras's side of the comparison.
"""

import importlib.util
import json
import os
import re
import string
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from imdb_jax.config import DataConfig
from imdb_jax.data import archive, sample
from imdb_jax.data.tokenizer import Vocabulary, split_words


def keras_side(source: Path, target: Path) -> None:
  """Fit Keras's tokenizer on the first texts of each corpus and encode all of them."""
  import keras
  from keras.src.legacy.preprocessing.text import Tokenizer

  results = []
  for corpus in json.loads(source.read_text(encoding="utf-8")):
    tokenizer = Tokenizer(num_words=corpus["size"])
    tokenizer.fit_on_texts(corpus["texts"][: corpus["num_fitted"]])
    sequences = tokenizer.texts_to_sequences(corpus["texts"])
    tokens = keras.utils.pad_sequences(sequences, maxlen=corpus["sequence_length"])
    results.append({"index": tokenizer.word_index, "tokens": tokens.tolist()})
  target.write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
  keras_side(Path(sys.argv[1]), Path(sys.argv[2]))


def config_of(size: int = 100, **settings: Any) -> DataConfig:
  return DataConfig(vocabulary_size=size, **settings)


def fit(*texts: str, **settings: Any) -> Vocabulary:
  vocabulary, *fitted = Vocabulary.fit(texts, config_of(**settings))
  for array, expected in zip(fitted, vocabulary.encode(texts), strict=True):
    np.testing.assert_array_equal(array, expected, strict=True)
  return vocabulary


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("", []),
    (" \t\n ", []),
    ("!?...", []),
    ("Don't STOP", ["don't", "stop"]),
    ("well-made,sharp(and)fast", ["well", "made", "sharp", "and", "fast"]),
    ('!"#$%&()*+,-./:;<=>?@[\\]^_`{|}~a', ["a"]),
    ("one\ttwo\nthree", ["one", "two", "three"]),
    ("10/10", ["10", "10"]),
    # Only ASCII marks separate words; other quotes, dashes and spaces do not.
    ("caf\u00e9 \u201cfine\u201d a\u2014b", ["caf\u00e9", "\u201cfine\u201d", "a\u2014b"]),
    ("a\u00a0b\u2003c\rd", ["a\u00a0b\u2003c\rd"]),
    ("\u00c9T\u00c9 STRASSE \u0130", ["\u00e9t\u00e9", "strasse", "i\u0307"]),
    # A byte order mark, at the start of a file or where files were joined.
    ("\ufeffGood film\n\ufeffBad", ["good", "film", "bad"]),
  ],
)
def test_words(text, words):
  assert split_words(text, strip_html=True) == words


@pytest.mark.parametrize(
  ("text", "stripped", "kept"),
  [
    ("good<br /><br />bad", ["good", "bad"], ["good", "br", "br", "bad"]),
    ("<i>Alien</i>", ["alien"], ["i", "alien", "i"]),
    ("1 < 2 and 3 > 2", ["1", "2"], ["1", "2", "and", "3", "2"]),
    ("a <> b < c", ["a", "b", "c"], ["a", "b", "c"]),
    ("<a\nhref='x'>b", ["b"], ["a", "href", "'x'", "b"]),
  ],
)
def test_tags(text, stripped, kept):
  assert split_words(text, strip_html=True) == stripped
  assert split_words(text, strip_html=False) == kept


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("Good!! (1/10), don't.", ["good", "!", "!", "(", "1", "/", "10", ")", ",", "don't", "."]),
    ("<br />a-b_c \\ ^", ["a", "-", "b", "_", "c", "\\", "^"]),
    ("\ta\n\ufeffb", ["a", "b"]),
    ("\u2026 \u201ca\u201d", ["\u2026", "\u201ca\u201d"]),
  ],
)
def test_punctuation_marks_may_be_words(text, words):
  assert split_words(text, strip_html=True, punctuation=True) == words
  vocabulary = Vocabulary(config=config_of(punctuation=True), words=tuple(dict.fromkeys(words)))
  assert [text[start:end].lower() for number, start, end in vocabulary.spans(text) if number] == words


@settings(max_examples=300, deadline=None)
@given(
  text=st.lists(st.sampled_from(["<", "<", ">", ">", "a", "b c", "br /", "\n", "\u0130"]), max_size=30).map("".join)
)
def test_tags_are_the_shortest_texts_in_angle_brackets(text):
  """This pattern says so in one line, but takes quadratic time."""
  pattern = "<[^>]+>"
  assert split_words(text, strip_html=True) == split_words(re.sub(pattern, " ", text), strip_html=False)
  words = "a", "b", "c", "br", "i\u0307"
  stripping, plain = (Vocabulary(config=config_of(strip_html=each), words=words) for each in (True, False))
  without_tags = re.sub(pattern, lambda tag: " " * len(tag[0]), text)
  tags = [(0, *tag.span()) for tag in re.finditer(pattern, text)]
  assert stripping.spans(text) == sorted(plain.spans(without_tags) + tags, key=lambda span: span[1])


FUNCTIONS = {
  "split_words": lambda text: split_words(text, strip_html=True),
  "ids": fit("a <b> i\u0307").ids,
  "spans": fit("a <b> i\u0307").spans,
  "encode": lambda text: fit("a <b> i\u0307").encode([text]),
}


def seconds(function: str, text: str) -> float:
  """Return the processor time of a call, the least of three."""
  times = []
  for _ in range(3):
    start = time.process_time()
    FUNCTIONS[function](text)
    times.append(time.process_time() - start)
  return min(times)


@settings(max_examples=10, deadline=None)
@given(
  unit=st.lists(st.sampled_from([*"< >.&a'\u0130\u03a3\u02b0", "<a", "<br />"]), min_size=1, max_size=4).map("".join)
)
@example("<")
@example("<<>")
@example(" ")
@example("&")
@example("\u0130")
@example("x")
def test_a_text_of_twice_the_length_takes_at_most_three_times_as_long(unit):
  for function in FUNCTIONS:
    once, twice = (seconds(function, unit * (size // len(unit))) for size in (2**15, 2**16))
    # The few milliseconds are those of the clock and of other programs.
    assert twice <= 3 * once + 0.005, function


@pytest.mark.parametrize("unit", ["<", "<a", "\u0130", "a "])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_million_characters_take_about_a_second(function, unit):
  start = time.process_time()
  FUNCTIONS[function](unit * (10**6 // len(unit)))
  # It takes less. The limit is for slow machines.
  assert time.process_time() - start < 5


def test_frequent_words_have_low_ids():
  vocabulary = fit("a bad film", "A good, good film", "film!")
  assert vocabulary.words == ("film", "a", "good", "bad")
  assert vocabulary.ids("Good film, bad plot") == [3, 1, 4]


def test_ties_go_to_the_word_that_comes_first():
  """Not in alphabetical order, and also where the list of words is cut off."""
  assert fit("z y x w", "w x y z", "v").words == ("z", "y", "x", "w", "v")
  assert fit("z y x w", "w x y z", "v", size=3).words == ("z", "y")


@pytest.mark.parametrize("size", [2, 5, 6, 7])
def test_size_counts_the_padding_id(size):
  """As Keras's num_words: ids are below it, so one word fewer is known."""
  vocabulary = fit("a a a a a b b b b c c c d d e", size=size, sequence_length=8)
  assert vocabulary.words == tuple("abcde"[: size - 1])
  tokens, _ = vocabulary.encode(["a b c d e f"])
  assert tokens.max() == min(size - 1, 5)


def test_golden_ids():
  vocabulary = fit("the film was good", "the film was not good", "the end", size=5, sequence_length=4)
  assert vocabulary.words == ("the", "film", "was", "good")
  texts = ["The end was NOT the good end.", "", "unknown words", "good", "film film the was the film"]
  tokens, lengths = vocabulary.encode(texts)
  # Unknown words leave no gap, padding is at the front, and of a long review the last words are kept.
  expected = [[1, 3, 1, 4], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 4], [1, 3, 1, 2]]
  np.testing.assert_array_equal(tokens, expected)
  np.testing.assert_array_equal(lengths, [4, 0, 0, 1, 4])
  assert lengths.dtype == np.int32


def test_no_texts():
  tokens, lengths = fit("a", sequence_length=3).encode([])
  assert tokens.shape == (0, 3)
  assert lengths.shape == (0,)


@pytest.mark.parametrize(("size", "dtype"), [(2**15, np.int16), (2**15 + 1, np.int32)])
def test_ids_fit_their_type(size, dtype):
  words = [f"w{i}" for i in range(2**15)]
  vocabulary = fit(" ".join(words), size=size, sequence_length=10_000)
  tokens, _ = vocabulary.encode([" ".join(words)])
  assert tokens.dtype == dtype
  assert tokens.max() == size - 1
  assert tokens.min() >= 0


# Words, tags, separators, and characters whose lower case is longer or depends on the neighbours.
PIECES = ["a", "b", "The", "the", "don't", "'", "ab", "10", "<br />", "<", ">"]
PIECES += ["\u0130", "\u00df", "\u1e9e", "\u03a3", "\u0391\u03a3", "caf\u00e9", "cafe\u0301", "\u201c", "\U0001f3ac"]
PIECES += " \t\n\r\x0b\x1c.,-_/&|~`\u00a0\u2003\u2028"
TEXTS = st.lists(st.sampled_from(PIECES) | st.characters(exclude_categories=["Cs"]), max_size=40).map("".join)


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("A good<br />film!", ["A", "good", "film"]),
    # The lower case of \u0130 has two characters.
    ("\u0130\u0130 \u0130 good", ["\u0130\u0130", "\u0130", "good"]),
    # The first word ends in a final sigma; in the second, the sigma is followed by a letter.
    (
      "\u039f\u0394\u039f\u03a3 \u039f\u0394\u039f\u03a3.\u0391",
      ["\u039f\u0394\u039f\u03a3", "\u039f\u0394\u039f\u03a3", "\u0391"],
    ),
    ("<i>\u0130</i>\U0001f3ac, <b>end", ["\u0130", "\U0001f3ac", "end"]),
    ("", []),
  ],
)
def test_spans_are_the_places_of_the_words(text, words):
  vocabulary = fit(text)
  spans = vocabulary.spans(text)
  assert [text[start:end] for number, start, end in spans if number] == words
  assert [number for number, _, _ in spans if number] == vocabulary.ids(text)


def test_unknown_words_and_removed_tags_have_the_id_of_padding():
  spans = [(0, 0, 1), (1, 2, 6), (0, 6, 9), (0, 11, 14), (2, 15, 19)]
  assert fit("good film").spans("a good<b>, bad FILM") == spans
  assert fit("good b", strip_html=False).spans("good<b>") == [(1, 0, 4), (2, 5, 6)]


@settings(max_examples=150, deadline=None)
@given(text=TEXTS, known=TEXTS, strip_html=st.booleans(), punctuation=st.booleans())
def test_spans_of_any_text(text, known, strip_html, punctuation):
  """Every id has its place; only the form of a sigma may depend on the text around it."""
  vocabulary = fit(text[::2], known, strip_html=strip_html, punctuation=punctuation)
  spans = vocabulary.spans(text)
  assert [number for number, _, _ in spans if number] == vocabulary.ids(text)
  positions = [position for _, start, end in spans for position in (start, end)]
  assert positions == sorted(positions)
  for number, start, end in spans:
    if text[start] == "<" and end - start > 1:
      assert (number, strip_html) == (0, True), "a tag"
      continue
    (word,) = split_words(text[start:end], strip_html=False, punctuation=punctuation)
    if word in string.punctuation:
      continue
    if number:
      assert word.replace("\u03c2", "\u03c3") == vocabulary.words[number - 1].replace("\u03c2", "\u03c3")
    # The word is whole: both neighbours are separators. "<" and ">" of tags are separators, too.
    for neighbour in (text[max(start - 1, 0) : start], text[end : end + 1]):
      assert split_words(neighbour, strip_html=False) == []


def generated_corpora() -> list[dict]:
  """Return corpora that hypothesis generates."""
  corpora = []

  @settings(max_examples=150, derandomize=True, database=None, deadline=None)
  @given(st.lists(TEXTS, min_size=1, max_size=8), st.integers(2, 12), st.integers(1, 12), st.integers(1, 8))
  def collect(texts, size, sequence_length, num_fitted):
    corpora.append({"texts": texts, "size": size, "sequence_length": sequence_length, "num_fitted": num_fitted})

  collect()
  return corpora


def assert_same_as_keras(corpora: list[dict], folder: Path) -> None:
  if importlib.util.find_spec("keras") is None:
    pytest.skip("keras is not installed")
  source, target = folder / "source.json", folder / "target.json"
  source.write_text(json.dumps(corpora), encoding="utf-8")
  path = os.pathsep.join(filter(None, sys.path))
  environment = os.environ | {"KERAS_BACKEND": "jax", "KERAS_HOME": str(folder), "PYTHONPATH": path}
  command = [sys.executable, __file__, str(source), str(target)]
  done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
  assert done.returncode == 0, done.stderr[-2000:]
  for corpus, keras in zip(corpora, json.loads(target.read_text(encoding="utf-8")), strict=True):
    # Keras strips no tags. Its index holds all words, but it uses only those with an id below num_words.
    config = config_of(corpus["size"], sequence_length=corpus["sequence_length"], strip_html=False)
    vocabulary, *_ = Vocabulary.fit(corpus["texts"][: corpus["num_fitted"]], config)
    used = {word: i for word, i in keras["index"].items() if i < corpus["size"]}
    assert {word: i for i, word in enumerate(vocabulary.words, start=1)} == used
    tokens, lengths = vocabulary.encode(corpus["texts"])
    np.testing.assert_array_equal(tokens, keras["tokens"])
    np.testing.assert_array_equal(lengths, np.count_nonzero(keras["tokens"], axis=1))


def test_ids_are_those_of_keras(tmp_path):
  splits = sample.load()
  texts = [*splits["train"].texts[:400], *splits["test"].texts[:200]]
  lengths = ((1000, 64), (100, 20))
  corpora = [{"texts": texts, "size": size, "sequence_length": t, "num_fitted": 400} for size, t in lengths]
  assert_same_as_keras(corpora + generated_corpora(), tmp_path)


@pytest.mark.skipif("IMDB_ARCHIVE" not in os.environ, reason="IMDB_ARCHIVE names no archive of the real reviews")
def test_ids_of_real_reviews_are_those_of_keras(tmp_path):
  texts = archive.read_archive(Path(os.environ["IMDB_ARCHIVE"]))["train"].texts[:2000]
  corpora = [{"texts": texts, "size": 4000, "sequence_length": 400, "num_fitted": 1500}]
  assert_same_as_keras(corpora, tmp_path)
