"""Exported models answer as the run does, in NumPy alone, as StableHLO and as ONNX."""

import dataclasses
import functools
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import programs
import pytest
import safetensors.numpy

from imdb_jax.config import DataConfig, ModelConfig, RuntimeConfig, TrainingConfig
from imdb_jax.data import ngrams
from imdb_jax.data.reviews import CLASSES
from imdb_jax.data.tokenizer import Vocabulary
from imdb_jax.errors import CheckpointError, UsageError
from imdb_jax.export import export
from imdb_jax.prediction import Classifier
from imdb_jax.program import Program

EXAMPLES = Path(__file__).parents[1] / "examples"
WORDS = "the a film was good bad don't not dull déjà vu masterpiece plot of in it as and 10 br"
# The last one is longer than the sequences. Lower-cased, "İ" is two characters.
TEXTS = ["", "A good film.", "not the PLOT<br />of it: don't", "unknown", "Déjà-vu in 10/10 İ", "bad dull film " * 9]
LENGTH = 12
DATA = DataConfig(vocabulary_size=21, sequence_length=LENGTH)
VOCABULARY = Vocabulary(config=DATA, words=(*WORDS.split(),))
ARTICLE = ModelConfig(embedding_size=4, hidden_size=5)
FAST = dataclasses.replace(ARTICLE, mask_padding=True, pooling="mean_max")
VARIANTS = {
  "article, two directions": dataclasses.replace(ARTICLE, directions=2),
  "article, two directions, without padding": dataclasses.replace(ARTICLE, directions=2, mask_padding=True),
  "Keras 1": dataclasses.replace(ARTICLE, gate_activation="hard_sigmoid", pooling="max", mask_padding=True),
}
OTHER_CELLS = {
  "gru": dataclasses.replace(FAST, cell="gru"),
  "rnn": dataclasses.replace(ARTICLE, cell="rnn", directions=2),
}
STRONG = dataclasses.replace(FAST, directions=2, ngrams=2)
MODELS = {"article": ARTICLE, "fast": FAST, "strong": STRONG, "punctuation": FAST, **VARIANTS, **OTHER_CELLS}
MODELS |= {"three classes": FAST, "three classes, n-grams": STRONG}


def make_classifier(name: str, num_seeds: int = 2, temperature: float = 1.7) -> Classifier:
  """Return a model whose parameters are far from the initial ones, so that its answers are far from 1/2."""
  model, classes = MODELS[name], ("bad", "so-so", "good") if name.startswith("three") else CLASSES
  vocabulary = VOCABULARY
  if name == "punctuation":
    data = dataclasses.replace(DATA, punctuation=True)
    vocabulary = Vocabulary(config=data, words=("-", "/", ".", "'", ":", *VOCABULARY.words[5:]))
  config = dataclasses.replace(
    programs.config_of(model, training=TrainingConfig(num_seeds=num_seeds)),
    data=vocabulary.config,
    runtime=RuntimeConfig(platform="cpu", num_devices=1, implementation="scan"),
  )
  program = Program(config, programs.mesh_of(1), classes=classes)
  rng = np.random.default_rng(0)
  initial = jax.device_get(program.init().params)
  params = jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.7, leaf.shape).astype(leaf.dtype), initial)
  if model.ngrams:
    tokens, _ = VOCABULARY.encode(TEXTS)
    fitted = ngrams.fit(tokens, np.arange(len(TEXTS)) % len(classes), model.ngrams, len(classes))
    params["ngrams"] = {name: np.stack([array] * num_seeds) for name, array in fitted.items()}
  return Classifier(program, vocabulary, programs.put(program, params), step=3, temperature=temperature)


def example(name: str) -> Any:
  """Return a program of the examples as a module."""
  spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Callable[[str], tuple[Classifier, Path]]:
  """Return the classifier and the exported weights of a model, made once."""

  @functools.cache
  def of(name: str) -> tuple[Classifier, Path]:
    classifier, folder = make_classifier(name), tmp_path_factory.mktemp("exported") / "out"
    export(classifier, "safetensors", folder)
    return classifier, folder

  return of


def models(*names: str) -> pytest.MarkDecorator:
  """Run a test for these models; only three are quick enough for each run of the tests."""
  presets = ("article", "fast", "punctuation")
  return pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in presets else pytest.mark.slow) for name in names]
  )


@models("article", "fast", "punctuation", "three classes", *VARIANTS)
def test_numpy_alone_computes_the_same_probabilities(name, exported):
  classifier, folder = exported(name)
  found = example("predict_numpy").Model(folder).predict_proba(TEXTS)
  np.testing.assert_allclose(found, classifier.predict_proba(TEXTS), atol=1e-6)


@models("article", "strong", "punctuation", "three classes, n-grams", *OTHER_CELLS)
def test_weights_are_restored_exactly(name, exported):
  classifier, folder = exported(name)
  restored = Classifier.from_safetensors(folder, runtime=RuntimeConfig(platform="cpu", num_devices=1))
  programs.assert_equal(restored.params, classifier.params)
  np.testing.assert_allclose(restored.predict_proba(TEXTS), classifier.predict_proba(TEXTS), atol=1e-6)
  assert repr(restored) == repr(classifier)


@models("strong", "three classes, n-grams", "article, two directions", *OTHER_CELLS)
def test_stablehlo_takes_batches_of_any_size(name, exported, tmp_path):
  pytest.importorskip("flatbuffers")
  classifier, _ = exported(name)
  export(classifier, "stablehlo", tmp_path / "out")
  program = jax.export.deserialize(bytearray((tmp_path / "out" / "model.stablehlo").read_bytes()))
  assert program.platforms == ("cpu", "cuda", "tpu")
  tokens, expected = VOCABULARY.encode(TEXTS)[0].astype(np.int32), classifier.predict_proba(TEXTS)
  for rows in ([1], [0, 1, 2, 3, 4, 5, 2]):
    np.testing.assert_allclose(program.call(tokens[rows]), expected[rows], atol=1e-6)


@models("article", "fast", "three classes", *VARIANTS, *OTHER_CELLS)
def test_onnx_runtime_computes_the_same_probabilities(name, exported, monkeypatch):
  onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
  monkeypatch.syspath_prepend(EXAMPLES)
  classifier, folder = exported(name)
  model = example("to_onnx").convert(example("predict_numpy").Model(folder))
  onnx.checker.check_model(model, full_check=True)
  session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
  tokens, _ = VOCABULARY.encode(TEXTS)
  (found,) = session.run(["probabilities"], {"tokens": tokens.astype(np.int32)})
  # ONNX Runtime approximates sigmoid and tanh.
  np.testing.assert_allclose(found, classifier.predict_proba(TEXTS), atol=5e-6)


def test_other_answers_are_noticed_and_nothing_is_left(tmp_path, monkeypatch):
  classifier, save = make_classifier("article"), safetensors.numpy.save_file

  def save_other(arrays: dict[str, np.ndarray], path: Path) -> None:
    save(arrays | {"dense.bias": arrays["dense.bias"] + np.float32(1e-3)}, path)

  monkeypatch.setattr(safetensors.numpy, "save_file", save_other)
  with pytest.raises(CheckpointError, match=r"probabilities differ from the run's by \d\.\de-0[345]"):
    export(classifier, "safetensors", tmp_path / "new" / "out")
  assert not [*(tmp_path / "new").iterdir()]


def test_what_exists_is_not_touched(tmp_path):
  (tmp_path / "out").mkdir()
  with pytest.raises(UsageError, match="out: exists; name a new folder"):
    export(make_classifier("article"), "safetensors", tmp_path / "out")
  (tmp_path / "file").touch()
  with pytest.raises(UsageError, match="cannot be written"):
    export(make_classifier("article"), "safetensors", tmp_path / "file" / "out")
  assert [*(tmp_path / "out").iterdir()] == []


def test_a_missing_package_is_named(tmp_path, monkeypatch):
  monkeypatch.setattr(jax.export.Exported, "serialize", lambda *_: __import__("a_missing_package"))
  with pytest.raises(UsageError, match=r"--format stablehlo: requires pip install 'imdb_jax\[export\]'"):
    export(make_classifier("article"), "stablehlo", tmp_path / "out")
  assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
  ("name", "change"),
  [
    ("model.json", lambda facts: facts | {"temperature": -1.0}),
    ("model.json", lambda facts: facts | {"temperature": "1"}),
    ("model.json", lambda facts: facts | {"step": None}),
    ("classes.json", lambda classes: [["negative"], 3]),
    ("classes.json", lambda classes: ["bad", "middling", "good"]),
    ("model.json", lambda facts: [facts]),
    ("config.json", lambda config: config | {"model": config["model"] | {"hidden_size": 6}}),
    ("config.json", lambda config: config | {"model": config["model"] | {"ngrams": 1}}),
    ("vocab.json", lambda vocabulary: vocabulary | {"words": ["film", "film"]}),
  ],
)
def test_files_that_do_not_fit_together_are_refused_in_one_line(name, change, exported, tmp_path):
  folder = shutil.copytree(exported("article")[1], tmp_path / "out")
  (folder / name).write_text(json.dumps(change(json.loads((folder / name).read_text()))))
  with pytest.raises(UsageError) as raised:
    Classifier.from_safetensors(folder, runtime=RuntimeConfig(platform="cpu", num_devices=1))
  assert len(str(raised.value).splitlines()) == 1
  assert str(folder) in str(raised.value)
