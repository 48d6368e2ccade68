"""The far field on JAX arrays: attention over kept blocks, and the multipole estimate of those that are dropped whole.

See :mod:`sieve_attn.attend.far_field`. Every key is read, a tile of queries at a time; gradients are traced through the near
field and through masses and mean values of the far one, where clipping did not fix them.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp

from sieve_attn.attend.far_field import FarField, expand
from sieve_attn.jax import gather
from sieve_attn.jax.call import Call
from sieve_attn.jax.selection import PaddedBlocks
from sieve_attn.jax.stages import kept_by, tiles_in
from sieve_attn.policies import FAR_FIELD_BOUND
from sieve_attn.types import Geometry, Selection


def attend(call: Call, selection: PaddedBlocks | Selection, geometry: Geometry) -> tuple[jax.Array, jax.Array]:
    """``(output, lse)`` with the far field's mass in both; ``geometry`` holds what ``FAR_FIELD_BOUND`` and values ask for."""
    padded = isinstance(selection, PaddedBlocks)
    size, lead = (selection.q_block, selection.lead) if padded else (gather.TILE, call.lead(gather.TILE))
    numbers = gather.tiles_of(call, size, lead)
    key, value = call.compute("key"), call.compute("value")
    chosen = tiles_in(selection)
    field = FarField(jax.lax.stop_gradient(geometry), FAR_FIELD_BOUND)

    def one(number):
        mine = replace(call, shared={})
        rows = mine.rows_at(jnp.clip(number, 0, call.q_len - 1))
        kept = kept_by(selection, call, number, rows.position, chosen)
        out, lse = gather.softmax(rows, key, value, kept, gather.sink_of(call))
        bias = None if rows.bias is None else jax.lax.stop_gradient(rows.bias)
        found = expand(replace(rows, bias=bias, memo={}), kept, field.geometry, field.bound, mine)
        free = jnp.where(jax.lax.stop_gradient(found.slope) != 0, found.free - jax.lax.stop_gradient(found.free), 0.0)
        return _merged(out, lse, jax.lax.stop_gradient(found.mass) + free, found.worth)

    with jax.default_matmul_precision("highest"):
        return gather.map_tiles(call, numbers, lead, one)


def _merged(out: jax.Array, lse: jax.Array, mass: jax.Array, worth: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The near output and log-sum-exp with blocks of log mass ``mass`` [batch, q_heads, rows, blocks] at the values ``worth``."""
    top = jax.lax.stop_gradient(jnp.maximum(lse, mass.max(-1)))
    top = jnp.where(jnp.isneginf(top), 0.0, top)

    def weight(x, top):
        there = ~jnp.isneginf(x)
        return jnp.where(there, jnp.exp(jnp.where(there, x - top, 0.0)), 0.0)

    near, far = weight(lse, top), weight(mass, top[..., None])
    total = near + far.sum(-1)
    empty = total == 0
    safe = jnp.where(empty, 1.0, total)
    merged = (near[..., None] * out + gather.weighted(far, worth)) / safe[..., None]
    return merged, jnp.where(empty, -jnp.inf, jnp.log(safe) + top)
