"""Mian-Chowla offsets: 1, 2, 4, 8, 13, 21, 31, 45, 66, 81, ..., the greedy set with all pairwise sums distinct."""

from __future__ import annotations

from dataclasses import dataclass
from threading import Lock

import numpy as np

from sieve_attn.patterns.offsets import OffsetSet, check_terms, first_terms

_SEGMENT = 1 << 19  # candidates sieved at a time: they stay in the cache


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
    sieved in segments: all sums that fall into one are marked, then the unmarked are taken in order, and each new term ``a``
    marks ``a + d`` behind it. (The other sums with its own differences are among those: ``a_j + a - a_i = a + (a_j - a_i)``.)
    """

    def __init__(self):
        self.terms = np.array([1], np.int64)
        self.differences = np.zeros(0, np.int64)  # increasing
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
        start, stop = self.known, self.known + size
        free = np.ones(size, bool)
        first = np.searchsorted(self.differences, start - self.terms)
        last = np.searchsorted(self.differences, stop - self.terms)
        for a, low, high in zip(self.terms.tolist(), first.tolist(), last.tolist(), strict=True):
            free[self.differences[low:high] + (a - start)] = False
        old, near, place = self.terms, self.differences, -1
        while True:
            ahead = free[place + 1 :]
            step = int(ahead.argmax()) if len(ahead) else 0
            if not len(ahead) or not ahead[step]:
                break
            place += 1 + step
            new = start + place
            self.terms, made = np.append(self.terms, new), new - self.terms
            # differences beyond the segment mark nothing in it; those inside must be known to the terms that follow
            near = np.concatenate([near[: np.searchsorted(near, size)], made[made < size]])
            near.sort()
            free[place + near[: np.searchsorted(near, size - place)]] = False
        added = self.terms[len(old) :]
        apart = (added[:, None] - self.terms[None, :]).ravel()
        self.differences = np.sort(np.concatenate([self.differences, apart[apart > 0]]), kind="stable")
        self.known = stop


_SEQUENCE = _Greedy()


def mian_chowla(count: int) -> np.ndarray:
    """The first ``count`` terms, int64."""
    return _SEQUENCE.first(count)
