"""Evaluate a run: `python scripts/evaluate.py RUN_DIR`."""

from imdb_jax import cli

if __name__ == "__main__":
  cli.evaluate()
