"""A wrong value is refused in one line that names the flag, the value and what is allowed."""

import dataclasses
import math
import os
import re
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from imdb_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, RuntimeConfig, TrainingConfig
from imdb_jax.errors import UsageError
from imdb_jax.validation import Settings, flag, options, setting

SECTIONS = {"data": DataConfig, "model": ModelConfig, "optimizer": OptimizerConfig, "training": TrainingConfig}


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("data.limit", "7"),
    ("data.limit", 7.0),
    ("data.limit", True),
    ("data.limit", 10**400),
    ("data.source", None),
    ("data.strip_html", 1),
    ("data.strip_html", "true"),
    ("data.vocabulary_size", None),
    ("data.vocabulary_size", 4000.0),
    ("model.pooling", ["last"]),
    ("model.hidden_size", {}),
    ("model.input_dropout_rate", "0.2"),
    ("model.input_dropout_rate", False),
    ("optimizer.learning_rate", None),
    ("optimizer.learning_rate", 10**400),
    ("training.epochs", False),
  ],
)
def test_a_wrong_type_is_named_in_a_file_and_from_python(name, value):
  section, key = name.split(".")
  fields = Config().to_dict()
  fields[section][key] = value
  named = re.escape(f"{flag(key)} {value!r:.80}: must be ")
  with pytest.raises(UsageError, match=f"^{named}") as in_file:
    Config.from_dict(fields)
  with pytest.raises(UsageError) as from_python:
    SECTIONS[section](**{key: value})
  assert str(in_file.value) == str(from_python.value)


@pytest.mark.parametrize(
  ("section", "name", "value", "allowed"),
  [
    (DataConfig, "validation", "dev", "one of test, split"),
    (ModelConfig, "cell", "GRU", "one of lstm, gru, rnn, bag"),
    (ModelConfig, "pooling", "avg", "one of last, mean, max, mean_max"),
    (ModelConfig, "dropout_masks", "share", "one of shared, per_gate"),
    (ModelConfig, "mask_padding", "no", "True or False"),
    (OptimizerConfig, "schedule", "ignore", "one of constant, one_cycle"),
    (OptimizerConfig, "b1", "0.9", "a number at least 0 and below 1"),
    (TrainingConfig, "epochs", "3", "a whole number from 1 to 100,000"),
    (TrainingConfig, "batch_size", True, "a whole number from 1 to 65,536"),
    (TrainingConfig, "seed", np.float64(2), "a whole number from 0 to 2,147,483,647"),
    (RuntimeConfig, "platform", "gpuu", "one of auto, cpu, gpu, tpu"),
    (RuntimeConfig, "implementation", "abacus", "one of auto, mosaic_gpu, chunked, scan"),
    (RuntimeConfig, "num_devices", 2.0, "a whole number from 1 to 1,024 or None"),
    (RuntimeConfig, "run_dir", 3, "a path .* or None"),
    (RuntimeConfig, "cache_dir", None, "a path .*"),
    (RuntimeConfig, "coordinator_address", 1234, "a text or None"),
    (RuntimeConfig, "deterministic", "yes", "True or False"),
    (Config, "model", None, "ModelConfig"),
  ],
)
def test_the_allowed_values_are_named(section, name, value, allowed):
  with pytest.raises(UsageError, match=rf"^--{name.replace('_', '-')} .*: must be {allowed}\.$"):
    section(**{name: value})


def test_a_long_value_is_shortened():
  with pytest.raises(UsageError) as caught:
    DataConfig(validation="x" * 10_000)  # pyright: ignore[reportArgumentType]
  assert len(str(caught.value)) < 200


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
    (RuntimeConfig, "num_devices", 1, 1024),
    (RuntimeConfig, "evaluation_batch_size", 1, 65_536),
    (RuntimeConfig, "steps_per_dispatch", 1, 10_000),
    (RuntimeConfig, "save_every_steps", 1, 10**9),
    (RuntimeConfig, "log_every", 1, 1_000_000),
  ],
)
def test_the_range_of_a_whole_number_is_checked_and_named(section, name, lowest, highest):
  for value in (lowest, highest):
    assert getattr(section(**{name: value}), name) == value
  for value in (lowest - 1, highest + 1):
    with pytest.raises(UsageError, match=rf"^{flag(name)} {value}: must be .*from {lowest:,} to {highest:,}"):
      section(**{name: value})


@pytest.mark.parametrize(
  ("section", "name", "good", "bad", "allowed"),
  [
    (DataConfig, "validation_fraction", (1e-6, 0.999), (0, 1, -0.1, math.nan), "above 0 and below 1"),
    (ModelConfig, "input_dropout_rate", (0, 0.999), (-0.1, 1, math.nan), "at least 0 and below 1"),
    (ModelConfig, "recurrent_dropout_rate", (0, 0.999), (-0.1, 1, math.nan), "at least 0 and below 1"),
    (OptimizerConfig, "learning_rate", (1e-9, 1e38), (0, -1, 1e39, math.inf, math.nan), "above 0"),
    (OptimizerConfig, "b1", (0, 0.9), (1, -0.1, math.nan), "at least 0 and below 1"),
    (OptimizerConfig, "b2", (0, 0.9), (1, -0.1, math.nan), "at least 0 and below 1"),
    (OptimizerConfig, "epsilon", (1e-12, 1e38), (0, -1, 1e39, math.inf, math.nan), "above 0"),
    (RuntimeConfig, "save_every_seconds", (0.1, 1e9), (0, -1, math.inf, math.nan), "above 0"),
  ],
)
def test_the_range_of_another_number_is_checked_and_named(section, name, good, bad, allowed):
  for value in good:
    assert getattr(section(**{name: value}), name) == value
  for value in bad:
    with pytest.raises(UsageError, match=rf"^{flag(name)} {re.escape(str(float(value)))}: must be a number {allowed}"):
      section(**{name: value})


def test_the_last_seed_is_in_range_too():
  assert list(TrainingConfig(seed=2**31 - 2, num_seeds=2).seeds) == [2**31 - 2, 2**31 - 1]
  with pytest.raises(UsageError, match=r"^--num-seeds 3: must be at most 2:"):
    TrainingConfig(seed=2**31 - 2, num_seeds=3)


def test_a_history_fits_into_the_memory():
  assert TrainingConfig(epochs=100_000, num_seeds=10).num_seeds == 10
  with pytest.raises(UsageError, match=r"^--num-seeds 11: must be at most 10 with --epochs 100000\.$"):
    TrainingConfig(epochs=100_000, num_seeds=11)


@pytest.mark.parametrize("name", ["run_dir", "cache_dir", "archive"])
def test_a_path_that_some_library_does_not_understand_is_refused(name):
  for path in ("plain", "dé jà/vu ☃", "a" * 3_000):
    assert getattr(RuntimeConfig(**{name: path}), name) == Path(path)
  # Bytes that are not UTF-8 reach Python as surrogates.
  for path in (os.fsdecode(b"b\xff"), Path("\ud800"), "a\0b", "é" * 1_501):
    with pytest.raises(
      UsageError, match=rf"^{flag(name)} .*: must be a path of at most 3,000 bytes in UTF-8"
    ) as caught:
      RuntimeConfig(**{name: path})
    assert len(str(caught.value).splitlines()) == 1


def test_joining_by_hand_requires_all_three_flags():
  together = {"coordinator_address": "127.0.0.1:1234", "num_processes": 2, "process_id": 1}
  RuntimeConfig(**together)
  for name in together:
    with pytest.raises(UsageError, match="give all three"):
      RuntimeConfig(**(together | {name: None}))
  for process_id in (-1, 2):
    with pytest.raises(UsageError, match=f"--process-id {process_id}"):
      RuntimeConfig(**(together | {"process_id": process_id}))
  for address in ("127.0.0.1", "127.0.0.1:", ":1234", "host:port", "host:65536"):
    with pytest.raises(UsageError, match=f"^--coordinator-address '{address}': must be HOST:PORT"):
      RuntimeConfig(**(together | {"coordinator_address": address}))


def test_numbers_of_numpy_become_those_of_python():
  training = TrainingConfig(seed=np.int64(3), epochs=np.uint8(2))
  optimizer = OptimizerConfig(learning_rate=np.float32(0.5), b1=np.float64(0.5), b2=np.int32(0))
  values = [training.seed, training.epochs, optimizer.learning_rate, optimizer.b1, optimizer.b2]
  assert [(type(value), value) for value in values] == [(int, 3), (int, 2), (float, 0.5), (float, 0.5), (float, 0.0)]


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("name", ["run_dir", "archive", "cache_dir"])
def test_a_path_may_be_a_string_and_may_begin_at_home(name, kind, monkeypatch):
  monkeypatch.setenv("HOME", "/home/me")
  for given, expected in {
    "~/x": "/home/me/x",
    "x/y": "x/y",
    "~nobody-of-that-name/x": "~nobody-of-that-name/x",
  }.items():
    value = getattr(RuntimeConfig(**{name: kind(given)}), name)
    assert isinstance(value, Path)
    assert value == Path(expected)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example(Settings):
  """Settings with each kind of field."""

  size: int = setting(3, "A size.", gt=1, le=5)
  rate: float | None = setting(None, "A rate.", le=1)
  name: Literal["a", "b"] = setting("a", "A name.")
  made: list = setting(list, "A new list for each.")


@pytest.mark.parametrize(
  ("name", "value", "allowed"),
  [
    ("size", 6, "a whole number above 1 and at most 5"),
    ("size", 1, "a whole number above 1 and at most 5"),
    ("rate", 1.5, "a number at most 1 or None"),
    ("name", "c", "one of a, b"),
    ("made", (), "list"),
  ],
)
def test_ranges_are_declared_beside_the_field(name, value, allowed):
  with pytest.raises(UsageError, match=rf"^--{name} .*: must be {allowed}\.$"):
    Example(**{name: value})


def test_defaults_may_be_made_anew_and_replacing_checks_again():
  assert Example().made is not Example().made
  assert dataclasses.replace(Example(), size=4, rate=1, name="b") == Example(size=4, rate=1.0, name="b")
  with pytest.raises(UsageError, match="--size 7"):
    dataclasses.replace(Example(), size=7)


def test_flags_and_options():
  assert (flag("source"), flag("run_dir"), flag("b1")) == ("--data", "--run-dir", "--b1")
  assert (options(int), options(int | None)) == ((int,), (int, type(None)))
