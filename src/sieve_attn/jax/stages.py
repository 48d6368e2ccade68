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
from sieve_attn.checks import error
from sieve_attn.jax.selection import PaddedBlocks
from sieve_attn.patterns import Sinks, Window
from sieve_attn.patterns.base import members
from sieve_attn.policies import Policy
from sieve_attn.selection.reference import Chosen, Tiles, choose
from sieve_attn.types import Call, Geometry, Offsets, Ranges, Selection
from sieve_attn.types.call import CHUNK_BYTES


def check_pattern(policy: Policy) -> None:
    """Patterns that look at the values of positions cannot be traced beside a scorer."""
    for part in () if policy.keep is None else members(policy.keep):
        if not isinstance(part, (Sinks, Window)):
            raise error("policy", "must force Sinks and Window only where JAX chooses blocks", repr(part),
                        "use the pattern alone, or backend='reference' outside of jit")  # fmt: skip


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
    """``(kept, visible)`` keys [batch, q_heads, 1] of a selection that was not chosen here, a tile of queries at a time."""
    batch, heads = call.query.shape[:2]
    size = selection.q_block if isinstance(selection, PaddedBlocks) else 64
    lead = selection.lead if isinstance(selection, PaddedBlocks) else 0
    tiles = -(-(call.q_len + lead) // size)
    numbers = jnp.arange(tiles * size).reshape(tiles, size) - lead
    blocks = jnp.moveaxis(selection.to_tiles(), 2, 0) if isinstance(selection, PaddedBlocks) else jnp.zeros((tiles, 0))

    def one(given):
        number, mine = given
        rows = replace(call, shared={}).rows_at(jnp.clip(number, 0, call.q_len - 1))
        real = ((number >= 0) & (number < call.q_len))[:, None]
        seen = jnp.broadcast_to(rows.visible & real, (batch, heads, size, call.kv_len))
        if isinstance(selection, PaddedBlocks):
            mine = xp.repeat_each(mine, 1 if mine.shape[1] == 1 else heads // mine.shape[1], 1)
            kept = jnp.repeat(mine, selection.kv_block, -1)[..., None, : call.kv_len]
        else:
            kept = jnp.zeros((), bool)
            for part in selection.parts:
                kept = kept | in_part(part, rows.position[:, None], jnp.arange(call.kv_len)[None, :])
        return (seen & kept).sum((2, 3), dtype=jnp.float32), seen.sum((2, 3), dtype=jnp.float32)

    kept, visible = jax.lax.map(one, (numbers, blocks))
    return kept.sum(0)[..., None], visible.sum(0)[..., None]


def in_part(part: Ranges | Offsets, position: jax.Array, key: jax.Array) -> jax.Array:
    """Whether the query at ``position`` keeps ``key``; arrays that broadcast."""
    if isinstance(part, Ranges):
        near = (key > position - part.window) & (key < position + (part.window if part.two_sided else 1))
        return (key < part.prefix) | near
    apart = position - key
    table = np.zeros(part.kv_len + 1, bool)
    table[[s for s in part.offsets if s <= part.kv_len]] = True
    return jnp.asarray(table)[jnp.clip(apart, 0, part.kv_len)] & (apart >= 0) & (key >= part.first_key)


def choose_tiles(call: Call, geometry: Geometry, policy: Policy) -> Chosen:
    """What the policy keeps: ``tiles`` [batch, heads, tiles, blocks] bool and its counts, as ``pipeline.select`` would."""
    check_pattern(policy)
    if policy.selector.needs_brackets:
        with xp.no_grad():
            require_full_precision(xp, call.query)
    size = policy.query_tile
    tiles = -(-(call.q_len + call.lead(size)) // size)
    step = tiles_per_chunk(call, size, tiles)
    chunks = -(-tiles // step)
    numbers = jnp.asarray(row_numbers(call, size, chunks * step).reshape(chunks, step * size), jnp.int32)
    heads = call.key.shape[1] if policy.share_group else call.query.shape[1]
    inside = Tiles(step * size, 0, size)
    plain = {name: jax.lax.stop_gradient(getattr(call, name)) for name in ("query", "key", "value")}
    plain |= {name: None if (x := getattr(call, name)) is None else jax.lax.stop_gradient(x) for name in ("bias", "sink")}
    geometry = jax.lax.stop_gradient(geometry)

    def one(number: jax.Array) -> tuple[jax.Array, ...]:
        # what chunks share must not outlive the trace of this one
        mine = replace(call, shared={}, **plain)
        rows = mine.rows_at(number)
        scores = pipeline.score_rows(mine, policy, rows, geometry, number, inside)
        found = choose(
            scores, rows, geometry, policy.selector, policy.keep, tiles=inside, heads=heads, per_query=False,
            dense_above=policy.dense_above, rescore=lambda: policy.scorer.score(rows, geometry).estimate,
        )  # fmt: skip
        return found.tiles, found.kept, found.visible, found.dense_tiles

    with xp.no_grad():
        parts = [x[None] for x in one(numbers[0])] if chunks == 1 else jax.lax.map(one, numbers)
    joined = (jnp.moveaxis(x, 0, 2).reshape(*x.shape[1:3], -1, *x.shape[4:])[:, :, :tiles] for x in parts)
    kept, *counts = joined
    return Chosen(kept, None, *counts)
