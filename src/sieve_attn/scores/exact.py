"""The oracle: the exact mass of every block, from the keys themselves. For evaluation and tests; it skips nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sieve_attn import arrays
from sieve_attn.bounds import logit_margin, round_down, round_up
from sieve_attn.scores.base import Bound, exact_block_mass, per_query_head, query_norm
from sieve_attn.types import Geometry, Rows

Array = Any


@dataclass(frozen=True)
class Exact(Bound):
    """``log sum_{j in block} exp(s_j)`` read from the keys."""

    by_key = True

    def estimate(self, rows: Rows, geometry: Geometry) -> Array:
        return exact_block_mass(rows, geometry.block_size)

    def brackets(self, rows: Rows, geometry: Geometry) -> tuple[Array, Array]:
        xp = arrays.namespace(rows.query)
        mass = exact_block_mass(rows, geometry.block_size)
        norm = per_query_head(geometry.key_norm, rows)[:, :, None, :]
        margin = logit_margin(rows.scale, query_norm(rows), norm, rows.query.shape[-1] + geometry.block_size + 16)
        margin = margin + (geometry.block_size + 16) * 2.0**-24
        return round_up(xp, mass, margin), round_down(xp, mass, margin)
