"""The optimizer and its learning rate."""

import jax
import jax.numpy as jnp
import optax

from imdb_jax.config import OptimizerConfig


def schedule(config: OptimizerConfig, num_steps: int) -> optax.ScalarOrSchedule:
  """Return the learning rate, as a function of the number of steps done if it changes."""
  is_constant, rate = config.schedule == "constant", config.learning_rate
  return rate if is_constant else optax.schedules.cosine_onecycle_schedule(num_steps, rate)


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
  """Return Adam in Keras's form: lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + epsilon), with t from 1.

  optax adds its epsilon after bias correction of the second moment. There, an epsilon of epsilon / sqrt(1 - b2^t) gives
  Keras's form exactly. Gradients are clipped before it (Pascanu et al. 2013, algorithm 1), and weight decay adds
  lr weight_decay params (Loshchilov and Hutter 2019, algorithm 2). If they are off, the optimizer has no state of them.
  A schedule extends over `num_steps`, the steps of the whole run.
  """

  def epsilon(count: jax.Array) -> jax.Array:
    t = count.astype(jnp.float32) + 1
    return config.epsilon / jnp.sqrt(1 - config.b2**t)

  kind, decay = (optax.adamw, {"weight_decay": config.weight_decay}) if config.weight_decay else (optax.adam, {})
  adam = optax.inject_hyperparams(kind, static_args=("b1", "b2", "learning_rate", "eps_root", *decay))
  optimizer = adam(learning_rate=schedule(config, num_steps), b1=config.b1, b2=config.b2, eps=epsilon, **decay)
  return optimizer if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
