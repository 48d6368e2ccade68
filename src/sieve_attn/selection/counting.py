"""How many keys the queries of a call see, and how many of them a selection keeps, without an array of queries x keys.

Causality, window and packing leave every query one interval of keys, and so do a block, a prefix and a window of a selection:
what two of them have in common is counted by its ends, and by prefix sums of ``key_mask`` where keys are missing.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from sieve_attn import arrays
from sieve_attn.types import Blocks, Call, Offsets, Ranges, Selection
from sieve_attn.types.call import CHUNK_BYTES

Array = Any


def count_keys(call: Call, selection: Selection) -> tuple[Array, Array]:
    """``(kept, visible)`` pairs of a query and a key, [batch, q_heads, 1] int64.

    Time and memory grow with queries + keys and what a selection lists; with queries x keys, a chunk at a time, only where the
    caller's mask or bias has that size itself, or for single ``Tokens``.
    """
    if needs_pairs(call, selection):
        return _by_pairs(call, selection)
    return by_sight(call, selection, arrays.namespace(call.query).int64)


def needs_pairs(call: Call, selection: Selection) -> bool:
    """Whether ends of intervals do not tell what is seen and kept."""
    known = all(isinstance(part, (Blocks, Offsets, Ranges)) for part in selection.parts)
    return call.mask is not None or call.bias is not None or not known


def by_sight(call: Call, selection: Selection, dtype: Any) -> tuple[Array, Array]:
    """``(kept, visible)`` [batch, q_heads, 1], summed in ``dtype``."""
    xp = arrays.namespace(call.query)
    batch, heads = call.query.shape[:2]
    if call.key_mask is None and call.cu_seqlens is None and isinstance(call.offset, int) and selection.blocks is None:
        # no array has a say: counted exactly, with nothing launched or waited for
        counts = _of_lengths(call.q_len, call.kv_len, call.causal, call.window, selection.parts)
        return tuple(xp.full((batch, heads, 1), count, dtype, call.query) for count in counts)
    number, between = xp.arange(0, call.q_len, call.query), _Between(call)
    sight = call.sight(number)

    def spread(count: Array) -> Array:
        while len(count.shape) < 2:
            count = count[..., None]
        if count.shape[1] not in (1, heads):
            count = xp.repeat_each(count, heads // count.shape[1], 1)
        return xp.broadcast_to(count, (batch, heads))[..., None]

    kept = 0
    for part in selection.parts:
        if isinstance(part, Blocks):
            count = _in_blocks(part.beside(call.query), call, between, dtype)
        else:
            count = xp.total(_of_rows(part, call, number, sight, between), -1, dtype)
        kept = kept + spread(count)
    return kept, spread(xp.total(between(*sight), -1, dtype))


@lru_cache(maxsize=64)
def _of_lengths(q_len: int, kv_len: int, causal: bool, window: int | None, parts: tuple) -> tuple[int, int]:
    """``(kept, visible)`` of one head. The layers of a model ask for the same ones, one after the other."""
    call = Call(np.empty((1, 1, q_len, 1)), np.empty((1, 1, kv_len, 1)), np.empty(0), causal=causal, window=window)
    number, between = np.arange(q_len), _Between(call)
    sight = call.sight(number)
    kept = sum(int(_of_rows(part, call, number, sight, between).sum()) for part in parts)
    return kept, int(between(*sight).sum())


class _Between:
    """``between(first, last)``: how many keys of ``first .. last - 1`` are there; [batch, ...] where ``key_mask`` hides some."""

    def __init__(self, call: Call):
        self.kv_len, self.sums = call.kv_len, None
        if call.key_mask is not None:
            xp = arrays.namespace(call.key_mask)
            counted = xp.cumsum(xp.cast(call.key_mask, xp.int64), 1)
            self.sums = xp.concat([xp.zeros((counted.shape[0], 1), counted.dtype, counted), counted], 1)

    def __call__(self, first: Array, last: Array) -> Array:
        xp = arrays.namespace(first)
        first = xp.minimum(first, self.kv_len)
        last = xp.maximum(last, first)
        return last - first if self.sums is None else self.sums[:, last] - self.sums[:, first]

    def of_batch(self, batch: Array, first: Array, last: Array) -> Array:
        """The same for intervals of one sequence each, whose index in the batch is ``batch``."""
        if self.sums is None:
            return self(first, last)
        xp = arrays.namespace(first)
        first = xp.minimum(first, self.kv_len)
        return self.sums[batch, xp.maximum(last, first)] - self.sums[batch, first]


def _of_rows(part: Ranges | Offsets, call: Call, number: Array, sight: tuple[Array, Array], between: _Between) -> Array:
    """[rows], or [batch, rows] where keys are missing: how many of the keys in sight a part keeps."""
    return (_in_ranges if isinstance(part, Ranges) else _at_offsets)(part, call, number, sight, between)


def _in_ranges(part: Ranges, call: Call, number: Array, sight: tuple[Array, Array], between: _Between) -> Array:
    xp = arrays.namespace(number)
    (first, last), position = sight, number + call.offset
    near = xp.maximum(xp.maximum(first, part.prefix), position - part.window + 1)
    end = xp.minimum(last, position + (part.window if part.two_sided else 1))
    return between(first, xp.minimum(last, part.prefix)) + between(near, end)


def _at_offsets(part: Offsets, call: Call, number: Array, sight: tuple[Array, Array], between: _Between) -> Array:
    xp = arrays.namespace(number)
    offsets = xp.asarray(sorted(set(part.offsets)), xp.int64, number)
    position, first, last = number + call.offset, xp.maximum(sight[0], part.first_key), sight[1]
    if call.key_mask is None:
        # key position - s lies in first .. last - 1 for the s of position - last + 1 .. position - first
        counts = xp.searchsorted(offsets, position - first) - xp.searchsorted(offsets, position - last)
        return xp.maximum(counts, 0)
    batch, parts = call.key_mask.shape[0], []
    step = max(1, CHUNK_BYTES // (8 * batch * max(len(part.offsets), 1)))
    for start in range(0, call.q_len, step):
        rows = slice(start, start + step)
        key = position[rows, None] - offsets
        seen = (key >= first[rows, None]) & (key < last[rows, None])
        parts.append(xp.total(call.key_mask[:, xp.where(seen, key, 0)] & seen, -1, xp.int64))
    return xp.concat(parts, 1)


def _in_blocks(part: Blocks, call: Call, between: _Between, dtype: Any) -> Array:
    """[batch | 1, heads] keys."""
    xp = arrays.namespace(part.row_ptr)
    batch = call.query.shape[0] if between.sums is not None else part.batch
    lane, room = xp.arange(0, part.q_block, part.row_ptr), part.block_index.shape[0]
    step, counts = max(1, CHUNK_BYTES // (8 * part.q_block)), []
    for start in range(0, room, step):
        entries = slice(start, min(start + step, room))
        row, block = part._entry_row[entries], xp.cast(part.block_index[entries], xp.int64)[:, None]
        number = (row % part.tiles)[:, None] * part.q_block + lane - part.lead
        inside = (number >= 0) & (number < call.q_len)
        first, last = call.sight(xp.where(inside, number, 0))
        first, last = xp.maximum(first, block * part.kv_block), xp.minimum(last, (block + 1) * part.kv_block)
        kept = inside if part.row_mask is None else inside & part.row_mask[entries]
        each = []
        for b in range(batch // part.batch):
            # a choice that all sequences share meets the keys of each
            sequence = row // (part.heads * part.tiles) if part.batch > 1 else row * 0 + b
            sequence = xp.minimum(sequence, batch - 1)[:, None]
            each.append(xp.total(xp.where(kept, between.of_batch(sequence, first, last), 0), -1, dtype))
        counts.append(xp.stack(each, 0))
    if not counts:
        return xp.zeros((1, 1), dtype, part.row_ptr)
    sums = xp.cumsum(xp.concat(counts, 1), 1)
    sums = xp.concat([xp.zeros((sums.shape[0], 1), sums.dtype, sums), sums], 1)
    by_tile = sums[:, part.row_ptr[1:]] - sums[:, part.row_ptr[:-1]]
    return xp.total(by_tile.reshape(-1, part.heads, part.tiles), -1, dtype)


def _by_pairs(call: Call, selection: Selection) -> tuple[Array, Array]:
    xp = arrays.namespace(call.query)
    heads = call.query.shape[1]
    kept, visible = 0, 0
    for start, stop in call.chunks():
        rows = call.rows(start, stop)
        chosen = call.kept(selection, start, stop)
        # what all heads or sequences have in common is counted once and spread out afterwards
        visible = visible + xp.total(xp.total(rows.visible, -1, xp.int64), -1)
        kept = kept + xp.total(xp.total(rows.visible & chosen, -1, xp.int64), -1)
    kept, visible = (xp.broadcast_to(count, (call.query.shape[0], heads)) for count in (kept, visible))
    return kept[..., None], visible[..., None]
