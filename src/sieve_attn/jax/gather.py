"""Attention over kept blocks in ``jax.numpy``: the blocks of one query tile are gathered, then the next tile's. Any platform.

Costs and memory follow ``max_blocks``. Where a tile overflows, a branch that reads every block, tile by tile, computes the same
selection instead. Gradients recompute a tile's logits; nothing of size queries x keys exists.
"""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from sieve_attn.arrays import jax_ops as xp
from sieve_attn.bounds import soft_cap
from sieve_attn.jax.call import Call
from sieve_attn.jax.selection import PaddedBlocks
from sieve_attn.jax.stages import in_part, kept_by, tiles_in
from sieve_attn.types import Ranges, Rows, Selection

TILE = 64


def attend(call: Call, selection: PaddedBlocks | Selection) -> tuple[jax.Array, jax.Array]:
    """``(output [batch, q_heads, q_len, v_dim] in the query's dtype, lse [batch, q_heads, q_len])``."""
    # converted in front of branches and loops, which would leave their tracers to each other
    for name in ("query", "key", "value"):
        call.compute(name)
    with jax.default_matmul_precision("highest"):
        if isinstance(selection, PaddedBlocks):
            if selection.max_blocks >= selection.blocks:
                return _everything(call, selection)
            some = selection.overflow.any()
            return jax.lax.cond(some, lambda: _everything(call, selection), lambda: _gathered(call, selection))
        ranges = selection.parts[0]
        blocks = static_blocks(call, ranges) if call.kv_length is None else _all_blocks(call)
        # what the ranges touch is known beforehand; single keys are masked inside of their blocks
        run = _everything if blocks.max_blocks >= blocks.blocks else _gathered
        return run(call, blocks, ranges)


def options_why_not(call: Call) -> tuple[str, ...]:
    """The gather takes every argument."""
    return ()


def why_not(selection: PaddedBlocks | Selection) -> tuple[str, ...]:
    if isinstance(selection, PaddedBlocks) or selection.kinds == ("Ranges",):
        return ()
    return (f"the gather takes Blocks or one Ranges, not {', '.join(selection.kinds)}",)


def tiles_of(call: Call, size: int, lead: int) -> jax.Array:
    """[tiles, size] the query of every place, out of range where a tile has none."""
    tiles = -(-(call.q_len + lead) // size)
    return jnp.asarray(np.arange(tiles * size).reshape(tiles, size) - lead, jnp.int32)


def map_tiles(call: Call, numbers: jax.Array, lead: int, one, *per_tile: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``one(number, *part)`` for every tile; its rows are put side by side again."""
    run = jax.checkpoint(lambda given: one(*given))
    out, lse = jax.lax.map(run, (numbers, *(jnp.moveaxis(x, 2, 0) for x in per_tile)))

    def joined(x):
        x = jnp.moveaxis(x, 0, 2)
        return x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, lead : lead + call.q_len]

    return joined(out).astype(call.query.dtype), joined(lse)


@jax.custom_jvp
def products(query: jax.Array, key: jax.Array) -> jax.Array:
    """``query @ key^T``; in gradients, what is not finite counts as zero: pairs that are not seen pull at it with zero, and only
    those that are seen, which give what is no number anyway, with more."""
    return query @ xp.transpose_last(key)


@products.defjvp
def _(given, tangents):
    (query, key), (d_query, d_key) = given, tangents
    clean_query, clean_key = (jnp.where(jnp.isfinite(x), x, 0.0) for x in given)
    return products(query, key), d_query @ xp.transpose_last(clean_key) + clean_query @ xp.transpose_last(d_key)


def softmax(
    rows: Rows, key: jax.Array, value: jax.Array, kept: jax.Array | bool, sink: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """One tile over ``key``, ``value`` [batch, kv_heads | q_heads, keys, ...], of which ``kept`` and ``rows.visible`` count;
    ``sink`` broadcasts to [batch, q_heads, rows, 1]."""
    batch, heads, n, dim = rows.query.shape
    shared = key.shape[1]
    seen = jnp.broadcast_to(kept & rows.visible, (batch, heads, n, key.shape[2]))
    logits = products(rows.query.reshape(batch, shared, -1, dim), key).reshape(batch, heads, n, -1)
    # the slope of the cap is no number where a logit is none
    logits = logits if rows.softcap is None else jnp.where(seen, logits, 0.0)
    capped = soft_cap(xp, logits * rows.scale, rows.softcap)
    final = jnp.where(seen, capped if rows.bias is None else capped + rows.bias, -math.inf)
    top = jax.lax.stop_gradient(final.max(-1, keepdims=True))
    if sink is not None:
        sink = sink.astype(final.dtype)
        top = jnp.maximum(top, jax.lax.stop_gradient(sink))
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    weight = jnp.where(seen, jnp.exp(jnp.where(seen, final - top, 0.0)), 0.0)
    weight = jnp.where(jnp.isneginf(final), 0.0, weight)
    total = weight.sum(-1, keepdims=True)
    if sink is not None:
        total = total + jnp.exp(sink - top)
    empty = total == 0
    share = weight / jnp.where(empty, 1.0, total)
    lse = jnp.where(empty, -math.inf, jnp.log(jnp.where(empty, 1.0, total)) + top)[..., 0]
    return weighted(share, value), lse


def weighted(weight: jax.Array, value: jax.Array) -> jax.Array:
    """As :func:`sieve_attn.attend.weighted.weighted`, whatever is in ``value``: a weight of exactly zero hides even a NaN."""
    flat = weight.reshape(weight.shape[0], value.shape[1], -1, weight.shape[-1])
    out = flat @ jnp.where(jnp.isfinite(value), value, 0.0)
    touched = (flat != 0).astype(value.dtype)
    for kind, mark in ((jnp.isnan(value), math.nan), (value == jnp.inf, math.inf), (value == -jnp.inf, -math.inf)):
        out = jnp.where(touched @ kind.astype(value.dtype) > 0, out + mark, out)
    return out.reshape(*weight.shape[:3], -1)


def sink_of(call: Call) -> jax.Array | None:
    return None if call.sink is None else call.sink[None, :, None, None]


def _everything(call: Call, selection: PaddedBlocks, ranges: Ranges | None = None) -> tuple[jax.Array, jax.Array]:
    """Every key is read; blocks that a tile does not keep are masked."""
    numbers = tiles_of(call, selection.q_block, selection.lead)
    key, value = call.compute("key"), call.compute("value")
    chosen = tiles_in(selection)

    def one(number):
        rows = replace(call, shared={}).rows_at(jnp.clip(number, 0, call.q_len - 1))
        mine = kept_by(selection, call, number, rows.position, chosen)
        if ranges is not None:
            mine = mine & in_part(ranges, rows.position[:, None], jnp.arange(call.kv_len))
        return softmax(rows, key, value, mine, sink_of(call))

    return map_tiles(call, numbers, selection.lead, one)


def _gathered(call: Call, selection: PaddedBlocks, ranges: Ranges | None = None) -> tuple[jax.Array, jax.Array]:
    """Only kept blocks are read."""
    batch, heads = call.query.shape[:2]
    kv_heads, size = call.key.shape[1], selection.kv_block
    choosers = max(selection.indices.shape[1], kv_heads)

    def spread(x):
        return jnp.broadcast_to(xp.repeat_each(x, choosers // x.shape[1], 1), (batch, choosers, *x.shape[2:]))

    index = spread(selection.indices)
    numbers = tiles_of(call, selection.q_block, selection.lead)
    lanes = () if selection.rows is None else (spread(selection.rows),)
    blocked = {}
    for name in ("key", "value"):
        padded = xp.pad_end(call.compute(name), 2, -call.kv_len % size, 0)
        blocked[name] = padded.reshape(*padded.shape[:2], -1, size, padded.shape[-1])

    def taken(x, mine):
        x = xp.repeat_each(x, choosers // kv_heads, 1) if choosers != kv_heads else x
        found = jnp.take_along_axis(x, mine[..., None, None], 2)
        return found.reshape(batch, choosers, -1, x.shape[-1])

    def one(number, mine, *lanes):
        listed = mine >= 0
        mine = jnp.where(listed, mine, 0)
        place = (mine[..., None] * size + jnp.arange(size)).reshape(batch, choosers, -1)
        real = jnp.repeat(listed, size, -1) & (place < call.kv_len)
        rows = _rows_at(call, jnp.clip(number, 0, call.q_len - 1), jnp.minimum(place, call.kv_len - 1))
        kept = xp.repeat_each(real, heads // choosers, 1)[:, :, None, :]
        for lane in lanes:
            chose = jnp.repeat(jnp.swapaxes(lane, -1, -2), size, -1)  # [batch, choosers, q_block, keys]
            kept = kept & xp.repeat_each(chose, heads // choosers, 1)
        if ranges is not None:
            kept = kept & in_part(ranges, rows.position[:, None], place[:, :1, None, :])
        return softmax(rows, taken(blocked["key"], mine), taken(blocked["value"], mine), kept, sink_of(call))

    return map_tiles(call, numbers, selection.lead, one, index, *lanes)


def _rows_at(call: Call, number: jax.Array, place: jax.Array) -> Rows:
    """As ``call.rows_at``, of the keys ``place`` [batch, choosers, keys] alone."""
    heads = call.query.shape[1]
    place = xp.repeat_each(place, heads // place.shape[1], 1)[:, :, None, :]
    position = (number + call.offset)[:, None]
    visible = jnp.ones((1, 1, number.shape[0], 1), bool)
    if call.causal:
        visible = visible & (place <= position)
    if call.window is not None:
        visible = visible & (place > position - call.window) & (place < position + call.window)
    if call.cu_seqlens is not None:
        edges = call.cu_seqlens
        mine = jnp.searchsorted(edges, number, side="right")[:, None]
        visible = visible & (jnp.searchsorted(edges, place, side="right") == mine)
    if call.key_mask is not None:
        visible = visible & jnp.take_along_axis(call.key_mask[:, None, None, :], place, 3)
    if call.mask is not None:
        visible = visible & jnp.take_along_axis(call.mask[:, :, number], place, 3)
    bias = None
    if call.bias is not None:
        bias = call.bias if call.bias.shape[2] == 1 else call.bias[:, :, number]
        bias = bias.astype(xp.compute_dtype(call.query))
        bias = jnp.broadcast_to(bias, (*bias.shape[:2], number.shape[0], bias.shape[3]))
        bias = bias if bias.shape[3] == 1 else jnp.take_along_axis(bias, place, 3)
        hidden = jnp.isneginf(bias)
        visible, bias = visible & ~hidden, jnp.where(hidden, 0.0, bias)
    query = call.compute("query")[:, :, number]
    return Rows(query, position[:, 0], visible, visible, call.scale, call.softcap, bias, call.sink)


def _all_blocks(call: Call) -> PaddedBlocks:
    """Every block: what the ranges of one query touch follows from how much of the cache is filled."""
    blocks = -(-call.kv_len // TILE)
    return PaddedBlocks.from_tiles(jnp.ones((1, 1, 1, blocks), bool), blocks, q_len=1, kv_len=call.kv_len, q_block=TILE,
                                   kv_block=TILE, lead=0)  # fmt: skip


def static_blocks(call: Call, ranges: Ranges) -> PaddedBlocks:
    """Blocks of ``TILE`` keys that a tile's ranges and causality touch, in NumPy."""
    lead = call.lead(TILE)
    tiles, blocks = -(-(call.q_len + lead) // TILE), -(-call.kv_len // TILE)
    first = np.maximum(np.arange(tiles) * TILE - lead, 0) + call.offset
    last = np.minimum((np.arange(tiles) + 1) * TILE - lead, call.q_len) - 1 + call.offset
    start, stop = np.arange(blocks) * TILE, np.minimum((np.arange(blocks) + 1) * TILE, call.kv_len)
    after = last[:, None] + (ranges.window if ranges.two_sided else 1)
    near = (stop[None] > first[:, None] - ranges.window + 1) & (start[None] < after)
    kept = (start[None] < ranges.prefix) | near
    if call.causal:
        kept &= start[None] <= last[:, None]
    most = max(1, int(kept.sum(-1).max()))
    grid = {"q_len": call.q_len, "kv_len": call.kv_len, "q_block": TILE, "kv_block": TILE, "lead": lead}
    return PaddedBlocks.from_tiles(jnp.asarray(kept)[None, None], most, **grid)
