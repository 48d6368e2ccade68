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
from sieve_attn.patterns import Sinks, Window
from sieve_attn.patterns.base import members
from sieve_attn.policies import Policy
from sieve_attn.selection.reference import Chosen, Tiles, choose
from sieve_attn.types import Call, Geometry
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
