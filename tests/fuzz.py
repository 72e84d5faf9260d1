"""Coverage-guided fuzzing of every reader of files: `make fuzz`, or `python tests/fuzz.py --help`.

Each kind of file gets a process of its own and an equal share of the time. libFuzzer, through Atheris, changes intact
files so that they reach new lines of the package. A reader must answer or raise one of our errors, within 10 seconds
and 2 GB. The inputs that reached something new are kept in a folder outside the repository, and used again.
"""

import argparse
import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris
import platformdirs

with atheris.instrument_imports(include=["imdb_jax.data", "imdb_jax.store"]):
  from reliability.mutations import Reader, make_inputs
  from reliability.sandbox import Sandbox

from imdb_jax.errors import ImdbJaxError


def target(read: Reader, path: Path) -> Callable[[bytes], None]:
  """Return a function that reads a file with the content that it is given."""

  def run(content: bytes) -> None:
    path.write_bytes(content)
    with contextlib.suppress(ImdbJaxError):
      read(path)

  return run


def fuzz(name: str, whole: Path, corpus: Path, seconds: int) -> None:
  """Fuzz the reader of a kind of file; libFuzzer ends the process."""
  folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
  content, read = make_inputs(whole, folder)[name]
  (corpus / "intact").write_bytes(content)
  limits = [f"-max_total_time={seconds}", "-timeout=10", "-rss_limit_mb=2048", f"-artifact_prefix={corpus}-"]
  atheris.Setup([sys.argv[0], *limits, "-print_final_stats=1", str(corpus)], target(read, folder / "fuzzed"))
  atheris.Fuzz()


def main() -> None:
  """Fuzz one kind of file, or all of them one after the other, each in a process of its own."""
  parser = argparse.ArgumentParser(description="Fuzz every reader of files, guided by coverage.")
  parser.add_argument("--seconds", type=int, default=600, help="Time for all kinds of files together. [600]")
  default = platformdirs.user_cache_path("imdb_jax") / "fuzz"
  parser.add_argument("--corpus", type=Path, default=default, help=f"Folder of the inputs. [{default}]")
  parser.add_argument("--only", help="Kind of file.")
  parser.add_argument("--whole", type=Path, help="Finished run of the torture test, whose files are changed.")
  given = parser.parse_args()
  if given.only:
    corpus = given.corpus / given.only
    corpus.mkdir(parents=True, exist_ok=True)
    fuzz(given.only, given.whole, corpus, given.seconds)
  with tempfile.TemporaryDirectory() as folder, contextlib.closing(Sandbox(Path(folder))) as sandbox:
    names = sorted(make_inputs(sandbox.whole, Path(tempfile.mkdtemp(dir=folder))))
    own = ["--whole", str(sandbox.whole), "--corpus", str(given.corpus), "--seconds", str(given.seconds // len(names))]
    failed = [name for name in names if subprocess.run([sys.executable, __file__, "--only", name, *own]).returncode]
  if failed:
    sys.exit(f"Failures in {', '.join(failed)}; the inputs are {given.corpus}/NAME-crash-* and the like.")


if __name__ == "__main__":
  main()
