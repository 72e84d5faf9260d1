"""Files from outside, mutated: of each the outcome is an answer or an error of ours."""

import contextlib
import gzip
import io
import json
import lzma
import random
import signal
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from reliability.sandbox import Failure, require

from imdb_jax import manifest, run_directory
from imdb_jax.config import DataConfig
from imdb_jax.data import archive, tokens
from imdb_jax.data.tokenizer import Vocabulary
from imdb_jax.errors import ImdbJaxError
from imdb_jax.training.recorder import read_metrics


def mutate(content: bytes, rng: random.Random) -> bytes:
  """A few bytes, a piece, or a value changed for another."""
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


def make_inputs(whole: Path, folder: Path) -> dict[str, tuple[bytes, Callable[[Path], Any]]]:
  """What comes from outside: the content of an honest file, and what reads it.

  Args:
    whole: a run that has ended.
    folder: to work in.
  """
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
  expected = dict.fromkeys(kinds, 2)
  vocabulary = Vocabulary.load(whole / "vocab.json")

  def read_archive(path: Path) -> None:
    archive.read_archive(path, expected=expected)

  def read_config(path: Path) -> None:
    run_dir = folder / "config"
    run_dir.mkdir(exist_ok=True)
    path.replace(run_dir / "config.json")
    run_directory.load_config(run_dir)

  def read_lines(path: Path) -> None:
    run_dir = folder / "metrics"
    run_dir.mkdir(exist_ok=True)
    path.replace(run_dir / "metrics.jsonl")
    read_metrics(run_dir)

  newest = max((whole / "checkpoints").iterdir(), key=lambda step: int(step.name))
  manifest_path = whole / "manifests" / f"{newest.name}.json"
  honest_files = json.loads(manifest_path.read_text(encoding="utf-8"))["files"]

  def read_manifest(path: Path) -> None:
    problem = manifest.problem(newest, path)
    if problem is None:
      is_same = json.loads(path.read_text(encoding="utf-8"))["files"] == honest_files
      require(is_same, "a manifest of other files passes")

  def read_text(path: Path) -> None:
    vocabulary.encode([path.read_bytes().decode("utf-8", "replace")], 24)

  cached = folder / "cached"
  config = DataConfig(vocabulary_size=50, sequence_length=8)
  archive_path = folder / "honest.tar"
  archive_path.write_bytes(tar)
  entry = tokens._entry(config, archive.fingerprint(archive_path), cached)
  data = tokens.encode(config, archive.read_archive(archive_path, expected=expected))
  tokens._write(data, entry, config, official=True)
  honest = {path.name: path.read_bytes() for path in entry.iterdir()}

  def read_cache(name: str) -> Callable[[Path], None]:
    def read(path: Path) -> None:
      for other, content in honest.items():
        (entry / other).write_bytes(content)
      path.replace(entry / name)
      try:
        found = tokens._read(entry)
      # `load` takes any error of a cache for damage, and makes it anew.
      except Exception:
        return
      require(found.digest() == data.digest(), f"a damaged cache passes: {name}")

    return read

  return {
    "archive.tar": (tar, read_archive),
    "archive.tar.gz": (gzip.compress(tar), read_archive),
    "archive.tar.xz": (lzma.compress(tar), read_archive),
    "vocab.json": ((whole / "vocab.json").read_bytes(), Vocabulary.load),
    "config.json": ((whole / "config.json").read_bytes(), read_config),
    "metrics.jsonl": ((whole / "metrics.jsonl").read_bytes(), read_lines),
    "manifest": (manifest_path.read_bytes(), read_manifest),
    "review": ("A film <br /> of 10/10 - «déjà vu» ☺ &amp; more".encode(), read_text),
    **{f"cached {name}": (content, read_cache(name)) for name, content in honest.items()},
  }


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
  def late(*_: Any) -> None:
    raise Failure(f"hangs for {seconds} s")

  previous = signal.signal(signal.SIGALRM, late)
  signal.alarm(seconds)
  try:
    yield
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def _listing(folder: Path) -> dict[str, bytes]:
  return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def read_mutated(whole: Path, folder: Path, count: int, seed: int) -> list[str]:
  """Mutates inputs and reads them; returns what went wrong.

  Args:
    whole: a run that has ended.
    folder: to work in.
    count: files to mutate.
    seed: of all that is random.
  """
  folder.mkdir()
  inputs = make_inputs(whole, folder)
  before, failures = _listing(whole), []
  for number in range(count):
    rng = random.Random(f"{seed} mutation {number}")
    name = rng.choice(sorted(inputs))
    content, read = inputs[name]
    path = folder / "mutated"
    path.write_bytes(mutate(content, rng))
    try:
      with within(20):
        read(path)
    except ImdbJaxError as error:
      if len(str(error).splitlines()) != 1:
        failures.append(f"mutation {number} of {name}: not one line: {error}")
    except Exception as error:
      failures.append(f"mutation {number} of {name}: {error!r}")
  if _listing(whole) != before:
    failures.append("a file of another run was written")
  return failures
