"""Train or resume a model: `python scripts/train.py --help`."""

from imdb_jax import cli

if __name__ == "__main__":
  cli.train()
