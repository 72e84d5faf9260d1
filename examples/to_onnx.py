"""Convert an exported model to ONNX: `python to_onnx.py FOLDER model.onnx`. Requires `pip install onnx`.

FOLDER comes from `imdb-jax export RUN --output FOLDER`; the n-grams of a run (`--ngrams`) cannot be converted. The ONNX
model turns `tokens` i32[b, t], padded at the front with 0, into `probabilities` f32[b, classes].
"""

import sys

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from predict_numpy import Model

# Versions of the operations and of the file; ONNX Runtime 1.16 (2023) supports them.
OPSET, IR_VERSION = 18, 9
# Our gates in ONNX's order: i, o, f, g; z, r, g; a simple RNN has none.
GATES = {"lstm": [0, 3, 1, 2], "gru": [0, 1, 2], "rnn": [0]}


class Graph:
  """Operations and constants."""

  def __init__(self):
    self.nodes, self.constants = [], []

  def __call__(self, kind, *inputs, output=0, result=None, **attributes):
    """Add an operation on results, which are names, and on arrays; return the name of one of its outputs."""
    names, result = list(inputs), result or f"result{len(self.nodes)}"
    for i, value in enumerate(inputs):
      if not isinstance(value, str):
        names[i] = f"constant{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), names[i]))
    self.nodes.append(helper.make_node(kind, names, [""] * output + [result], **attributes))
    return result


def convert(model):
  """Return the ONNX model."""
  op, settings, t = Graph(), model.config["model"], model.config["data"]["sequence_length"]
  if settings["ngrams"]:
    raise SystemExit("The n-grams of this run cannot be converted.")
  tokens = op("Transpose", "tokens", perm=[1, 0])
  # Without mask_padding, the model reads padding like a word.
  is_word = op("Greater", tokens, np.int32(0 if settings["mask_padding"] else -1))
  lengths = op("ReduceSum", op("Cast", is_word, to=TensorProto.INT32), [0], keepdims=0)
  # ONNX expects padding at the end.
  positions = np.arange(t, dtype=np.int32)[:, None]
  places = op("Mod", op("Add", positions, op("Sub", np.int32(t), lengths)), np.int32(t))
  tokens, is_word = op("GatherElements", tokens, places), op("Less", positions, lengths)
  seeds = []
  for seed in range(len(model.params["dense.bias"])):
    params = {name: array[seed] for name, array in model.params.items()}
    inputs = op("Gather", params["embedding.embedding"], tokens)
    features = encode(op, settings, params, inputs, is_word, lengths)
    kernel, bias = params["dense.kernel"], params["dense.bias"]
    if len(bias) == 1:
      # One logit is that of the second of two classes.
      kernel, bias = np.pad(kernel, ((0, 0), (1, 0))), np.pad(bias, (1, 0))
    seeds.append(op("Unsqueeze", op("LogSoftmax", op("Gemm", features, kernel, bias), axis=1), [0]))
  mean = op("ReduceLogSumExp", op("Concat", *seeds, axis=0), [0], keepdims=0)
  found = op("Softmax", op("Div", mean, np.float32(model.facts["temperature"])), axis=1)
  # Without a known word, the answer is the share of each class in the training texts.
  is_known = op("Greater", op("ReduceSum", "tokens", [1], keepdims=1), np.int32(0))
  op("Where", is_known, found, np.array([*model.classes.values()], np.float32), result="probabilities")
  graph = helper.make_graph(
    op.nodes,
    "imdb_jax",
    [helper.make_tensor_value_info("tokens", TensorProto.INT32, ["b", t])],
    [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["b", len(model.classes)])],
    op.constants,
  )
  return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


def encode(op, settings, params, inputs, is_word, lengths):
  """Return the pooled hidden states [b, n] of inputs [t, b, e]."""
  cell, column, is_word, pooled = settings["cell"], op("Unsqueeze", lengths, [1]), op("Unsqueeze", is_word, [2]), []
  attributes = {"hidden_size": settings["hidden_size"]} | ({"linear_before_reset": 1} if cell == "gru" else {})
  if settings["gate_activation"] == "hard_sigmoid":
    attributes["activations"] = ["HardSigmoid", "Tanh", "Tanh"]
  for direction, name in [("forward", cell), ("reverse", f"backward_{cell}")][: settings["directions"]]:
    kernel, recurrent_kernel, bias = (
      np.concatenate([np.split(params[f"{name}.{part}"], len(GATES[cell]), axis=-1)[gate] for gate in GATES[cell]], -1)
      for part in ("kernel", "recurrent_kernel", "bias")
    )
    # ONNX has a bias of the inputs and one of the hidden state. Only our GRU has both.
    bias = bias.ravel() if cell == "gru" else np.append(bias, np.zeros_like(bias))
    arguments = inputs, kernel.T[None], recurrent_kernel.T[None], bias[None], lengths
    # The hidden states of all positions, [t, 1, b, h], or the last one, [1, b, h].
    output = int(settings["pooling"] == "last")
    hidden = op(cell.upper(), *arguments, output=output, direction=direction, **attributes)
    hidden = op("Squeeze", hidden, [1 - output])
    for pooling in settings["pooling"].split("_"):
      if pooling == "mean":
        total = op("ReduceSum", op("Where", is_word, hidden, np.float32(0)), [0], keepdims=0)
        pooled.append(op("Div", total, op("Cast", op("Max", column, np.int32(1)), to=TensorProto.FLOAT)))
      elif pooling == "max":
        pooled.append(op("ReduceMax", op("Where", is_word, hidden, np.float32(-np.inf)), [0], keepdims=0))
      else:
        pooled.append(hidden)
  # A text without words has features of 0.
  return op("Where", op("Greater", column, np.int32(0)), op("Concat", *pooled, axis=1), np.float32(0))


if __name__ == "__main__":
  onnx.save(convert(Model(sys.argv[1])), sys.argv[2])
