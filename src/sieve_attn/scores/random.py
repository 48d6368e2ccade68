"""Random scores: the floor that every ranking must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sieve_attn import arrays
from sieve_attn.scores.base import Heuristic
from sieve_attn.types import Geometry, Rows

Array = Any

_PRIME = 2147483647


@dataclass(frozen=True)
class Random(Heuristic):
    """A fixed pseudo-random number for every (head, query position, block): the same on every backend and chunking."""

    seed: int = 0
    by_key = True

    def estimate(self, rows: Rows, geometry: Geometry) -> Array:
        xp = arrays.namespace(rows.query)
        head = xp.arange(0, rows.query.shape[1], rows.query)[:, None, None]
        block = xp.arange(0, geometry.blocks, rows.query)[None, None, :]
        state = (head * 7919 + rows.position[None, :, None] * 104729 + block * 1299709 + self.seed * 15485863 + 1) % _PRIME
        for _ in range(3):
            state = (state * 48271 + 11) % _PRIME
            state = state ^ (state >> 13)
        noise = xp.cast(state % _PRIME, rows.query.dtype) / _PRIME
        return xp.broadcast_to(noise[None], (rows.query.shape[0], *noise.shape))
