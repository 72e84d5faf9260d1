"""Settings survive their file, and a file of another form is refused in one line."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from homeless import make_homeless
from hypothesis import given, settings
from hypothesis import strategies as st

from imdb_jax import config, presets
from imdb_jax.config import (
  Config,
  DataConfig,
  ModelConfig,
  OptimizerConfig,
  RuntimeConfig,
  TrainingConfig,
  differing_fields,
)
from imdb_jax.errors import UsageError
from imdb_jax.presets import PRESETS

CHANGED = Config(
  preset="mine",
  data=DataConfig(source="sample", limit=7, validation="split", validation_fraction=0.25, strip_html=False),
  model=ModelConfig(hidden_size=3, dropout_masks="per_gate", mask_padding=True, pooling="max"),
  optimizer=OptimizerConfig(learning_rate=1, epsilon=1e-8),
  training=TrainingConfig(epochs=2, seed=5, num_seeds=3, matmul_precision="bfloat16"),
)
SECTIONS = ["data", "training", "model", "optimizer"]


@pytest.mark.parametrize("wanted", [*PRESETS.values(), CHANGED], ids=lambda wanted: wanted.preset)
def test_a_config_survives_its_json(wanted):
  restored = Config.from_dict(json.loads(json.dumps(wanted.to_dict())), wanted.runtime)
  assert restored == wanted


ANYTHING = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([10**400, "test", "mean", 0.5]),
  lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
  max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_object_gives_the_config_that_it_describes_or_one_clear_line(data):
  fields = CHANGED.to_dict()
  sections = [fields[name] for name in SECTIONS]
  for _ in range(data.draw(st.integers(0, 2))):
    where = data.draw(st.sampled_from([fields, *sections]))
    where[data.draw(st.sampled_from([*where, "a\nb"]))] = data.draw(ANYTHING)
  try:
    restored = Config.from_dict(fields)
  except UsageError as error:
    assert len(str(error).splitlines()) == 1
  else:
    # A section that lacks settings has their defaults, and paths are absolute.
    saved = restored.to_dict()
    for name in {*config.PATHS} & fields["data"].keys():
      fields["data"][name] = getattr(DataConfig(**{name: fields["data"][name]}), name)
    assert saved == fields | {name: saved[name] | fields[name] for name in SECTIONS}
    assert 0 < float(restored.optimizer.learning_rate) < math.inf


NUMPY = [np.int64(3), np.uint8(200), np.float32(0.5), np.float64(0.5), np.True_, np.str_("max"), np.array(3)]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_every_config_that_can_be_created_can_be_read_again(data):
  """Otherwise a run would refuse the folder that it has created itself."""
  name = data.draw(st.sampled_from(SECTIONS))
  section = getattr(CHANGED, name)
  field = data.draw(st.sampled_from([field.name for field in dataclasses.fields(section)]))
  try:
    changed = dataclasses.replace(section, **{field: data.draw(ANYTHING | st.sampled_from(NUMPY))})
    made = dataclasses.replace(CHANGED, **{name: changed})
  except UsageError:
    return
  assert Config.from_dict(json.loads(json.dumps(made.to_dict())), made.runtime) == made


def test_presets_have_their_names():
  assert {name: presets.preset(name).preset for name in PRESETS} == {name: name for name in PRESETS}


def test_the_article_is_what_keras_ran():
  """Keras 2.3 with the recipe's settings; a change here is another experiment."""
  article = presets.preset("article")
  assert article.data == DataConfig(
    source="imdb",
    limit=None,
    validation="test",
    validation_fraction=0.1,
    vocabulary_size=4000,
    sequence_length=400,
    strip_html=True,
  )
  assert article.model == ModelConfig(
    embedding_size=128,
    cell="lstm",
    hidden_size=128,
    input_dropout_rate=0.2,
    recurrent_dropout_rate=0.2,
    dropout_masks="shared",
    gate_activation="sigmoid",
    mask_padding=False,
    directions=1,
    pooling="last",
    embedding="random",
    unlabelled=False,
  )
  assert article.optimizer == OptimizerConfig(
    learning_rate=1e-3,
    embedding_rate=1.0,
    recurrent_rate=1.0,
    schedule="constant",
    b1=0.9,
    b2=0.999,
    epsilon=1e-7,
  )
  assert article.training == TrainingConfig(
    epochs=10, batch_size=32, seed=0, num_seeds=1, bucket_by_length=False, matmul_precision="auto"
  )


def test_a_setting_that_is_gone_is_ignored_in_an_old_run():
  saved = CHANGED.to_dict()
  saved["optimizer"] |= {"non_finite": "skip"}
  assert Config.from_dict(saved) == dataclasses.replace(CHANGED, runtime=RuntimeConfig())


def test_where_and_how_to_compute_is_not_saved():
  assert set(CHANGED.to_dict()) == {"format", "preset", *SECTIONS}
  runtime = RuntimeConfig(num_devices=2)
  assert Config.from_dict(CHANGED.to_dict(), runtime).runtime == runtime


@pytest.mark.parametrize("name", ["data.limit", "model.pooling", "optimizer.b1", "training.seed", "model"])
def test_a_missing_setting_has_its_default(name):
  """A run that was created before the setting existed keeps loading."""
  fields = CHANGED.to_dict()
  *section, key = name.split(".")
  del (fields[section[0]] if section else fields)[key]
  restored = Config.from_dict(fields)
  expected = Config()
  if section:
    default = getattr(getattr(expected, section[0]), key)
    assert restored == dataclasses.replace(
      CHANGED, **{section[0]: dataclasses.replace(getattr(CHANGED, section[0]), **{key: default})}
    )
  else:
    assert restored == dataclasses.replace(CHANGED, **{key: getattr(expected, key)})


@pytest.mark.parametrize("number", [None, 1, 2, 4, "3", 3.5, [3]])
def test_another_format_is_refused_in_one_line(number):
  fields = CHANGED.to_dict()
  assert fields.pop("format") == 3
  with pytest.raises(UsageError, match=r"^config\.format: must be 3, not .* \(another version's run\)\.$"):
    Config.from_dict(fields if number is None else fields | {"format": number})


def test_a_run_of_version_0_1_is_refused_in_one_line():
  """Its sections and settings have other names."""
  sections = CHANGED.settings()
  old = {"preset": "article", "dataset": {"data": "imdb"}, **{name: sections[name] for name in SECTIONS[1:]}}
  with pytest.raises(UsageError) as caught:
    Config.from_dict(old)
  assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("section", SECTIONS)
def test_an_unknown_key_is_named(section):
  fields = CHANGED.to_dict()
  fields[section]["colour"] = 1
  with pytest.raises(UsageError, match=rf"^{section}\.colour: unknown\.$"):
    Config.from_dict(fields)
  with pytest.raises(UsageError, match=r"^config\.runtime: unknown\.$"):
    Config.from_dict(CHANGED.to_dict() | {"runtime": {}})


def test_a_long_unknown_key_is_shortened_to_one_line():
  with pytest.raises(UsageError) as caught:
    Config.from_dict(CHANGED.to_dict() | {"a\n" * 10_000: 1})
  assert len(str(caught.value)) < 200
  assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("value", [None, [], "article", 3])
def test_a_value_that_is_no_object_is_refused(value):
  with pytest.raises(UsageError, match="config: must be a JSON object"):
    Config.from_dict(value)
  with pytest.raises(UsageError, match="model: must be a JSON object"):
    Config.from_dict(CHANGED.to_dict() | {"model": value})
  if value != "article":
    with pytest.raises(UsageError, match="preset"):
      Config.from_dict(CHANGED.to_dict() | {"preset": value})


def test_ranges_are_checked_in_a_file_too():
  fields = CHANGED.to_dict()
  fields["training"]["epochs"] = 0
  with pytest.raises(UsageError, match="--epochs 0"):
    Config.from_dict(fields)


@pytest.mark.parametrize(("name", "nearest"), [("artcle", "article"), ("samples", "sample")])
def test_an_unknown_preset_suggests_the_nearest(name, nearest):
  with pytest.raises(UsageError, match=rf"--preset {name}: .*Did you mean {nearest}\?"):
    presets.preset(name)


def test_an_unknown_preset_far_from_all_lists_them():
  with pytest.raises(UsageError, match="article") as caught:
    presets.preset("zzz")
  assert "Did you mean" not in str(caught.value)
  assert all(name in str(caught.value) for name in PRESETS)


def test_differences_are_named_with_both_values():
  other = dataclasses.replace(
    CHANGED,
    model=dataclasses.replace(CHANGED.model, hidden_size=4),
    data=dataclasses.replace(CHANGED.data, limit=None),
  )
  differences = differing_fields(CHANGED, other)
  assert sorted(differences) == ["data.limit: 7 -> None", "model.hidden_size: 3 -> 4"]


def test_preset_name_and_runtime_are_no_differences():
  other = dataclasses.replace(CHANGED, preset="other", runtime=RuntimeConfig(num_devices=3, log_every=1))
  assert differing_fields(CHANGED, other) == []


OTHER_VALUES = {
  "data": {
    "source": "sample",
    "test_data": "/tests.csv",
    "unlabelled_data": "/more.csv",
    "text_column": "review",
    "label_column": "stars",
    "group_column": "film",
    "limit": 5,
    "validation": "split",
    "validation_fraction": 0.5,
    "vocabulary_size": 5,
    "sequence_length": 5,
    "strip_html": False,
    "punctuation": True,
  },
  "model": {
    "embedding_size": 5,
    "cell": "gru",
    "hidden_size": 5,
    "input_dropout_rate": 0.5,
    "recurrent_dropout_rate": 0.5,
    "dropout_masks": "per_gate",
    "gate_activation": "hard_sigmoid",
    "mask_padding": True,
    "directions": 2,
    "pooling": "max",
    "embedding": "svd",
    "unlabelled": False,
    "ngrams": 2,
  },
  "optimizer": {
    "learning_rate": 0.5,
    "embedding_rate": 0.5,
    "recurrent_rate": 0.5,
    "b1": 0.5,
    "b2": 0.5,
    "epsilon": 0.5,
    "schedule": "one_cycle",
    "clip_norm": 0.5,
    "weight_decay": 0.5,
  },
  "training": {
    "objective": "next_word",
    "epochs": 5,
    "early_stopping": 5,
    "batch_size": 5,
    "seed": 5,
    "num_seeds": 5,
    "class_weights": "balanced",
    "bucket_by_length": True,
    "matmul_precision": "bfloat16",
  },
}


@pytest.mark.parametrize("settings", [{"cell": "bag", "pooling": "mean"}, {"ngrams": 2}])
def test_a_language_model_is_recurrent_and_has_no_linear_part(settings):
  with pytest.raises(UsageError, match=r"^--objective next_word: requires a recurrent --cell and --ngrams 0\.$"):
    Config(training=TrainingConfig(objective="next_word"), model=ModelConfig(**settings))


def test_an_empty_path_is_not_this_folder():
  for name, flag in (("source", "--data"), ("test_data", "--test-data"), ("unlabelled_data", "--unlabelled-data")):
    with pytest.raises(UsageError, match=f"^{flag}: must not be empty"):
      DataConfig(**{name: ""})


def test_every_setting_counts_as_a_difference():
  """A new setting belongs into the table above."""
  # `unlabelled_data` requires `unlabelled`, which requires word vectors that are computed.
  base = Config(model=ModelConfig(embedding="skipgram", unlabelled=True))
  saved = base.settings()
  assert {section: set(values) for section, values in OTHER_VALUES.items()} == {
    section: set(values) for section, values in saved.items()
  }
  for section, values in OTHER_VALUES.items():
    for name, value in values.items():
      other = Config.from_dict(base.to_dict() | {section: saved[section] | {name: value}})
      assert differing_fields(base, other) == [f"{section}.{name}: {saved[section][name]} -> {value}"]


@pytest.mark.parametrize("cell", ["gru", "rnn", "bag"])
@pytest.mark.parametrize("setting", ["--gate-activation hard_sigmoid", "--dropout-masks per_gate"])
def test_settings_of_the_lstm_are_refused_with_another_cell(cell, setting):
  name, value = setting.removeprefix("--").replace("-", "_").split()
  with pytest.raises(UsageError, match=rf"^{setting}: requires --cell lstm, not {cell}\.$"):
    ModelConfig(cell=cell, pooling="max", **{name: value})


@pytest.mark.parametrize("settings", [{"pooling": "last"}, {"pooling": "mean", "directions": 2}])
def test_a_bag_of_words_has_no_last_state_and_no_direction(settings):
  with pytest.raises(UsageError, match=r"^--cell bag: requires --directions 1 and --pooling mean, max or mean_max\.$"):
    ModelConfig(cell="bag", **settings)


def test_the_run_directory_is_that_of_the_preset_unless_named():
  assert Config(preset="Mine_2-b").run_dir == Path("runs/Mine_2-b")
  assert CHANGED.run_dir == Path("runs/mine")
  for run_dir in ("there", Path("there")):
    assert dataclasses.replace(CHANGED, runtime=RuntimeConfig(run_dir=run_dir)).run_dir == Path("there")


@pytest.mark.parametrize("name", ["../../x", "a/b", "..", ".", "", "a b", "a\n", "é"])
def test_a_preset_is_a_plain_name(name):
  """It names the default run directory."""
  fields = CHANGED.to_dict() | {"preset": name}
  for make in (lambda: Config(preset=name), lambda: Config.from_dict(fields)):
    with pytest.raises(UsageError, match=rf"^--preset {re.escape(repr(name))}: must be a plain name"):
      make()


def test_an_archive_is_only_for_the_real_reviews():
  with pytest.raises(UsageError, match=r"^--archive x: requires --data imdb, not sample\.$"):
    dataclasses.replace(CHANGED, runtime=RuntimeConfig(archive="x"))


def test_the_cache_folder_follows_the_environment(monkeypatch):
  monkeypatch.setenv("IMDB_JAX_CACHE", "/a")
  monkeypatch.setenv("XDG_CACHE_HOME", "/b")
  assert RuntimeConfig().cache_dir == Path("/a")
  monkeypatch.delenv("IMDB_JAX_CACHE")
  assert RuntimeConfig().cache_dir == Path("/b/imdb_jax")
  monkeypatch.delenv("XDG_CACHE_HOME")
  assert RuntimeConfig().cache_dir == Path.home() / ".cache/imdb_jax"
  monkeypatch.setenv("IMDB_JAX_CACHE", "~/c")
  assert RuntimeConfig().cache_dir == Path.home() / "c"


def test_a_user_without_a_home_has_the_cache_folder_beside_the_runs(monkeypatch):
  make_homeless(monkeypatch)
  assert RuntimeConfig().cache_dir == Path("imdb_jax-cache")
