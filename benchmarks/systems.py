"""The systems that the benchmarks compare."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class System:
  """How a system trains the article's model."""

  work: str  # What it computes, for comparisons: a key of `WORKS`.
  computes: str  # Details.
  flags: str = ""  # Flags of our trainer; "" if it is not ours.
  backend: str = ""  # jax or tensorflow for Keras, or torch.
  mask_zero: bool = False  # Whether Keras masks padding.
  # Whether to forbid cuDNN. Otherwise Keras does not use XLA for an LSTM on TensorFlow, even on a machine without
  # cuDNN, and takes twice as long. On JAX, XLA is the default.
  force_xla: bool = False


WORKS = {
  "article": "padding processed, input and recurrent dropout",
  "masked": "padding skipped, input and recurrent dropout",
  "less": "padding processed, input dropout only",
}
# Dropout rate of the LSTM's inputs and of its hidden state.
DROPOUT_RATE = 0.2

_SHARED, _GATES = "masks shared by the gates", "one mask per gate"
_MASKED = "--implementation chunked --mask-padding"
_XLA = f"{_GATES}; jit_compile=True, use_cudnn=False"

OURS = {
  "ours-chunked": System("article", _SHARED, "--implementation chunked"),
  "ours-scan": System("article", _SHARED, "--implementation scan"),
  "ours-mosaic-gpu": System("article", f"{_SHARED}; recurrent products bfloat16", "--implementation mosaic_gpu"),
  "ours-masked": System("masked", f"{_SHARED}; up to the longest review of a batch", _MASKED),
  "ours-bucketed": System("masked", f"{_SHARED}; batches by length", f"{_MASKED} --bucket-by-length"),
}
BASELINES = {
  "keras-jax": System("article", _GATES, backend="jax"),
  "keras-tensorflow": System("article", f"{_GATES}; default settings", backend="tensorflow"),
  "keras-tensorflow-xla": System("article", _XLA, backend="tensorflow", force_xla=True),
  "keras-jax-masked": System("masked", f"{_GATES}; full length", backend="jax", mask_zero=True),
  "keras-tensorflow-xla-masked": System(
    "masked", f"{_XLA}; full length", backend="tensorflow", mask_zero=True, force_xla=True
  ),
  "keras-jax-less": System("less", "no recurrent dropout", backend="jax"),
  "torch": System("less", "no recurrent dropout, which nn.LSTM lacks", backend="torch"),
}
ALL = {**OURS, **BASELINES}

# The recurrence alone: whether it has recurrent dropout.
RECURRENCES = {"mosaic_gpu": True, "chunked": True, "scan": True}
RECURRENCES |= {"keras-jax": True, "keras-jax-without": False, "torch-float32": False, "torch-bfloat16": False}
# Its sizes, of which a benchmark varies one.
RECURRENCE_SIZES = {"batch_size": 32, "num_steps": 400, "hidden_size": 128}
