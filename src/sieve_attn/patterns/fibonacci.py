"""Fibonacci offsets: 1, 2, 3, 5, 8, ..."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sieve_attn.patterns.offsets import OffsetSet, check_terms, first_terms


@dataclass(frozen=True)
class Fibonacci(OffsetSet):
    """Keys ``i - f`` for every Fibonacci number ``f``, or for the first ``terms`` of them: logarithmically many."""

    terms: int | None = None

    def __post_init__(self):
        check_terms(self.terms)

    def up_to(self, limit: int) -> np.ndarray:
        found, following = [], (1, 2)
        while following[0] <= limit:
            found.append(following[0])
            following = (following[1], sum(following))
        return first_terms(np.asarray(found, np.int64), self.terms)
