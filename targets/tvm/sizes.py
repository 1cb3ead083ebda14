"""Sizes that lowering, packing and kernels agree on."""

from __future__ import annotations

KEYS = 32  # keys that attention scores together; a page holds a multiple of them
PARTS = 16  # most parts that the context of one token is cut into
PART_BLOCKS = 16  # least blocks of KEYS keys in a part


def state_columns(value_dim: int) -> int:
    """Columns of a DeltaNet state that lie together: 32 of them make a block for the first cache."""
    return next(n for n in (32, 16, 8, 1) if value_dim % n == 0)


def plan_ints(experts: int, pairs: int) -> int:
    """Length of the scratch `plan` of the experts: active | expert[E] | start[E+1] | cursor[E] | order[pairs]."""
    return 2 + 3 * experts + pairs
