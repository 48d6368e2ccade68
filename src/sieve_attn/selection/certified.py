"""Keep blocks until the dropped softmax mass is proved to be at most ``error``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sieve_attn import arrays
from sieve_attn.bounds import SMALLEST, UNIT, dropped_mass, kept_mass, logit_margin
from sieve_attn.checks import error as complain
from sieve_attn.checks import share
from sieve_attn.scores.base import exact_block_mass, per_query_head, query_norm
from sieve_attn.selection.base import Candidates, RowSelector

Array = Any


@dataclass(frozen=True)
class Certified(RowSelector):
    """Per query: stream the blocks by ``U + kappa * clip(estimate, L, U)``, ``kappa = error / (1 - error)``, with the exact
    mass ``K`` of those already read, and stop at the first prefix whose rest is proved to be at most ``error`` of the total.

    The tile keeps the union of its queries' prefixes; adding blocks never raises any query's dropped mass.
    """

    error: float = 0.02
    needs_brackets = True
    every_query = True
    keeps_some = True
    may_turn_dense = True

    def __post_init__(self):
        share("error", self.error, "0.02 proves that at most 2 % of the softmax mass is dropped")
        if self.error in (0, 1):
            raise complain("error", "must lie strictly between 0 and 1", self.error, "use Dense() for no error at all")

    def keep(self, candidates: Candidates) -> Array:
        xp = arrays.namespace(candidates.visible)
        rows, geometry, scores = candidates.rows, candidates.geometry, candidates.scores
        # a hair below the target, so that the certificate computed afterwards in another order meets it too
        target = self.error * (1.0 - 2.0**-10)
        kappa = target / (1.0 - target)
        middle = xp.minimum(xp.maximum(scores.estimate, scores.lower), scores.upper)
        priority = xp.where(candidates.visible, xp.logaddexp(scores.upper, math.log(kappa) + middle), -math.inf)
        first = candidates.visible & (candidates.forced | ~xp.isfinite(priority) & (scores.upper > 0))
        priority = xp.where(first, math.inf, priority)
        _, order = xp.sort_descending(priority, -1)

        exact = xp.where(candidates.visible, exact_block_mass(rows, geometry.block_size), -math.inf)
        kept_front = _running_mass(xp, xp.take_along(exact, order, -1))
        if rows.sink is not None:
            kept_front = xp.logaddexp(kept_front, xp.cast(rows.sink, kept_front.dtype)[None, :, None, None])
        upper = xp.where(candidates.visible & ~first, scores.upper, -math.inf)
        rest = _remaining_mass(xp, xp.take_along(upper, order, -1))

        seen_norm = xp.where(candidates.visible, per_query_head(geometry.key_norm, rows)[:, :, None, :], 0.0)
        margin = logit_margin(rows.scale, query_norm(rows), xp.amax(seen_norm, -1)[..., None], rows.query.shape[-1] + 8)
        kv_len = rows.visible.shape[-1]
        low = kept_mass(xp, kept_front, margin=margin, additions=kv_len, tiles=upper.shape[-1])
        proved = dropped_mass(xp, low, rest + (upper.shape[-1] + 16) * UNIT) <= target
        forced_first = xp.take_along(first, order, -1)
        # the first success is final: everything up to and including it is kept
        successes = xp.cumsum(xp.cast(proved & ~_more_forced(xp, forced_first), xp.int32), -1)
        kept = (successes == 0) | (_shifted(xp, successes) == 0)
        return xp.take_along(kept, xp.inverse_permutation(order, -1), -1) & candidates.visible


def _running_mass(xp, ordered: Array) -> Array:
    """Log mass of each prefix. What underflows is only lost from the kept side, which is safe."""
    top = xp.amax(ordered, -1)[..., None]
    top = xp.where(xp.isfinite(top), top, 0.0)
    return xp.log(xp.cumsum(xp.exp(ordered - top), -1)) + top


def _remaining_mass(xp, ordered: Array) -> Array:
    """At least the log mass of everything after each place: summed from the tail, so nothing cancels or is lost."""
    top = xp.amax(ordered, -1)[..., None]
    top = xp.where(xp.isfinite(top), top, 0.0)
    there = xp.isfinite(ordered)
    each = xp.where(there, xp.exp(ordered - top) + SMALLEST, 0.0)
    tail = xp.flip(xp.cumsum(xp.flip(each, -1), -1), -1)
    after = xp.concat([tail[..., 1:], xp.zeros((*tail.shape[:-1], 1), tail.dtype, tail)], -1)
    return xp.log(after) + top


def _shifted(xp, counts: Array) -> Array:
    return xp.concat([xp.zeros((*counts.shape[:-1], 1), counts.dtype, counts), counts[..., :-1]], -1)


def _more_forced(xp, forced: Array) -> Array:
    """Whether a forced block comes after this place (forced ones lead, so this only holds inside their run)."""
    later = xp.concat([forced[..., 1:], xp.zeros((*forced.shape[:-1], 1), xp.boolean, forced)], -1)
    return later
