"""Mian-Chowla offsets: 1, 2, 4, 8, 13, 21, 31, 45, 66, 81, ..., the greedy set with all pairwise sums distinct."""

from __future__ import annotations

from dataclasses import dataclass
from threading import Lock

import numpy as np

from sieve_attn.patterns.offsets import OffsetSet, check_terms, first_terms

_SEGMENT = 1 << 20  # candidates sieved at a time: their bits stay in the cache


@dataclass(frozen=True)
class MianChowla(OffsetSet):
    """Keys ``i - a`` for every term ``a`` of the Mian-Chowla sequence, or for its first ``terms``."""

    terms: int | None = None

    def __post_init__(self):
        check_terms(self.terms)

    def up_to(self, limit: int) -> np.ndarray:
        return first_terms(_SEQUENCE.up_to(max(limit, 0)), self.terms)


class _Greedy:
    """The sequence as far as anybody asked.

    A number ``c`` above all terms may follow iff it is no ``a_j + d`` with ``d`` a difference of two terms. Candidates are
    sieved in segments: all such sums that fall into one are marked, then the unmarked are taken in order, and each new term
    ``a`` marks ``a + d`` behind it. (Other sums with its own differences are among those: ``a_j + a - a_i = a + (a_j - a_i)``.)
    Differences are single bits, so that one term marks a segment by OR-ing the bits that lie ``a_j`` before it.
    """

    def __init__(self):
        self.terms = np.array([1], np.int64)
        self.differences = np.zeros(0, np.uint8)  # bit d of the whole, the lowest of a byte first: d is a difference
        self.known = 2  # all terms below are found
        self._lock = Lock()

    def up_to(self, limit: int) -> np.ndarray:
        with self._lock:
            while self.known <= limit:
                self._extend(min(max(self.known // 4, 1 << 12), _SEGMENT))
            return self.terms[: np.searchsorted(self.terms, limit, "right")]

    def first(self, count: int) -> np.ndarray:
        with self._lock:
            while len(self.terms) < count:
                self._extend(min(max(self.known // 4, 1 << 12), _SEGMENT))
            return self.terms[:count]

    def _extend(self, size: int) -> None:
        start, stop, wide = self.known, self.known + size, size // 8 + 2
        if len(self.differences) < stop // 8 + 2:
            more = max(stop // 8 + 2 - len(self.differences), len(self.differences))
            self.differences = np.concatenate([self.differences, np.zeros(more, np.uint8)])
        # bit n + r of row r: number start + n is marked, by terms whose bits lie r places into a byte
        marks = np.zeros((8, wide), np.uint8)
        for a in self.terms.tolist():
            byte, r = divmod(start - a, 8)
            marks[r] |= self.differences[byte : byte + wide]
        free = np.ones(size, bool)
        for r in range(8):
            free &= _bits(marks[r])[r : r + size] == 0
        place = 0
        while free[place:].any():
            place += int(free[place:].argmax())
            made = start + place - self.terms
            np.bitwise_or.at(self.differences, made >> 3, np.left_shift(1, made & 7).astype(np.uint8))
            self.terms = np.append(self.terms, start + place)
            free[place:] &= _bits(self.differences[: (size - place) // 8 + 1])[: size - place] == 0
            free[place] = False
        self.known = stop


def _bits(packed: np.ndarray) -> np.ndarray:
    return np.unpackbits(packed, bitorder="little")


_SEQUENCE = _Greedy()


def mian_chowla(count: int) -> np.ndarray:
    """The first ``count`` terms, int64."""
    return _SEQUENCE.first(count)
