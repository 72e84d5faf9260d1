"""The program in docs/lstm.md."""

from pathlib import Path

import jax
import numpy as np
import pytest

DOCUMENT = Path(__file__).parents[2] / "docs" / "lstm.md"


@pytest.mark.slow
def test_the_example_learns():
  """Chance is 1/3. The chains that made the sequences tell how many can be told apart at all."""
  program = DOCUMENT.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
  found = {}
  # As in a program of its own: this project's tests are stricter about types than JAX.
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    exec(program, found)
  chains, tokens = found["chains"], found["tokens"]
  likely = []
  for row, length in zip(tokens, found["lengths"], strict=True):
    symbols = row[-length:] - 1
    likely.append(np.log(chains[:, symbols[:-1], symbols[1:]]).sum(axis=1).argmax())
  best = np.mean(np.array(likely) == found["labels"])
  assert best - 0.05 < found["accuracy"]
