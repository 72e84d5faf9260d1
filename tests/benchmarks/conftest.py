"""Modules and commands of the benchmarks."""

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture
def module(monkeypatch) -> Callable[[str], ModuleType]:
  """A function that imports a module of the benchmarks."""
  monkeypatch.syspath_prepend(str(BENCHMARKS))
  return importlib.import_module


@pytest.fixture(scope="session")
def run() -> Callable[..., subprocess.CompletedProcess[str]]:
  """A function that runs a script of the benchmarks."""

  def run(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=170, stdin=subprocess.DEVNULL)

  return run
