"""Classify texts: `python scripts/predict.py RUN_DIR TEXT ...`."""

from imdb_jax import cli

if __name__ == "__main__":
  cli.predict()
