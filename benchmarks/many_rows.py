"""Write a CSV file of many short labelled texts: `python benchmarks/many_rows.py 2000000 texts.csv`.

A text has 20 to 60 words, drawn by Zipf's law from 20,000. Two of them tell its label.
"""

import argparse
import csv
from pathlib import Path

import numpy as np

_NUM_WORDS, _PART = 20_000, 10_000
_SIGNS = {"bad": ["awful", "bad", "dull", "poor"], "good": ["fine", "good", "great", "lovely"]}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("num_rows", type=int, help="Number of texts.")
  parser.add_argument("path", type=Path, help="File to write.")
  flags = parser.parse_args()
  rng, words = np.random.default_rng(0), np.array([f"w{number}" for number in range(_NUM_WORDS)])
  shares = np.cumsum(1 / np.arange(1, _NUM_WORDS + 1))
  with flags.path.open("w", encoding="utf-8", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["text", "label"])
    for start in range(0, flags.num_rows, _PART):
      count = min(_PART, flags.num_rows - start)
      drawn = words[np.searchsorted(shares / shares[-1], rng.random((count, 60)))]
      for text, length, label in zip(drawn, rng.integers(20, 61, count), rng.integers(0, 2, count), strict=True):
        name = [*_SIGNS][label]
        text[rng.integers(0, length, 2)] = rng.choice(_SIGNS[name], 2)
        writer.writerow([" ".join(text[:length]), name])


if __name__ == "__main__":
  main()
