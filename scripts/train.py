"""Train or resume a model: `python scripts/train.py --help`."""

import signal

if __name__ == "__main__":
  # Ctrl-C while Python imports ends it without a traceback; the command then takes over.
  if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
  from imdb_jax import cli

  cli.train()
