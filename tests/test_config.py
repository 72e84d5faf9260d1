"""Settings survive their file, and what is wrong is named: the field, its value, what is allowed."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imdb_jax import cli, config
from imdb_jax.config import (
  PRESETS,
  Config,
  DataConfig,
  ModelConfig,
  OptimizerConfig,
  RuntimeConfig,
  TrainingConfig,
  differing_fields,
)
from imdb_jax.errors import UsageError

CHANGED = Config(
  preset="mine",
  dataset=DataConfig(data="sample", limit=7, validation="split", validation_fraction=0.25, strip_html=False),
  model=ModelConfig(hidden_size=3, dropout_masks="per_gate", mask_padding=True, pooling="max"),
  optimizer=OptimizerConfig(learning_rate=1, epsilon=1e-8),
  training=TrainingConfig(epochs=2, seed=5, num_seeds=3, matmul_precision="bfloat16"),
)


@pytest.mark.parametrize("wanted", [*PRESETS.values(), CHANGED], ids=lambda wanted: wanted.preset)
def test_round_trip_through_json(wanted):
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
  sections = [fields[name] for name in ("dataset", "model", "optimizer", "training")]
  for _ in range(data.draw(st.integers(0, 2))):
    where = data.draw(st.sampled_from([fields, *sections]))
    where[data.draw(st.sampled_from([*where, "a\nb"]))] = data.draw(ANYTHING)
  try:
    assert Config.from_dict(fields).to_dict() == fields
  except UsageError as error:
    assert len(str(error).splitlines()) == 1
  else:
    rate = Config.from_dict(fields).optimizer.learning_rate
    assert 0 < float(rate) < math.inf


NUMPY = [np.int64(3), np.uint8(200), np.float32(0.5), np.float64(0.5), np.True_, np.str_("max"), np.array(3)]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_what_can_be_made_can_be_read_again(data):
  """Else a run would refuse the folder that it has laid itself."""
  name = data.draw(st.sampled_from(["dataset", "model", "optimizer", "training"]))
  section = getattr(CHANGED, name)
  field = data.draw(st.sampled_from([field.name for field in dataclasses.fields(section)]))
  try:
    made = dataclasses.replace(section, **{field: data.draw(ANYTHING | st.sampled_from(NUMPY))})
  except UsageError:
    return
  made = dataclasses.replace(CHANGED, **{name: made})
  assert Config.from_dict(json.loads(json.dumps(made.to_dict())), made.runtime) == made


def test_presets_bear_their_names():
  assert {name: config.preset(name).preset for name in PRESETS} == {name: name for name in PRESETS}


def test_article_is_what_ran():
  """As the recipe tells: Keras 2.3, defaults; a change here is another experiment."""
  article = config.preset("article")
  assert article.dataset == DataConfig(
    data="imdb",
    limit=None,
    validation="test",
    validation_fraction=0.1,
    vocabulary_size=4000,
    sequence_length=400,
    strip_html=True,
  )
  assert article.model == ModelConfig(
    embedding_size=128,
    hidden_size=128,
    input_dropout_rate=0.2,
    recurrent_dropout_rate=0.2,
    dropout_masks="shared",
    gate_activation="sigmoid",
    mask_padding=False,
    pooling="last",
  )
  assert article.optimizer == OptimizerConfig(learning_rate=1e-3, b1=0.9, b2=0.999, epsilon=1e-7)
  assert (article.training.epochs, article.training.batch_size) == (10, 32)


def test_where_and_how_is_not_saved():
  assert set(CHANGED.to_dict()) == {"preset", "dataset", "model", "optimizer", "training"}
  runtime = RuntimeConfig(num_devices=2)
  assert Config.from_dict(CHANGED.to_dict(), runtime).runtime == runtime


@pytest.mark.parametrize("name", ["dataset.limit", "model.pooling", "optimizer.b1", "training.seed", "preset", "model"])
def test_missing_key_is_named(name):
  fields = CHANGED.to_dict()
  *section, key = name.split(".")
  del (fields[section[0]] if section else fields)[key]
  with pytest.raises(UsageError, match=rf"{name}: missing"):
    Config.from_dict(fields)


@pytest.mark.parametrize("section", ["dataset", "model", "optimizer", "training"])
def test_unknown_key_is_named(section):
  fields = CHANGED.to_dict()
  fields[section]["colour"] = 1
  with pytest.raises(UsageError, match=rf"{section}\.colour: unknown"):
    Config.from_dict(fields)
  with pytest.raises(UsageError, match=r"config\.runtime: unknown"):
    Config.from_dict(CHANGED.to_dict() | {"runtime": {}})


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("dataset.limit", "7"),
    ("dataset.limit", 7.0),
    ("dataset.limit", True),
    ("dataset.data", "mnist"),
    ("dataset.data", None),
    ("dataset.strip_html", 1),
    ("dataset.strip_html", "true"),
    ("dataset.vocabulary_size", None),
    ("dataset.vocabulary_size", 4000.0),
    ("model.pooling", ["last"]),
    ("model.hidden_size", {}),
    ("model.input_dropout_rate", "0.2"),
    ("model.input_dropout_rate", False),
    ("optimizer.learning_rate", None),
    ("optimizer.learning_rate", 10**400),
    ("training.epochs", False),
  ],
)
def test_wrong_type_is_named_in_a_file_and_from_python(name, value):
  fields = CHANGED.to_dict()
  section, key = name.split(".")
  fields[section][key] = value
  named = re.escape(f"--{key.replace('_', '-')} {value!r:.80}: must be ")
  with pytest.raises(UsageError, match=f"^{named}") as in_file:
    Config.from_dict(fields)
  with pytest.raises(UsageError) as from_python:
    dataclasses.replace(getattr(CHANGED, section), **{key: value})
  assert str(in_file.value) == str(from_python.value)


@pytest.mark.parametrize(
  ("section", "name", "value", "allowed"),
  [
    (DataConfig, "validation", "dev", "one of test, split"),
    (ModelConfig, "pooling", "avg", "one of last, mean, max"),
    (ModelConfig, "dropout_masks", "share", "one of shared, per_gate"),
    (ModelConfig, "mask_padding", "no", "True or False"),
    (OptimizerConfig, "non_finite", "ignore", "one of stop, skip"),
    (OptimizerConfig, "b1", "0.9", "a number"),
    (TrainingConfig, "epochs", "3", "a whole number"),
    (TrainingConfig, "batch_size", True, "a whole number"),
    (TrainingConfig, "seed", np.float64(2), "a whole number"),
    (RuntimeConfig, "platform", "gpuu", "one of auto, cpu, gpu, tpu"),
    (RuntimeConfig, "implementation", "abacus", "one of auto, mosaic_gpu, cudnn, chunked, scan"),
    (RuntimeConfig, "num_devices", 2.0, "a whole number or None"),
    (RuntimeConfig, "run_dir", "here", "Path or None"),
    (RuntimeConfig, "coordinator_address", 1234, "a text or None"),
    (Config, "model", None, "ModelConfig"),
  ],
)
def test_what_is_allowed_is_told(section, name, value, allowed):
  with pytest.raises(UsageError, match=rf"^--{name.replace('_', '-')} .*: must be {allowed}\.$"):
    section(**{name: value})


def test_numbers_of_numpy_become_those_of_python():
  training = TrainingConfig(seed=np.int64(3), epochs=np.uint8(2))
  optimizer = OptimizerConfig(learning_rate=np.float32(0.5), b1=np.float64(0.5), b2=np.int32(0))
  values = [training.seed, training.epochs, optimizer.learning_rate, optimizer.b1, optimizer.b2]
  assert [(type(value), value) for value in values] == [(int, 3), (int, 2), (float, 0.5), (float, 0.5), (int, 0)]


@pytest.mark.parametrize("value", [None, [], "article", 3])
def test_no_object_is_refused(value):
  with pytest.raises(UsageError, match="config: must be a JSON object"):
    Config.from_dict(value)
  with pytest.raises(UsageError, match="model: must be a JSON object"):
    Config.from_dict(CHANGED.to_dict() | {"model": value})
  if value != "article":
    with pytest.raises(UsageError, match="preset"):
      Config.from_dict(CHANGED.to_dict() | {"preset": value})


@pytest.mark.parametrize(
  ("section", "name", "lowest", "highest"),
  [
    (DataConfig, "limit", 1, 1_000_000),
    (DataConfig, "vocabulary_size", 2, 1_000_000),
    (DataConfig, "sequence_length", 1, 10_000),
    (ModelConfig, "embedding_size", 1, 65_536),
    (ModelConfig, "hidden_size", 1, 65_536),
    (TrainingConfig, "epochs", 1, 100_000),
    (TrainingConfig, "batch_size", 1, 65_536),
    (TrainingConfig, "seed", 0, 2**31 - 1),
    (TrainingConfig, "num_seeds", 1, 1024),
    (RuntimeConfig, "num_devices", 1, 65_536),
    (RuntimeConfig, "evaluation_batch_size", 1, 65_536),
    (RuntimeConfig, "log_every", 1, 1_000_000),
  ],
)
def test_range_of_whole_numbers_is_told(section, name, lowest, highest):
  flag = name.replace("_", "-")
  for value in (lowest, highest):
    assert getattr(section(**{name: value}), name) == value
  for value in (lowest - 1, highest + 1):
    with pytest.raises(UsageError, match=rf"^--{flag} {value}: must be .*{lowest:,} to {highest:,}"):
      section(**{name: value})


@pytest.mark.parametrize(
  ("section", "name", "good", "bad", "allowed"),
  [
    (DataConfig, "validation_fraction", (1e-6, 0.999), (0, 1, -0.1, math.nan), "between 0 and 1"),
    (ModelConfig, "input_dropout_rate", (0, 0.999), (-0.1, 1, math.nan), "at least 0 and below 1"),
    (ModelConfig, "recurrent_dropout_rate", (0, 0.999), (-0.1, 1, math.nan), "at least 0 and below 1"),
    (OptimizerConfig, "learning_rate", (1e-9, 10), (0, -1, math.inf, math.nan), "a positive number"),
    (OptimizerConfig, "b1", (0, 0.9), (1, -0.1, math.nan), "at least 0 and below 1"),
    (OptimizerConfig, "b2", (0, 0.9), (1, -0.1, math.nan), "at least 0 and below 1"),
    (OptimizerConfig, "epsilon", (1e-12, 1), (0, -1, math.inf, math.nan), "a positive number"),
  ],
)
def test_range_of_other_numbers_is_told(section, name, good, bad, allowed):
  for value in good:
    assert getattr(section(**{name: value}), name) == value
  for value in bad:
    with pytest.raises(UsageError, match=rf"^--{name.replace('_', '-')} {value}: must be {allowed}"):
      section(**{name: value})


def test_range_is_checked_in_a_file_too():
  fields = CHANGED.to_dict()
  fields["training"]["epochs"] = 0
  with pytest.raises(UsageError, match="--epochs 0"):
    Config.from_dict(fields)


def test_the_last_seed_is_in_range_too():
  assert list(TrainingConfig(seed=2**31 - 2, num_seeds=2).seeds) == [2**31 - 2, 2**31 - 1]
  with pytest.raises(UsageError, match=r"^--num-seeds 3: must be at most 2,"):
    TrainingConfig(seed=2**31 - 2, num_seeds=3)


def test_joining_by_hand_needs_all_three():
  together = {"coordinator_address": "127.0.0.1:1234", "num_processes": 2, "process_id": 1}
  RuntimeConfig(**together)
  for name in together:
    with pytest.raises(UsageError, match="give all three"):
      RuntimeConfig(**(together | {name: None}))
  for process_id in (-1, 2):
    with pytest.raises(UsageError, match=f"--process-id {process_id}"):
      RuntimeConfig(**(together | {"process_id": process_id}))


@pytest.mark.parametrize(("name", "nearest"), [("artcle", "article"), ("samples", "sample")])
def test_unknown_preset_suggests_the_nearest(name, nearest):
  with pytest.raises(UsageError, match=rf"--preset {name}: .*Did you mean {nearest}\?"):
    config.preset(name)


def test_unknown_preset_far_from_all_lists_them():
  with pytest.raises(UsageError, match="article") as caught:
    config.preset("zzz")
  assert "Did you mean" not in str(caught.value)
  assert all(name in str(caught.value) for name in PRESETS)


def test_differences_are_named_with_both_values():
  other = dataclasses.replace(
    CHANGED,
    model=dataclasses.replace(CHANGED.model, hidden_size=4),
    dataset=dataclasses.replace(CHANGED.dataset, limit=None),
  )
  differences = differing_fields(CHANGED, other)
  assert sorted(differences) == ["dataset.limit: 7 -> None", "model.hidden_size: 3 -> 4"]


def test_preset_name_and_runtime_are_no_differences():
  other = dataclasses.replace(CHANGED, preset="other", runtime=RuntimeConfig(num_devices=3, log_every=1))
  assert differing_fields(CHANGED, other) == []


OTHER_VALUES = {
  "dataset": {
    "data": "sample",
    "limit": 5,
    "validation": "split",
    "validation_fraction": 0.5,
    "vocabulary_size": 5,
    "sequence_length": 5,
    "strip_html": False,
  },
  "model": {
    "embedding_size": 5,
    "hidden_size": 5,
    "input_dropout_rate": 0.5,
    "recurrent_dropout_rate": 0.5,
    "dropout_masks": "per_gate",
    "gate_activation": "hard_sigmoid",
    "mask_padding": True,
    "pooling": "max",
  },
  "optimizer": {
    "learning_rate": 0.5,
    "b1": 0.5,
    "b2": 0.5,
    "epsilon": 0.5,
    "schedule": "one_cycle",
    "non_finite": "skip",
  },
  "training": {
    "epochs": 5,
    "batch_size": 5,
    "seed": 5,
    "num_seeds": 5,
    "bucket_by_length": True,
    "matmul_precision": "bfloat16",
  },
}


def test_every_setting_counts_as_a_difference():
  """A new setting belongs into the table above."""
  saved = Config().to_dict()
  assert {section: set(values) for section, values in OTHER_VALUES.items()} == {
    section: set(values) for section, values in saved.items() if section != "preset"
  }
  for section, values in OTHER_VALUES.items():
    for name, value in values.items():
      other = Config.from_dict(saved | {section: saved[section] | {name: value}})
      assert differing_fields(Config(), other) == [f"{section}.{name}: {saved[section][name]} -> {value}"]


def test_runs_are_kept_by_preset_unless_told():
  assert Config(preset="Mine_2-b").run_dir == Path("runs/Mine_2-b")
  assert CHANGED.run_dir == Path("runs/mine")
  assert dataclasses.replace(CHANGED, runtime=RuntimeConfig(run_dir=Path("there"))).run_dir == Path("there")


@pytest.mark.parametrize("name", ["../../x", "a/b", "..", ".", "", "a b", "a\n", "é"])
def test_a_preset_is_a_plain_name(name):
  """Runs are kept in the folder of that name."""
  fields = CHANGED.to_dict() | {"preset": name}
  for make in (lambda: Config(preset=name), lambda: Config.from_dict(fields)):
    with pytest.raises(UsageError, match=rf"^--preset {re.escape(repr(name))}: must be a plain name"):
      make()


def test_cache_dir_follows_the_environment(monkeypatch):
  monkeypatch.setenv("IMDB_JAX_CACHE", "/a")
  monkeypatch.setenv("XDG_CACHE_HOME", "/b")
  assert RuntimeConfig().cache_dir == Path("/a")
  monkeypatch.delenv("IMDB_JAX_CACHE")
  assert RuntimeConfig().cache_dir == Path("/b/imdb_jax")
  monkeypatch.delenv("XDG_CACHE_HOME")
  assert RuntimeConfig().cache_dir == Path.home() / ".cache/imdb_jax"
  monkeypatch.setenv("IMDB_JAX_CACHE", "~/c")
  assert RuntimeConfig().cache_dir == Path.home() / "c"


@pytest.mark.parametrize("settings", [RuntimeConfig, cli._Evaluate, cli._Predict, cli._Plot, cli._Prepare])
def test_every_path_may_begin_at_home(settings, monkeypatch):
  monkeypatch.setenv("HOME", "/home/me")
  names = [field.name for field in dataclasses.fields(settings) if "pathlib.Path" in str(field.type)]
  made = settings(**{name: Path("~", name) for name in names})
  assert names
  assert {name: getattr(made, name) for name in names} == {name: Path("/home/me", name) for name in names}


def test_a_folder_whose_name_only_looks_like_a_home_is_itself():
  assert RuntimeConfig(run_dir=Path("~nobody-of-that-name/run")).run_dir == Path("~nobody-of-that-name/run")
