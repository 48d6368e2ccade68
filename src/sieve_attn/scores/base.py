"""What a scorer is, and the few operations that scorers share.

A :class:`Bound` brackets the log mass of a block, so it can prove; a :class:`Heuristic` only ranks. A certificate accepts
Bounds only, and checks the type.
"""

from __future__ import annotations

import math
from typing import Any

from jaxtyping import Float, Int, Shaped

from sieve_attn import arrays
from sieve_attn.bounds import soft_cap
from sieve_attn.types import Geometry, Rows, Scores, Statistics

Array = Any


class Scorer:
    """Gives every (query, block) an estimate in scaled-logit units; a larger one is kept first."""

    by_key = False  # True where the estimate of a block is made of the keys that the query sees, and of no others

    @property
    def statistics(self) -> Statistics:
        """What the geometry must hold."""
        return Statistics()

    def estimate(self, rows: Rows, geometry: Geometry) -> Float[Array, "batch q_heads rows blocks"]:
        """A number for every query and block."""
        raise TypeError(f"{type(self).__name__} must define `estimate`")

    def score(self, rows: Rows, geometry: Geometry, *, brackets: bool = False) -> Scores:
        """The estimate, -inf where a query sees nothing of a block, and for bounds on request the brackets as well."""
        xp = arrays.namespace(rows.query)
        seen = visible_count(rows, geometry.block_size) > 0
        lowest = -1e30
        estimate = self.estimate(rows, geometry)
        if not self.by_key:
            # statistics of a block that is cut hold keys after the query: it is kept anyway, and must not rank others down
            estimate = xp.where(cut_blocks(rows, geometry), lowest, estimate)
        estimate = xp.where(seen, xp.where(xp.isnan(estimate), lowest, xp.maximum(estimate, lowest)), -math.inf)
        if not brackets:
            return Scores(estimate)
        finite = per_query_head(geometry.finite, rows)[:, :, None, :]
        upper, lower = self.brackets(rows, geometry)
        upper = xp.where(finite & ~xp.isnan(upper), upper, math.inf)
        lower = xp.where(finite & ~xp.isnan(lower), lower, -math.inf)
        return Scores(estimate, xp.where(seen, upper, -math.inf), xp.where(seen, lower, -math.inf))


class Heuristic(Scorer):
    """Ranks only: nothing may be proved from it."""


class Bound(Scorer):
    """Ranks and proves: ``brackets`` holds for every block, query and input, rounding included."""

    @property
    def proof_statistics(self) -> Statistics:
        """What the geometry should hold to prove: more than ranking needs, where that makes brackets tighter."""
        return self.statistics

    @property
    def prover(self) -> Bound:
        """The bound that certifies where this one ranks: itself, less what only makes ranking cheap."""
        return self

    def brackets(self, rows: Rows, geometry: Geometry) -> tuple[Array, Array]:
        """``(upper, lower)`` log mass of the visible keys of each block, [batch, q_heads, rows, blocks]."""
        raise TypeError(f"{type(self).__name__} must define `brackets`")


def per_query_head(x: Array, rows: Rows) -> Array:
    """[batch, kv_heads, ...] to [batch, q_heads, ...]."""
    return arrays.namespace(x).repeat_each(x, rows.query.shape[1] // x.shape[1], 1)


def grouped(
    query: Float[Array, "batch q_heads rows n"], items: Float[Array, "batch kv_heads m n"]
) -> Float[Array, "batch q_heads rows m"]:
    """Dot products of every query with the items of its KV head; a group is never repeated."""
    batch, heads, n, dim = query.shape
    xp = arrays.namespace(query)
    flat = query.reshape(batch, items.shape[1], -1, dim) @ xp.transpose_last(items)
    return flat.reshape(batch, heads, n, items.shape[2])


def remember(memo: dict, name: Any, compute: Any) -> Any:
    if name not in memo:
        memo[name] = compute()
    return memo[name]


def split_blocks(x: Shaped[Array, "*axes kv_len"], block_size: int, fill: Any) -> Shaped[Array, "*axes blocks {block_size}"]:
    """[..., kv_len] to [..., blocks, block_size]."""
    xp = arrays.namespace(x)
    x = xp.pad_end(x, -1, -x.shape[-1] % block_size, fill)
    return x.reshape(*x.shape[:-1], -1, block_size)


def visible_count(rows: Rows, block_size: int) -> Int[Array, "b h rows blocks"]:
    """[batch | 1, q_heads | 1, rows, blocks] how many keys of each block a query sees."""
    xp = arrays.namespace(rows.query)
    return remember(
        rows.memo, ("visible", block_size), lambda: xp.total(split_blocks(rows.visible, block_size, False), -1, xp.int32)
    )


def cut_blocks(rows: Rows, geometry: Geometry) -> Array:
    """[rows, blocks] bool: causality, window or packing show the query a part of the block."""
    xp = arrays.namespace(rows.query)

    def compute():
        size = geometry.block_size
        allowed = split_blocks(rows.structural, size, False)
        absent = split_blocks(xp.full((1, rows.structural.shape[-1]), False, xp.boolean, rows.query), size, True)
        return xp.any_(allowed, -1) & ~xp.all_(allowed | absent, -1)

    return remember(rows.memo, ("cut", geometry.block_size), compute)


def query_norm(rows: Rows) -> Array:
    """[batch, q_heads, rows, 1]"""
    xp = arrays.namespace(rows.query)
    return remember(rows.memo, "query_norm", lambda: xp.norm(rows.query)[..., None] * (1.0 + rows.query.shape[-1] * 2.0**-23))


def named(memo: dict, name: str, geometry: Geometry) -> tuple:
    """A memo key for what depends on ``geometry``, which is kept alive so that its identity stays its own."""
    memo.setdefault(("geometry", id(geometry)), geometry)
    return name, id(geometry)


def centre_logits(rows: Rows, geometry: Geometry) -> Float[Array, "batch q_heads rows blocks"]:
    """``c = scale * q.mu``, [batch, q_heads, rows, blocks]."""
    return remember(rows.memo, named(rows.memo, "centre", geometry), lambda: grouped(rows.query, geometry.mean) * rows.scale)


def bias_range(rows: Rows, block_size: int) -> tuple[Array | float, Array | float]:
    """Largest and smallest bias over the visible keys of each block; zeros without a bias."""
    if rows.bias is None:
        return 0.0, 0.0
    xp = arrays.namespace(rows.query)

    def compute():
        high = xp.amax(split_blocks(xp.where(rows.visible, rows.bias, -math.inf), block_size, -math.inf), -1)
        low = xp.amin(split_blocks(xp.where(rows.visible, rows.bias, math.inf), block_size, math.inf), -1)
        there = xp.isfinite(high)
        return xp.where(there, high, 0.0), xp.where(there, low, 0.0)

    return remember(rows.memo, ("bias", block_size), compute)


def exact_logits(rows: Rows) -> Float[Array, "batch q_heads rows kv_len"]:
    """Capped, biased logits of every key, -inf where invisible: [batch, q_heads, rows, kv_len]."""
    xp = arrays.namespace(rows.query)

    def compute():
        logits = soft_cap(xp, grouped(rows.query, xp.cast(rows.key, rows.query.dtype)) * rows.scale, rows.softcap)
        return xp.where(rows.visible, logits if rows.bias is None else logits + rows.bias, -math.inf)

    return remember(rows.memo, "exact", compute)


def exact_block_mass(rows: Rows, block_size: int) -> Float[Array, "batch q_heads rows blocks"]:
    """Log mass of the visible keys of each block, from the keys themselves."""
    xp = arrays.namespace(rows.query)
    return remember(
        rows.memo, ("exact mass", block_size), lambda: xp.logsumexp(split_blocks(exact_logits(rows), block_size, -math.inf), -1)
    )
