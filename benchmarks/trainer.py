"""A whole run of the trainer in a process of its own: preset and flags as arguments, one line of JSON at its end."""

import json
import sys

import tyro
import worker

import imdb_jax
from imdb_jax import config


def main() -> None:
  file = worker.answers()
  preset, *flags = sys.argv[1:]
  result = imdb_jax.fit(tyro.cli(config.Config, default=config.preset(preset), args=flags))
  print(json.dumps({"history": result.history, "compile_seconds": result.compile_seconds}), file=file, flush=True)


if __name__ == "__main__":
  main()
