"""Contributions of words are the integrals of their definition, add up, and are shown at their places in the text."""

import dataclasses
import html
import os
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import programs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import float64_logits

from imdb_jax import explanation
from imdb_jax.config import DataConfig, ModelConfig, RuntimeConfig, TrainingConfig
from imdb_jax.data import ngrams, sample
from imdb_jax.data.tokenizer import Vocabulary
from imdb_jax.errors import UsageError
from imdb_jax.explanation import Explanation, Word
from imdb_jax.prediction import Classifier
from imdb_jax.program import Program

WORDS = ("good", "bad", "film", "not", "a", "plot")
LAST = ModelConfig(embedding_size=4, hidden_size=5)
STRONG = dataclasses.replace(LAST, directions=2, pooling="mean_max", mask_padding=True, ngrams=2)


def make_classifier(
  model: ModelConfig, num_seeds: int = 1, classes: tuple[str, ...] = ("negative", "positive"), num_devices: int = 1
) -> Classifier:
  """Return a classifier with random parameters, large enough for curved paths; it knows each second n-gram."""
  config = dataclasses.replace(
    programs.config_of(model),
    data=DataConfig(vocabulary_size=len(WORDS) + 1, sequence_length=5),
    training=TrainingConfig(num_seeds=num_seeds),
  )
  program, rng = Program(config, programs.mesh_of(num_devices), classes=classes), np.random.default_rng(0)
  shapes = program.abstract_state().params
  params: Any = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes)
  if model.ngrams:
    tokens = rng.integers(0, len(WORDS) + 1, (200, 5)).astype(np.int16)
    keys = np.sort(np.unique(ngrams.keys_of(np.sort(tokens, axis=1), model.ngrams))[1::2])
    keys = np.pad(keys, (ngrams.SIZE - len(keys), 0)).astype(np.uint32)
    weights = np.where((keys > 0)[:, None], params["ngrams"]["weights"][0].reshape(len(keys), -1), 0)
    weights = np.broadcast_to(weights.reshape(params["ngrams"]["weights"].shape[1:]), params["ngrams"]["weights"].shape)
    params["ngrams"] |= {"keys": np.broadcast_to(keys, (num_seeds, len(keys))), "weights": weights}
  vocabulary = Vocabulary(config=config.data, words=WORDS)
  return Classifier(program, vocabulary, programs.put(program, params), step=0, temperature=1.5)


def contributions_of(found: Explanation) -> np.ndarray:
  return np.array([word.contribution for word in found.words if word.contribution is not None])


def float64_log_odds(classifier: Classifier, params: Any, tokens: np.ndarray, presence: np.ndarray) -> float:
  """Return the log odds of the second class for one text of different words, by the definition of presence."""
  model, ids, probabilities = classifier.config.model, tokens[0][tokens[0] > 0], []
  for seed in range(classifier.config.training.num_seeds):
    one = jax.tree.map(lambda leaf, seed=seed: leaf[seed], params)
    vectors = one["embedding"]["embedding"].astype(np.float64)
    vectors[ids] = vectors[0] + presence[:, None] * (vectors[ids] - vectors[0])
    faded = one | {"embedding": {"embedding": vectors}}
    logit = float64_logits(model, faded, tokens, np.array([len(ids)], np.int32), (None, None))[0]
    if model.ngrams:
      linear = float(one["ngrams"]["bias"])
      for size in range(1, model.ngrams + 1):
        for start in range(len(ids) - size + 1):
          place = one["ngrams"]["keys"] == key_of(ids[start : start + size])
          linear += one["ngrams"]["weights"][place].sum() * presence[start : start + size].mean()
      logit = (logit + linear) / 2
    probabilities.append(1 / (1 + np.exp(-logit)))
  p = np.mean(probabilities)
  return np.log(p / (1 - p)) / classifier.temperature


def key_of(words: Any) -> int:
  """Return the key of an n-gram: the only one of its words together that is not one of fewer words."""
  words = np.array(words, np.int16)[None]
  shorter = ngrams.keys_of(words, words.shape[1] - 1) if words.shape[1] > 1 else np.zeros(0)
  (key,) = {*ngrams.keys_of(words, words.shape[1]).ravel().tolist()} - {*shorter.ravel().tolist()} - {0}
  return key


SMOOTH, WITH_MAXIMA = np.polynomial.legendre.leggauss(16), (np.arange(-199, 200, 2) / 200, np.full(200, 0.01))


@pytest.mark.slow
@pytest.mark.parametrize(
  ("model", "num_seeds", "rule", "atol"),
  [
    (LAST, 2, SMOOTH, 1e-4),
    (dataclasses.replace(LAST, cell="gru", pooling="mean"), 1, SMOOTH, 1e-4),
    (dataclasses.replace(LAST, cell="rnn", ngrams=1), 2, SMOOTH, 1e-4),
    # Slopes jump, so both sides have an error.
    (STRONG, 1, WITH_MAXIMA, 3e-3),
  ],
)
def test_contributions_are_integrals_along_the_straight_path(model, num_seeds, rule, atol, monkeypatch):
  """Central differences in float64, and another quadrature: by Gauss, or of 200 midpoints."""
  monkeypatch.setattr(explanation, "MAX_CHANGE", atol)
  classifier, text = make_classifier(model, num_seeds), "not good film"
  params, (tokens, _) = jax.device_get(classifier.params), classifier.vocabulary.encode([text])
  expected, step = np.zeros(3), 1e-5
  for node, weight in zip(*rule, strict=True):
    for word, change in enumerate(step * np.eye(3)):
      up, down = (float64_log_odds(classifier, params, tokens, (node + 1) / 2 + sign * change) for sign in (1, -1))
      expected[word] += weight / 2 * (up - down) / (2 * step)
  (found,) = classifier.explain([text])
  assert found.change <= atol
  np.testing.assert_allclose(contributions_of(found), expected, atol=atol)
  assert abs(expected).max() > 0.1
  for logit, presence in ((found.baseline_logit, 0.0), (found.logit, 1.0)):
    assert logit == pytest.approx(float64_log_odds(classifier, params, tokens, np.full(3, presence)), abs=1e-5)


def test_a_phrase_shares_its_weight_over_its_words_and_places():
  """The recurrent part is a constant here, so contributions are exact."""
  classifier = make_classifier(dataclasses.replace(LAST, ngrams=2))
  params: Any = jax.device_get(classifier.params)
  weights_of = {key_of([1, 2]): 8.0, key_of([1]): 3.0}
  keys, weights = np.zeros(ngrams.SIZE, np.uint32), np.zeros(ngrams.SIZE, np.float32)
  keys[-2:] = sorted(weights_of)
  weights[-2:] = [weights_of[key] for key in sorted(weights_of)]
  params["ngrams"] |= {"keys": keys[None], "weights": weights[None]}
  params["dense"] = jax.tree.map(np.zeros_like, params["dense"])
  classifier = Classifier(classifier.program, classifier.vocabulary, params, step=0)
  (found,) = classifier.explain(["good bad film good bad"])
  # Half of the logit is the linear model's: of "good bad" twice, 8 / 2 / 4 each, and of "good" twice, 3 / 2 / 2 each.
  np.testing.assert_allclose(contributions_of(found), [1.75, 1, 0, 1.75, 1], atol=1e-6)


@pytest.mark.parametrize(("model", "num_seeds"), [(LAST, 1), (STRONG, 3)])
@pytest.mark.parametrize("classes", [("negative", "positive"), ("a", "b", "c")])
def test_contributions_add_up_and_the_logit_is_that_of_the_answer(model, num_seeds, classes):
  classifier = make_classifier(model, num_seeds, classes)
  texts = ["not a good film", "bad", "zzz", "", "plot film bad good a not good bad", "bad bad bad"]
  probabilities = classifier.predict_proba(texts)
  found = classifier.explain(texts)
  for each, row in zip(found, probabilities, strict=True):
    assert contributions_of(each).sum() == pytest.approx(each.logit - each.baseline_logit, abs=1e-3)
    assert (each.error <= 1e-3, each.change <= 0.02) == (True, True)
    if len(contributions_of(each)):
      place = 1 if len(classes) == 2 else row.argmax()
      assert each.label == classes[place]
      assert 1 / (1 + np.exp(-each.logit)) == pytest.approx(row[place], abs=1e-5)
  for each, other in zip(classifier.explain(texts, classes[0]), found, strict=True):
    assert each.label == classes[0]
    if len(classes) == 2:
      assert each.logit == pytest.approx(-other.logit, abs=1e-5)
      np.testing.assert_allclose(contributions_of(each), -contributions_of(other), atol=1e-5)
  with pytest.raises(UsageError, match=f"'better': is no class; there are {', '.join(classes)}"):
    classifier.explain(texts, "better")
  with pytest.raises(TypeError, match="a list of texts"):
    classifier.explain("bad")


def test_explanations_do_not_depend_on_devices_or_other_texts():
  texts = ["not a good film", "bad", "plot film bad", "good good"] * 5
  one, four = (make_classifier(LAST, num_devices=count).explain(texts) for count in (1, 4))
  for each, other, text in zip(one, four, texts, strict=True):
    assert each.text == text
    np.testing.assert_allclose(contributions_of(each), contributions_of(other), atol=1e-5)
    np.testing.assert_allclose(contributions_of(each), contributions_of(one[texts.index(text)]), atol=1e-5)


@pytest.mark.slow
def test_contributions_add_up_on_the_sample():
  config = programs.config_of(dataclasses.replace(STRONG, ngrams=0), length=40)
  config = dataclasses.replace(config, data=dataclasses.replace(config.data, vocabulary_size=500))
  vocabulary, *_ = Vocabulary.fit(sample.load()["train"].texts, config.data)
  program, rng = Program(config, programs.mesh_of(1)), np.random.default_rng(0)
  shapes = program.abstract_state().params
  params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes)
  assert_exact(Classifier(program, vocabulary, params, step=0), sample.load()["test"].texts[:20])


def assert_exact(classifier: Classifier, texts) -> None:
  logits = classifier.program.task.ensemble(classifier.logits(texts))[:, 0]
  for each, logit in zip(classifier.explain(texts), logits, strict=True):
    assert each.logit == pytest.approx(logit / classifier.temperature, abs=1e-4)
    assert contributions_of(each).sum() == pytest.approx(each.logit - each.baseline_logit, abs=1e-3)
    assert each.error <= 1e-3


@pytest.mark.slow
@pytest.mark.skipif("IMDB_ARCHIVE" not in os.environ, reason="IMDB_ARCHIVE names no archive of the real reviews")
def test_contributions_add_up_on_a_thousand_real_reviews(tmp_path):
  import imdb_jax
  from imdb_jax.data import archive

  fast, path = imdb_jax.PRESETS["fast"], Path(os.environ["IMDB_ARCHIVE"])
  runtime = RuntimeConfig(platform="cpu", archive=path, cache_dir=tmp_path / "cache", run_dir=tmp_path / "run")
  data = dataclasses.replace(fast.data, limit=4000)
  imdb_jax.fit(dataclasses.replace(fast, data=data, runtime=runtime))
  classifier = Classifier.load(tmp_path / "run", runtime=RuntimeConfig(platform="cpu"))
  assert_exact(classifier, archive.read_archive(path)["test"].texts[:1000])


def test_what_was_not_exact_says_so(monkeypatch):
  classifier, text = make_classifier(STRONG, 2), "plot film bad good not"
  monkeypatch.setattr(explanation, "MAX_CHANGE", 1e-7)
  monkeypatch.setattr(explanation, "_MAX_STEPS", 32)
  (few,) = classifier.explain([text])
  assert few.change > 1e-7
  assert "; not exact: error " in explanation.to_terminal(few, is_colored=False)
  monkeypatch.setattr(explanation, "_MAX_STEPS", 512)
  (many,) = classifier.explain([text])
  assert 0 < many.change < few.change
  monkeypatch.undo()
  (found,) = classifier.explain([text])
  assert "not exact" not in explanation.to_terminal(found, is_colored=False)
  # The tolerance for a single contribution.
  np.testing.assert_allclose(contributions_of(found), contributions_of(many), atol=0.02)


def test_tags_unknown_words_and_truncated_beginnings_are_not_seen():
  text = "Plot: <b>bad</b> \u0130zzz film, not A\ngood film"
  (found,) = make_classifier(LAST).explain([text])
  assert all(text[word.start : word.end] == word.text for word in found.words)
  seen = [(word.text, word.contribution is not None) for word in found.words]
  unseen = [("Plot", False), ("<b>", False), ("bad", False), ("</b>", False), ("\u0130zzz", False)]
  assert seen == [*unseen, *[(word, True) for word in ("film", "not", "A", "good", "film")]]
  joined = [*explanation.joined(found)]
  assert joined[0] == Word("Plot: <b>bad</b> \u0130zzz", 0, 21, None)
  assert joined[1:] == [*found.words[5:]]


def make_explanation(text: str, words: list[tuple[int, int, float | None]]) -> Explanation:
  found = tuple(Word(text[start:end], start, end, value) for start, end, value in words)
  return Explanation(text=text, label="<b>", logit=1.0, baseline_logit=0.5, words=found, error=0.0, change=0.0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=5), st.none() | st.floats(-9, 9))))
def test_any_text_is_shown_whole_and_never_as_html(parts):
  text, words = "", []
  for part, value in parts:
    words.append((len(text), len(text) + len(part), value))
    text += part
  shown = explanation.to_html(make_explanation(text, words))
  without = re.sub(r"</?(p|span)( [a-z]+=\"[^\"<>]*\")*>", "", shown)
  assert not re.search("[<>]", without)
  assert html.unescape(without) == html.unescape(html.escape(text))


def test_colors_tell_for_from_against_and_strength():
  found = make_explanation("good bad zzz film", [(0, 4, 1.0), (5, 8, -2.0), (9, 12, None), (13, 17, 0.0)])
  assert re.findall(r"<span (.*?)>", explanation.to_html(found)) == [
    'style="background: rgba(0, 114, 178, 0.300)" title="+1.000"',
    'style="background: rgba(213, 94, 0, 0.600)" title="-2.000"',
    'style="opacity: 0.65; text-decoration: underline dotted" title="not seen"',
  ]
  shown = explanation.to_terminal(found, is_colored=True)
  assert "\033[1;34mgood\033[0m \033[1;31mbad\033[0m \033[2mzzz\033[0m film" in shown
  plain = explanation.to_terminal(found, is_colored=False)
  assert "\033" not in plain
  assert plain.splitlines()[2:] == ["  -2.000  bad", "  +1.000  good", "  +0.000  film"]
