"""Who may import whom: arrows go down only. Imports inside functions count as well."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import imdb_jax

PACKAGE = Path(imdb_jax.__file__).parent

# A room is a module of the package or a folder of them. It may import rooms of lower levels, and itself.
LEVELS = {
  "config": 0,
  "errors": 0,
  "plots": 0,
  "manifest": 1,
  "data": 1,
  "lstm": 1,
  "model": 2,
  "sharding": 2,
  "run_directory": 2,
  "state": 3,
  "steps": 4,
  "checkpoint": 5,
  "evaluation": 5,
  "prediction": 6,
  "training": 6,
  "cli": 7,
}
# `imdb_jax/__init__.py` only names what users import, lazily.
TOP = ""
# The recurrence stands alone; errors may be raised anywhere else.
NOTHING_OF_OURS = {"lstm", "errors"}
# Rooms that may import a package; all others may not.
ONLY_IN = {"orbax": {"checkpoint"}, "tensorflow_datasets": {"data"}, "matplotlib": {"plots"}}
NUMPY_ONLY = {"data", "config", "errors", "plots"}
JAX_PACKAGES = {"jax", "jaxlib", "flax", "optax", "orbax"}


def modules() -> dict[str, Path]:
  """Dotted name below the package: file."""
  found = {}
  for path in sorted(PACKAGE.rglob("*.py")):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
  return found


def imported(source: str, names: set[str]) -> Iterator[str]:
  """Full names of the modules that `source` imports; `from a import b` is a.b if that is a module of ours, else a."""
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, "relative import"
      for alias in node.names:
        whole = f"{node.module}.{alias.name}"
        yield whole if whole.removeprefix("imdb_jax.") in names or node.module == "jax" else node.module or ""


def room_of(module: str) -> str:
  return module.split(".")[0]


def faults(module: str, source: str, names: set[str]) -> list[str]:
  """What is wrong with the imports of a module."""
  room, found = room_of(module), []
  for name in imported(source, names):
    package = name.split(".")[0]
    if package == "imdb_jax":
      target = room_of(name.removeprefix("imdb_jax").removeprefix("."))
      free = target == room or (target == "errors" and room not in NOTHING_OF_OURS)
      if room != TOP and not free and (room in NOTHING_OF_OURS or LEVELS.get(target, 99) >= LEVELS[room]):
        found.append(f"{module} imports {name}, which stands no lower")
    if name.startswith("jax._src") or name == "jaxlib" or package == "jaxlib":
      found.append(f"{module} imports {name}, which is private")
    if package in ONLY_IN and room not in ONLY_IN[package]:
      found.append(f"{module} imports {name}, which only {', '.join(ONLY_IN[package])} may")
    if room in NUMPY_ONLY and package in JAX_PACKAGES:
      found.append(f"{module} imports {name}, but works without JAX")
  return found


def test_every_module_has_its_room():
  assert {room_of(module) for module in modules()} <= {TOP, *LEVELS}, "place the new module in LEVELS"


@pytest.mark.parametrize("module", [module for module in modules() if room_of(module) in {TOP, *LEVELS}])
def test_imports_go_down_only(module):
  assert faults(module, modules()[module].read_text(encoding="utf-8"), set(modules())) == []


@pytest.mark.parametrize(
  ("module", "source"),
  [
    ("model", "from imdb_jax import steps"),
    ("model", "from imdb_jax import sharding"),
    ("model", "def f():\n  import imdb_jax.training.loop"),
    ("lstm.scan", "from imdb_jax.config import Config"),
    ("lstm.scan", "from imdb_jax.errors import UsageError"),
    ("data.tokens", "from imdb_jax.model import SentimentLSTM"),
    ("data.tokens", "import jax"),
    ("data.tokens", "def f():\n  from flax import linen"),
    ("prediction", "from imdb_jax.training import loop"),
    ("training.loop", "from imdb_jax import prediction"),
    ("state", "import orbax.checkpoint as ocp"),
    ("steps", "from jax._src import core"),
    ("steps", "from jax import _src"),
    ("plots", "import jax.numpy"),
  ],
)
def test_a_forbidden_import_is_found(module, source):
  assert len(faults(module, source, set(modules()))) == 1


def test_what_is_imported_is_declared():
  """A package that only comes along with another may go with it."""
  project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
  declared = {re.split(r"[^\w-]", requirement)[0] for requirement in project["dependencies"]}
  names = {name for path in modules().values() for name in imported(path.read_text(encoding="utf-8"), set(modules()))}
  packages = {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"imdb_jax"}
  sources = importlib.metadata.packages_distributions()
  assert "numpy" in packages
  assert {package for package in packages if not declared & set(sources.get(package, []))} == set()


def test_arguments_and_data_are_read_without_jax():
  """`--help` answers at once, and arrays in the cache need no tensorflow-datasets. Counts what imports import, too."""
  heavy = ["jax", "flax", "optax", "orbax", "tensorflow_datasets", "tensorflow", "matplotlib", "keras"]
  code = f"import sys, imdb_jax.cli, imdb_jax.data.tokens; print([name for name in {heavy} if name in sys.modules])"
  done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=60)
  assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr[-2000:]


def test_what_users_import_is_listed_and_comes_when_asked_for():
  """A notebook's completion asks `dir`."""
  code = (
    "import imdb_jax, sys; assert {*imdb_jax.__all__} <= {*dir(imdb_jax)}; assert 'jax' not in sys.modules;"
    "[getattr(imdb_jax, name) for name in imdb_jax.__all__]; assert 'jax' in sys.modules"
  )
  subprocess.run([sys.executable, "-c", code], check=True)
