"""Means of a few keys: a cheap ranking between the block mean and the sketch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sieve_attn import arrays
from sieve_attn.bounds import soft_cap
from sieve_attn.checks import positive_int
from sieve_attn.scores.base import Heuristic, bias_range, centre_logits, grouped, per_query_head
from sieve_attn.types import Geometry, Rows, Statistics

Array = Any


@dataclass(frozen=True)
class SubMeans(Heuristic):
    """``log sum_p n_p exp(scale * q.mu_p)`` over the means ``mu_p`` of ``size`` consecutive keys."""

    size: int = 4

    def __post_init__(self):
        positive_int("size", self.size, "try 4")

    @property
    def statistics(self) -> Statistics:
        return Statistics(sub_means=self.size)

    def estimate(self, rows: Rows, geometry: Geometry) -> Array:
        xp = arrays.namespace(rows.query)
        means, counts = geometry.sub_means, geometry.sub_counts
        flat = means.reshape(*means.shape[:2], -1, means.shape[-1])
        logits = soft_cap(xp, grouped(rows.query, flat) * rows.scale, rows.softcap)
        weight = xp.log(xp.cast(per_query_head(counts, rows), logits.dtype))[:, :, None]
        logits = logits.reshape(*logits.shape[:3], *counts.shape[2:])
        return xp.logsumexp(logits + weight, -1) + bias_range(rows, geometry.block_size)[0]


@dataclass(frozen=True)
class Mean(Heuristic):
    """``log n + scale * q.mu``: the mass of a block whose keys all equal their mean (a lower bound, by Jensen)."""

    def estimate(self, rows: Rows, geometry: Geometry) -> Array:
        xp = arrays.namespace(rows.query)
        centre = soft_cap(xp, centre_logits(rows, geometry), rows.softcap)
        count = xp.log(xp.cast(per_query_head(geometry.count, rows), centre.dtype))[:, :, None]
        return centre + count + bias_range(rows, geometry.block_size)[0]
