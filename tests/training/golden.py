"""The first 50 losses of a small run, as they have been since they were recorded.

They reveal an unintended change of the numerics. After an intended one, `python tests/training/golden.py` records them
again; say so in the commit.
"""

import dataclasses
import json
import tempfile
from pathlib import Path

from imdb_jax.config import Config
from imdb_jax.presets import PRESETS

STEPS = 50


def path(platform: str) -> Path:
  """Return the file with the losses of a platform."""
  return Path(__file__).parent / f"golden-{platform}.json"


def config(run_dir: Path) -> Config:
  """Return the settings of the run."""
  sample = PRESETS["sample"]
  return dataclasses.replace(
    sample,
    data=dataclasses.replace(sample.data, limit=16 * STEPS, sequence_length=40),
    model=dataclasses.replace(sample.model, embedding_size=16, hidden_size=16),
    optimizer=dataclasses.replace(sample.optimizer, learning_rate=3e-3),
    training=dataclasses.replace(sample.training, epochs=1, batch_size=16),
    runtime=dataclasses.replace(sample.runtime, run_dir=run_dir, num_devices=1, log_every=1),
  )


def losses() -> list[float]:
  """Train, and return the loss of each step."""
  import imdb_jax

  with tempfile.TemporaryDirectory() as folder:
    imdb_jax.fit(config(Path(folder)))
    lines = map(json.loads, (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line["loss"] for line in lines if line["kind"] == "step"]


if __name__ == "__main__":
  import jax

  found = losses()
  path(jax.default_backend()).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
