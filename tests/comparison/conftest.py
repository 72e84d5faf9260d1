"""Fixtures of the comparison tests."""

import pytest
from comparison.few import RECURRENT, few_reviews

from imdb_jax.comparison import rows
from imdb_jax.data import sample


@pytest.fixture(scope="module", autouse=True)
def tiny():
  """Make every row of the comparison tiny."""
  reviews = few_reviews()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sample, "load", lambda: reviews)
    for row, overrides in RECURRENT.items():
      patch.setitem(rows.RECURRENT, row, ("sample", overrides))
    yield
