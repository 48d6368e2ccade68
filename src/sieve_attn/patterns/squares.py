"""Square offsets: 1, 4, 9, 16, ..."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sieve_attn.patterns.offsets import OffsetSet, check_terms, first_terms


@dataclass(frozen=True)
class Squares(OffsetSet):
    """Keys ``i - n^2`` for every ``n`` from 1 on, or for the first ``terms`` of them."""

    terms: int | None = None

    def __post_init__(self):
        check_terms(self.terms)

    def up_to(self, limit: int) -> np.ndarray:
        return first_terms(np.arange(1, math.isqrt(max(limit, 0)) + 1, dtype=np.int64) ** 2, self.terms)
