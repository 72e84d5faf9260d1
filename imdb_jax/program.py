"""Everything that is compiled: initialisation, training steps and prediction, for all seeds of a run.

Every array of the state has a first axis [seeds], also for a single seed. The reviews stay in host memory, and each
dispatch gets those of its steps. A global batch is sharded over the mesh: `shard_map` gives each device its rows, so
that gradients are summed across devices once per step and not once per position of the time loop.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec

from imdb_jax import devices, lstm
from imdb_jax.config import Config
from imdb_jax.data import ngrams
from imdb_jax.data.reviews import CLASSES
from imdb_jax.data.tokenizer import PADDING_ID
from imdb_jax.data.tokens import TokenSplit
from imdb_jax.errors import UsageError
from imdb_jax.language_model import LanguageModel, NextWord
from imdb_jax.model import OwnModel, TextClassifier, check_own_model, draw_dropout_masks
from imdb_jax.optimizer import make_optimizer
from imdb_jax.task import Classification

Examples = dict[str, jax.Array]
Sums = dict[str, jax.Array]

# Of all seeds together.
_MAX_LOOKUP_BYTES = 2**28
_ROWS, _REPLICATED = PartitionSpec(devices.AXIS), PartitionSpec()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
  """State that training changes, for all seeds.

  Attributes:
    step: i32[seeds], steps done.
    params: parameters of the model, a tree of dicts of f32[seeds, ...], and u32 for the keys of n-grams.
    opt_state: state of the optimizer, for the parameters that steps change.
    key: u32[seeds, 2], the raw PRNG key from which the dropout masks of all steps follow.
  """

  step: jax.Array
  params: Any
  opt_state: optax.OptState
  key: jax.Array


class Program:
  """The compiled functions of a run. Only skip-gram and the kernel's self-check call `jax.jit` elsewhere.

  Attributes:
    config: settings of the run.
    mesh: devices.
    task: loss and metrics.
    model: the network.
    own_model: name of the class of a model that was given; None for the network of the settings.
    choice: implementation of the recurrence, and why; of a model that was given, its name.
    train_steps: jitted `(state, batches, num_steps) -> (state, sums)`: several training steps in one dispatch. It
      donates the buffers of the state. `batches` and `num_steps` come from `put_batches`. The sums are those of
      `Classification.sums`, `is_finite` (1 if loss, gradients and parameters are finite, else 0) and `grad_norm` (of
      the mean loss, over all parameters, before clipping), f32[seeds, k] each; entries beyond `num_steps` are 0. One
      program makes any number of steps up to k, so that a run's result does not depend on where it stops.
    predict: jitted `(params, tokens int[b, t], lengths i32[b]) -> logits f32[seeds, b, head_size]`. It is faster with
      parameters from `prepare`.
    features: jitted likewise, with the inputs of the head as the result, f32[seeds, b, n].
    slopes: jitted `(params, temperature, tokens int[t], length, label, presence f32[b]) -> f32[b, 1 + t]`: the log odds
      of the label for one text at several presences of all words (`TextClassifier.fade`), and its slope for each word.
  """

  def __init__(
    self,
    config: Config,
    mesh: Mesh,
    optimizer: optax.GradientTransformation | None = None,
    classes: tuple[str, ...] = CLASSES,
    model: nn.Module | None = None,
  ):
    """Build the functions; they are compiled when they are first called.

    `optimizer` is any of optax that needs only gradients and parameters; by default, that of the settings for one step.
    `classes` are the names of the labels. `model` is any Flax module in place of the network, see `OwnModel`.

    Raises:
      UsageError: the named implementation does not support the model or the device, there are too many classes,
        --class-weights names another one, or a model of your own cannot be trained with these settings.
    """
    is_classifier = config.training.objective == "label"
    self.config, self.mesh = config, mesh
    self.task: Any = Classification(classes) if is_classifier else NextWord()
    if config.model.ngrams and len(classes) > ngrams.MAX_CLASSES:
      raise UsageError(f"--ngrams {config.model.ngrams}: allows {ngrams.MAX_CLASSES} classes, not {len(classes):,}.")
    # Raises before a run directory is made.
    self.task.loss_weights(np.zeros(0, np.int32), config.training.class_weights)
    precision = config.training.matmul_precision
    self._matmul_precision = "float32" if precision == "auto" else precision
    self.own_model = None if model is None else type(model).__name__
    if model is None:
      self.choice = _choose(config, mesh.devices.flat[0])
      kind = TextClassifier if is_classifier else LanguageModel
      self.model: Any = kind(config.model, config.data.vocabulary_size, self.task.head_size, self.choice.name)
    elif not is_classifier or config.model.ngrams or config.model.embedding != "random" or config.runtime.init_from:
      raise UsageError("Your own model requires --objective label, --embedding random, --ngrams 0 and no --init-from.")
    else:
      check_own_model(model, config, self.task.head_size)
      self.choice, self.model = lstm.Choice(type(model).__name__, "a model of your own"), OwnModel(model)
    self._optimizer = optimizer or make_optimizer(config.optimizer, num_steps=1)
    everywhere, rows = devices.replicated(mesh), devices.over_rows(mesh)
    self._init = jax.jit(self._init_seeds, out_shardings=everywhere)
    self.train_steps = jax.jit(
      self._train_steps,
      donate_argnums=0,
      in_shardings=(everywhere, devices.over_rows(mesh, axis=2), everywhere),
      out_shardings=everywhere,
    )
    self.predict, self.features = (
      jax.jit(functools.partial(self._apply, name), in_shardings=(everywhere, rows, rows), out_shardings=everywhere)
      for name in ("predict", "features")
    )
    self.slopes = jax.jit(self._slopes, in_shardings=(*[everywhere] * 5, rows), out_shardings=everywhere)
    self._prepare = jax.jit(self._with_lookup, out_shardings=everywhere)

  @property
  def precision(self) -> str:
    """Precision of the matrix products, in words."""
    others = self._matmul_precision
    recurrent = lstm.recurrent_precision(self.choice.name, self.config.training.matmul_precision)
    return others if recurrent == others else f"{others}, recurrence {recurrent}"

  def init(self, fitted: Any = None) -> TrainState:
    """Return the state before the first step, on every device.

    Every seed starts from the `fitted` parameters of one layer or several, by layer; others are drawn at random.
    """
    state = self._init(np.array(self.config.training.seeds, np.uint32))
    num_seeds = self.config.training.num_seeds
    if jax.process_count() > 1:
      # Other machines may round differently.
      fitted = multihost_utils.broadcast_one_to_all(fitted or {})
    params = jax.tree.map(lambda array: np.broadcast_to(array, (num_seeds, *array.shape)), fitted or {})
    return dataclasses.replace(state, params=state.params | devices.put(params, devices.replicated(self.mesh)))

  def abstract_state(self) -> TrainState:
    """Return shapes, dtypes and shardings of the state, into which a checkpoint is restored."""
    place = devices.replicated(self.mesh)
    shapes = jax.eval_shape(self._init_seeds, jnp.zeros(self.config.training.num_seeds, jnp.uint32))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes)

  def exported(self, params: Any, temperature: float, prior: np.ndarray) -> jax.export.Exported:
    """Return prediction with these parameters as StableHLO that runs on CPUs, NVIDIA GPUs and TPUs.

    The program turns tokens i32[b, t], for any b, into the probabilities of the classes, f32[b, classes]. A review
    without a token has those of `prior`, f32[classes].
    """
    # The other implementations support less.
    model = self.model if self.own_model else self.model.clone(implementation="scan")

    def probabilities(tokens: jax.Array) -> jax.Array:
      lengths = jnp.sum(tokens != PADDING_ID, axis=1, dtype=jnp.int32)
      with jax.default_matmul_precision(self._matmul_precision):
        apply = jax.vmap(lambda params: model.apply({"params": params}, tokens, lengths, method="predict"))
        logits: Any = apply(params)
      found = jax.nn.softmax(self.task.traced_ensemble(logits) / temperature)
      return jnp.where(lengths[:, None] > 0, found, prior[None])

    shape = *jax.export.symbolic_shape("b"), self.config.data.sequence_length
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
    return jax.export.export(jax.jit(probabilities), platforms=("cpu", "cuda", "tpu"))(tokens)

  def prepare(self, params: Any) -> Any:
    """Return parameters with which `predict` is faster, if the model and its size allow that."""
    size = 16 * self.config.training.num_seeds * self.config.data.vocabulary_size * self.config.model.hidden_size
    can_prepare = self.model.has_lookup and size <= _MAX_LOOKUP_BYTES
    return self._prepare(params) if can_prepare and "lookup" not in params else params

  def put_batches(self, split: TokenSplit, loss_weights: np.ndarray, rows: np.ndarray) -> tuple[Examples, jax.Array]:
    """Place the reviews of some steps on the devices, on each its part of every batch.

    The rows are i32[steps, seeds, b], -1 for none. `loss_weights`, f32[n], are those of all n reviews of the split.

    Returns:
      Arrays [seeds, k, b, ...], padded to k = `steps_per_dispatch` steps and to a batch that divides over the devices;
      and the number of steps, i32[].
    """
    num_steps, num_seeds, batch_size = rows.shape
    shape = num_seeds, self.config.runtime.steps_per_dispatch, devices.padded_size(batch_size, self.mesh)
    padded = np.full(shape, -1, np.int32)
    padded[:, :num_steps, :batch_size] = rows.swapaxes(0, 1)
    batches = {name: array[padded] for name, array in (vars(split) | {"loss_weights": loss_weights}).items()}
    for array in batches.values():
      array[padded < 0] = 0
    batches["weights"] = (padded >= 0).astype(np.float32)
    return (
      devices.put(batches, devices.over_rows(self.mesh, axis=2)),
      devices.put(np.array(num_steps, np.int32), devices.replicated(self.mesh)),
    )

  def _over_seeds(self, function: Callable[..., Any]) -> Callable[..., Any]:
    """Turn a function of one seed's arrays into one of all seeds' arrays."""
    # On a CPU one seed keeps all cores busy, and vmap would pad every seed to the longest batch.
    if self.mesh.devices.flat[0].platform == "cpu":
      return lambda *arrays: jax.lax.map(lambda one: function(*one), arrays)
    return jax.vmap(function)

  def _init_seeds(self, seeds: jax.Array) -> TrainState:
    def init(seed: jax.Array) -> TrainState:
      params_key, dropout_key = jax.random.split(jax.random.key(seed))
      tokens, lengths = jnp.zeros((1, self.config.data.sequence_length), jnp.int32), jnp.ones((1,), jnp.int32)
      params = self.model.init(params_key, tokens, lengths, method="predict")["params"]
      return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=self._optimizer.init(_trained(params)),
        key=jax.random.key_data(dropout_key),
      )

    # vmap might round the decomposition behind the recurrent kernel differently.
    return jax.lax.map(init, seeds)

  def _train_steps(self, state: TrainState, batches: Examples, num_steps: jax.Array):
    def one_seed(state: TrainState, batches: Examples):
      def step(i, carry):
        state, sums = carry
        state, step_sums = self._train_step(state, {name: array[i] for name, array in batches.items()})
        return state, jax.tree.map(lambda values, value: values.at[i].set(value), sums, step_sums)

      sums = dict.fromkeys(("loss", "correct", "weight", "is_finite", "grad_norm"), jnp.zeros(len(batches["labels"])))
      return jax.lax.fori_loop(0, num_steps, step, (state, sums))

    # Seeds outside, steps inside: XLA would copy a state with a seed axis on every step.
    with jax.default_matmul_precision(self._matmul_precision):
      return self._over_seeds(one_seed)(state, batches)

  def _sharded(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    # check_vma would sum gradients over devices where the parameters are used, inside the time loop.
    return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

  def _train_step(self, state: TrainState, examples: Examples) -> tuple[TrainState, Sums]:
    """One step of one seed."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    # Drawn for the global batch, so that the result does not depend on the number of devices.
    dropout_masks = draw_dropout_masks(key, self.config.model, examples["labels"].shape[0])
    drawn = self.model.draw(jax.random.fold_in(key, 0))
    gradients = self._sharded(self._gradients, (_REPLICATED, _REPLICATED, _ROWS, _ROWS), _REPLICATED)
    params = _trained(state.params)
    grads, sums = gradients(params, drawn, examples, dropout_masks)
    grads = jax.tree.map(lambda grad: grad / sums["weight"], grads)
    # optax raises a float to an integer power, which strict promotion would refuse.
    updates: Any
    with jax.numpy_dtype_promotion("standard"):
      updates, opt_state = self._optimizer.update(grads, state.opt_state, params)
    settings = self.config.optimizer
    rates = {"embedding": settings.embedding_rate, **dict.fromkeys(self.model.layers, settings.recurrent_rate)}
    changed = {layer: rate for layer, rate in rates.items() if rate != 1 and layer in updates}
    updates = updates | {layer: optax.tree.scale(rate, updates[layer]) for layer, rate in changed.items()}
    params = optax.apply_updates(params, updates)
    grad_norm = optax.tree.norm(grads)
    finite = [jnp.isfinite(sums["loss"]), jnp.isfinite(grad_norm)]
    is_finite = jnp.stack([*finite, *(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params))]).all()
    state = TrainState(step=state.step + 1, params=state.params | params, opt_state=opt_state, key=state.key)
    return state, sums | {"is_finite": is_finite.astype(jnp.float32), "grad_norm": grad_norm}

  def _gradients(self, params: Any, drawn: Any, examples: Examples, dropout_masks: Any) -> tuple[Any, Sums]:
    """Return the gradients of the summed loss and the sums of a batch, on each device the total over all devices."""

    def summed_loss(params):
      reviews = examples["tokens"], examples["lengths"]
      logits: Any = self.model.apply({"params": params}, *reviews, dropout_masks, **drawn)
      sums = self.task.sums(logits, examples["labels"], examples["weights"], examples["loss_weights"])
      return sums["loss"], sums

    grads, sums = jax.grad(summed_loss, has_aux=True)(params)
    return jax.lax.psum((grads, sums), devices.AXIS)

  def _apply(self, method: str, params: Any, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    def apply(params, tokens, lengths):
      return self.model.apply({"params": params}, tokens, lengths, params.get("lookup"), method=method)

    sharded = self._sharded(apply, (_REPLICATED, _ROWS, _ROWS), _ROWS)
    with jax.default_matmul_precision(self._matmul_precision):
      return self._over_seeds(lambda params: sharded(params, tokens, lengths))(params)

  def _slopes(self, params: Any, temperature: jax.Array, *text: jax.Array) -> jax.Array:
    def slopes(params, temperature, tokens, length, label, presence):
      tokens, lengths, labels = (jnp.stack([each] * len(presence)) for each in (tokens, length, label))

      def log_odds(presence):
        fade = functools.partial(self.model.apply, method="fade")
        logits = self._over_seeds(lambda one: fade({"params": one}, tokens, lengths, presence))(params)
        found = self.task.traced_log_odds(logits, temperature, labels)
        return jnp.sum(found), found

      by_word, found = jax.grad(log_odds, has_aux=True)(jnp.broadcast_to(presence[:, None], tokens.shape))
      return jnp.concatenate([found[:, None], by_word], axis=1)

    with jax.default_matmul_precision(self._matmul_precision):
      return self._sharded(slopes, (*[_REPLICATED] * 5, _ROWS), _ROWS)(params, temperature, *text)

  def _with_lookup(self, params: Any) -> Any:
    with jax.default_matmul_precision(self._matmul_precision):
      lookup = self._over_seeds(lambda params: self.model.lookup(params, self.config.data.sequence_length))(params)
    return params | {"lookup": lookup}


def _trained(params: Any) -> Any:
  """Return the parameters that steps change: all except those of the n-grams."""
  return {layer: values for layer, values in params.items() if layer != "ngrams"}


def _choose(config: Config, device: Any) -> lstm.Choice:
  """Return the implementation of the recurrence that the settings ask for on a device."""
  call = lstm.Call(
    hidden_size=config.model.hidden_size,
    cell=config.model.cell,
    per_gate_masks=config.model.dropout_masks == "per_gate",
    gate_activation=config.model.gate_activation,
    precision=config.training.matmul_precision,
  )
  name = config.runtime.implementation
  if name == "auto":
    return lstm.choose(call, device)
  problem = lstm.unsupported(name, call, device)
  if problem is not None:
    raise UsageError(f"--implementation {name}: {problem}.")
  return lstm.Choice(name, "--implementation")
