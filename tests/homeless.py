"""A user without a home, as in a container that runs under a number."""

import pwd

import pytest


def make_homeless(monkeypatch: pytest.MonkeyPatch) -> None:
  """Unset $HOME and everything that may stand for it, and let the user have no name."""
  for name in ("HOME", "XDG_CACHE_HOME", "IMDB_JAX_CACHE", "TFDS_DATA_DIR"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
