"""Bounds from a few numbers a block: ball, cosh, box, Bennett, and the tightest of several.

Each says how large a logit of the block can be and how small; the mass bracket follows. Sound, and at 64 keys a block
nearly blind: ``docs/math.md`` has the figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sieve_attn import arrays
from sieve_attn.bounds import (
    bennett_log_mgf,
    capped_lower_shift,
    capped_upper_shift,
    log_cosh,
    logit_margin,
    round_down,
    round_up,
    soft_cap,
)
from sieve_attn.scores.base import Bound, bias_range, centre_logits, grouped, per_query_head, query_norm, visible_count
from sieve_attn.types import Geometry, Rows, Statistics

Array = Any


class BlockBound(Bound):
    """A bound from the range of a block's logits and, where ``log_mgf`` gives one, from their spread about the mean."""

    def reach(self, rows: Rows, geometry: Geometry) -> tuple[Array, Array]:
        """Largest and smallest scaled logit that a key of the block can have."""
        raise TypeError(f"{type(self).__name__} must define `reach`")

    def log_mgf(self, rows: Rows, geometry: Geometry) -> Array | None:
        """``log f`` with ``sum_j e^{s_j} <= n e^c f``, or None."""
        return None

    def deviation(self, rows: Rows, geometry: Geometry) -> Array:
        """At least the standard deviation of the block's logits."""
        highest, lowest = self.reach(rows, geometry)
        return highest - lowest

    def estimate(self, rows: Rows, geometry: Geometry) -> Array:
        xp = arrays.namespace(rows.query)
        return soft_cap(xp, self.reach(rows, geometry)[0], rows.softcap) + bias_range(rows, geometry.block_size)[0]

    def brackets(self, rows: Rows, geometry: Geometry) -> tuple[Array, Array]:
        xp = arrays.namespace(rows.query)
        cap, dtype = rows.softcap, rows.query.dtype
        seen = visible_count(rows, geometry.block_size)
        count = per_query_head(geometry.count, rows)[:, :, None, :]
        whole = seen == count
        log_seen, log_count = (xp.log(xp.maximum(xp.cast(n, dtype), 1.0)) for n in (seen, count))
        highest, lowest = self.reach(rows, geometry)
        centre = centre_logits(rows, geometry)
        upper = log_seen + soft_cap(xp, highest, cap)
        lower = log_seen + soft_cap(xp, lowest, cap)
        log_mgf = self.log_mgf(rows, geometry)
        if log_mgf is not None and (cap is None or cap >= 5):
            shift = 0.0 if cap is None else capped_upper_shift(cap)
            upper = xp.minimum(upper, log_count + soft_cap(xp, centre + log_mgf, cap) + shift)
        if cap is None:
            lower = xp.where(whole, log_count + centre, lower)
        elif cap >= 5:
            jensen = log_count + soft_cap(xp, centre, cap) - capped_lower_shift(xp, self.deviation(rows, geometry), cap)
            lower = xp.where(whole, xp.maximum(lower, jensen), lower)
        largest, smallest = bias_range(rows, geometry.block_size)
        terms = xp.cast(count, dtype) + (rows.query.shape[-1] + 16)
        margin = logit_margin(rows.scale, query_norm(rows), self._norm(rows, geometry), terms)
        return round_up(xp, upper + largest, margin), round_down(xp, lower + smallest, margin)

    def _norm(self, rows: Rows, geometry: Geometry) -> Array:
        """The norm that the rounding of this bound's dot products scales with."""
        return per_query_head(geometry.key_norm, rows)[:, :, None, :]


@dataclass(frozen=True)
class Euclidean(BlockBound):
    """The ball of AETHER: ``max_j s_j <= scale * (q.mu + ||q|| r)``. The estimate is that largest logit."""

    @property
    def statistics(self) -> Statistics:
        return Statistics(radius=True)

    def radius_logit(self, rows: Rows, geometry: Geometry) -> Array:
        return rows.scale * query_norm(rows) * per_query_head(geometry.radius, rows)[:, :, None, :]

    def reach(self, rows: Rows, geometry: Geometry) -> tuple[Array, Array]:
        centre, reach = centre_logits(rows, geometry), self.radius_logit(rows, geometry)
        return centre + reach, centre - reach

    def deviation(self, rows: Rows, geometry: Geometry) -> Array:
        return self.radius_logit(rows, geometry)


@dataclass(frozen=True)
class Cosh(Euclidean):
    """The ball with zero mean: mass at most ``n e^c cosh R``."""

    def log_mgf(self, rows: Rows, geometry: Geometry) -> Array:
        return log_cosh(arrays.namespace(rows.query), self.radius_logit(rows, geometry))

    def estimate(self, rows: Rows, geometry: Geometry) -> Array:
        return _mass_estimate(self, rows, geometry)


@dataclass(frozen=True)
class Bennett(Euclidean):
    """The ball with zero mean and a bound on the variance in every direction: Bennett's two-point supremum."""

    @property
    def statistics(self) -> Statistics:
        return Statistics(radius=True, variance=True)

    def deviation(self, rows: Rows, geometry: Geometry) -> Array:
        xp = arrays.namespace(rows.query)
        return rows.scale * query_norm(rows) * xp.sqrt(per_query_head(geometry.variance, rows))[:, :, None, :]

    def log_mgf(self, rows: Rows, geometry: Geometry) -> Array:
        xp = arrays.namespace(rows.query)
        count = xp.cast(per_query_head(geometry.count, rows)[:, :, None, :], rows.query.dtype)
        return bennett_log_mgf(xp, self.radius_logit(rows, geometry), self.deviation(rows, geometry) ** 2, count)

    def estimate(self, rows: Rows, geometry: Geometry) -> Array:
        return _mass_estimate(self, rows, geometry)


def _mass_estimate(bound: Euclidean, rows: Rows, geometry: Geometry) -> Array:
    xp = arrays.namespace(rows.query)
    seen = xp.log(xp.maximum(xp.cast(visible_count(rows, geometry.block_size), rows.query.dtype), 1.0))
    inside = centre_logits(rows, geometry) + bound.log_mgf(rows, geometry)
    return seen + soft_cap(xp, inside, rows.softcap) + bias_range(rows, geometry.block_size)[0]


@dataclass(frozen=True)
class Box(BlockBound):
    """Channel minima and maxima (Quest): ``max_j s_j <= scale * sum_d max(q_d low_d, q_d high_d)``."""

    @property
    def statistics(self) -> Statistics:
        return Statistics(box=True)

    def reach(self, rows: Rows, geometry: Geometry) -> tuple[Array, Array]:
        xp = arrays.namespace(rows.query)
        positive, negative = xp.maximum(rows.query, 0.0), xp.minimum(rows.query, 0.0)
        highest = grouped(positive, geometry.high) + grouped(negative, geometry.low)
        lowest = grouped(positive, geometry.low) + grouped(negative, geometry.high)
        return highest * rows.scale, lowest * rows.scale

    def _norm(self, rows: Rows, geometry: Geometry) -> Array:
        xp = arrays.namespace(rows.query)
        corner = xp.norm(xp.maximum(abs(geometry.low), abs(geometry.high)))
        return 2.0 * per_query_head(corner, rows)[:, :, None, :]


@dataclass(frozen=True)
class Tightest(Bound):
    """The smallest upper and the largest lower bracket of several bounds; ranks by the first."""

    bounds: tuple[Bound, ...]

    @property
    def by_key(self) -> bool:
        return self.bounds[0].by_key

    @property
    def statistics(self) -> Statistics:
        asked = Statistics()
        for bound in self.bounds:
            asked = asked | bound.statistics
        return asked

    @property
    def proof_statistics(self) -> Statistics:
        asked = Statistics()
        for bound in self.bounds:
            asked = asked | bound.proof_statistics
        return asked

    def estimate(self, rows: Rows, geometry: Geometry) -> Array:
        return self.bounds[0].estimate(rows, geometry)

    def brackets(self, rows: Rows, geometry: Geometry) -> tuple[Array, Array]:
        xp = arrays.namespace(rows.query)
        upper, lower = self.bounds[0].brackets(rows, geometry)
        for bound in self.bounds[1:]:
            u, low = bound.brackets(rows, geometry)
            upper, lower = xp.minimum(upper, u), xp.maximum(lower, low)
        return upper, lower
