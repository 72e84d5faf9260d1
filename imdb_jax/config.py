"""Every setting of a run: frozen dataclasses, checked when they are made, and the named presets.

Everything but `Config.runtime` defines the result of a run, is saved beside it, and may not change when the run
is resumed. `Config.runtime` says only where and how the work is done.
"""

import dataclasses
import difflib
import math
import numbers
import os
import re
import sys
import types
import typing
from pathlib import Path
from typing import Any, Literal

import tyro

from imdb_jax.errors import UsageError


def _require(fulfilled: bool, config: Any, field: str, allowed: str) -> None:
  if not fulfilled:
    raise UsageError(f"--{field.replace('_', '-')} {getattr(config, field)!r:.80}: must be {allowed}.")


def _require_types(config: Any) -> None:
  for field, hint in typing.get_type_hints(type(config)).items():
    value = getattr(config, field)
    # Numbers of NumPy become Python's, the only ones that JSON knows.
    if isinstance(value, numbers.Real) and type(value) not in (bool, int, float):
      object.__setattr__(config, field, int(value) if isinstance(value, numbers.Integral) else float(value))
    _require(_has_type(getattr(config, field), hint), config, field, _described(hint))


def _has_type(value: Any, hint: Any) -> bool:
  if typing.get_origin(hint) is Literal:
    return isinstance(value, str) and value in typing.get_args(hint)
  if typing.get_origin(hint) is types.UnionType:
    return any(_has_type(value, option) for option in typing.get_args(hint))
  if hint is float:
    return type(value) is float or (type(value) is int and abs(value) <= sys.float_info.max)
  # True is an int to isinstance.
  return type(value) is int if hint is int else isinstance(value, hint)


def _described(hint: Any) -> str:
  if typing.get_origin(hint) is Literal:
    return f"one of {', '.join(typing.get_args(hint))}"
  if typing.get_origin(hint) is types.UnionType:
    return " or ".join(map(_described, typing.get_args(hint)))
  names = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", types.NoneType: "None"}
  return names.get(hint) or hint.__name__


def _require_whole(config: Any, field: str, low: int, high: int) -> None:
  _require(low <= getattr(config, field) <= high, config, field, f"a whole number from {low:,} to {high:,}")


def _require_rate(config: Any, field: str) -> None:
  _require(0 <= getattr(config, field) < 1, config, field, "at least 0 and below 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """Which reviews, and how they become token ids."""

  data: Literal["imdb", "sample"] = "imdb"
  """imdb: the 50,000 labelled reviews; sample: the small corpus inside the package."""
  limit: int | None = None
  """Use only the first N reviews of each split (in their fixed, shuffled order)."""
  validation: Literal["test", "split"] = "test"
  """What is evaluated after each epoch: the test reviews, as the article did, or a part held out of training."""
  validation_fraction: float = 0.1
  """The held-out share of the training reviews with --validation split; no film is on both sides."""
  vocabulary_size: int = 4000
  """Ids run below this; id 0 is padding, so one word fewer is kept."""
  sequence_length: int = 400
  """A review keeps its last N known words and is padded at the front."""
  strip_html: bool = True
  """Remove tags such as <br /> before splitting into words."""

  def __post_init__(self):
    _require_types(self)
    if self.limit is not None:
      _require_whole(self, "limit", 1, 1_000_000)
    _require(0 < self.validation_fraction < 1, self, "validation_fraction", "between 0 and 1")
    _require_whole(self, "vocabulary_size", 2, 1_000_000)
    _require_whole(self, "sequence_length", 1, 10_000)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """Embedding, LSTM, pooling, logit. The defaults are what really ran in the article."""

  embedding_size: int = 128
  """Width of a word's vector."""
  hidden_size: int = 128
  """Width of the LSTM's state."""
  input_dropout_rate: float = 0.2
  """Dropout of the LSTM's inputs; one mask a review, constant over time."""
  recurrent_dropout_rate: float = 0.2
  """Dropout of the LSTM's hidden state; one mask a review, constant over time."""
  dropout_masks: Literal["shared", "per_gate"] = "shared"
  """shared: the four gates see one mask (Keras 2.3); per_gate: each has its own (Keras 1 and 3)."""
  gate_activation: Literal["sigmoid", "hard_sigmoid"] = "sigmoid"
  """hard_sigmoid is Keras 1's clip(0.2 x + 0.5, 0, 1)."""
  mask_padding: bool = False
  """Skip padding. The article's model processes it like a word."""
  pooling: Literal["last", "mean", "max"] = "last"
  """How the hidden states become one vector: the last one, or their mean or maximum over the positions."""

  def __post_init__(self):
    _require_types(self)
    _require_whole(self, "embedding_size", 1, 65_536)
    _require_whole(self, "hidden_size", 1, 65_536)
    _require_rate(self, "input_dropout_rate")
    _require_rate(self, "recurrent_dropout_rate")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """Adam, with Keras's constants."""

  learning_rate: float = 1e-3
  """Step size, or its peak."""
  schedule: Literal["constant", "one_cycle"] = "constant"
  """one_cycle warms up over the first 30 % of all steps and then falls to nearly nothing (Smith 2018)."""
  b1: float = 0.9
  """Decay of the mean of the gradients."""
  b2: float = 0.999
  """Decay of the mean of their squares."""
  epsilon: float = 1e-7
  """Added to the root of the second moment before its bias is corrected, as Keras does."""
  non_finite: Literal["stop", "skip"] = "stop"
  """What happens where a loss or gradient is not finite: the run stops, or goes on without that step's update."""

  def __post_init__(self):
    _require_types(self)
    _require(0 < self.learning_rate < math.inf, self, "learning_rate", "a positive number")
    _require_rate(self, "b1")
    _require_rate(self, "b2")
    _require(0 < self.epsilon < math.inf, self, "epsilon", "a positive number")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
  """The course of training."""

  epochs: int = 10
  """Passes over the training reviews."""
  batch_size: int = 32
  """Reviews per step, over all devices together."""
  seed: int = 0
  """Initial parameters, order of the reviews and dropout all follow from it."""
  num_seeds: int = 1
  """Models to train at once, of this seed and the next ones, on batches of their own; the run is their ensemble."""
  bucket_by_length: bool = False
  """Form batches of reviews of similar length. With --mask-padding a batch costs its own length."""
  matmul_precision: Literal["float32", "tensorfloat32", "bfloat16"] = "float32"
  """Precision of matrix products where the device has a choice; a CPU always computes float32."""

  def __post_init__(self):
    _require_types(self)
    _require_whole(self, "epochs", 1, 100_000)
    _require_whole(self, "batch_size", 1, 65_536)
    _require_whole(self, "seed", 0, 2**31 - 1)
    _require_whole(self, "num_seeds", 1, 1024)
    most = 2**31 - self.seed
    _require(self.num_seeds <= most, self, "num_seeds", f"at most {most:,}, for the last seed is 2,147,483,647")

  @property
  def seeds(self) -> range:
    return range(self.seed, self.seed + self.num_seeds)


def expand_home(path: str | Path) -> Path:
  """The path with the home folder for ~, which a shell leaves alone in --cache-dir=~/x and IMDB_JAX_CACHE='~/x'."""
  # Path.expanduser would raise at a folder of the name ~x.
  return Path(os.path.expanduser(path))  # noqa: PTH111


def expand_paths(settings: Any) -> None:
  """`expand_home` of every path of a frozen dataclass, in place: for its `__post_init__`."""
  for field in dataclasses.fields(settings):
    value = getattr(settings, field.name)
    if isinstance(value, Path):
      object.__setattr__(settings, field.name, expand_home(value))


def default_cache_dir() -> Path:
  """$IMDB_JAX_CACHE, else imdb_jax in the user's cache folder."""
  base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
  return Path(os.environ.get("IMDB_JAX_CACHE") or base / "imdb_jax")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
  """Where and how the work is done. None of it changes what is computed, but for rounding."""

  platform: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
  """auto takes the best that JAX finds; a named platform that is absent is an error."""
  num_devices: int | None = None
  """Devices of each process to shard the batch over; by default all, and on a CPU one for each core."""
  implementation: Literal["auto", "mosaic_gpu", "cudnn", "chunked", "scan"] = "auto"
  """How the LSTM is computed; auto takes the fastest that serves model and device, and the run's header says which."""
  archive: Path | None = None
  """A local aclImdb archive (.tar.gz, .tar.xz) or its unpacked folder; otherwise the prepared store or a download."""
  cache_dir: Path = dataclasses.field(default_factory=default_cache_dir)
  """Prepared reviews and encoded arrays are kept here."""
  run_dir: Path | None = None
  """Where the run is kept; runs/PRESET by default. The same command again resumes it."""
  steps_per_dispatch: int = 8
  """Training steps that the devices make on their own; a signal is heeded after them."""
  evaluation_batch_size: int = 128
  """Reviews per evaluation step."""
  save_every_steps: int | None = None
  """Steps between checkpoints within an epoch; each epoch's end is saved in any case."""
  save_every_seconds: float | None = 300
  """Seconds between checkpoints within an epoch."""
  deterministic: bool = False
  """Have a GPU give the same bits on each run, at some cost in speed; a CPU does so anyway."""
  log_every: int = 50
  """Steps between two lines of metrics.jsonl, and of the console when it is not a terminal."""
  distributed: bool = False
  """Join the other processes of a cluster that JAX can detect (SLURM, Open MPI, TPU pods)."""
  coordinator_address: str | None = None
  """HOST:PORT of process 0, to join processes by hand."""
  num_processes: int | None = None
  """How many processes there are, to join them by hand."""
  process_id: int | None = None
  """Which of them this is, from 0."""

  def __post_init__(self):
    _require_types(self)
    expand_paths(self)
    if self.num_devices is not None:
      _require_whole(self, "num_devices", 1, 65_536)
    _require_whole(self, "steps_per_dispatch", 1, 10_000)
    _require_whole(self, "evaluation_batch_size", 1, 65_536)
    _require_whole(self, "log_every", 1, 1_000_000)
    if self.save_every_steps is not None:
      _require_whole(self, "save_every_steps", 1, 1_000_000_000)
    if self.save_every_seconds is not None:
      _require(0 < self.save_every_seconds < math.inf, self, "save_every_seconds", "a positive number")
    by_hand = (self.coordinator_address, self.num_processes, self.process_id)
    if any(value is not None for value in by_hand):
      if any(value is None for value in by_hand):
        raise UsageError("--coordinator-address, --num-processes and --process-id go together: give all three.")
      is_address = re.fullmatch(r".+:\d{1,5}", self.coordinator_address or "") is not None
      _require(is_address, self, "coordinator_address", "HOST:PORT")
      _require_whole(self, "num_processes", 1, 65_536)
      _require_whole(self, "process_id", 0, (self.num_processes or 1) - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """All settings of a run. Those of a preset are `PRESETS[name]`; the field `preset` is a label and sets nothing."""

  preset: str = "article"
  """Named settings to start from; other flags override them."""
  dataset: tyro.conf.OmitArgPrefixes[DataConfig] = dataclasses.field(default_factory=DataConfig)
  model: tyro.conf.OmitArgPrefixes[ModelConfig] = dataclasses.field(default_factory=ModelConfig)
  optimizer: tyro.conf.OmitArgPrefixes[OptimizerConfig] = dataclasses.field(default_factory=OptimizerConfig)
  training: tyro.conf.OmitArgPrefixes[TrainingConfig] = dataclasses.field(default_factory=TrainingConfig)
  runtime: tyro.conf.OmitArgPrefixes[RuntimeConfig] = dataclasses.field(default_factory=RuntimeConfig)

  def __post_init__(self):
    _require_types(self)
    # It becomes the name of a folder.
    is_plain = re.fullmatch("[A-Za-z0-9_-]+", self.preset) is not None
    _require(is_plain, self, "preset", "a plain name: letters, digits, _ and -")
    if self.runtime.archive is not None and self.dataset.data != "imdb":
      raise UsageError(f"--archive {self.runtime.archive}: only with --data imdb, not with {self.dataset.data}.")

  @property
  def run_dir(self) -> Path:
    return self.runtime.run_dir or Path("runs") / self.preset

  def to_dict(self) -> dict[str, Any]:
    """All that defines the result: everything but `runtime`, as JSON types."""
    fields = dataclasses.asdict(self)
    del fields["runtime"]
    return fields

  @classmethod
  def from_dict(cls, value: Any, runtime: RuntimeConfig | None = None) -> "Config":
    """The inverse of `to_dict`.

    Raises:
      UsageError: a key is missing, unknown or has a value of the wrong type or range.
    """
    sections = {"dataset": DataConfig, "model": ModelConfig, "optimizer": OptimizerConfig, "training": TrainingConfig}
    _require_keys(value, {"preset", *sections}, "config")
    for name, section in sections.items():
      _require_keys(value[name], {field.name for field in dataclasses.fields(section)}, name)
    return cls(
      preset=value["preset"],
      runtime=runtime or RuntimeConfig(),
      **{name: section(**value[name]) for name, section in sections.items()},
    )


def _require_keys(value: Any, names: set[str], where: str) -> None:
  if not isinstance(value, dict):
    raise UsageError(f"{where}: must be a JSON object.")
  for name in sorted(set(value) ^ names):
    # A name of somebody else's making may be long, or hold line breaks.
    raise UsageError(f"{where}.{repr(name)[1:-1]:.80}: {'unknown' if name in value else 'missing'}.")


def differing_fields(saved: Config, wanted: Config) -> list[str]:
  """The settings in which two configs differ, as `section.field: saved -> wanted`; `preset` and `runtime` apart."""
  ours, theirs = saved.to_dict(), wanted.to_dict()
  return [
    f"{section}.{name}: {ours[section][name]} -> {theirs[section][name]}"
    for section in ours
    if section != "preset"
    for name in ours[section]
    if ours[section][name] != theirs[section][name]
  ]


PRESETS: dict[str, Config] = {
  # The reference article, as it really ran under Keras 2.3. On 2 CPU cores: see README for time and accuracy.
  "article": Config(),
  # The quickest to the article's best accuracy with the same words: padding costs nothing, the best position of each
  # unit counts, the step size falls to nothing, and two small models answer together, in the time of one of the
  # article's size. Chosen on reviews held out of training: docs/performance.md.
  "fast": Config(
    preset="fast",
    model=ModelConfig(
      embedding_size=64,
      hidden_size=64,
      input_dropout_rate=0.3,
      recurrent_dropout_rate=0.3,
      mask_padding=True,
      pooling="max",
    ),
    optimizer=OptimizerConfig(learning_rate=6e-3, schedule="one_cycle"),
    training=TrainingConfig(epochs=2, num_seeds=2, bucket_by_length=True),
  ),
  # The corpus inside the package, learnt in seconds: for demonstrations and tests.
  "sample": Config(
    preset="sample",
    dataset=DataConfig(data="sample", vocabulary_size=1000, sequence_length=64),
    model=ModelConfig(embedding_size=64, hidden_size=64),
    optimizer=OptimizerConfig(learning_rate=3e-3),
    training=TrainingConfig(epochs=12),
  ),
}


def preset(name: str) -> Config:
  """The named settings.

  Raises:
    UsageError: there is no preset of that name.
  """
  if name not in PRESETS:
    nearest = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f" Did you mean {nearest[0]}?" if nearest else ""
    raise UsageError(f"--preset {name}: must be one of {', '.join(PRESETS)}.{hint}")
  return PRESETS[name]
