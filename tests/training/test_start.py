"""A new run may start from the weights of another one."""

import contextlib
import dataclasses
import json
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from programs import assert_equal
from reliability.sandbox import checkpoints_of
from training.test_resume import signal_before, train_until_stopped
from training.tiny import assert_same_end, change, tiny

import imdb_jax
from imdb_jax.config import Config
from imdb_jax.data import sample
from imdb_jax.data.tokenizer import Vocabulary
from imdb_jax.errors import CheckpointError, UsageError
from imdb_jax.store import files
from imdb_jax.training.loop import _Trainer
from imdb_jax.training.metrics import Recorder

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("shared_programs")]


def started(config: Config) -> dict:
  """Start a run, kill it before its first step, and return the parameters that it has started from."""
  states = []

  def die(trainer):
    states.append(jax.device_get(trainer._state))
    raise KeyboardInterrupt

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(_Trainer, "_compile", die)
    with pytest.raises(KeyboardInterrupt):
      imdb_jax.fit(config)
  return states[0].params


def best_of(config: Config) -> dict:
  with contextlib.closing(checkpoints_of(config.run_dir)) as checkpoints:
    return jax.device_get(checkpoints.restore("best")[1].params)


def vectors_of(config: Config, params: dict, seed: int = 0) -> dict[str, np.ndarray]:
  words = Vocabulary.load(config.run_dir / "vocab.json", config.data).words
  return dict(zip(("padding", *words), params["embedding"]["embedding"][seed], strict=False))


def fewer(run_dir: Path, source: Config | None, **training) -> Config:
  """Return the settings of a run on fewer reviews, which start from those of another run."""
  config = change(tiny(run_dir, **training), "data", limit=12, vocabulary_size=60)
  return change(config, "runtime", init_from=source and source.run_dir)


@pytest.fixture(scope="module")
def small(shared_programs, tmp_path_factory) -> Config:
  """A run of two seeds that knows few words."""
  config = fewer(tmp_path_factory.mktemp("runs") / "small", None, num_seeds=2)
  imdb_jax.fit(config)
  return config


def test_a_run_starts_from_the_words_layers_and_head_of_another(small, tmp_path, capsys):
  plain, config = tiny(tmp_path / "plain", num_seeds=2), tiny(tmp_path / "run", num_seeds=2)
  drawn = started(plain)
  found = started(change(config, "runtime", init_from=small.run_dir))
  theirs = best_of(small)
  known = vectors_of(small, theirs)
  for seed in range(2):
    for layer in ("lstm", "dense"):
      for name, value in theirs[layer].items():
        np.testing.assert_array_equal(found[layer][name][seed], value[0])
    # Words that the other run does not know start as those of the first seed.
    expected = vectors_of(plain, drawn) | known
    vectors = vectors_of(config, found, seed)
    assert known.keys() < vectors.keys() <= expected.keys()
    for word, vector in vectors.items():
      np.testing.assert_array_equal(vector, expected[word], err_msg=word)
  step = imdb_jax.Classifier.load(small.run_dir).step
  shown = f"From {small.run_dir}, step {step}: 59 of {len(vectors) - 1} word vectors, dense, lstm\n"
  assert shown in capsys.readouterr().out
  (first,) = files.read_json(config.run_dir / "provenance.json")["starts"]
  assert (first["init_from"]["run_dir"], first["init_from"]["step"]) == (str(small.run_dir), step)


def test_a_head_of_another_shape_is_new_and_all_recurrent_layers_are_taken(tmp_path, capsys):
  settings = {"cell": "gru", "directions": 2, "ngrams": 2}
  source = change(tiny(tmp_path / "source", epochs=1), "model", **settings)
  imdb_jax.fit(source)
  plain, config = (
    change(fewer(tmp_path / name, origin), "model", **settings, pooling="mean_max", embedding="svd")
    for name, origin in (("plain", None), ("run", source))
  )
  drawn, found, theirs = started(plain), started(config), best_of(source)
  for layer, expected in {"gru": theirs, "backward_gru": theirs, "dense": drawn, "ngrams": drawn}.items():
    assert_equal(found[layer], expected[layer])
  assert ": 59 of 59 word vectors, backward_gru, gru, not dense\n" in capsys.readouterr().out
  expected = vectors_of(source, theirs)
  assert_equal(vectors_of(config, found), {word: expected[word] for word in vectors_of(config, found)})


def test_a_head_for_classes_of_other_names_is_new(small, tmp_path, capsys):
  reviews = sample.load()
  data = {name: (split.texts, np.array(["dull", "funny"])[split.labels]) for name, split in reviews.items()}
  imdb_jax.fit(change(fewer(tmp_path / "run", small, epochs=1), "data", limit=40), data=data)
  assert " word vectors, lstm, not dense\n" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("name", "value", "flag"),
  [
    ("embedding_size", 5, "--embedding-size 5: the run of --init-from {} has 4"),
    ("hidden_size", 5, "--hidden-size 5: the run of --init-from {} has 4"),
    ("cell", "gru", "--cell gru: the run of --init-from {} has lstm"),
    ("directions", 2, "--directions 2: the run of --init-from {} has 1"),
  ],
)
def test_weights_of_another_shape_are_refused_and_leave_no_trace(name, value, flag, small, tmp_path):
  config = change(fewer(tmp_path / "run", small), "model", **{name: value})
  with pytest.raises(UsageError) as caught:
    imdb_jax.fit(config)
  assert str(caught.value) == f"{flag.format(small.run_dir)}."
  assert not config.run_dir.exists()


def test_the_preset_that_needs_another_run_says_so_before_the_reviews_are_read(tmp_path):
  config = dataclasses.replace(tiny(tmp_path / "run"), preset="pretrained")
  config = change(config, "data", source=str(tmp_path / "missing.csv"))
  with pytest.raises(UsageError, match="--preset pretrained: requires --init-from RUN, a language model"):
    imdb_jax.fit(config)
  assert not (tmp_path / "run").exists()


def test_a_folder_without_a_run_is_refused(tmp_path):
  with pytest.raises(UsageError, match="nothing: not a run directory"):
    imdb_jax.fit(change(tiny(tmp_path / "run"), "runtime", init_from=tmp_path / "nothing"))
  assert not (tmp_path / "run").exists()


def test_a_damaged_run_is_refused(small, tmp_path):
  source = change(small, "runtime", run_dir=Path(shutil.copytree(small.run_dir, tmp_path / "source")))
  shutil.rmtree(source.run_dir / "checkpoints")
  config = fewer(tmp_path / "run", source)
  with pytest.raises(CheckpointError, match="source: there are no checkpoints"):
    imdb_jax.fit(config)
  (source.run_dir / "vocab.json").write_text("{}")
  with pytest.raises(UsageError, match=r"source/vocab\.json: not the vocabulary"):
    imdb_jax.fit(config)


@pytest.mark.parametrize("step", [0, 1, 3])
def test_once_it_has_started_a_run_does_not_depend_on_the_other_one(step, small, tmp_path):
  undisturbed = fewer(tmp_path / "undisturbed", small)
  imdb_jax.fit(undisturbed)
  source = change(small, "runtime", run_dir=Path(shutil.copytree(small.run_dir, tmp_path / "source")))
  config = fewer(tmp_path / "run", source)
  if step:
    with signal_before(Recorder, "record_steps", signal.SIGTERM, at_call=step):
      assert train_until_stopped(config).step == step
  else:
    started(config)
  shutil.rmtree(source.run_dir)
  imdb_jax.fit(config)
  assert_same_end(undisturbed, config)
  starts = json.loads((config.run_dir / "provenance.json").read_text())["starts"]
  assert ["init_from" in start for start in starts] == [True, False]
  imdb_jax.fit(fewer(config.run_dir, None))


def test_different_weights_have_different_digests(small, tmp_path):
  other = fewer(tmp_path / "other", None, seed=3)
  imdb_jax.fit(other)
  digests = []
  for name, source in {"a": small, "b": small, "c": other}.items():
    started(fewer(tmp_path / name, source))
    digests.append(files.read_json(tmp_path / name / "provenance.json")["starts"][0]["init_from"]["sha256"])
  assert digests[0] == digests[1] != digests[2]
