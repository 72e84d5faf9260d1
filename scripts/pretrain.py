"""Train a language model, from which a classifier can start: `python scripts/pretrain.py --run-dir runs/language`."""

import signal

if __name__ == "__main__":
  # Ctrl-C during imports ends Python without a traceback. The command installs its own handler later.
  if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
  from imdb_jax import cli

  cli.run("pretrain")
