"""Draw a run's curves: `python scripts/plot.py RUN_DIR`."""

from imdb_jax import cli

if __name__ == "__main__":
  cli.plot()
