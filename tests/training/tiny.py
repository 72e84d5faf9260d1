"""A run of a second, and what it left."""

import dataclasses
import json

from imdb_jax.config import PRESETS, Config


def tiny(run_dir, **training) -> Config:
  """A run of two epochs of 4 steps, of 10 reviews each but the last of an epoch."""
  sample = PRESETS["sample"]
  return dataclasses.replace(
    sample,
    dataset=dataclasses.replace(sample.dataset, limit=32, sequence_length=16),
    model=dataclasses.replace(sample.model, embedding_size=4, hidden_size=4),
    training=dataclasses.replace(sample.training, **({"epochs": 2, "batch_size": 10} | training)),
    runtime=dataclasses.replace(sample.runtime, run_dir=run_dir, platform="cpu", num_devices=1, log_every=3),
  )


def lines(run_dir) -> list[dict]:
  return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def without_times(run_dir) -> list[dict]:
  return [{name: value for name, value in line.items() if "seconds" not in name} for line in lines(run_dir)]
