"""Classify texts with an exported model in NumPy alone: `python predict_numpy.py FOLDER TEXT ...`.

FOLDER comes from `imdb-jax export RUN --output FOLDER`. The run must have LSTM cells, and no n-grams.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np


class Model:
  def __init__(self, folder):
    parts = (
      json.loads((Path(folder) / f"{name}.json").read_text()) for name in ("config", "vocab", "classes", "model")
    )
    self.config, self.vocabulary, self.classes, self.facts = parts
    self.ids = {word: i for i, word in enumerate(self.vocabulary["words"], start=1)}
    content = (Path(folder) / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    # Such as params["lstm.kernel"], with a first axis [seeds].
    self.params = {
      name: np.frombuffer(content[start:][slice(*entry["data_offsets"])], "<f4").reshape(entry["shape"])
      for name, entry in json.loads(content[8:start]).items()
    }

  def encode(self, text):
    """Return the ids of the last known words of a text, after padding if the model reads that."""
    text = re.sub("<[^>]+>", " ", text) if self.vocabulary["strip_html"] else text
    # Punctuation marks are words of their own, or separators.
    replacement = r" \g<0> " if self.vocabulary.get("punctuation") else " "
    text = re.sub('[!"#$%&()*+,./:;<=>?@[\\\\\\]^_`{|}~-]', replacement, text.lower())
    words = re.split("[ \t\n\ufeff]", text)
    length = self.config["data"]["sequence_length"]
    known = [self.ids[word] for word in words if word in self.ids][-length:]
    return known if self.config["model"]["mask_padding"] else [0] * (length - len(known)) + known

  def run(self, inputs, name, seed):
    """Return the hidden states [t, h] of an LSTM over inputs [t, e]."""
    kernel, recurrent, bias = (self.params[f"{name}.{part}"][seed] for part in ("kernel", "recurrent_kernel", "bias"))
    gate = sigmoid if self.config["model"]["gate_activation"] == "sigmoid" else lambda x: np.clip(0.2 * x + 0.5, 0, 1)
    c, h, states = np.zeros(len(recurrent)), np.zeros(len(recurrent)), []
    for x in inputs @ kernel + bias:
      i, f, g, o = np.split(x + h @ recurrent, 4)
      c = gate(f) * c + gate(i) * np.tanh(g)
      h = gate(o) * np.tanh(c)
      states.append(h)
    return np.array(states)

  def logits(self, text, seed):
    inputs, pooled = self.params["embedding.embedding"][seed][self.encode(text)], []
    for name, step in [("lstm", 1), ("backward_lstm", -1)][: self.config["model"]["directions"]]:
      # Without any word, all features are 0.
      states = (
        self.run(inputs[::step], name, seed) if len(inputs) else np.zeros((1, self.config["model"]["hidden_size"]))
      )
      pool = {"last": states[-1], "mean": states.mean(axis=0), "max": states.max(axis=0)}
      pooled += [pool[kind] for kind in self.config["model"]["pooling"].split("_")]
    logits = np.concatenate(pooled) @ self.params["dense.kernel"][seed] + self.params["dense.bias"][seed]
    # One logit is that of the second of two classes.
    return np.append(0, logits) if len(logits) == 1 else logits

  def predict_proba(self, texts):
    """Return the probabilities of the classes, [n, classes]: the mean over the seeds, then the temperature."""
    seeds = range(len(self.params["dense.bias"]))
    mean = np.mean([[softmax(self.logits(text, seed)) for text in texts] for seed in seeds], axis=0)
    # Without a known word, the answer is the share of each class in the training texts.
    is_known = np.array([[any(self.encode(text))] for text in texts])
    return np.where(is_known, softmax(np.log(mean) / self.facts["temperature"]), [*self.classes.values()])


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def softmax(x):
  e = np.exp(x - x.max(axis=-1, keepdims=True))
  return e / e.sum(axis=-1, keepdims=True)


if __name__ == "__main__":
  model = Model(sys.argv[1])
  for text, row in zip(sys.argv[2:], model.predict_proba(sys.argv[2:]), strict=True):
    print({name: round(float(p), 4) for name, p in zip(model.classes, row, strict=True)}, text)
