"""Imports go down only, and files, functions and constructors stay small. Imports inside functions count as well."""

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
ROOT = PACKAGE.parent

# From the lowest layer to the highest, as in the table of CONTRIBUTING.md. A name is a module or a folder of modules. A
# module may import modules of lower layers, of its own folder, and further left in its own row.
LAYERS = (
  (("errors", "validation", "config", "presets", "store.files"),),
  (("data",), ("lstm",), ("plots",)),
  (("task", "model", "language_model", "optimizer", "processes", "devices"),),
  (("program",), ("store",)),
  (("evaluation", "explanation"), ("checking",), ("report",)),
  (("prediction", "export"), ("training",)),
  (("comparison",), ("serving",), ("scoring",)),
  (("arguments", "exits", "cli"),),
)
# The layer, the row in it and the place in that row, by name.
PLACES = {
  name: (layer, row, place)
  for layer, rows in enumerate(LAYERS)
  for row, names in enumerate(rows)
  for place, name in enumerate(names)
}
# `imdb_jax/__init__.py` only names what users import, lazily.
TOP = ""
# The recurrence can be used alone.
NOTHING_OF_OURS = {"lstm", "errors"}
# Modules that may import a package; all others may not.
ONLY_IN = {
  "orbax": {"store"},
  "filelock": {"data", "store.run_directory"},
  "tensorflow_datasets": {"data"},
  "array_record": {"data"},
  "matplotlib": {"plots"},
  "rich": {"training"},
  "sklearn": {"comparison"},
  "safetensors": {"store.arrays", "export"},
  "starlette": {"serving"},
  "uvicorn": {"serving"},
  "argparse": {"arguments"},
  "jinja2": {"report"},
  "tensorboardX": {"store.metrics_log"},
}
WITHOUT_JAX = {
  *("errors", "validation", "config", "presets", "arguments", "exits", "data", "plots", "checking", "scoring"),
  *("store.files", "store.metrics_log", "store.run_directory"),
}
JAX_PACKAGES = {"jax", "jaxlib", "flax", "optax", "orbax"}
MAY_COMPILE = {"program", "lstm.choice", "training.skipgram"}
COMPILERS = {"jit", "pjit", "pmap"}

MAX_LINES = 9_578
MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 60
MAX_CONSTRUCTOR_ARGUMENTS = 5


def modules() -> dict[str, Path]:
  """Return the files of the package by their dotted names below it."""
  found = {}
  for path in sorted(PACKAGE.rglob("*.py")):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
  return found


MODULES = modules()


def is_within(module: str, names: set[str]) -> bool:
  """Return whether a module is one of these modules, or in one of these folders."""
  return any(module == name or module.startswith(f"{name}.") for name in names)


def room_of(module: str) -> str:
  """Return the most specific name of `LAYERS` that a module belongs to."""
  return max((name for name in PLACES if is_within(module, {name})), key=len, default="")


def imported(source: str) -> Iterator[str]:
  """Yield full names of imported modules; `from a import b` is a.b if that is a module of ours, else a."""
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, "relative import"
      for alias in node.names:
        whole = f"{node.module}.{alias.name}"
        yield whole if whole.removeprefix("imdb_jax.") in MODULES or node.module == "jax" else node.module or ""


def may_import(module: str, target: str) -> bool:
  """Return whether a module of the package may import another one."""
  room, other = room_of(module), room_of(target)
  if room == other:
    return True
  if not other or room in NOTHING_OF_OURS:
    return False
  (layer, *row), (other_layer, *other_row) = PLACES[room], PLACES[other]
  return other_layer < layer or (other_layer == layer and other_row[0] == row[0] and other_row[1] < row[1])


def import_faults(module: str, source: str) -> list[str]:
  """Return what is wrong with the imports of a module."""
  found = []
  for name in imported(source):
    package = name.split(".")[0]
    if package == "imdb_jax" and module != TOP:
      target = name.removeprefix("imdb_jax").removeprefix(".")
      # A folder's own name stands for its docstring alone.
      if target != "store" and not may_import(module, target):
        found.append(f"{module} imports {name}, which is not below it")
    if name.startswith("jax._src") or package == "jaxlib":
      found.append(f"{module} imports {name}, which is private")
    if package in ONLY_IN and not is_within(module, ONLY_IN[package]):
      found.append(f"{module} imports {name}, which only {', '.join(sorted(ONLY_IN[package]))} may")
    if is_within(module, WITHOUT_JAX) and package in JAX_PACKAGES:
      found.append(f"{module} imports {name}, but works without JAX")
  return found


def compile_faults(module: str, source: str) -> list[str]:
  """Return where a module that may not compile does so."""
  if module in MAY_COMPILE:
    return []
  nodes = list(ast.walk(ast.parse(source)))
  lines = [node.lineno for node in nodes if isinstance(node, ast.Attribute) and node.attr in COMPILERS]
  lines += [
    node.lineno for node in nodes if isinstance(node, ast.ImportFrom) and {a.name for a in node.names} & COMPILERS
  ]
  return [f"{module}, line {line}: compiles, which only {', '.join(sorted(MAY_COMPILE))} may" for line in lines]


def size_faults(source: str) -> list[str]:
  """Return what is too large in a module."""
  found, num_lines = [], len(source.splitlines())
  if num_lines > MAX_FILE_LINES:
    found.append(f"{num_lines} lines")
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      # Without the signature, in which each argument may have its shape.
      num_lines = (node.end_lineno or 0) - node.body[0].lineno + 1
      if num_lines > MAX_FUNCTION_LINES:
        found.append(f"{node.name} has {num_lines} lines")
      given = node.args
      num_arguments = len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs) - 1
      if node.name == "__init__" and num_arguments > MAX_CONSTRUCTOR_ARGUMENTS:
        found.append(f"a constructor has {num_arguments} arguments")
  return found


def read(module: str) -> str:
  return MODULES[module].read_text(encoding="utf-8")


def test_every_module_has_its_layer():
  assert {module for module in MODULES if module not in (TOP, "store") and not room_of(module)} == set()
  assert {name for name in PLACES if name not in MODULES} == set(), "a module that is gone"


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_only(module):
  assert import_faults(module, read(module)) == []


@pytest.mark.parametrize(
  ("module", "source"),
  [
    ("model", "from imdb_jax import program"),
    ("model", "from imdb_jax import devices"),
    ("model", "from imdb_jax.store import checkpoints"),
    ("model", "def f():\n  import imdb_jax.training.loop"),
    ("model", "import imdb_jax"),
    ("processes", "from imdb_jax.devices import start"),
    ("lstm.scan", "from imdb_jax.config import Config"),
    ("lstm.scan", "from imdb_jax.errors import UsageError"),
    ("errors", "from imdb_jax import validation"),
    ("validation", "from imdb_jax import config"),
    ("plots", "from imdb_jax.data import batches"),
    ("data.tokens", "from imdb_jax.model import TextClassifier"),
    ("data.tokens", "from imdb_jax.store import metrics_log"),
    ("data.tokens", "import jax"),
    ("data.tokens", "def f():\n  from flax import linen"),
    ("store.files", "from imdb_jax.store import run_directory"),
    ("store.files", "from imdb_jax.data import reviews"),
    ("store.run_directory", "import jax"),
    ("store.metrics_log", "import optax"),
    ("store.metrics_log", "from imdb_jax import evaluation"),
    ("store.checkpoints", "from imdb_jax import program"),
    ("program", "from imdb_jax.store import files, arrays"),
    ("prediction", "from imdb_jax.training import loop"),
    ("training.loop", "from imdb_jax import prediction"),
    ("training.loop", "from imdb_jax import cli"),
    ("training.loop", "import orbax.checkpoint as ocp"),
    ("training.loop", "from matplotlib.figure import Figure"),
    ("evaluation", "from rich.console import Console"),
    ("cli", "import argparse"),
    ("arguments", "from imdb_jax import cli"),
    ("program", "from jax._src import core"),
    ("program", "from jax import _src"),
    ("program", "import jaxlib"),
    ("config", "import jax.numpy"),
  ],
)
def test_a_forbidden_import_is_found(module, source):
  assert len(import_faults(module, source)) == 1


@pytest.mark.parametrize(
  ("module", "source"),
  [
    ("devices", "from imdb_jax import processes"),
    ("cli", "from imdb_jax import arguments"),
    ("config", "from imdb_jax.validation import Settings"),
    ("data.tokens", "from imdb_jax.store import files"),
    ("store.checkpoints", "from imdb_jax.store import files, arrays"),
    ("store.checkpoints", "import orbax.checkpoint as ocp"),
    ("training.metrics", "from imdb_jax.training.console import Console"),
  ],
)
def test_an_allowed_import_is_no_fault(module, source):
  assert import_faults(module, source) == []


def test_contributing_describes_the_same_layers():
  text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
  table = text[text.index("| layer | modules |") :].split("\n\n")[0]
  layers: list[list[tuple[str, ...]]] = []
  for line in table.splitlines()[2:]:
    number, names = (cell.strip() for cell in line.split("|")[1:3])
    if number:
      assert int(number) == len(layers)
      layers.append([])
    layers[-1].append(tuple(name.removesuffix("/") for name in re.findall(r"`([\w./]+)`", names)))
  assert layers == list(map(list, LAYERS))


@pytest.mark.parametrize("module", MODULES)
def test_only_the_program_compiles(module):
  """The kernel's self-check and skip-gram are computed before the first step, outside of a run's program."""
  assert compile_faults(module, read(module)) == []


@pytest.mark.parametrize(
  "source",
  [
    "import jax\nf = jax.jit(g)",
    "from functools import partial\n@partial(jax.jit, static_argnums=0)\ndef f(): pass",
    "from jax import jit",
    "from jax.experimental.pjit import pjit",
    "@nn.jit\nclass Model: pass",
    "jax.pmap(f)",
  ],
)
def test_a_forbidden_compilation_is_found(source):
  assert len(compile_faults("evaluation", source)) == 1
  assert compile_faults("program", source) == []


@pytest.mark.parametrize("module", MODULES)
def test_files_functions_and_constructors_are_small(module):
  assert size_faults(read(module)) == []


@pytest.mark.parametrize(
  "source",
  [
    "x = 1\n" * 351,
    "class A:\n  def f(self):\n" + "    x = 1\n" * 61,
    "class A:\n  def __init__(self, a, b, c, *, d, e, f): pass",
  ],
)
def test_what_is_too_large_is_found(source):
  assert len(size_faults(source)) == 1


def test_the_package_is_small():
  assert sum(len(read(module).splitlines()) for module in MODULES) <= MAX_LINES


def test_every_imported_package_is_declared():
  """A package that is only installed along with another one may go away with it."""
  project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
  requirements = project["dependencies"]
  requirements += [
    requirement
    for name in ("compare", "serve", "export", "tensorboard")
    for requirement in project["optional-dependencies"][name]
  ]
  declared = {re.split(r"[^\w-]", requirement)[0] for requirement in requirements}
  packages = {name.split(".")[0] for module in MODULES for name in imported(read(module))}
  packages -= sys.stdlib_module_names | {"imdb_jax"}
  sources = importlib.metadata.packages_distributions()
  assert "numpy" in packages
  assert {package for package in packages if not declared & set(sources.get(package, []))} == set()


def run_python(code: str) -> str:
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
  assert done.returncode == 0, done.stderr[-2000:]
  return done.stdout.strip()


def test_arguments_data_and_files_are_read_without_jax():
  """`--help` answers at once, and arrays in the cache need no tensorflow-datasets. Indirect imports count, too."""
  light = [module for module in MODULES if is_within(module, WITHOUT_JAX) and module != "data.tfds_imdb"]
  heavy = ["jax", "flax", "optax", "orbax", "tensorflow_datasets", "tensorflow", "matplotlib", "keras"]
  names = ", ".join(f"imdb_jax.{module}" for module in [*light, "cli"])
  assert run_python(f"import sys, {names}; print([name for name in {heavy} if name in sys.modules])") == "[]"


def test_the_public_names_are_listed_and_imported_when_they_are_used():
  """A notebook's completion asks `dir`."""
  run_python(
    "import imdb_jax, sys; assert {*imdb_jax.__all__} <= {*dir(imdb_jax)}; assert 'jax' not in sys.modules;"
    "[getattr(imdb_jax, name) for name in imdb_jax.__all__]; assert 'jax' in sys.modules"
  )
