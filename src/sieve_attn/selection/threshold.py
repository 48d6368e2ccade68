"""Keep what scores above a level: an absolute one, or one relative to the query's best block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sieve_attn import arrays
from sieve_attn.checks import error, threshold
from sieve_attn.selection.base import Candidates, RowSelector

Array = Any


@dataclass(frozen=True)
class Threshold(RowSelector):
    """Keep iff the estimate exceeds ``threshold`` (strictly, in scaled-logit units).

    Softmax does not change when all logits shift, so an absolute level has no absolute meaning: 0.15 keeps every block of
    Gaussian keys. ``-inf`` keeps everything, ``+inf`` only what is forced and each query's best block.
    """

    threshold: float = 0.15
    every_query = True

    def __post_init__(self):
        threshold("threshold", self.threshold)

    def keep(self, candidates: Candidates) -> Array:
        if self.threshold == float("-inf"):
            return candidates.visible
        return candidates.scores.estimate > self.threshold


@dataclass(frozen=True)
class RelativeThreshold(RowSelector):
    """Keep iff the estimate is within ``margin`` of the query's largest estimate: what softmax itself cares about."""

    margin: float = 8.0
    every_query = True
    keeps_some = True

    def __post_init__(self):
        if not threshold("margin", self.margin) >= 0:
            raise error("margin", "must be at least 0", self.margin, "8.0 drops blocks below e^-8 of the best")

    def keep(self, candidates: Candidates) -> Array:
        xp = arrays.namespace(candidates.visible)
        best = xp.amax(candidates.scores.estimate, -1)[..., None]
        return candidates.visible & (candidates.scores.estimate >= best - self.margin)
