"""Stages 2 and 3 by the shared scorers and selectors on ``jax.numpy``: one chunk of query tiles after another, so that nothing of
size queries x keys exists. Runs under ``jit`` on any platform, for every scorer and selector."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from sieve_attn import pipeline
from sieve_attn.arrays import jax_ops as xp
from sieve_attn.certify.reference import require_full_precision
from sieve_attn.jax import forced
from sieve_attn.jax.call import Call
from sieve_attn.jax.selection import PaddedBlocks, padded
from sieve_attn.policies import Policy
from sieve_attn.selection.counting import by_sight, needs_pairs
from sieve_attn.selection.reference import Tiles
from sieve_attn.selection.reference import choose as choose_rows
from sieve_attn.types import Geometry, Offsets, Ranges, Selection
from sieve_attn.types.call import CHUNK_BYTES


def tiles_per_chunk(call: Call, size: int, tiles: int) -> int:
    """How many query tiles are scored at a time."""
    row = call.query.shape[0] * call.query.shape[1] * call.kv_len * xp.itemsize(xp.compute_dtype(call.query))
    return max(1, min(tiles, CHUNK_BYTES // max(row * size, 1)))


def row_numbers(call: Call, size: int, tiles: int) -> np.ndarray:
    """[tiles, size] the query of every place; places that no query has repeat the last query of their tile.

    Repeating changes nothing, since a tile is a union or a largest value over its queries; of a tile's queries its last one is
    always looked at, whatever the stride.
    """
    lead = call.lead(size)
    number = np.arange(tiles * size).reshape(tiles, size) - lead
    number = np.where(number < 0, min(size - 1 - lead, call.q_len - 1), number)
    return np.minimum(number, call.q_len - 1)


def count_keys(call: Call, selection: PaddedBlocks | Selection) -> tuple[jax.Array, jax.Array]:
    """``(kept, visible)`` keys [batch, q_heads, 1] of a selection that was not chosen here, in fp32."""
    if isinstance(selection, Selection) and not needs_pairs(call, selection):
        return by_sight(call, selection, xp.float32)
    # a tile of queries at a time
    batch, heads = call.query.shape[:2]
    size = selection.q_block if isinstance(selection, PaddedBlocks) else 64
    lead = selection.lead if isinstance(selection, PaddedBlocks) else 0
    tiles = -(-(call.q_len + lead) // size)
    numbers = jnp.arange(tiles * size).reshape(tiles, size) - lead
    chosen = tiles_in(selection)

    def one(number):
        rows = replace(call, shared={}).rows_at(jnp.clip(number, 0, call.q_len - 1))
        real = ((number >= 0) & (number < call.q_len))[:, None]
        seen = jnp.broadcast_to(rows.visible & real, (batch, heads, size, call.kv_len))
        kept = kept_by(selection, call, number, rows.position, chosen)
        return (seen & kept).sum((2, 3), dtype=jnp.float32), seen.sum((2, 3), dtype=jnp.float32)

    kept, visible = jax.lax.map(one, numbers)
    return kept.sum(0)[..., None], visible.sum(0)[..., None]


def tiles_in(selection: PaddedBlocks | Selection) -> jax.Array | None:
    """What :func:`kept_by` would compute again for every chunk of queries."""
    return selection.to_tiles() if isinstance(selection, PaddedBlocks) and selection.rows is None else None


def kept_by(
    selection: PaddedBlocks | Selection, call: Call, number: jax.Array, position: jax.Array, tiles: jax.Array | None = None
) -> jax.Array:
    """[batch | 1, q_heads | 1, n, kv_len] bool: what the queries ``number`` [n] at ``position`` [n] keep, causality aside."""
    if isinstance(selection, PaddedBlocks):
        blocks, heads = selection.to_rows(number, tiles), call.query.shape[1]
        blocks = xp.repeat_each(blocks, 1 if blocks.shape[1] == 1 else heads // blocks.shape[1], 1)
        return jnp.repeat(blocks, selection.kv_block, -1)[..., : call.kv_len]
    kept = jnp.zeros((), bool)
    for part in selection.parts:
        kept = kept | in_part(part, position[:, None], jnp.arange(call.kv_len)[None, :])
    return kept[None, None]


def in_part(part: Ranges | Offsets, position: jax.Array, key: jax.Array) -> jax.Array:
    """Whether the query at ``position`` keeps ``key``; arrays that broadcast."""
    if isinstance(part, Ranges):
        near = (key > position - part.window) & (key < position + (part.window if part.two_sided else 1))
        return (key < part.prefix) | near
    apart = position - key
    table = np.zeros(part.kv_len + 1, bool)
    table[[s for s in part.offsets if s <= part.kv_len]] = True
    return jnp.asarray(table)[jnp.clip(apart, 0, part.kv_len)] & (apart >= 0) & (key >= part.first_key)


def choose(
    call: Call, geometry: Geometry, policy: Policy, room: int, per_query: bool = False
) -> tuple[PaddedBlocks, tuple[jax.Array, jax.Array, jax.Array]]:
    """``(what the policy keeps, (kept, visible, dense tiles))``, as ``pipeline.select`` would."""
    if policy.selector.needs_brackets:
        with xp.no_grad():
            require_full_precision(xp, call.query)
    size = policy.query_tile
    tiles = -(-(call.q_len + call.lead(size)) // size)
    step = tiles_per_chunk(call, size, tiles)
    chunks = -(-tiles // step)
    places = jnp.arange(chunks * step * size, dtype=jnp.int32).reshape(chunks, -1) - call.lead(size)
    numbers = jnp.asarray(row_numbers(call, size, chunks * step).reshape(chunks, step * size), jnp.int32)
    heads = call.key.shape[1] if policy.share_group else call.query.shape[1]
    inside = Tiles(step * size, 0, size)
    keep = forced.traceable(policy.keep, call.kv_len)
    plain = {name: jax.lax.stop_gradient(getattr(call, name)) for name in ("query", "key", "value")}
    plain |= {name: None if (x := getattr(call, name)) is None else jax.lax.stop_gradient(x) for name in ("bias", "sink")}
    geometry = jax.lax.stop_gradient(geometry)

    def one(given: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        number, place = given
        # what chunks share must not outlive the trace of this one
        mine = replace(call, shared={}, **plain)
        rows = mine.rows_at(number)
        if per_query:
            # a repeated query would count, and choose, twice
            real = ((place >= 0) & (place < call.q_len))[:, None]
            rows = replace(rows, visible=rows.visible & real, structural=rows.structural & real)
            scores = policy.scorer.score(rows, geometry, brackets=policy.selector.needs_brackets)
        else:
            scores = pipeline.score_rows(mine, policy, rows, geometry, number, inside)
        found = choose_rows(
            scores, rows, geometry, policy.selector, keep, tiles=inside, heads=heads, per_query=per_query,
            dense_above=policy.dense_above, rescore=lambda: policy.scorer.score(rows, geometry).estimate,
        )  # fmt: skip
        lanes = inside.split(found.rows, False) if per_query else None
        counts, indices, lanes = padded(found.tiles, room, lanes)
        return counts, indices, found.kept, found.visible, found.dense_tiles, *((lanes,) if per_query else ())

    given = (numbers, places)
    with xp.no_grad():
        parts = [x[None] for x in one((numbers[0], places[0]))] if chunks == 1 else jax.lax.map(one, given)
    joined = [jnp.moveaxis(x, 0, 2).reshape(*x.shape[1:3], -1, *x.shape[4:])[:, :, :tiles] for x in parts]
    counts, indices, kept, visible, dense, *lanes = joined
    grid = (call.q_len, call.kv_len, size, policy.block_size, call.lead(size))
    kept, visible = (x.astype(jnp.int32) for x in (kept, visible))
    return PaddedBlocks(counts, indices, *grid, *lanes), (kept, visible, dense)
