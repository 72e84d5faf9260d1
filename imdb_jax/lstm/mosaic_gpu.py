"""One kernel launch for the whole time loop: Pallas on Mosaic GPU, for NVIDIA Hopper and later.

A GPU runs a loop of small kernels at the pace of their launches. Here a thread block keeps the recurrent kernel in its
shared memory and walks all positions of a tile of 16 rows; blocks exchange nothing. A warpgroup has 64 hidden units,
all four gates of them, so that gates, cell state and hidden state never leave its registers, but for the hidden state
that the other warpgroups multiply next. `jax.vmap` adds an axis to the grid.

Precision: operands of the recurrent products are rounded to bfloat16, forward the hidden state after its dropout mask,
backward dz; sums, gates, cell state and hidden state are float32. dz is bfloat16 for the products of the weight
gradients as well. All other products are XLA's, at `jax_default_matmul_precision`.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# Rows of a tile: the narrowest right operand that the tensor cores take with its rows contiguous.
_ROWS = 16
# Hidden units of a warpgroup: the rows of a tensor core product.
_UNITS = 64
# JAX 0.10, the last one for Python 3.11, asks for an index beside the reference; 0.11 warns of one.
_NO_INDEX = () if jax.__version_info__ >= (0, 11) else (None,)
_LOG2_E = math.log2(math.e)
# Closes a gate whatever the state adds: sigmoid and hard sigmoid are 0 there, exactly.
_CLOSED = -1e4


class _Weights(NamedTuple):
  kernel: jax.Array
  recurrent_kernel: jax.Array
  bias: jax.Array


class _Masks(NamedTuple):
  inputs: jax.Array | None
  recurrent: jax.Array


def _sigmoid(x: jax.Array) -> jax.Array:
  """By the hardware's exponential, whose error is 2e-7; its tanh has 5e-4."""
  return 1 / (1 + jnp.exp2(-_LOG2_E * x))


def _tanh(x: jax.Array) -> jax.Array:
  return 2 * _sigmoid(2 * x) - 1


def _activate(z: jax.Array, gate_activation: str) -> jax.Array:
  if gate_activation == "sigmoid":
    return _sigmoid(z)
  return jnp.minimum(jnp.maximum(0.2 * z + 0.5, 0.0), 1.0)


def _slope(gate: jax.Array, gate_activation: str) -> jax.Array:
  """Derivative of i, f or o by its pre-activation, from its value."""
  if gate_activation == "sigmoid":
    return gate * (1 - gate)
  return jnp.where((gate > 0) & (gate < 1), jnp.full_like(gate, 0.2), jnp.zeros_like(gate))


def _load(ref, *index):
  # Rows of 64 bytes, straight to registers: the accumulators' layout is what the compiler would not call optimal.
  return plgpu.load(ref.at[index], *_NO_INDEX, optimized=False)


def _load_weights(weights, weights_smem, is_loaded, block) -> None:
  """Starts the copies of all blocks, one by one: a copy has few dimensions, and `jax.vmap` adds one."""

  @pl.when(block == 0)
  def _():
    @pl.loop(0, weights.shape[0])
    def _(n):
      plgpu.copy_gmem_to_smem(weights.at[n], weights_smem.at[n], is_loaded)


def _forward_kernel(
  projected,  # f32[tiles, t, 4, blocks, units, rows]
  recurrent,  # bf16[4 * blocks * blocks, units, units]: gate, block of z, block of h
  masks,  # f32[tiles, 1 or 4, blocks, units, rows]
  first,  # i32[tiles], the first position with a real row
  gates_out,  # f32[tiles, t, 4, blocks, units, rows]
  c_out,  # f32[tiles, t + 1, blocks, units, rows], before each position
  hidden_out,  # f32[tiles, t, blocks, units, rows]
  recurrent_smem,
  hidden_smem,  # bf16[2, 1 or 4, blocks, units, rows]
  is_loaded,
  is_written,
  *,
  gate_activation: str,
):
  tile, block = lax.axis_index("tile"), lax.axis_index("block")
  t, num_masks, num_blocks = projected.shape[1], masks.shape[1], projected.shape[3]

  _load_weights(recurrent, recurrent_smem, is_loaded, block)
  own_masks = [_load(masks, tile, m, block) for m in range(num_masks)]

  def publish(hidden, position):
    """Lets all warpgroups have the hidden state before a position. Two slots: the other one may still be read."""
    for m, mask in enumerate(own_masks):
      hidden_smem[position % 2, m, block] = (hidden * mask).astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.barrier_arrive(is_written)

  def load(position):
    return tuple(_load(projected, tile, position, gate, block) for gate in range(4))

  activate = functools.partial(_activate, gate_activation=gate_activation)
  begin = first[tile]
  zeros = jnp.zeros((_UNITS, _ROWS), jnp.float32)
  publish(zeros, begin)
  plgpu.barrier_wait(is_loaded)

  def step(position, carry):
    c, from_inputs = carry
    plgpu.barrier_wait(is_written)
    # Under way while this position is computed.
    next_from_inputs = load(jnp.minimum(position + 1, t - 1))

    def compute(*accumulators):
      """A gate is activated while the tensor cores compute the next ones."""
      for gate, accumulator in enumerate(accumulators):
        for k in range(num_blocks):
          weights = recurrent_smem.at[(gate * num_blocks + block) * num_blocks + k]
          plgpu.wgmma(accumulator, weights, hidden_smem.at[position % 2, gate % num_masks, k])

      def preactivation(gate):
        remaining = (3 - gate) * num_blocks
        return from_inputs[gate] + plgpu.wgmma_accumulator_load(accumulators[gate], wait_n=remaining)

      def keep(gate, value):
        # At once: the assembler moves arithmetic across the next wait, but no store.
        gates_out[tile, position, gate, block] = value
        return value

      c_out[tile, position, block] = c
      i, f = (keep(gate, activate(preactivation(gate))) for gate in (0, 1))
      g = keep(2, _tanh(preactivation(2)))
      c_after = f * c + i * g
      tanh_c = _tanh(c_after)
      return c_after, tanh_c, activate(preactivation(3))

    c_after, tanh_c, o = pl.run_scoped(compute, *[plgpu.ACC((_UNITS, _ROWS))] * 4)
    hidden = o * tanh_c
    # First what the other warpgroups wait for.
    publish(hidden, position + 1)
    gates_out[tile, position, 3, block] = o
    hidden_out[tile, position, block] = hidden
    return c_after, next_from_inputs

  c, _ = lax.fori_loop(begin, t, step, (zeros, load(jnp.minimum(begin, t - 1))))
  c_out[tile, t, block] = c
  plgpu.barrier_wait(is_written)


def _backward_kernel(
  d_hidden,  # f32[tiles, t, blocks, units, rows]
  gates,  # as the forward kernel left them
  c,
  recurrent,  # bf16[blocks * 4 * blocks, units, units]: block of h, gate, block of z
  masks,
  first,
  dz_out,  # bf16[tiles, t, 4, blocks, units, rows]
  recurrent_smem,
  dz_smem,  # bf16[2, 4, blocks, units, rows]
  is_loaded,
  is_written,
  *,
  gate_activation: str,
):
  tile, block = lax.axis_index("tile"), lax.axis_index("block")
  t, num_masks, num_blocks = d_hidden.shape[1], masks.shape[1], d_hidden.shape[2]

  _load_weights(recurrent, recurrent_smem, is_loaded, block)
  own_masks = [_load(masks, tile, m, block) for m in range(num_masks)]
  begin = first[tile]
  slope = functools.partial(_slope, gate_activation=gate_activation)

  def load(position):
    own_gates = (_load(gates, tile, position, gate, block) for gate in range(4))
    return *own_gates, _load(c, tile, position, block), _load(d_hidden, tile, position, block)

  def slopes(i, f, g, o, c_before, tanh_c):
    """Derivatives of c by hidden state, and of the pre-activations by c, c, c and hidden state."""
    return o * (1 - tanh_c * tanh_c), (g * slope(i), c_before * slope(f), i * (1 - g * g), tanh_c * slope(o))

  plgpu.barrier_wait(is_loaded)

  def step(count, carry):
    dc, dh, c_before, f, d_hidden, (dc_dh, (dc_di, dc_df, dc_dg, dh_do)) = carry
    position = t - 1 - count
    dh = dh + d_hidden
    dc = dc + dh * dc_dh
    rounded = [value.astype(jnp.bfloat16) for value in (dc * dc_di, dc * dc_df, dc * dc_dg, dh * dh_do)]
    for gate, value in enumerate(rounded):
      dz_smem[position % 2, gate, block] = value
    plgpu.commit_smem()
    plgpu.barrier_arrive(is_written)
    # Meanwhile the other warpgroups get as far.
    earlier = load(jnp.maximum(position - 1, 0))
    for gate, value in enumerate(rounded):
      dz_out[tile, position, gate, block] = value
    plgpu.barrier_wait(is_written)

    def compute(*accumulators):
      """What the step before takes from memory is turned into slopes while the tensor cores compute."""
      for gate in range(4):
        for k in range(num_blocks):
          weights = recurrent_smem.at[(block * 4 + gate) * num_blocks + k]
          plgpu.wgmma(accumulators[gate % num_masks], weights, dz_smem.at[position % 2, gate, k])
      i, f, g, o, c_earlier, d_hidden = earlier
      ahead = c_earlier, f, d_hidden, slopes(i, f, g, o, c_earlier, _tanh(c_before))
      plgpu.wgmma_wait(0)
      return ahead, tuple(accumulator[...] for accumulator in accumulators)

    ahead, from_gates = pl.run_scoped(compute, *[plgpu.ACC((_UNITS, _ROWS))] * num_masks)
    dh = functools.reduce(jnp.add, (d * mask for d, mask in zip(from_gates, own_masks, strict=True)))
    return dc * f, dh, *ahead

  zeros = jnp.zeros((_UNITS, _ROWS), jnp.float32)
  i, f, g, o, c_before, last_d_hidden = load(t - 1)
  last = c_before, f, last_d_hidden, slopes(i, f, g, o, c_before, _tanh(_load(c, tile, t, block)))
  lax.fori_loop(0, t - begin, step, (zeros, zeros, *last))


def _launch(body, out_type, smem_shapes, gate_activation: str, num_tiles: int, num_blocks: int):
  """The first of the shapes in shared memory is that of the weights."""
  barriers = plgpu.Barrier(num_arrivals=smem_shapes[0][0]), plgpu.Barrier(num_arrivals=num_blocks)
  return plgpu.kernel(
    functools.partial(body, gate_activation=gate_activation),
    out_type=out_type,
    scratch_types=(*(plgpu.SMEM(shape, jnp.bfloat16) for shape in smem_shapes), *barriers),
    grid=(num_tiles,),
    grid_names=("tile",),
    num_threads=num_blocks,
    thread_name="block",
    compiler_params=plgpu.CompilerParams(
      approx_math=True,
      # Without it a barrier stands before and after each store. None is needed: in global memory a thread reads back
      # nothing that it has written, and a slot of shared memory is written again only after `is_written` of the step
      # between, which no warpgroup reaches before all of its warps have awaited the products that read the slot.
      unsafe_no_auto_barriers=True,
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
    ),
  )


def _split_units(x: jax.Array) -> jax.Array:
  """[..., n * units] -> [..., n, units]."""
  return x.reshape(*x.shape[:-1], -1, _UNITS)


def _weight_blocks(recurrent_kernel: jax.Array) -> jax.Array:
  """[h, 4h] -> bf16[block of h, unit of h, gate, block of z, unit of z]."""
  h = recurrent_kernel.shape[0]
  blocks = h // _UNITS
  return recurrent_kernel.reshape(blocks, _UNITS, 4, blocks, _UNITS).astype(jnp.bfloat16)


def _tiles(x: jax.Array) -> jax.Array:
  """[b, ...] -> [tiles, rows, ...]; b divides."""
  return x.reshape(-1, _ROWS, *x.shape[1:])


def _mask_tiles(masks: jax.Array) -> jax.Array:
  """[1 or 4, b, h] -> [tiles, 1 or 4, blocks, units, rows]."""
  return jnp.einsum("minku->imkun", _split_units(masks.reshape(masks.shape[0], -1, _ROWS, masks.shape[2])))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _recurrence(x, weights: _Weights, masks: _Masks, is_real, first, gate_activation: str) -> jax.Array:
  """x f32[b, t, e], b a multiple of the rows of a tile -> hidden f32[b, t, h]; is_real bool[b, t], first i32[tiles]."""
  return _forward(x, weights, masks, is_real, first, gate_activation)[0]


def _project(x, kernel, mask):
  """Masked x [b, t, e] times kernel [e, 4, h]: [b, t, 4, h]; mask [b, e], [4, b, e] or None."""
  if mask is not None and mask.ndim == 3:
    return jnp.einsum("bte,gbe,egh->btgh", x, mask, kernel)
  return jnp.einsum("bte,egh->btgh", x if mask is None else x * mask[:, None], kernel)


def _forward(x, weights: _Weights, masks: _Masks, is_real, first, gate_activation: str):
  (_, t, e), h = x.shape, weights.recurrent_kernel.shape[0]
  num_tiles, num_blocks, num_masks = len(first), h // _UNITS, masks.recurrent.shape[0]
  z = _project(x, weights.kernel.reshape(e, 4, h), masks.inputs) + weights.bias.reshape(1, 1, 4, h)
  closed = jnp.array([_CLOSED, 0.0, 0.0, _CLOSED], jnp.float32)[None, None, :, None]
  z = jnp.where(is_real[:, :, None, None], z, closed)
  z = jnp.einsum("intgku->itgkun", _split_units(_tiles(z)))
  recurrent = jnp.einsum("kugmv->gmkvu", _weight_blocks(weights.recurrent_kernel)).reshape(-1, _UNITS, _UNITS)

  def out(*shape):
    return jax.ShapeDtypeStruct((num_tiles, *shape, num_blocks, _UNITS, _ROWS), jnp.float32)

  gates, c, hidden = _launch(
    _forward_kernel,
    (out(t, 4), out(t + 1), out(t)),
    (recurrent.shape, (2, num_masks, num_blocks, _UNITS, _ROWS)),
    gate_activation,
    num_tiles,
    num_blocks,
  )(z, recurrent, _mask_tiles(masks.recurrent), first)
  hidden = jnp.einsum("itkun->intku", hidden).reshape(*x.shape[:2], h)
  # The kernel leaves what lies before a tile's first real row as it was.
  hidden = jnp.where(is_real[:, :, None], hidden, 0.0)
  return hidden, (x, weights, masks, is_real, first, gates, c, hidden)


def _backward(gate_activation: str, residuals, d_hidden):
  x, weights, masks, is_real, first, gates, c, hidden = residuals
  (b, t, e), h = x.shape, weights.recurrent_kernel.shape[0]
  num_tiles, num_blocks = len(first), h // _UNITS
  recurrent = jnp.einsum("kugmv->kgmuv", _weight_blocks(weights.recurrent_kernel)).reshape(-1, _UNITS, _UNITS)
  dz = _launch(
    _backward_kernel,
    jax.ShapeDtypeStruct((num_tiles, t, 4, num_blocks, _UNITS, _ROWS), jnp.bfloat16),
    (recurrent.shape, (2, 4, num_blocks, _UNITS, _ROWS)),
    gate_activation,
    num_tiles,
    num_blocks,
  )(
    jnp.einsum("intku->itkun", _split_units(_tiles(d_hidden))), gates, c, recurrent, _mask_tiles(masks.recurrent), first
  )
  dz = jnp.einsum("itgkun->intgku", dz).reshape(b, t, 4, h).astype(jnp.float32)
  dz = jnp.where(is_real[:, :, None, None], dz, 0.0)
  hidden_before = jnp.pad(hidden, ((0, 0), (1, 0), (0, 0)))[:, :-1]
  kernel = weights.kernel.reshape(e, 4, h)
  if masks.inputs is not None and masks.inputs.ndim == 3:
    d_kernel = jnp.einsum("bte,gbe,btgh->egh", x, masks.inputs, dz)
    dx = jnp.einsum("btgh,egh,gbe->bte", dz, kernel, masks.inputs)
  else:
    mask = jnp.ones((b, 1, e), x.dtype) if masks.inputs is None else masks.inputs[:, None]
    d_kernel = jnp.einsum("bte,btgh->egh", x * mask, dz)
    dx = jnp.einsum("btgh,egh->bte", dz, kernel) * mask
  if masks.recurrent.shape[0] == 4:
    d_recurrent = jnp.einsum("btk,gbk,btgh->kgh", hidden_before, masks.recurrent, dz)
  else:
    d_recurrent = jnp.einsum("btk,btgh->kgh", hidden_before * masks.recurrent[0][:, None], dz)
  d_weights = _Weights(
    d_kernel.reshape(e, 4 * h), d_recurrent.reshape(h, 4 * h), jnp.sum(dz, axis=(0, 1)).reshape(4 * h)
  )
  return dx, d_weights, None, None, None


_recurrence.defvjp(_forward, _backward)


def _turn(x: jax.Array, reverse: bool) -> jax.Array:
  """[b, t, ...], the last position first if it is to be reversed."""
  return x[:, ::-1] if reverse else x


def lstm(
  inputs: jax.Array,
  kernel: jax.Array,
  recurrent_kernel: jax.Array,
  bias: jax.Array,
  *,
  input_dropout_mask: jax.Array | None,
  recurrent_dropout_mask: jax.Array | None,
  lengths: jax.Array | None,
  gate_activation: str,
  reverse: bool,
) -> jax.Array:
  """See `imdb_jax.lstm.lstm`; hidden sizes of 64 and 128."""
  (b, t, _), h = inputs.shape, recurrent_kernel.shape[0]
  if recurrent_dropout_mask is None:
    recurrent_dropout_mask = jnp.ones((b, h), inputs.dtype)
  lengths = jnp.full((b,), t, jnp.int32) if lengths is None else lengths.astype(jnp.int32)
  is_real = _turn(jnp.arange(t)[None, :] >= t - lengths[:, None], reverse)
  num_rows = b + -b % _ROWS

  def fill(x, axis=0):
    """Up to whole tiles, with rows that are never real."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, num_rows - b)
    return jnp.pad(x, padding)

  def fill_mask(mask):
    return fill(mask, axis=mask.ndim - 2)

  longest = jnp.max(_tiles(fill(lengths)), axis=1)
  hidden: Any = _recurrence(
    fill(_turn(inputs, reverse)),
    _Weights(kernel, recurrent_kernel, bias),
    _Masks(
      inputs=None if input_dropout_mask is None else fill_mask(input_dropout_mask),
      recurrent=fill_mask(recurrent_dropout_mask).reshape(-1, num_rows, h),
    ),
    fill(is_real),
    jnp.zeros_like(longest) if reverse else t - longest,
    gate_activation,
  )
  return _turn(hidden, reverse)[:b]
