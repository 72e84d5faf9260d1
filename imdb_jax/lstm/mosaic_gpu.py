"""One kernel launch for the whole time loop: Pallas on Mosaic GPU, for NVIDIA Hopper and later.

On a GPU, a loop of small kernels is launch-bound. Here, each thread block keeps the recurrent kernel in shared memory
and processes all positions of a tile of 16 rows; blocks exchange nothing. A warpgroup owns 64 hidden units with all
four gates. Its gates, cell state and hidden state stay in registers. It also writes the hidden state to shared memory,
because the other warpgroups multiply it next. `jax.vmap` adds an axis to the grid.

Precision: operands of the recurrent products are rounded to bfloat16 (forward, the hidden state after its dropout mask;
backward, dz). Sums, gates, cell state and hidden state are float32. The products of the weight gradients use the
rounded dz as well. All other products are XLA's, at `jax_default_matmul_precision`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from imdb_jax.lstm.shared import CLOSED, Masks, Weights, in_order, known_lengths, real_positions, slopes

# Rows of a tile: the narrowest right operand that the tensor cores accept with its rows contiguous.
_ROWS = 16
# Hidden units of a warpgroup: the rows of a tensor core product.
_UNITS = 64
# JAX 0.10, the last version for Python 3.11, requires an index beside the reference; 0.11 deprecates it.
_NO_INDEX = () if jax.__version_info__ >= (0, 11) else (None,)
_LOG2_E = math.log2(math.e)


def _sigmoid(x: jax.Array) -> jax.Array:
  """Compute with the hardware's exponential, whose error is 2e-7; the error of its tanh is 5e-4."""
  return 1 / (1 + jnp.exp2(-_LOG2_E * x))


def _tanh(x: jax.Array) -> jax.Array:
  return 2 * _sigmoid(2 * x) - 1


def _load(ref, *index):
  """Load to registers in the layout of the accumulators, whose rows of 64 bytes `optimized=True` would refuse."""
  return plgpu.load(ref.at[index], *_NO_INDEX, optimized=False)


def _load_weights(weights, weights_smem, is_loaded, block) -> None:
  """Start copying all blocks, one by one: a copy has few dimensions, and `jax.vmap` adds one."""

  @pl.when(block == 0)
  def _():
    @pl.loop(0, weights.shape[0])
    def _(n):
      plgpu.copy_gmem_to_smem(weights.at[n], weights_smem.at[n], is_loaded)


def _forward_kernel(
  projected,  # f32[tiles, t, 4, blocks, units, rows]
  recurrent,  # bf16[4 * blocks * blocks, units, units]: gate, block of z, block of h
  masks,  # f32[tiles, blocks, units, rows]
  first,  # i32[tiles], the first position with a real row
  gates_out,  # f32[tiles, t, 4, blocks, units, rows]
  c_out,  # f32[tiles, t + 1, blocks, units, rows], before each position
  hidden_out,  # f32[tiles, t, blocks, units, rows]
  recurrent_smem,
  hidden_smem,  # bf16[2, blocks, units, rows]
  is_loaded,
  is_written,
):
  tile, block = lax.axis_index("tile"), lax.axis_index("block")
  t, num_blocks = projected.shape[1], projected.shape[3]

  _load_weights(recurrent, recurrent_smem, is_loaded, block)
  mask = _load(masks, tile, block)

  def publish(hidden, position):
    """Give all warpgroups the hidden state before a position. Two slots: the other one may still be read."""
    hidden_smem[position % 2, block] = (hidden * mask).astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.barrier_arrive(is_written)

  def load(position):
    return tuple(_load(projected, tile, position, gate, block) for gate in range(4))

  begin = first[tile]
  zeros = jnp.zeros((_UNITS, _ROWS), jnp.float32)
  publish(zeros, begin)
  plgpu.barrier_wait(is_loaded)

  def step(position, carry):
    c, from_inputs = carry
    plgpu.barrier_wait(is_written)
    # Runs while this position is computed.
    next_from_inputs = load(jnp.minimum(position + 1, t - 1))

    def compute(*accumulators):
      """Activate each gate while the tensor cores compute the next ones."""
      for gate, accumulator in enumerate(accumulators):
        for k in range(num_blocks):
          weights = recurrent_smem.at[(gate * num_blocks + block) * num_blocks + k]
          plgpu.wgmma(accumulator, weights, hidden_smem.at[position % 2, k])

      def preactivation(gate):
        remaining = (3 - gate) * num_blocks
        return from_inputs[gate] + plgpu.wgmma_accumulator_load(accumulators[gate], wait_n=remaining)

      def keep(gate, value):
        # Stored at once: the assembler moves arithmetic across the next wait, but no store.
        gates_out[tile, position, gate, block] = value
        return value

      c_out[tile, position, block] = c
      i, f = (keep(gate, _sigmoid(preactivation(gate))) for gate in (0, 1))
      g = keep(2, _tanh(preactivation(2)))
      c_after = f * c + i * g
      tanh_c = _tanh(c_after)
      return c_after, tanh_c, _sigmoid(preactivation(3))

    c_after, tanh_c, o = pl.run_scoped(compute, *[plgpu.ACC((_UNITS, _ROWS))] * 4)
    hidden = o * tanh_c
    # First, because the other warpgroups wait for it.
    publish(hidden, position + 1)
    gates_out[tile, position, 3, block] = o
    hidden_out[tile, position, block] = hidden
    return c_after, next_from_inputs

  c, _ = lax.fori_loop(begin, t, step, (zeros, load(jnp.minimum(begin, t - 1))))
  c_out[tile, t, block] = c
  plgpu.barrier_wait(is_written)


def _backward_kernel(
  d_hidden,  # f32[tiles, t, blocks, units, rows]
  gates,  # as the forward kernel wrote them
  c,
  recurrent,  # bf16[blocks * 4 * blocks, units, units]: block of h, gate, block of z
  masks,
  first,
  dz_out,  # bf16[tiles, t, 4, blocks, units, rows]
  recurrent_smem,
  dz_smem,  # bf16[2, 4, blocks, units, rows]
  is_loaded,
  is_written,
):
  tile, block = lax.axis_index("tile"), lax.axis_index("block")
  t, num_blocks = d_hidden.shape[1], d_hidden.shape[2]

  _load_weights(recurrent, recurrent_smem, is_loaded, block)
  mask = _load(masks, tile, block)
  begin = first[tile]

  def load(position):
    own_gates = (_load(gates, tile, position, gate, block) for gate in range(4))
    return *own_gates, _load(c, tile, position, block), _load(d_hidden, tile, position, block)

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
    # Until the other warpgroups have done the same, load and store.
    earlier = load(jnp.maximum(position - 1, 0))
    for gate, value in enumerate(rounded):
      dz_out[tile, position, gate, block] = value
    plgpu.barrier_wait(is_written)

    def compute(accumulator):
      """Turn the loaded values into slopes for the next step while the tensor cores compute."""
      for gate in range(4):
        for k in range(num_blocks):
          weights = recurrent_smem.at[(block * 4 + gate) * num_blocks + k]
          plgpu.wgmma(accumulator, weights, dz_smem.at[position % 2, gate, k])
      i, f, g, o, c_earlier, d_hidden = earlier
      ahead = c_earlier, f, d_hidden, slopes(i, f, g, o, c_earlier, _tanh(c_before))
      plgpu.wgmma_wait(0)
      return ahead, accumulator[...]

    ahead, from_gates = pl.run_scoped(compute, plgpu.ACC((_UNITS, _ROWS)))
    return dc * f, from_gates * mask, *ahead

  zeros = jnp.zeros((_UNITS, _ROWS), jnp.float32)
  i, f, g, o, c_before, last_d_hidden = load(t - 1)
  last = c_before, f, last_d_hidden, slopes(i, f, g, o, c_before, _tanh(_load(c, tile, t, block)))
  lax.fori_loop(0, t - begin, step, (zeros, zeros, *last))


def _launch(body, out_shapes, out_dtype, slots, *inputs):
  """Run a kernel on inputs that end with weights, masks and first positions.

  The shapes of the outputs and of the slots in shared memory lack the axes of tiles, blocks, units and rows.
  """
  *_, recurrent, masks, _ = inputs
  num_tiles, num_blocks = masks.shape[:2]
  all_blocks = num_blocks, _UNITS, _ROWS
  smem = [plgpu.SMEM(shape, jnp.bfloat16) for shape in (recurrent.shape, (*slots, *all_blocks))]
  kernel = plgpu.kernel(
    body,
    out_type=[jax.ShapeDtypeStruct((num_tiles, *shape, *all_blocks), out_dtype) for shape in out_shapes],
    scratch_types=(*smem, plgpu.Barrier(num_arrivals=len(recurrent)), plgpu.Barrier(num_arrivals=num_blocks)),
    grid=(num_tiles,),
    grid_names=("tile",),
    num_threads=num_blocks,
    thread_name="block",
    compiler_params=plgpu.CompilerParams(
      approx_math=True,
      # The compiler would put a barrier before and after each store. None is needed: no thread reads global memory that
      # it has written. A slot of shared memory is written again only after `is_written` of the step between, which a
      # warpgroup reaches only after all of its warps have awaited the products that read the slot.
      unsafe_no_auto_barriers=True,
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
    ),
  )
  return kernel(*inputs)


def _tiles(x) -> jax.Array:
  """Return [b, ..., n * units] as [tiles, rows, ..., n, units]; b is a multiple of the rows."""
  return x.reshape(-1, _ROWS, *x.shape[1:-1], x.shape[-1] // _UNITS, _UNITS)


def _weight_blocks(recurrent_kernel: jax.Array, order: str) -> jax.Array:
  """Return [h, 4h] as bf16[-1, units, units]; order names block k and unit u of h, gate g, block m and unit v of z."""
  h = recurrent_kernel.shape[0]
  split = recurrent_kernel.reshape(h // _UNITS, _UNITS, 4, h // _UNITS, _UNITS).astype(jnp.bfloat16)
  return jnp.einsum(f"kugmv->{order}", split).reshape(-1, _UNITS, _UNITS)


def _masked(x: jax.Array, mask: jax.Array | None) -> jax.Array:
  """Return x [b, t, n] times mask [b, n]."""
  return x if mask is None else x * mask[:, None]


@jax.custom_vjp
def _recurrence(x, weights: Weights, masks: Masks, is_real, first):
  """Return hidden f32[b, t, h].

  x f32[b, t, e] has whole tiles of rows, is_real is bool[b, t], first i32[tiles] is the first position with a real row,
  and there is a recurrent mask.
  """
  return _forward(x, weights, masks, is_real, first)[0]


def _forward(x, weights: Weights, masks: Masks, is_real, first) -> Any:
  (b, t, e), h = x.shape, weights.recurrent_kernel.shape[0]
  z = jnp.einsum("bte,egh->btgh", _masked(x, masks.inputs), weights.kernel.reshape(e, 4, h))
  z = z + weights.bias.reshape(1, 1, 4, h)
  closed = jnp.array(CLOSED, jnp.float32)[None, None, :, None]
  z = jnp.where(is_real[:, :, None, None], z, closed)
  z = jnp.einsum("intgku->itgkun", _tiles(z))
  recurrent = _weight_blocks(weights.recurrent_kernel, "gmkvu")
  mask = jnp.einsum("inku->ikun", _tiles(masks.recurrent))
  shapes = (t, 4), (t + 1,), (t,)
  gates, c, hidden = _launch(_forward_kernel, shapes, jnp.float32, (2,), z, recurrent, mask, first)
  hidden = jnp.einsum("itkun->intku", hidden).reshape(b, t, h)
  # The kernel writes nothing before the first real row of a tile.
  hidden = jnp.where(is_real[:, :, None], hidden, 0.0)
  return hidden, (x, weights, masks, is_real, first, gates, c, hidden)


def _backward(residuals, d_hidden):
  x, weights, masks, is_real, first, gates, c, hidden = residuals
  (b, t, e), h = x.shape, weights.recurrent_kernel.shape[0]
  recurrent = _weight_blocks(weights.recurrent_kernel, "kgmuv")
  d_hidden = jnp.einsum("intku->itkun", _tiles(d_hidden))
  mask = jnp.einsum("inku->ikun", _tiles(masks.recurrent))
  (dz,) = _launch(_backward_kernel, [(t, 4)], jnp.bfloat16, (2, 4), d_hidden, gates, c, recurrent, mask, first)
  dz = jnp.where(is_real.reshape(-1, _ROWS, t).mT[:, :, None, None, None], dz, 0)
  d_bias = jnp.sum(dz, axis=(0, 1, 5), dtype=jnp.float32).reshape(4 * h)  # Later, XLA would copy dz for it.
  dz = jnp.einsum("itgkun->intgku", dz).reshape(b, t, 4, h).astype(jnp.float32)
  hidden_before = jnp.pad(hidden, ((0, 0), (1, 0), (0, 0)))[:, :-1]
  d_kernel = jnp.einsum("bte,btgh->egh", _masked(x, masks.inputs), dz)
  d_recurrent = jnp.einsum("btk,btgh->kgh", _masked(hidden_before, masks.recurrent), dz)
  dx = _masked(jnp.einsum("btgh,egh->bte", dz, weights.kernel.reshape(e, 4, h)), masks.inputs)
  return dx, Weights(d_kernel.reshape(e, 4 * h), d_recurrent.reshape(h, 4 * h), d_bias), None, None, None


_recurrence.defvjp(_forward, _backward)


def lstm(inputs: jax.Array, weights: Weights, masks: Masks, lengths: jax.Array | None, *, reverse: bool) -> jax.Array:
  """Compute `imdb_jax.lstm.lstm` for hidden sizes of 64 and 128, shared masks and sigmoid gates."""
  (b, t, _), h = inputs.shape, weights.recurrent_kernel.shape[0]
  lengths = known_lengths(lengths, inputs)

  def fill(x):
    """Add rows that are never real, up to whole tiles."""
    return jnp.pad(x, ((0, -b % _ROWS), *[(0, 0)] * (x.ndim - 1)))

  longest = jnp.max(fill(lengths).reshape(-1, _ROWS), axis=1)
  recurrent_mask = jnp.ones((b, h), inputs.dtype) if masks.recurrent is None else masks.recurrent
  hidden = _recurrence(
    fill(in_order(inputs, reverse)),
    weights,
    jax.tree.map(fill, Masks(masks.inputs, recurrent_mask)),
    fill(in_order(real_positions(lengths, t), reverse)),
    jnp.zeros_like(longest) if reverse else t - longest,
  )
  return in_order(hidden, reverse)[:b]
