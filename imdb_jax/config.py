"""Settings of a run: frozen dataclasses, validated on construction, and the named presets.

`Config.runtime` says where and how a run is computed. All other settings define its result: they are saved in the run
directory and may not change when the run is resumed, except how long it trains (`--epochs`, `--early-stopping`).
"""

import dataclasses
import os
import re
from pathlib import Path
from typing import Any, Literal

import platformdirs

from imdb_jax.errors import UsageError
from imdb_jax.validation import Settings, flag, setting

# Version of the JSON form and of the run directory. Version 1, of imdb_jax 0.1, had no number.
FORMAT = 3
# Other sources of texts are paths. Texts given to `fit` from Python are "python".
NAMED_SOURCES = ("imdb", "sample", "python")
# Settings of `DataConfig` that hold paths.
PATHS = ("source", "test_data", "unlabelled_data")


def default_cache_dir() -> Path:
  """Return $IMDB_JAX_CACHE, imdb_jax in the user's cache folder, or imdb_jax-cache here if the user has no home."""
  try:
    folder = os.environ.get("IMDB_JAX_CACHE") or platformdirs.user_cache_path("imdb_jax", appauthor=False).expanduser()
  # In a container, a user may have neither a name nor $HOME.
  except RuntimeError:
    folder = "imdb_jax-cache"
  return Path(folder)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Settings):
  """Which reviews to use, and how to turn them into token ids."""

  source: str = setting(
    "imdb",
    "imdb (50,000 film reviews), sample (a small generated corpus), or your own: a CSV or JSONL file, or a folder.",
  )
  test_data: str | None = setting(None, "Test texts of your own; by default 20% of --data, by a hash of the text.")
  unlabelled_data: str | None = setting(None, "More texts of your own, for --unlabelled: a CSV or JSONL file.")
  text_column: str = setting("text", "Column of the texts.")
  label_column: str = setting("label", "Column of the labels.")
  group_column: str | None = setting(None, "Column whose equal values stay on one side of every split.")
  limit: int | None = setting(None, "Use only the first N reviews of each split.", ge=1, le=1_000_000)
  validation: Literal["test", "split"] = setting("test", "Evaluate on test reviews (as the article) or held-out ones.")
  validation_fraction: float = setting(0.1, "Share of training reviews to hold out, whole films.", gt=0, lt=1)
  vocabulary_size: int = setting(4000, "Number of token ids, including one for padding.", ge=2, le=1_000_000)
  sequence_length: int = setting(400, "Keep the last N known words of a review.", ge=1, le=10_000)
  strip_html: bool = setting(True, "Remove HTML tags such as <br />.")
  punctuation: bool = setting(False, "Read punctuation as words, except the apostrophe, instead of dropping it.")

  def __post_init__(self):
    super().__post_init__()
    # The run can be evaluated from another folder.
    for name in PATHS:
      path = getattr(self, name)
      if path == "":
        raise UsageError(f"--{name.replace('_', '-').replace('source', 'data')}: must not be empty.")
      if path is not None and (name != "source" or path not in NAMED_SOURCES):
        object.__setattr__(self, name, os.path.abspath(os.path.expanduser(path)))  # noqa: PTH100, PTH111


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Settings):
  """Embedding, recurrent layer, pooling and head. The defaults are those of the article."""

  embedding_size: int = setting(128, "Size of the word vectors.", ge=1, le=65_536)
  cell: Literal["lstm", "gru", "rnn", "bag"] = setting("lstm", "Recurrent cell (gru and rnn are slow); bag has none.")
  hidden_size: int = setting(128, "Number of recurrent units.", ge=1, le=65_536)
  input_dropout_rate: float = setting(0.2, "Dropout rate of the recurrent layer's inputs.", ge=0, lt=1)
  recurrent_dropout_rate: float = setting(0.2, "Dropout rate of the hidden state.", ge=0, lt=1)
  dropout_masks: Literal["shared", "per_gate"] = setting("shared", "One mask for all gates, or one each (slow).")
  gate_activation: Literal["sigmoid", "hard_sigmoid"] = setting("sigmoid", "hard_sigmoid is Keras 1's (slow).")
  mask_padding: bool = setting(False, "Skip padding, which the article's model processes like a word.")
  directions: int = setting(1, "Read the review forwards (1), or by a second layer backwards as well (2).", ge=1, le=2)
  pooling: Literal["last", "mean", "max", "mean_max"] = setting(
    "last", "Use the last hidden state, the mean, the maximum, or mean and maximum."
  )
  embedding: Literal["random", "svd", "skipgram", "file"] = setting(
    "random", "Start word vectors at random, by a decomposition (seconds) or skip-gram (minutes), or from a file."
  )
  unlabelled: bool = setting(False, "Compute word vectors from the unlabelled reviews of the archive as well.")
  ngrams: int = setting(
    0, "Average the logit with a linear model's, of the review's phrases of up to N words (0: do not).", ge=0, le=3
  )

  def __post_init__(self):
    super().__post_init__()
    for name, value in (("gate_activation", "hard_sigmoid"), ("dropout_masks", "per_gate")):
      if self.cell != "lstm" and getattr(self, name) == value:
        raise UsageError(f"{flag(name)} {value}: requires --cell lstm, not {self.cell}.")
    if self.cell == "bag" and (self.directions == 2 or self.pooling == "last"):
      raise UsageError("--cell bag: requires --directions 1 and --pooling mean, max or mean_max.")
    if self.unlabelled and self.embedding not in ("svd", "skipgram"):
      raise UsageError(f"--unlabelled: requires --embedding svd or skipgram, not {self.embedding}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Settings):
  """Adam, with Keras's constants."""

  learning_rate: float = setting(1e-3, "Learning rate, or its peak with --schedule one_cycle.", gt=0, le=1e38)
  embedding_rate: float = setting(1.0, "Learning rate of the word vectors, as a factor.", ge=0, le=1e6)
  recurrent_rate: float = setting(1.0, "Learning rate of the recurrent layers, as a factor.", ge=0, le=1e6)
  schedule: Literal["constant", "one_cycle"] = setting(
    "constant", "one_cycle warms up for 30% of the steps of all --epochs, then anneals."
  )
  b1: float = setting(0.9, "Decay rate of the first moment.", ge=0, lt=1)
  b2: float = setting(0.999, "Decay rate of the second moment.", ge=0, lt=1)
  epsilon: float = setting(1e-7, "Adam's epsilon, added before bias correction as in Keras.", gt=0, le=1e38)
  clip_norm: float | None = setting(None, "Scale gradients down to this norm, over all parameters.", gt=0, le=1e38)
  weight_decay: float = setting(0.0, "Decoupled weight decay, as in AdamW.", ge=0, le=1e6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig(Settings):
  """Epochs, batches and seeds."""

  objective: Literal["label", "next_word"] = setting(
    "label", "Learn the labels; or a language model that predicts the next word, for --init-from."
  )
  epochs: int = setting(10, "Number of passes over the training reviews.", ge=1, le=100_000)
  early_stopping: int | None = setting(None, "Stop after N epochs without a better validation accuracy.", ge=1)
  batch_size: int = setting(32, "Reviews per step, over all devices together.", ge=1, le=65_536)
  seed: int = setting(0, "Seed of the parameters, the order of the reviews and the dropout masks.", ge=0, le=2**31 - 1)
  num_seeds: int = setting(1, "Train an ensemble of N models at once, with consecutive seeds.", ge=1, le=1024)
  class_weights: str = setting(
    "none", "Weights of the losses: none, balanced (the rarer a class, the more), or NAME=WEIGHT,... (others 1)."
  )
  bucket_by_length: bool = setting(False, "Form batches of similar length; saves time with --mask-padding.")
  matmul_precision: Literal["auto", "float32", "tensorfloat32", "bfloat16"] = setting(
    "auto", "auto: float32, except in the kernel for Hopper GPUs (docs/gpu.md)."
  )

  def __post_init__(self):
    super().__post_init__()
    most = 2**31 - self.seed
    if self.num_seeds > most:
      raise UsageError(f"--num-seeds {self.num_seeds}: must be at most {most:,}: the last seed is 2,147,483,647.")
    # The history of a run is kept in memory: 300 MB at most.
    most = 1_000_000 // self.epochs
    if self.num_seeds > most:
      raise UsageError(f"--num-seeds {self.num_seeds}: must be at most {most:,} with --epochs {self.epochs}.")

  @property
  def seeds(self) -> range:
    """The seeds of the run."""
    return range(self.seed, self.seed + self.num_seeds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuntimeConfig(Settings):
  """Where and how to compute, and where the files are that a run starts from.

  Only the content of these files changes the result; the other settings change its rounding at most.
  """

  platform: Literal["auto", "cpu", "gpu", "tpu"] = setting("auto", "Where to compute; auto is the best found.")
  run_dir: Path | None = setting(None, "Run directory (default: runs/PRESET). The same command again resumes the run.")
  archive: Path | None = setting(None, "Local aclImdb archive; otherwise the reviews are downloaded.")
  cache_dir: Path = setting(default_cache_dir, "Cache folder for reviews.")
  word_vectors: Path | None = setting(None, "Vectors for --embedding file, as text of word2vec, GloVe or fastText.")
  init_from: Path | None = setting(None, "Run directory whose weights a new run starts from, words by name.")
  num_devices: int | None = setting(None, "Devices per process; by default all, and one per CPU core.", ge=1, le=1024)
  implementation: Literal["auto", "mosaic_gpu", "chunked", "scan"] = setting(
    "auto", "Implementation of the LSTM; auto uses the fastest that works."
  )
  steps_per_dispatch: int = setting(8, "Training steps per dispatch; signals are handled in between.", ge=1, le=10_000)
  evaluation_batch_size: int = setting(128, "Reviews per evaluation step.", ge=1, le=65_536)
  save_every_steps: int | None = setting(None, "Steps between checkpoints, besides one per epoch.", ge=1, le=10**9)
  save_every_seconds: float | None = setting(300, "Seconds between checkpoints, besides one per epoch.", gt=0)
  deterministic: bool = setting(False, "Make a GPU give the same bits in each run (slower).")
  log_every: int = setting(50, "Steps between two lines of metrics.", ge=1, le=1_000_000)
  tensorboard: bool = setting(False, "Write the metrics for TensorBoard as well, to RUN_DIR/tensorboard.")
  profile: int | None = setting(
    None, "Trace N steps or a few more, for Perfetto or TensorBoard, to RUN_DIR/profile.", ge=1, le=1000
  )
  distributed: bool = setting(False, "Join the processes of a cluster (SLURM, Open MPI, TPU pods).")
  coordinator_address: str | None = setting(None, "HOST:PORT of process 0, to join processes by hand.")
  num_processes: int | None = setting(None, "Number of processes, to join them by hand.", ge=1, le=65_536)
  process_id: int | None = setting(None, "Index of this process, to join processes by hand.", ge=0, le=65_535)

  def __post_init__(self):
    super().__post_init__()
    address, count, number = self.coordinator_address, self.num_processes, self.process_id
    if (address, count, number).count(None) in (1, 2):
      raise UsageError("--coordinator-address, --num-processes and --process-id go together: give all three.")
    port = re.fullmatch(r".+:(\d{1,5})", address or "")
    if address is not None and (port is None or int(port[1]) > 65_535):
      raise UsageError(f"--coordinator-address {address!r:.80}: must be HOST:PORT.")
    if count is not None and number is not None and number >= count:
      raise UsageError(f"--process-id {number}: must be below --num-processes {count}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Settings):
  """All settings of a run. `PRESETS[name]` holds those of a preset; the field `preset` is only a label."""

  preset: str = setting(
    "article", "Settings to start from, such as article, fast, strong or sample. Other flags override them."
  )
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
  runtime: RuntimeConfig = dataclasses.field(default_factory=RuntimeConfig)
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)

  def __post_init__(self):
    super().__post_init__()
    # The preset names the default run directory.
    if not re.fullmatch("[A-Za-z0-9_-]+", self.preset):
      raise UsageError(f"--preset {self.preset!r:.80}: must be a plain name of letters, digits, _ and -.")
    if self.runtime.archive is not None and self.data.source != "imdb":
      raise UsageError(f"--archive {self.runtime.archive}: requires --data imdb, not {self.data.source}.")
    if self.data.unlabelled_data is not None and not self.model.unlabelled:
      raise UsageError(f"--unlabelled-data {self.data.unlabelled_data}: requires --unlabelled.")
    if self.training.objective == "next_word" and (self.model.cell == "bag" or self.model.ngrams):
      raise UsageError("--objective next_word: requires a recurrent --cell and --ngrams 0.")
    if self.runtime.word_vectors is not None and self.model.embedding != "file":
      raise UsageError(f"--word-vectors {self.runtime.word_vectors}: requires --embedding file.")

  @property
  def run_dir(self) -> Path:
    """The run directory."""
    return self.runtime.run_dir or Path("runs") / self.preset

  def settings(self) -> dict[str, dict[str, Any]]:
    """Return the settings that define the result, by section: all except `runtime`."""
    return {name: dataclasses.asdict(getattr(self, name)) for name in _SECTIONS}

  def to_dict(self) -> dict[str, Any]:
    """Return the JSON form of `preset` and `settings`."""
    return {"format": FORMAT, "preset": self.preset, **self.settings()}

  @classmethod
  def from_dict(cls, value: Any, runtime: RuntimeConfig | None = None) -> "Config":
    """Return the config with this JSON form. Settings that the form lacks have their default.

    Raises UsageError if the form is of another version, or has an unknown key or an invalid value.
    """
    _require_keys(value, {"format", "preset", *_SECTIONS}, "config")
    if value.get("format") != FORMAT:
      raise UsageError(f"config.format: must be {FORMAT}, not {value.get('format')!r:.80} (another version's run).")
    sections = {}
    for name, section in _SECTIONS.items():
      fields = value.get(name, {})
      names = {field.name for field in dataclasses.fields(section)}
      _require_keys(fields, names | _RETIRED, name)
      sections[name] = section(**{field: fields[field] for field in fields.keys() & names})
    return cls(preset=value.get("preset"), runtime=runtime or RuntimeConfig(), **sections)


_SECTIONS = {"data": DataConfig, "training": TrainingConfig, "model": ModelConfig, "optimizer": OptimizerConfig}
# Settings of imdb_jax 0.4, which change nothing that has been trained.
_RETIRED = {"non_finite"}


def differing_fields(saved: Config, wanted: Config) -> list[str]:
  """Return the settings in which two configs differ, as `section.field: saved -> wanted`.

  Files may have moved: the digest of the data tells whether they are the same.
  """
  old, new = saved.settings(), wanted.settings()
  for name in PATHS:
    if all(Path(settings["data"][name] or "").is_absolute() for settings in (old, new)):
      del old["data"][name]
  return [
    f"{section}.{name}: {value} -> {new[section][name]}"
    for section, fields in old.items()
    for name, value in fields.items()
    if value != new[section][name]
  ]


def _require_keys(value: Any, names: set[str], where: str) -> None:
  if not isinstance(value, dict):
    raise UsageError(f"{where}: must be a JSON object.")
  for name in value.keys() - names:
    # A name from a damaged file may be long or hold line breaks.
    raise UsageError(f"{where}.{repr(name)[1:-1]:.80}: unknown.")
