"""A vocabulary file is read back, or refused in one line."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imdb_jax.config import DataConfig
from imdb_jax.data import tokenizer
from imdb_jax.data.tokenizer import Vocabulary
from imdb_jax.errors import DataError, UsageError

CONFIG = DataConfig(vocabulary_size=10)


def fit(*texts: str, config: DataConfig = CONFIG) -> Vocabulary:
  return Vocabulary.fit(texts, config)[0]


@pytest.mark.parametrize("strip_html", [False, True])
def test_vocabulary_survives_its_file(tmp_path, strip_html):
  config = DataConfig(vocabulary_size=50, strip_html=strip_html)
  vocabulary = fit("don't caf\u00e9 \u201ca\u201d \U0001f3ac \u2028 a\u00a0b <br />", config=config)
  path = tmp_path / "vocab.json"
  path.write_text(vocabulary.json, encoding="utf-8")
  assert Vocabulary.load(path, config) == vocabulary


def test_vocabulary_with_punctuation_is_not_taken_for_one_without(tmp_path):
  config = DataConfig(vocabulary_size=10, punctuation=True)
  vocabulary = fit("a, b!", config=config)
  path = tmp_path / "vocab.json"
  path.write_text(vocabulary.json, encoding="utf-8")
  assert Vocabulary.load(path, config) == vocabulary
  with pytest.raises(UsageError, match=r"keys format, size, strip_html, words"):
    Vocabulary.load(path, CONFIG)
  path.write_text(fit("a b").json, encoding="utf-8")
  with pytest.raises(UsageError, match=r"keys format, punctuation, size"):
    Vocabulary.load(path, config)


def test_the_file_has_the_bytes_on_which_the_digests_of_runs_depend():
  text = '{{\n"format": "imdb_jax vocabulary 1",\n"size": 10,\n"strip_html": {},\n"words": [\n"a",\n"!"\n]{}\n}}'
  marked, plain = DataConfig(vocabulary_size=10, punctuation=True), DataConfig(vocabulary_size=10, strip_html=False)
  assert fit("a !", config=marked).json == text.format("true", ',\n"punctuation": true')
  assert Vocabulary(config=plain, words=("a", "!")).json == text.format("false", "")


@pytest.mark.parametrize(
  ("limit", "value", "words"),
  [("_MAX_WORDS", 3, "more than 3 different"), ("_MAX_FILE_BYTES", 99, "more than 99 bytes")],
)
def test_words_that_would_fill_the_memory_or_could_not_be_read_again_are_refused(limit, value, words, monkeypatch):
  monkeypatch.setattr(tokenizer, limit, value)
  with pytest.raises(DataError, match=words):
    fit("a b c d")


def vocabulary_json(**changes) -> str:
  fields = json.loads(fit("a b c").json) | changes
  return json.dumps({name: value for name, value in fields.items() if value is not None})


@pytest.mark.parametrize(
  "content",
  [
    pytest.param("", id="empty"),
    pytest.param("words", id="not JSON"),
    pytest.param(vocabulary_json()[:-5], id="cut short"),
    pytest.param("[]", id="not an object"),
    pytest.param("[" * 100_000, id="deeply nested"),
    pytest.param(vocabulary_json().encode().replace(b'"a"', b'"\xff"'), id="not UTF-8"),
    pytest.param(vocabulary_json(strip_html=None), id="key missing"),
    pytest.param(vocabulary_json(extra=1), id="key unknown"),
    pytest.param(vocabulary_json(format="imdb_jax vocabulary 99"), id="other format"),
    pytest.param(vocabulary_json(size="10"), id="size is a text"),
    pytest.param(vocabulary_json(size=10.0), id="size is a float"),
    pytest.param(vocabulary_json(size=11), id="size of another config"),
    pytest.param(vocabulary_json(size=200_001, words=[str(i) for i in range(200_000)]), id="more words than ids"),
    pytest.param(vocabulary_json(strip_html=False), id="tags are words"),
    pytest.param(vocabulary_json(size=True), id="size is a truth value"),
    pytest.param(vocabulary_json(strip_html=1), id="strip_html is a number"),
    pytest.param(vocabulary_json(words={"a": 1}), id="words are no list"),
    pytest.param(vocabulary_json(words=["a", 1]), id="a word is a number"),
    pytest.param(vocabulary_json(words=["a", "b", "a"]), id="a word twice"),
    pytest.param(vocabulary_json(words=["a", "\ud800"]), id="half of a surrogate pair"),
    pytest.param(vocabulary_json(words=list("abcdefghij")), id="as many words as size"),
    pytest.param(vocabulary_json(size=-1, words=[]), id="negative size"),
    pytest.param(vocabulary_json().replace("10", "1" * 5000), id="huge number"),
  ],
)
def test_damaged_file_is_refused_by_name(tmp_path, content):
  path = tmp_path / "vocab.json"
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  with pytest.raises(UsageError, match=r"vocab\.json: not a usable vocabulary: .+") as caught:
    Vocabulary.load(path, CONFIG)
  assert str(caught.value).isascii()
  assert len(str(caught.value).splitlines()) == 1


WORDS = st.lists(st.text(max_size=8), max_size=8)
ODD = st.none() | st.integers() | st.floats() | st.text() | st.lists(st.text() | st.integers(), max_size=3)


@settings(max_examples=200, deadline=None)
@given(
  fields=st.fixed_dictionaries(
    {
      "format": st.just("imdb_jax vocabulary 1") | ODD,
      "size": st.just(10) | ODD,
      "strip_html": st.booleans() | ODD,
      "words": WORDS | ODD,
    }
  ),
  text=st.text(),
)
def test_any_object_gives_the_vocabulary_that_it_describes_or_one_clear_line(fields, text, tmp_path_factory):
  path = tmp_path_factory.getbasetemp() / "any.json"
  path.write_text(json.dumps(fields), encoding="utf-8")
  try:
    vocabulary = Vocabulary.load(path, CONFIG)
  except UsageError as error:
    assert len(str(error).splitlines()) == 1
    return
  assert json.loads(vocabulary.json) == fields
  tokens, lengths = vocabulary.encode([text, *vocabulary.words])
  assert tokens.max() < CONFIG.vocabulary_size
  assert tokens.min() >= 0
  assert lengths.max() <= 5


def test_damages_above_start_from_a_good_file(tmp_path):
  path = tmp_path / "vocab.json"
  path.write_text(vocabulary_json())
  assert Vocabulary.load(path, CONFIG).words == ("a", "b", "c")


def test_huge_file_is_not_read(tmp_path):
  path = tmp_path / "vocab.json"
  with path.open("wb") as file:
    file.truncate(2**27)
  with pytest.raises(UsageError, match="larger than"):
    Vocabulary.load(path, CONFIG)


@pytest.mark.parametrize("name", ["absent.json", "."])
def test_absent_file_is_named(tmp_path, name):
  with pytest.raises(UsageError, match="not a usable vocabulary"):
    Vocabulary.load(tmp_path / name, CONFIG)
