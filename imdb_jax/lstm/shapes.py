"""Named problem shapes that every implementation is tested on."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
  """Sizes of one call: b reviews, t positions, e inputs, h hidden units."""

  b: int
  t: int
  e: int
  h: int


# Corner cases of the contract: single rows and steps, and sizes that no block size divides.
CONTRACT = {
  "one_of_each": Shape(b=1, t=1, e=1, h=1),
  "one_step": Shape(b=3, t=1, e=5, h=4),
  "one_row": Shape(b=1, t=9, e=4, h=6),
  "odd": Shape(b=5, t=13, e=7, h=3),
  "long": Shape(b=2, t=61, e=8, h=16),
}

# The same for kernels, whose hidden sizes are whole blocks: more rows than a tile, one step, two blocks.
KERNEL = {
  "kernel_one_of_each": Shape(b=1, t=1, e=1, h=64),
  "kernel_two_tiles": Shape(b=17, t=4, e=5, h=64),
  "kernel_two_blocks": Shape(b=3, t=3, e=4, h=128),
}
