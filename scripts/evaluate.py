"""Evaluate a run: `python scripts/evaluate.py RUN_DIR`."""

import signal

if __name__ == "__main__":
  # Ctrl-C while Python imports ends it without a traceback; the command then takes over.
  if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
  from imdb_jax import cli

  cli.evaluate()
