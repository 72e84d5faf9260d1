"""Files that the package reads, changed at random: each must give an answer or one of our errors."""

import contextlib
import dataclasses
import gzip
import io
import json
import lzma
import random
import resource
import shutil
import signal
import tarfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from reliability.sandbox import Failure, checkpoints_of, require

from imdb_jax import plots, scoring
from imdb_jax.config import DataConfig, RuntimeConfig
from imdb_jax.data import archive, reviews, sample, sources, tokens
from imdb_jax.data.tokenizer import Vocabulary
from imdb_jax.errors import ImdbJaxError
from imdb_jax.store import files, metrics_log, run_directory
from imdb_jax.store.arrays import load_safetensors as load_weights
from imdb_jax.training.console import Console
from imdb_jax.training.metrics import Recorder

Reader = Callable[[Path], Any]


def mutate(content: bytes, rng: random.Random) -> bytes:
  """Change a few bytes or a piece, or replace a value."""
  changed = bytearray(content)
  for _ in range(rng.randint(1, 4)):
    position = rng.randrange(len(changed) + 1)
    kind = rng.randrange(7)
    if kind == 0 and changed:
      changed[position % len(changed)] ^= 1 << rng.randrange(8)
    elif kind == 1:
      del changed[position:]
    elif kind == 2:
      changed[position:position] = rng.randbytes(rng.randint(1, 20))
    elif kind == 3:
      del changed[position : position + rng.randint(1, 50)]
    elif kind == 4:
      changed[position:position] = changed[position : position + rng.randint(1, 600)]
    elif kind == 5:
      odd = [b"null", b"-1", b"1e999", b"9" * 400, b'"', b"[" * 5000, b"\xff\xfe", b"../../x", b"{}", b"NaN", b"\0"]
      changed[position : position + rng.randint(0, 8)] = rng.choice(odd)
    elif kind == 6 and changed:
      digits = [place for place, byte in enumerate(changed[:5000]) if 48 <= byte <= 57]
      if digits:
        changed[rng.choice(digits)] = 48 + rng.randrange(10)
  return bytes(changed)


def make_inputs(whole: Path, folder: Path) -> dict[str, tuple[bytes, Reader]]:
  """Return the content of each kind of intact file, and a function that reads such a file.

  Args:
    whole: a finished run.
    folder: folder to work in.
  """
  config = run_directory.load_config(whole).data
  vocabulary = Vocabulary.load(whole / "vocab.json", config)

  def read_text(path: Path) -> None:
    text = path.read_bytes().decode("utf-8", "replace")
    known = [number for number, _, _ in vocabulary.spans(text) if number]
    require(known == vocabulary.ids(text), "a known word has no span")

  def read_lines(path: Path) -> None:
    for window in scoring.read(str(path), "text"):
      vocabulary.encode([text for text, _ in window])

  return {
    "vocab.json": ((whole / "vocab.json").read_bytes(), lambda path: Vocabulary.load(path, config)),
    "review": ("A film <br /> of 10/10 - «déjà vu» ☺ &amp; more".encode(), read_text),
    "reviews": ("\ufeffA film.\r\n\nA <br /> masterpiece ☃\nA disaster".encode(), read_lines),
    **_archives(),
    **_files_of_a_run(whole, folder),
    "facts": _facts(whole, folder / "facts"),
    "model.safetensors": _weights(folder),
    **_cached_arrays(folder),
  }


def _archives() -> dict[str, tuple[bytes, Reader]]:
  kinds = ("train/neg", "train/pos", "test/neg", "test/pos")
  packed = io.BytesIO()
  with tarfile.open(fileobj=packed, mode="w") as file:
    for kind in kinds:
      for number in range(2):
        text = f"{kind} review {number}, as dull as ditchwater. <br /> Déjà vu.".encode()
        member = tarfile.TarInfo(f"aclImdb/{kind}/{number}_1.txt")
        member.size = len(text)
        file.addfile(member, io.BytesIO(text))
  tar = packed.getvalue()

  def read(path: Path) -> None:
    archive.read_archive(path, expected=dict.fromkeys(kinds, 2))

  return {
    "archive.tar": (tar, read),
    "archive.tar.gz": (gzip.compress(tar), read),
    "archive.tar.xz": (lzma.compress(tar), read),
  }


def _files_of_a_run(whole: Path, folder: Path) -> dict[str, tuple[bytes, Reader]]:
  provenance = json.loads((whole / "provenance.json").read_bytes())

  def check(run_dir: Path) -> None:
    data = types.SimpleNamespace(digest=provenance["data_digest"], summary="")
    run_directory.check(run_dir, data=data, precision=provenance["starts"][0]["precision"])

  def within_a_run(name: str, read: Reader) -> tuple[bytes, Reader]:
    run_dir = folder / name
    run_dir.mkdir()
    for other in ("vocab.json", "config.json"):
      shutil.copy(whole / other, run_dir)

    def read_as(path: Path) -> None:
      path.replace(run_dir / name)
      read(run_dir)

    return (whole / name).read_bytes(), read_as

  history = metrics_log.read(whole)[0]

  def plot(run_dir: Path) -> None:
    found = metrics_log.read(run_dir)[0]
    # It takes a while.
    if found != history:
      metrics_log.write_csv(run_dir, found)
      plots.save(plots.history(found, "mutated"), run_dir / "history.png")

  newest = max((whole / "checkpoints").iterdir(), key=lambda step: int(step.name))
  manifest_path = whole / "manifests" / f"{newest.name}.json"
  intact = json.loads(manifest_path.read_text(encoding="utf-8"))["files"]

  def read_manifest(path: Path) -> None:
    try:
      files.check_manifest(newest, path)
    except (OSError, ValueError):
      return
    is_same = json.loads(path.read_text(encoding="utf-8"))["files"] == intact
    require(is_same, "a manifest of other files is accepted")

  return {
    "config.json": within_a_run("config.json", run_directory.load_config),
    "metrics.jsonl": within_a_run("metrics.jsonl", plot),
    "provenance.json": within_a_run("provenance.json", check),
    "manifest": (manifest_path.read_bytes(), read_manifest),
  }


def _weights(folder: Path) -> tuple[bytes, Reader]:
  arrays = {"dense.bias": np.ones((1, 1), np.float32), "lstm.kernel": np.ones((1, 8, 12), np.float32)}
  safetensors.numpy.save_file(arrays, folder / "model.safetensors")

  def read(path: Path) -> None:
    # `Classifier.from_safetensors` reports these.
    with contextlib.suppress(OSError, ValueError):
      load_weights(path, arrays)

  return (folder / "model.safetensors").read_bytes(), read


def _facts(whole: Path, run_dir: Path) -> tuple[bytes, Reader]:
  """Return the facts that a manifest holds about a step within an epoch, and how a resumed run reads them."""
  shutil.copytree(whole, run_dir)
  *_, step, newest = sorted(int(path.name) for path in (run_dir / "checkpoints").iterdir())
  path = run_dir / "manifests" / f"{step}.json"
  path.with_name(f"{newest}.json").unlink()
  intact = files.read_json(path)
  config = run_directory.load_config(run_dir, RuntimeConfig(run_dir=run_dir))

  def read(mutated: Path) -> None:
    with contextlib.suppress(ValueError, RecursionError):
      files.write_json(path, intact | {"facts": json.loads(mutated.read_bytes())})
    with contextlib.closing(checkpoints_of(run_dir)) as checkpoints:
      saved = checkpoints.find("latest")
    log = metrics_log.MetricsLog(config, step=step, num_epochs=config.training.epochs - 1, held=None)
    with contextlib.closing(log):
      Recorder(config, Console(is_quiet=True), log, saved.progress, 1e-3)

  return json.dumps(intact["facts"]).encode(), read


def _cached_arrays(folder: Path) -> dict[str, tuple[bytes, Reader]]:
  config, cache_dir = DataConfig(vocabulary_size=50, sequence_length=8), folder / "cached"
  splits = {name: split.take(range(6)) for name, split in sample.load().items()}
  source = dataclasses.replace(
    sources.find(DataConfig(source="sample"), None, cache_dir),
    fingerprint=lambda: reviews.content(splits),
    load=lambda report: splits,
  )
  digest = tokens.load(source, config, cache_dir=cache_dir).digest
  (entry,) = (cache_dir / "tokens").iterdir()
  intact = {path.name: path.read_bytes() for path in entry.iterdir()}

  def read_cache(name: str) -> Reader:
    def read(path: Path) -> None:
      for other, content in intact.items():
        (entry / other).write_bytes(content)
      path.replace(entry / name)
      found = tokens.load(source, config, cache_dir=cache_dir)
      require(found.digest == digest, f"a damaged cache is used: {name}")

    return read

  return {f"cached {name}": (content, read_cache(name)) for name, content in intact.items()}


@contextlib.contextmanager
def _within(seconds: int) -> Iterator[None]:
  def late(*_: Any) -> None:
    raise Failure(f"hangs for {seconds} s")

  previous = signal.signal(signal.SIGALRM, late)
  signal.alarm(seconds)
  try:
    yield
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def _peak_bytes() -> int:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _contents(folder: Path) -> dict[str, bytes]:
  return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def read_mutated(whole: Path, folder: Path, count: int, seed: int) -> list[str]:
  """Change files and read them; return a text per failure.

  Args:
    whole: a finished run.
    folder: folder to work in.
    count: number of files to change.
    seed: seed of the changes.
  """
  folder.mkdir()
  inputs = make_inputs(whole, folder)
  before, failures = _contents(whole), []
  for number in range(count):
    rng = random.Random(f"{seed} mutation {number}")
    name = rng.choice(sorted(inputs))
    content, read = inputs[name]
    path = folder / "mutated"
    path.write_bytes(mutate(content, rng))
    before_reading = _peak_bytes()
    try:
      with _within(20):
        read(path)
    except ImdbJaxError as error:
      if len(str(error).splitlines()) != 1:
        failures.append(f"mutation {number} of {name}: not one line: {error}")
    except Exception as error:
      failures.append(f"mutation {number} of {name}: {error!r}")
    if _peak_bytes() > before_reading + 2**30:
      failures.append(f"mutation {number} of {name}: more than 1 GB of memory")
  if _contents(whole) != before:
    failures.append("a file of another run was written")
  return failures
