"""What queries see of key blocks, worked out on the device. Causality, windows and packing leave each query one interval of keys.

A *unit* is what chooses together: one query tile of one choosing head. ``part`` [batch, kv_len] says which keys take part and
``before`` [batch, kv_len + 1] counts those in front of a place.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def unit_at(unit, tiles, heads):
    """``(batch, choosing head, tile)``"""
    return unit // (tiles * heads), unit // tiles % heads, unit % tiles


@triton.jit
def interval(query, edges, q_len, kv_len, offset, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr,
             there=True):  # fmt: skip
    """Queries to the intervals ``[low, high)`` of keys that they see; ``edges`` [2, q_len] are those of packed sequences."""
    position = query + offset
    low = tl.zeros_like(position)
    high = low + kv_len
    if CAUSAL:
        high = tl.minimum(high, position + 1)
    if WINDOW:
        low = tl.maximum(low, position - window + 1)
        if not CAUSAL:
            high = tl.minimum(high, position + window)
    if PACKED:
        low = tl.maximum(low, tl.load(edges + query, there, 0))
        high = tl.minimum(high, tl.load(edges + q_len + query, there, 0))
    return low, tl.where(there, tl.maximum(high, low), low)


@triton.jit
def looked_at(row, tile, q_len, lead, TILE: tl.constexpr, STRIDE: tl.constexpr, SLOTS: tl.constexpr, GROUP: tl.constexpr):
    """Rows of a unit to ``(query, query head of the unit, there)``: every ``STRIDE``-th query of the tile, the last one always.

    Where the stride leads beyond the last query, rows repeat it.
    """
    last = tl.minimum(TILE - 1, q_len - 1 + lead - tile * TILE)
    first = tl.where(tile == 0, lead // STRIDE, 0)  # nothing lies before the first query
    lane = tl.minimum((first + row % SLOTS) * STRIDE + (STRIDE - 1), last)
    query = tile * TILE - lead + lane
    return query, row // SLOTS, (row < SLOTS * GROUP) & (query >= 0)


@triton.jit
def tile_queries(tile, q_len, lead, TILE: tl.constexpr, LANES: tl.constexpr):
    """``(query, there)`` of the lanes of a tile from the first query on."""
    lane = tl.arange(0, LANES) + tl.where(tile == 0, lead, 0)
    query = tile * TILE - lead + lane
    return query, (lane < TILE) & (query >= 0) & (query < q_len)


@triton.jit
def reach(low, high, there, kv_len, SIZE: tl.constexpr):
    """``(first block, block after the last)`` that some query of a tile may see."""
    seeing = there & (low < high)
    bottom = tl.min(tl.where(seeing, low, kv_len), 0)
    top = tl.max(tl.where(seeing, high, 0), 0)
    return tl.where(bottom < top, bottom // SIZE, 0), tl.where(bottom < top, (top + SIZE - 1) // SIZE, 0)


@triton.jit
def keys_between(before, low, high, MASKED: tl.constexpr):
    """How many keys that take part lie in ``[low, high)``."""
    n = tl.maximum(high - low, 0)
    if MASKED:
        some = high > low
        n = tl.where(some, tl.load(before + high, some, 0) - tl.load(before + low, some, 0), 0)
    return n


@triton.jit
def sight(
    block, low, high, query, there, inner_low, inner_high, finite, before, blocks, kv_len, offset, sinks, near,
    SIZE: tl.constexpr, MASKED: tl.constexpr, SINKS: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """``(keys, forced)`` of blocks [n]: the most that a query of the tile sees, and whether the block is kept in any case.

    Forced are blocks that are cut for the tile, that hold a key that is not finite, and those of the pattern.
    """
    start, end = block * SIZE, tl.minimum(block * SIZE + SIZE, kv_len)
    left, right = tl.maximum(start[None, :], low[:, None]), tl.minimum(end[None, :], high[:, None])
    overlap = there[:, None] & (right > left)
    n = tl.where(overlap, keys_between(before, left, right, MASKED), 0)
    keys = tl.max(n, 0)
    whole = (inner_low <= start) & (end <= inner_high)
    forced = ((tl.max(overlap.to(tl.int32), 0) != 0) & (whole == 0)) | (tl.load(finite + block, block < blocks, 1) == 0)
    if SINKS:
        wanted = (n > 0) & (left < tl.minimum(right, sinks))
        forced = forced | (tl.max(wanted.to(tl.int32), 0) != 0)
    if NEAR:
        position = (query + offset)[:, None]
        wanted = (n > 0) & (tl.maximum(left, position - near + 1) < tl.minimum(right, position + near))
        forced = forced | (tl.max(wanted.to(tl.int32), 0) != 0)
    return keys, forced & (keys > 0)
