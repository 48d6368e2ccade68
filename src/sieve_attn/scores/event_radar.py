"""AETHER's Event Radar: statistics of normalised keys scored against raw queries. Ranks; bounds nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sieve_attn import arrays
from sieve_attn.checks import error, threshold
from sieve_attn.scores.base import Heuristic, grouped, per_query_head, query_norm
from sieve_attn.types import Geometry, Rows, Statistics

Array = Any


def radar_scores(
    alignment: Array,
    norm: Array,
    radius: Array,
    scale: float,
    *,
    variance: Array | None = None,
    concentration: Array | None = None,
) -> Array:
    """``scale * (q.mu^ + ||q|| r (1 + sqrt(var)) conc)``; the last two factors only where their statistic is given."""
    xp = arrays.namespace(radius)
    spread = norm * radius
    if variance is not None:
        spread = spread * (1.0 + xp.sqrt(variance))
    if concentration is not None:
        spread = spread * concentration
    return scale * (alignment + spread)


def add_recency(scores: Array, age: Array, decay: float, kind: str) -> Array:
    """Favour recent blocks: ``s + log(decay) * age``, ``age`` in blocks. ``legacy`` is the published factor
    ``1 + (1 - b / nb) (1 - decay)``, which favours the oldest block and lowers negative scores."""
    if kind == "additive":
        return scores + math.log(decay) * age
    blocks = scores.shape[-1]
    xp = arrays.namespace(scores)
    index = xp.cast(xp.arange(0, blocks, scores), scores.dtype)
    return scores * (1.0 + (1.0 - index / blocks) * (1.0 - decay))


def check_recency(recency: str, recency_decay: float) -> None:
    if recency not in ("additive", "legacy"):
        raise error("recency", "must be 'additive' or 'legacy'", repr(recency), "use 'additive' to favour recent blocks")
    threshold("recency_decay", recency_decay)
    if not 0 < recency_decay <= 1:
        raise error("recency_decay", "must lie in (0, 1]", recency_decay, "use 1.0 for no recency")


@dataclass(frozen=True)
class EventRadar(Heuristic):
    """The TensorRT-LLM form of AETHER's gate, recency bonus included."""

    use_variance: bool = False
    use_concentration: bool = False
    recency_decay: float = 1.0
    recency: str = "additive"

    def __post_init__(self):
        check_recency(self.recency, self.recency_decay)

    @property
    def statistics(self) -> Statistics:
        return Statistics(direction=True)

    def estimate(self, rows: Rows, geometry: Geometry) -> Array:
        xp = arrays.namespace(rows.query)

        def per_head(x, wanted=True):
            return per_query_head(x, rows)[:, :, None, :] if wanted else None

        scores = radar_scores(
            grouped(rows.query, geometry.direction_mean), query_norm(rows), per_head(geometry.direction_radius), rows.scale,
            variance=per_head(geometry.direction_variance, self.use_variance),
            concentration=per_head(geometry.concentration, self.use_concentration),
        )  # fmt: skip
        block = xp.arange(0, geometry.blocks, rows.query)[None, :]
        age = xp.maximum(rows.position[:, None] // geometry.block_size - block, 0)
        return add_recency(scores, xp.cast(age, scores.dtype), self.recency_decay, self.recency)
