"""Which texts a classifier accepts, what it compiles, and what it closes. Trained runs: training/test_seeds.py."""

import dataclasses
import types

import jax
import numpy as np
import programs
import pytest
from programs import config_of

from imdb_jax.config import DataConfig, RuntimeConfig, TrainingConfig
from imdb_jax.data.tokenizer import Vocabulary
from imdb_jax.data.tokens import TokenSplit
from imdb_jax.errors import CheckpointError, DataError, UsageError
from imdb_jax.prediction import Classifier, Ensemble
from imdb_jax.program import Program
from imdb_jax.store import run_directory
from imdb_jax.store.checkpoints import Checkpoints

CONFIG = dataclasses.replace(config_of(), data=DataConfig(vocabulary_size=4, sequence_length=3))
VOCABULARY = Vocabulary(config=CONFIG.data, words=("good", "bad", "film"))


def make_classifier(num_devices: int = 1, evaluation_batch_size: int = 40, seed: int = 0) -> Classifier:
  runtime = RuntimeConfig(evaluation_batch_size=evaluation_batch_size)
  config = dataclasses.replace(CONFIG, training=dataclasses.replace(CONFIG.training, seed=seed))
  program = Program(dataclasses.replace(config, runtime=runtime), programs.mesh_of(num_devices))
  return Classifier(program, VOCABULARY, programs.put(program, programs.initial_state(config).params), step=0)


@pytest.fixture(scope="module")
def classifier() -> Classifier:
  return make_classifier()


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_any_sequence_of_texts_is_accepted(classifier, kind):
  assert classifier.predict_proba(kind(["a good film", "bad"])).shape == (2, 2)


def test_a_text_is_of_its_most_probable_class(classifier):
  assert classifier.classes == ("negative", "positive")
  texts = ["a good film", "bad", "film", "good good"]
  likely = [max(zip(row, classifier.classes, strict=True))[1] for row in classifier.predict_proba(texts)]
  assert list(classifier.predict(texts)) == likely


def test_logits_and_features_are_those_of_each_seed():
  """The head turns features into logits, and both are the same for texts and for encoded reviews."""
  model = dataclasses.replace(programs.MODEL, directions=2, pooling="mean_max", mask_padding=True)
  config = dataclasses.replace(CONFIG, model=model, training=TrainingConfig(num_seeds=2))
  program = Program(config, programs.mesh_of(1))
  classifier = Classifier(program, VOCABULARY, program.init().params, step=0)
  texts = ["a good film", "bad", ""]
  features, logits = classifier.features(texts), classifier.logits(texts)
  assert (features.shape, logits.shape) == ((2, 3, 4 * 5), (2, 3, 1))
  head = jax.device_get(classifier.params["dense"])
  np.testing.assert_allclose(features @ head["kernel"] + head["bias"][:, None], logits, atol=1e-6)
  np.testing.assert_array_equal(features[:, 2], 0)
  assert abs(features[0, 0] - features[1, 0]).max() > 0.01
  tokens, lengths = VOCABULARY.encode(texts)
  split = TokenSplit(tokens=tokens, lengths=lengths, labels=np.zeros(3, np.int32))
  for compute in (classifier.features, classifier.logits, classifier.predict_proba):
    np.testing.assert_allclose(compute(split), compute(texts), atol=1e-6)


def test_a_notebook_shows_what_a_classifier_is(classifier):
  assert repr(classifier) == ("Classifier(negative, positive; preset article, 1 seed, step 0; 3 words, 222 parameters)")


class TestWithoutAKnownWord:
  """The network would call every such text the same, whatever the classes are."""

  TEXTS = ("unknown words", "", "good film")

  def classifiers(self) -> tuple[Classifier, Classifier]:
    first, second = make_classifier(), make_classifier(seed=1)
    first.prior, second.prior = np.array([0.7, 0.3], np.float32), np.array([0.4, 0.6], np.float32)
    return first, second

  def test_the_probabilities_are_the_prior(self):
    first, _ = self.classifiers()
    probabilities = first.predict_proba(self.TEXTS)
    np.testing.assert_array_equal(probabilities[:2], [first.prior] * 2)
    np.testing.assert_array_equal(probabilities[2:], make_classifier().predict_proba(self.TEXTS[2:]))
    assert list(first.predict(self.TEXTS[:2])) == ["negative", "negative"]

  def test_the_answer_has_no_class(self):
    answers = Ensemble(self.classifiers()).answers(self.TEXTS, threshold=0.1)
    assert [answer["class"] for answer in answers[:2]] == [None, None]
    assert [answer["known_words"] for answer in answers] == [0, 0, 2]
    assert answers[0]["probabilities"] == pytest.approx({"negative": 0.55, "positive": 0.45})


def test_answers_follow_the_threshold_and_abstain():
  ensemble, texts = Ensemble([make_classifier(seed=2)]), ["good film", "bad", "film", "good good", "bad bad film"]
  p = ensemble.predict_proba(texts)[:, 1]
  for threshold in (0.0, float(np.sort(p)[2]), 1.0):
    found = [answer["class"] for answer in ensemble.answers(texts, threshold=threshold)]
    assert found == [ensemble.classes[int(value >= threshold)] for value in p]
  sure = np.maximum(p, 1 - p)
  limit = float(np.sort(sure)[2])
  found = [answer["class"] for answer in ensemble.answers(texts, abstain_below=limit)]
  assert found == [ensemble.classes[int(p > 0.5)] if s >= limit else None for p, s in zip(p, sure, strict=True)]
  assert None in found
  assert ensemble.answers([]) == []


def test_one_text_is_not_taken_for_its_letters(classifier):
  with pytest.raises(TypeError, match="texts: must be a list of texts, not one text"):
    classifier.predict_proba("bad film")


@pytest.mark.parametrize("other", [None, b"bad", 3, ["bad"]])
def test_an_item_that_is_no_text_is_named(classifier, other):
  with pytest.raises(TypeError, match=rf"texts\[1\]: must be a str, not {type(other).__name__}"):
    classifier.predict_proba(["good", other])


def test_the_probability_of_a_text_does_not_depend_on_the_other_texts(classifier):
  """Nor on the size of the batch; up to rounding, as each size is a program of its own."""
  texts = ["good film", "bad", "", "film film good", "unknown words"] * 20
  together = classifier.predict_proba(texts)
  assert (together.shape, together.dtype) == ((100, 2), np.float32)
  assert len(set(together[:3, 0])) == 3
  np.testing.assert_array_equal(together, np.tile(together[:5], (20, 1)))
  for num_texts in (1, 5, 16):
    np.testing.assert_allclose(classifier.predict_proba(texts[:num_texts]), together[:num_texts], rtol=1e-6)
  assert classifier.predict_proba([]).shape == (0, 2)


@pytest.mark.parametrize(
  ("num_devices", "evaluation_batch_size", "num_shapes"), [(1, 40, 3), (4, 40, 3), (1, 8, 2), (1, 1, 1)]
)
def test_warmup_compiles_all_that_predict_will_need(num_devices, evaluation_batch_size, num_shapes):
  """So that a server answers its first request at once, whatever the number of texts."""
  classifier = make_classifier(num_devices, evaluation_batch_size)
  with programs.compilations() as found:
    classifier.warmup()
  assert len(found) == num_shapes
  with programs.compilations() as found:
    for num_texts in (0, 1, 2, 8, 9, 15, 16, 17, 40, 41, 100):
      assert classifier.predict_proba(["good film"] * num_texts).shape == (num_texts, 2)
  assert not found


def test_checkpoints_are_closed_when_none_can_be_restored(tmp_path, monkeypatch):
  runtime = RuntimeConfig(run_dir=tmp_path, platform="cpu", num_devices=1)
  facts = {"digest": "digest", "summary": "", "counts": {"a": 1, "b": 1}, "left_out": {}}
  data = types.SimpleNamespace(**facts, vocabulary=VOCABULARY)
  run_directory.create(dataclasses.replace(CONFIG, runtime=runtime), data)
  (tmp_path / "checkpoints").mkdir()
  close, closed = Checkpoints.close, []
  monkeypatch.setattr(Checkpoints, "close", lambda checkpoints: closed.append(close(checkpoints)))
  with pytest.raises(CheckpointError, match="none has been saved yet"):
    Classifier.load(tmp_path, runtime=runtime)
  assert len(closed) == 1


def members() -> list[Classifier]:
  """Return two classifiers of the same classes with different vocabularies, parameters and temperatures."""
  other = Vocabulary(config=CONFIG.data, words=("film", "good", "awful"))
  found = [make_classifier(seed=seed) for seed in (0, 1)]
  found[1].vocabulary, found[0].temperature, found[1].temperature = other, 0.05, 2.0
  return found


def test_an_ensemble_averages_the_probabilities_of_its_members():
  first, second = members()
  ensemble, texts = Ensemble([first, second]), ["good film", "bad", "", "awful film"]
  expected = (first.predict_proba(texts).astype(np.float64) + second.predict_proba(texts)) / 2
  np.testing.assert_allclose(ensemble.predict_proba(texts), expected, rtol=1e-6)
  assert list(ensemble.predict(texts)) == [ensemble.classes[row] for row in expected.argmax(axis=1)]


def test_an_ensemble_evaluates_each_member_with_its_own_encoding_and_temperature():
  both, texts, labels = members(), ["good film", "bad", "", "awful film"], np.array([1, 0, 1, 0], np.int32)
  splits = []
  for each in both:
    tokens, lengths = each.vocabulary.encode(texts)
    splits.append(TokenSplit(tokens=tokens, lengths=lengths, labels=labels))
  result = Ensemble(both).evaluate(splits)
  x = np.stack([each.logits(split)[0, :, 0] / each.temperature for each, split in zip(both, splits, strict=True)])
  p = np.mean(1 / (1 + np.exp(-x.astype(np.float64))), axis=0)
  assert result.loss == pytest.approx(-np.mean(np.log(np.where(labels == 1, p, 1 - p))), rel=1e-6)
  assert result.accuracy == np.mean((p > 0.5) == labels)
  for each, split, metrics in zip(both, splits, result.seeds, strict=True):
    alone = vars(each.evaluate(split))
    assert vars(metrics) == {name: alone[name] for name in vars(metrics)}
  other = dataclasses.replace(splits[1], labels=1 - labels)
  with pytest.raises(DataError, match="the reviews of this split are not those of the first run"):
    Ensemble(both).evaluate([splits[0], other])


def test_members_with_different_classes_are_refused():
  first, second = members()
  second.classes = ("bad", "good")
  with pytest.raises(UsageError, match="its classes are bad, good, but those of the first run are negative, positive"):
    Ensemble([first, second])
