"""Fixtures of the data tests: a small archive, a record store made from it, and a machine without network."""

import importlib
import socket
from pathlib import Path

import pytest
from data.archives import COUNTS, pack
from data.corpus import Corpus


@pytest.fixture(scope="session")
def small_archive(tmp_path_factory) -> Path:
  """An archive that nobody changes, named like the official one."""
  return pack(tmp_path_factory.mktemp("archive") / "aclImdb.gz").rename(
    tmp_path_factory.getbasetemp() / "aclImdb_v1.tar.gz"
  )


@pytest.fixture
def good(tmp_path) -> Path:
  """An archive that the test may change."""
  return pack(tmp_path / "good.tar")


@pytest.fixture(scope="session")
def tfds_imdb():
  """The module, if its packages are installed."""
  pytest.importorskip("array_record")
  return importlib.import_module("imdb_jax.data.tfds_imdb")


@pytest.fixture(scope="session")
def pristine(tfds_imdb, small_archive, tmp_path_factory) -> Path:
  """The root of a record store that nobody changes."""
  root = tmp_path_factory.mktemp("pristine")
  tfds_imdb.prepare(root, small_archive, expected=COUNTS)
  return root


@pytest.fixture
def no_network(monkeypatch):
  """A machine on which every connection is an error."""

  def refuse(*args, **kwargs):
    raise AssertionError("touched the network")

  monkeypatch.setattr(socket, "getaddrinfo", refuse)
  monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def corpus() -> Corpus:
  return Corpus("archive")


@pytest.fixture
def cache_dir(tmp_path) -> Path:
  return tmp_path / "cache"
