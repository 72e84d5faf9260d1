"""Prepare the reviews as a tensorflow-datasets store: `python scripts/prepare.py --archive PATH`."""

from imdb_jax import cli

if __name__ == "__main__":
  cli.prepare()
