"""A run of a second, and what it left."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from reliability.sandbox import newest_state

from imdb_jax.config import PRESETS, Config


def tiny(run_dir, **training) -> Config:
  """A run of two epochs of 4 steps, of 10 reviews each but the last of an epoch."""
  sample = PRESETS["sample"]
  return dataclasses.replace(
    sample,
    dataset=dataclasses.replace(sample.dataset, limit=32, sequence_length=16),
    model=dataclasses.replace(sample.model, embedding_size=4, hidden_size=4),
    training=dataclasses.replace(sample.training, **({"epochs": 2, "batch_size": 10} | training)),
    runtime=dataclasses.replace(
      sample.runtime, run_dir=run_dir, platform="cpu", num_devices=1, log_every=3, steps_per_dispatch=1
    ),
  )


def lines(run_dir) -> list[dict]:
  return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def without_times(run_dir) -> list[dict]:
  return [{name: value for name, value in line.items() if "seconds" not in name} for line in lines(run_dir)]


def final_state(run_dir: Path) -> dict[str, np.ndarray]:
  """Every array of the newest checkpoint."""
  _, restored = newest_state(run_dir)
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(restored)}


def assert_close_end(expected: Path, found: Path) -> None:
  """But for rounding and times."""
  for one, other in zip(without_times(found), without_times(expected), strict=True):
    assert one == other | {name: pytest.approx(value, rel=1e-4) for name, value in other.items() if "loss" in name}
  for name, value in final_state(expected).items():
    np.testing.assert_allclose(final_state(found)[name], value, rtol=1e-3, atol=1e-6, err_msg=name)
