"""A run of a second, and what it leaves behind."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from reliability.sandbox import newest_state

from imdb_jax.config import Config
from imdb_jax.presets import PRESETS


def tiny(run_dir: Path, **training) -> Config:
  """Return the settings of a run of two epochs of 4 steps, of 10 reviews each except the last of an epoch."""
  sample = PRESETS["sample"]
  return dataclasses.replace(
    sample,
    data=dataclasses.replace(sample.data, limit=32, sequence_length=16),
    model=dataclasses.replace(sample.model, embedding_size=4, hidden_size=4),
    training=dataclasses.replace(sample.training, **({"epochs": 2, "batch_size": 10} | training)),
    runtime=dataclasses.replace(
      sample.runtime, run_dir=run_dir, platform="cpu", num_devices=1, log_every=3, steps_per_dispatch=1
    ),
  )


def change(config: Config, section: str, **settings) -> Config:
  """Return a config with other settings in one section."""
  return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **settings)})


def lines(run_dir: Path) -> list[dict]:
  """Return the lines of metrics.jsonl."""
  return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def without_times(run_dir: Path) -> list[dict]:
  """Return the lines of metrics.jsonl without their times."""
  return [
    {name: value for name, value in line.items() if "second" not in name and name != "time"} for line in lines(run_dir)
  ]


def final_state(run_dir: Path) -> dict[str, np.ndarray]:
  """Return every array of the newest checkpoint."""
  _, restored = newest_state(run_dir)
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(restored)}


def assert_same_end(one: Config, other: Config) -> None:
  """Assert that two runs have the same bits, except times."""
  assert without_times(one.run_dir) == without_times(other.run_dir)
  expected, found = final_state(one.run_dir), final_state(other.run_dir)
  assert expected.keys() == found.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(found[name], value, err_msg=name)


def assert_close_end(expected: Path, found: Path) -> None:
  """Assert that two runs are equal, except for rounding and times."""
  for one, other in zip(without_times(found), without_times(expected), strict=True):
    assert one["kind"] == other["kind"]
    assert flat(one) == pytest.approx(flat(other), rel=1e-4)
  ends = final_state(expected), final_state(found)
  for name, value in ends[0].items():
    np.testing.assert_allclose(ends[1][name], value, rtol=1e-3, atol=1e-6, err_msg=name)


def flat(line: dict) -> dict[str, float]:
  """Return the numbers of a line, with those of its seeds under names of their own."""
  numbers = {name: value for name, value in line.items() if name not in ("kind", "seeds")}
  for seed in line.get("seeds", []):
    numbers |= {f"{name} {seed['seed']}": value for name, value in seed.items()}
  return numbers
