"""Prime offsets: 2, 3, 5, 7, ..."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sieve_attn.patterns.offsets import OffsetSet, check_terms, first_terms

_SEGMENT = 1 << 20  # odd numbers sieved at a time: they stay in the cache


@dataclass(frozen=True)
class Primes(OffsetSet):
    """Keys ``i - p`` for every prime ``p``, or for the first ``terms`` primes."""

    terms: int | None = None

    def __post_init__(self):
        check_terms(self.terms)

    def up_to(self, limit: int) -> np.ndarray:
        every = _primes_below(1 << max(limit, 1).bit_length())
        return first_terms(every[: np.searchsorted(every, limit, "right")], self.terms)


@lru_cache(maxsize=8)
def _primes_below(stop: int) -> np.ndarray:
    return primes(stop - 1)


def primes(limit: int) -> np.ndarray:
    """The primes of at most ``limit``, int64, by a segmented sieve of Eratosthenes over the odd numbers."""
    if limit < 2:
        return np.zeros(0, np.int64)
    base = _small_odd_primes(math.isqrt(limit))
    found = [np.array([2], np.int64)]
    odd_numbers = (limit - 1) // 2  # 3, 5, ...; place n holds 2 n + 3
    for start in range(0, odd_numbers, _SEGMENT):
        stop = min(odd_numbers, start + _SEGMENT)
        marks = np.ones(stop - start, bool)
        for p in base.tolist():
            first = (p * p - 3) // 2
            if first >= stop:
                break
            # the first multiple inside of the segment, at steps of p places
            marks[max(first - start, (first - start) % p) :: p] = False
        found.append(2 * (np.flatnonzero(marks) + start) + 3)
    return np.concatenate(found)


def _small_odd_primes(limit: int) -> np.ndarray:
    marks = np.ones(limit + 1, bool)
    marks[:3] = False
    marks[4::2] = False
    for p in range(3, math.isqrt(limit) + 1, 2):
        if marks[p]:
            marks[p * p :: p] = False
    return np.flatnonzero(marks)
