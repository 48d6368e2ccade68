"""Keep the estimated softmax mass that was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sieve_attn import arrays
from sieve_attn.checks import share
from sieve_attn.selection.base import Candidates, RowSelector

Array = Any


@dataclass(frozen=True)
class Mass(RowSelector):
    """Per query the smallest prefix of blocks, by estimated share, that reaches ``mass``. Estimated, not proved."""

    mass: float = 0.99
    may_turn_dense = True

    def __post_init__(self):
        share("mass", self.mass, "0.99 keeps what is estimated to hold 99 % of the softmax")

    def keep(self, candidates: Candidates) -> Array:
        xp = arrays.namespace(candidates.visible)
        if self.mass == 1.0:
            return candidates.visible
        estimate = candidates.scores.estimate
        ordered, order = xp.sort_descending(estimate, -1)
        lse = xp.logsumexp(estimate, -1)[..., None]
        shares = xp.where(xp.isfinite(ordered), xp.exp(ordered - xp.where(xp.isfinite(lse), lse, 0.0)), 0.0)
        before = xp.cumsum(shares, -1) - shares
        kept = (before < self.mass) & xp.isfinite(ordered)
        return xp.take_along(kept, xp.inverse_permutation(order, -1), -1) & candidates.visible
