"""Stops, damage and hostile files, many times at random: `python tests/torture.py --help`, or `make torture`.

Each trial draws its moment or its damage from a seed that is printed where it fails. A run that was disturbed must end
like one that was not, bit for bit in parameters, optimizer state and metrics.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
# A run of about two seconds of training, with a save every few steps.
TRAIN = ("--data", "sample", "--platform", "cpu", "--num-devices", "1", "--sequence-length", "24", "--limit", "400")
TRAIN += ("--embedding-size", "8", "--hidden-size", "8", "--vocabulary-size", "200", "--batch-size", "8")
TRAIN += ("--epochs", "3", "--save-every-steps", "10", "--log-every", "7", "--evaluation-batch-size", "16")
# Of 150 steps, with a line every seven and at an epoch's end.
LAST_LINE_BUT_ONE = 147
# Seconds after which a command counts as hanging, and a process whose partner was killed too.
HANGS = 120
SIGNAL_EXITS = {signal.SIGINT: 130, signal.SIGTERM: 143}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Disturb training and input at random, and see that nothing is lost or let in."""

  kills: int = 60
  """Runs killed with SIGKILL."""
  signals: int = 40
  """Runs stopped with SIGINT or SIGTERM."""
  damages: int = 200
  """Checkpoints damaged."""
  disk_full: int = 20
  """Runs on a disk that fills up (needs the right to mount a tmpfs)."""
  process_stops: int = 10
  """Runs of two processes, one of which gets SIGTERM."""
  process_kills: int = 10
  """Runs of two processes, one of which is killed."""
  mutations: int = 5000
  """Files from outside, mutated."""
  seed: int = 0
  """Of all that is random."""
  markdown: Path | None = None
  """Write the table here."""


class Failure(Exception):
  """What a trial should not have shown."""


def require(fulfilled: bool, what: str) -> None:
  if not fulfilled:
    raise Failure(what)


class Sandbox:
  """A folder for everything, with the end of a run that nothing disturbed."""

  def __init__(self, folder: Path):
    self.folder = folder
    code, _, stderr = self.train(folder / "whole")
    require(code == 0, f"the run that nothing disturbs fails: {stderr}")
    started = time.monotonic()
    shutil.rmtree(folder / "whole")
    # Once more, now that XLA's programs are cached: how long a trial takes.
    require(self.train(folder / "whole")[0] == 0, "the run that nothing disturbs fails")
    self.seconds = time.monotonic() - started
    self.end = end_of(folder / "whole")

  def start(self, run_dir: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *TRAIN, *arguments]
    command += ["--run-dir", str(run_dir), "--cache-dir", str(self.folder / "cache")]
    return subprocess.Popen(
      command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.folder
    )

  def train(self, run_dir: Path, *arguments: str) -> tuple[int, str, str]:
    return finish(self.start(run_dir, *arguments))

  def require_same_end(self, run_dir: Path) -> None:
    code, _, stderr = self.train(run_dir)
    require(code == 0, f"the run cannot be resumed, exit {code}: {stderr}")
    require(end_of(run_dir) == self.end, "the resumed run ends differently")


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
  try:
    stdout, stderr = process.communicate(timeout=HANGS)
  except subprocess.TimeoutExpired:
    process.kill()
    process.communicate()
    raise Failure(f"hangs for {HANGS} s") from None
  require("Traceback" not in stderr, f"a traceback: {stderr}")
  return process.returncode, stdout, stderr


def end_of(run_dir: Path) -> str:
  """SHA-256 of the arrays of the newest checkpoint and of all metrics but times."""
  from jax.tree_util import keystr, tree_leaves_with_path

  digest = hashlib.sha256()
  for path, leaf in sorted(((keystr(path), leaf) for path, leaf in tree_leaves_with_path(newest_state(run_dir)[1]))):
    digest.update(path.encode() + np.asarray(leaf).tobytes())
  for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
    kept = {name: value for name, value in json.loads(line).items() if "seconds" not in name}
    digest.update(json.dumps(kept).encode())
  return digest.hexdigest()


_RESTORING = threading.Lock()


def newest_state(run_dir: Path) -> tuple[int, Any]:
  """Step and state of the newest checkpoint that can be used."""
  import jax

  from imdb_jax import run_directory, state
  from imdb_jax.checkpoint import Checkpoints
  from imdb_jax.model import SentimentLSTM

  config = run_directory.load_config(run_dir)
  mesh = jax.make_mesh((1,), ("data",), devices=jax.devices("cpu")[:1])
  model, optimizer = SentimentLSTM.of_run(config), state.make_optimizer(config.optimizer, 1)
  abstract = state.abstract(model, optimizer, mesh, config.training.num_seeds)
  with _RESTORING:
    checkpoints = Checkpoints(run_dir, read_only=True)
    try:
      saved = checkpoints.find("latest")
      return saved.step, checkpoints.restore(saved, abstract)
    finally:
      checkpoints.close()


def kill(sandbox: Sandbox, rng: random.Random, run_dir: Path) -> None:
  """Up to three kills, each at any moment from the start of Python to the last save; some while a signal is heeded."""
  for _ in range(rng.randint(1, 3)):
    process = sandbox.start(run_dir)
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(rng.uniform(0, sandbox.seconds * 1.1))
    if rng.random() < 0.3:
      process.send_signal(signal.SIGTERM)
      time.sleep(rng.uniform(0, 0.3))
    process.kill()
    process.communicate()
  sandbox.require_same_end(run_dir)
  require(not (run_dir / "damaged").exists(), "a kill is taken for damage")


def _last_line(run_dir: Path) -> int:
  """The step of the last line of metrics.jsonl; -1 where there is none."""
  path = run_dir / "metrics.jsonl"
  lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
  return json.loads(lines[-1])["step"] if lines else -1


def stop(sandbox: Sandbox, rng: random.Random, run_dir: Path) -> None:
  number = rng.choice(list(SIGNAL_EXITS))
  process = sandbox.start(run_dir)
  # Not while Python itself starts, which answers Ctrl-C with a traceback of its own.
  with contextlib.suppress(subprocess.TimeoutExpired):
    process.wait(rng.uniform(0.8, sandbox.seconds))
  process.send_signal(number)
  # Read afterwards: training may have gone on by a few lines, never back.
  line = _last_line(run_dir)
  code, stdout, stderr = finish(process)
  if line < 0:
    # Before there is anything to save Python itself ends on the signal.
    require(code in (SIGNAL_EXITS[number], -number), f"exit {code} on {number.name} at the start: {stderr}")
  elif line < LAST_LINE_BUT_ONE:
    require(code == SIGNAL_EXITS[number], f"exit {code} on {number.name} after step {line}: {stderr}")
  else:
    # Once the last epoch is evaluated the run ends by itself.
    require(code in (SIGNAL_EXITS[number], -number, 0), f"exit {code} on {number.name} at the end: {stderr}")
  if "Saved step" in stderr:
    step = int(stderr.split("Saved step ")[1].split(" ")[0].replace(",", ""))
    require(newest_state(run_dir)[0] == step, f"step {step} is said to be saved, and is not: {stdout}")
  elif code == SIGNAL_EXITS[number]:
    require(line < 0 or line >= LAST_LINE_BUT_ONE, f"nothing was saved after step {line}: {stderr}")
  sandbox.require_same_end(run_dir)


def damage(sandbox: Sandbox, rng: random.Random, run_dir: Path) -> None:
  """One file of the newest checkpoint; it must be noticed, and the step before used, unaltered."""
  shutil.copytree(sandbox.folder / "whole", run_dir)
  newest = max(int(path.name) for path in (run_dir / "checkpoints").iterdir())
  before = sorted(int(path.name) for path in (run_dir / "checkpoints").iterdir())[-2]
  files = sorted(path for path in (run_dir / "checkpoints" / str(newest)).rglob("*") if path.is_file())
  files.append(run_dir / "manifests" / f"{newest}.json")
  path = rng.choice(files)
  content = path.read_bytes()
  how = rng.choice(["flip", "truncate", "remove", "link", "grow"])
  if how == "flip" and content:
    changed = bytearray(content)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    path.write_bytes(changed)
  elif how == "truncate" and content:
    os.truncate(path, rng.randrange(len(content)))
  elif how == "link":
    path.rename(run_dir / "elsewhere")
    path.symlink_to(run_dir / "elsewhere")
  elif how == "grow":
    path.write_bytes(content + rng.randbytes(1))
  else:
    path.unlink()
  step, _ = newest_state(run_dir)
  require(step == before, f"{how} of {path.name}: step {step} is used instead of {before}")


@contextlib.contextmanager
def tmpfs(folder: Path, kilobytes: int) -> Iterator[None]:
  folder.mkdir()
  done = subprocess.run(
    ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)], capture_output=True, text=True
  )
  if done.returncode:
    raise PermissionError(done.stderr.strip())
  try:
    yield
  finally:
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill_disk(sandbox: Sandbox, rng: random.Random, folder: Path) -> None:
  """Any write may be the one for which there is no room."""
  # A whole run takes about half a megabyte, and a save asks for a quarter of one beforehand.
  with tmpfs(folder, rng.randint(16, 1000)):
    run_dir = folder / "run"
    code, _, stderr = sandbox.train(run_dir)
    if code:
      lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
      require(len(lines) == 1 and code in (2, 3, 4), f"no clear error, exit {code}: {stderr}")
      # The first step is saved long before the first epoch ends.
      is_saved = any((run_dir / "manifests").glob("*.json"))
      require(is_saved or _last_line(run_dir) < 20, "all steps were lost")
      if (run_dir / "checkpoints").is_dir():
        from imdb_jax import manifest

        for path in (run_dir / "manifests").glob("*.json"):
          problem = manifest.problem(run_dir / "checkpoints" / path.stem, path)
          require(problem is None, f"step {path.stem} was lost: {problem}")
    subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
    sandbox.require_same_end(run_dir)


def _free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def _start_two(sandbox: Sandbox, run_dir: Path) -> list[subprocess.Popen[str]]:
  shared = ("--coordinator-address", f"127.0.0.1:{_free_port()}", "--num-processes", "2")
  return [sandbox.start(run_dir, *shared, "--process-id", str(rank)) for rank in range(2)]


def _require_same_end_of_two(sandbox: Sandbox, run_dir: Path) -> None:
  for code, _, stderr in map(finish, _start_two(sandbox, run_dir)):
    require(code == 0, f"the run of two cannot be resumed, exit {code}: {stderr}")
  require(end_of(run_dir) == _end_of_two(sandbox), "the resumed run of two ends differently")


def _end_of_two(sandbox: Sandbox) -> str:
  run_dir = sandbox.folder / "two"
  if not run_dir.exists():
    for code, _, stderr in map(finish, _start_two(sandbox, run_dir)):
      require(code == 0, f"the run of two that nothing disturbs fails, exit {code}: {stderr}")
  return end_of(run_dir)


def stop_one_of_two(sandbox: Sandbox, rng: random.Random, run_dir: Path) -> None:
  _end_of_two(sandbox)
  processes = _start_two(sandbox, run_dir)
  _wait_for_line(run_dir, rng)
  line = _last_line(run_dir)
  rng.choice(processes).send_signal(signal.SIGTERM)
  results = [finish(process) for process in processes]
  codes = [code for code, _, _ in results]
  # They agree every 16 steps; once the last epoch is evaluated the run ends by itself.
  is_late = line >= LAST_LINE_BUT_ONE - 16
  require(codes == [143, 143] or (is_late and codes == [0, 0]), f"exits {codes} after step {line}: {results}")
  if codes == [143, 143]:
    saved = {stderr.split("Saved step ")[1].split(" ")[0] for _, _, stderr in results}
    require(len(saved) == 1, f"different steps were saved: {saved}")
  _require_same_end_of_two(sandbox, run_dir)


def kill_one_of_two(sandbox: Sandbox, rng: random.Random, run_dir: Path) -> None:
  _end_of_two(sandbox)
  processes = _start_two(sandbox, run_dir)
  _wait_for_line(run_dir, rng)
  line, victim = _last_line(run_dir), rng.randrange(2)
  processes[victim].kill()
  processes[victim].communicate()
  code, _, stderr = finish(processes[1 - victim])
  require(code != 0 or line >= LAST_LINE_BUT_ONE - 16, f"exit 0 though process {victim} was killed: {stderr}")
  _require_same_end_of_two(sandbox, run_dir)


def _wait_for_line(run_dir: Path, rng: random.Random) -> None:
  """Until training has begun, and a little longer."""
  deadline = time.monotonic() + HANGS
  while not (run_dir / "metrics.jsonl").exists() or not (run_dir / "metrics.jsonl").stat().st_size:
    require(time.monotonic() < deadline, "training does not begin")
    time.sleep(0.01)
  time.sleep(rng.uniform(0, 2))


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


def make_inputs(sandbox: Sandbox, folder: Path) -> dict[str, tuple[bytes, Callable[[Path], Any]]]:
  """What comes from outside: the content of an honest file, and what reads it."""
  import gzip
  import io
  import lzma
  import tarfile

  from imdb_jax import manifest, run_directory
  from imdb_jax.config import DataConfig
  from imdb_jax.data import archive, tokens
  from imdb_jax.data.tokenizer import Vocabulary
  from imdb_jax.training.recorder import read_metrics

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
  whole = sandbox.folder / "whole"
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


def mutations(sandbox: Sandbox, options: Options, folder: Path) -> tuple[int, list[str]]:
  """Of every mutated file the outcome is an answer or an error of ours."""
  from imdb_jax.errors import ImdbJaxError

  folder.mkdir()
  inputs = make_inputs(sandbox, folder)
  outside = sandbox.folder / "whole"
  before, failures = _listing(outside), []
  for number in range(options.mutations):
    rng = random.Random(f"{options.seed} mutation {number}")
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
  if _listing(outside) != before:
    failures.append("a file of another run was written")
  return options.mutations, failures


TRIALS: dict[str, tuple[str, Callable[[Sandbox, random.Random, Path], None], int]] = {
  # Field of the options, the trial, and how many at a time.
  "SIGKILL at a random moment, up to three times, then resumed": ("kills", kill, 2),
  "SIGINT or SIGTERM at a random moment, then resumed": ("signals", stop, 2),
  "a file of the newest checkpoint damaged": ("damages", damage, 1),
  "disk full at a random write, then resumed": ("disk_full", fill_disk, 2),
  "one of two processes gets SIGTERM, then both resumed": ("process_stops", stop_one_of_two, 1),
  "one of two processes killed, then both resumed": ("process_kills", kill_one_of_two, 1),
}


def run_trials(sandbox: Sandbox, options: Options, field: str, trial: Callable, at_once: int) -> tuple[int, list[str]]:
  from imdb_jax.errors import ImdbJaxError

  def run(number: int) -> str | None:
    folder = sandbox.folder / f"{field}-{number}"
    try:
      trial(sandbox, random.Random(f"{options.seed} {field} {number}"), folder)
    except (Failure, ImdbJaxError) as error:
      return f"{field} {number} with seed {options.seed}: {error}"
    finally:
      shutil.rmtree(folder, ignore_errors=True)
    return None

  count = getattr(options, field)
  with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
    return count, [failure for failure in pool.map(run, range(count)) if failure]


def main() -> None:
  options = tyro.cli(Options, description=__doc__)
  if options.markdown is not None:
    options.markdown.parent.mkdir(parents=True, exist_ok=True)
  # The sandbox's own look at checkpoints needs no more than a CPU, and says of damaged ones what is expected.
  os.environ["JAX_PLATFORMS"] = "cpu"
  import logging

  logging.disable(logging.WARNING)
  rows, all_failures = [], []
  with tempfile.TemporaryDirectory(prefix="torture-") as name:
    sandbox = Sandbox(Path(name))
    for title, (field, trial, at_once) in TRIALS.items():
      started = time.monotonic()
      try:
        count, failures = run_trials(sandbox, options, field, trial, at_once)
        rows.append((title, count, count - len(failures), time.monotonic() - started))
      except PermissionError as error:
        failures = []
        rows.append((f"{title} (not run: {error})", 0, 0, 0.0))
      all_failures += failures
      print(*rows[-1], sep=" | ", flush=True)
    started = time.monotonic()
    count, failures = mutations(sandbox, options, sandbox.folder / "mutations")
    rows.append(("files from outside mutated", count, count - len(failures), time.monotonic() - started))
    all_failures += failures
  table = ["| trial | count | as it must be | seconds |", "|---|---|---|---|"]
  table += [f"| {title} | {count:,} | {good:,} | {seconds:.0f} |" for title, count, good, seconds in rows]
  print("\n".join(table))
  for failure in all_failures:
    print(failure, file=sys.stderr)
  if options.markdown is not None:
    import jax

    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, jax {jax.__version__}"
    command = "python tests/torture.py " + " ".join(sys.argv[1:])
    options.markdown.write_text(f"{command.strip()}\n{machine}\n\n" + "\n".join(table) + "\n", encoding="utf-8")
  sys.exit(1 if all_failures else 0)


if __name__ == "__main__":
  main()
