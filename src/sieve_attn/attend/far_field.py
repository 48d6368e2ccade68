"""The far field: instead of dropping a block, add its multipole estimate. For smooth tasks; it hurts exact recall.

A dropped block ``B`` of ``n`` keys with mean ``mu``, channel variances ``var_d`` and mean value ``nu_B`` counts as one key of
mass ``m_B = n exp(c + scale^2 sum_d q_d^2 var_d / 2)``, clipped into the proved bracket ``[L_B, U_B]``, at the value ``nu_B``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sieve_attn import arrays
from sieve_attn.attend.weighted import finite_only, weighted
from sieve_attn.bounds import soft_cap
from sieve_attn.geometry.edit import head, map_arrays
from sieve_attn.scores.base import Bound, bias_range, grouped, per_query_head, split_blocks, visible_count
from sieve_attn.types import Call, Geometry, Rows

Array = Any


@dataclass(frozen=True)
class FarField:
    """The geometry to expand about (radius, variance and value statistics) and the bound that clips the expansion."""

    geometry: Geometry
    bound: Bound


def front(geometry: Geometry, keys: int) -> Geometry:
    """The geometry of the leading blocks that hold ``keys`` keys."""
    if keys == geometry.kv_len:
        return geometry
    return map_arrays(geometry, head, -(-keys // geometry.block_size), keys, keys)


def block_means(x: Array, taking_part: Array, block_size: int) -> tuple[Array, Array]:
    """Mean and channel variance of each block, differentiable in ``x`` [batch, kv_heads, kv_len, n]."""
    xp = arrays.namespace(x)
    padded = xp.pad_end(x, 2, -x.shape[2] % block_size, 0.0)
    blocks = padded.reshape(*x.shape[:2], -1, block_size, x.shape[-1])
    real = split_blocks(taking_part, block_size, False)[..., None]
    n = xp.maximum(xp.cast(real, x.dtype).sum(3), 1.0)
    # a product with zero would let the NaN of a masked key through
    blocks = xp.where(real, blocks, 0.0)
    mean = blocks.sum(3) / n
    variance = (xp.where(real, blocks - mean[:, :, :, None, :], 0.0) ** 2).sum(3) / n
    return mean, variance


def dropped_whole(rows: Rows, kept: Array, geometry: Geometry) -> Array:
    """[batch, q_heads, rows, blocks]: blocks that a query sees whole and keeps nothing of."""
    xp = arrays.namespace(rows.query)
    group = rows.query.shape[1]
    some = xp.any_(split_blocks(kept & rows.visible, geometry.block_size, False), -1)
    count = xp.repeat_each(geometry.count, group // geometry.count.shape[1], 1)[:, :, None, :]
    return (visible_count(rows, geometry.block_size) == count) & (count > 0) & ~some


@dataclass(frozen=True)
class Expansion:
    """The far field of one chunk: per (query, block) a mass, and per block what it stands on."""

    mass: Array  # [batch, q_heads, rows, blocks] log m_B, -inf where the block is not far
    free: Array  # log m_B before it was clipped
    slope: Array  # d mass / d (c + spread): 0 where the mass was clipped
    mean: Array  # [batch, kv_heads, blocks, dim]
    variance: Array  # [batch, kv_heads, blocks, dim]
    worth: Array  # [batch, kv_heads, blocks, v_dim] mean values
    taking_part: Array  # [batch, kv_heads, kv_len] bool


def expand(rows: Rows, kept: Array, geometry: Geometry, bound: Bound, call: Call) -> Expansion:
    """The multipole estimate of every block that a query sees whole and keeps nothing of."""
    xp = arrays.namespace(rows.query)
    seen = rows.visible.shape[-1]
    part = xp.full(rows.key.shape[:3], True, xp.boolean, rows.query)
    if call.present is not None:
        part = part & call.present[:, None, :seen]
    mean, variance = block_means(rows.key, part, geometry.block_size)
    worth, _ = block_means(call.compute("value")[:, :, :seen], part, geometry.block_size)
    far = dropped_whole(rows, kept, geometry)
    count = xp.repeat_each(geometry.count, rows.query.shape[1] // geometry.count.shape[1], 1)[:, :, None, :]
    square = rows.query**2
    # what is not finite is left out of the products and put back where it belongs: a block that no query may look at has no
    # part in any gradient either
    inside = rows.scale * grouped(finite_only(xp, rows.query), finite_only(xp, mean))
    inside = inside + 0.5 * rows.scale**2 * grouped(finite_only(xp, square), finite_only(xp, variance))
    capped = soft_cap(xp, inside, rows.softcap)
    free = xp.log(xp.maximum(xp.cast(count, inside.dtype), 1.0)) + capped + bias_range(rows, geometry.block_size)[0]
    free = xp.where(_reaches(xp, rows, square, variance) | xp.isnan(free), math.inf, free)
    free = xp.where(_reaches(xp, rows, rows.query, mean), math.nan, free)
    scores = bound.score(rows, geometry, brackets=True)
    mass = xp.maximum(xp.minimum(free, scores.upper), scores.lower)
    slope = xp.where(far & (mass == free), 1.0 if rows.softcap is None else 1.0 - (capped / rows.softcap) ** 2, 0.0)
    return Expansion(xp.where(far, mass, -math.inf), free, slope, mean, variance, worth, part)


def _reaches(xp: Any, rows: Rows, of_rows: Array, of_blocks: Array) -> Array:
    """[batch, q_heads, rows, blocks]: the product of a row and a block meets something that is not finite."""
    row, block = (~xp.all_(xp.isfinite(x), -1) for x in (of_rows, of_blocks))
    return row[..., None] | per_query_head(block, rows)[:, :, None, :]


def add_far_field(rows: Rows, kept: Array, out: Array, lse: Array, far_field: FarField, call: Call) -> tuple[Array, Array]:
    """Merge the far field of one chunk into its near output and log-sum-exp."""
    xp = arrays.namespace(rows.query)
    geometry = front(far_field.geometry, rows.visible.shape[-1])
    found = expand(rows, kept, geometry, far_field.bound, call)
    total = xp.logaddexp(lse, xp.logsumexp(found.mass, -1))
    safe = xp.where(xp.isfinite(total), total, 0.0)
    near = xp.exp(lse - safe)[..., None] * out
    return near + weighted(xp, xp.exp(found.mass - safe[..., None]), found.worth), total


def add_far_gradients(
    rows: Rows,
    kept: Array,
    lse: Array,
    shift: Array,
    d_out: Array,
    far_field: FarField,
    call: Call,
    grads: dict[str, Array],
    start: int,
) -> None:
    """The far field's part of the gradients: a far block is one more key, whose logit and value depend on the block's keys."""
    xp = arrays.namespace(rows.query)
    geometry = front(far_field.geometry, rows.visible.shape[-1])
    found = expand(rows, kept, geometry, far_field.bound, call)
    batch, heads, n, _ = found.mass.shape
    kv_heads, seen = rows.key.shape[1], rows.visible.shape[-1]

    def by_group(x):
        return x.reshape(batch, kv_heads, -1, x.shape[-1])

    safe = xp.where(xp.isfinite(lse), lse, 0.0)[..., None]
    weight = by_group(xp.exp(found.mass - safe))
    slope, worth, mean, variance = by_group(found.slope), *(finite_only(xp, x) for x in (found.worth, found.mean, found.variance))
    d_mass = weight * (by_group(d_out) @ xp.transpose_last(worth) + by_group(shift[..., None])) * slope
    # as near: what carries no weight has no part in any gradient
    d_mass = xp.where((weight == 0) | (slope == 0), 0.0, d_mass)
    query, square = (finite_only(xp, by_group(x)) for x in (rows.query, rows.query**2))
    d_query = rows.scale * (d_mass @ mean) + rows.scale**2 * query * (d_mass @ variance)
    grads["query"][:, :, start : start + n] += d_query.reshape(batch, heads, n, -1)
    d_mass = xp.transpose_last(d_mass)
    d_mean, d_variance = rows.scale * (d_mass @ query), 0.5 * rows.scale**2 * (d_mass @ square)
    d_worth = xp.transpose_last(weight) @ by_group(d_out)

    size = geometry.block_size
    counted = xp.cast(split_blocks(found.taking_part, size, False), d_mean.dtype).sum(-1)[..., None]

    def to_keys(x):
        shared = xp.repeat_each(x / xp.maximum(counted, 1.0), size, 2)[:, :, :seen]
        return xp.where(found.taking_part[..., None], shared, 0.0)

    centred = finite_only(xp, rows.key - xp.repeat_each(found.mean, size, 2)[:, :, :seen])
    grads["key"][:, :, :seen] += to_keys(d_mean) + 2.0 * centred * to_keys(d_variance)
    grads["value"][:, :, :seen] += to_keys(d_worth)
