"""Keys at fixed distances before the query: the family of the number-theoretic patterns, and any offsets of one's own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from sieve_attn import arrays
from sieve_attn.checks import error, positive_int
from sieve_attn.patterns.base import Known, Pattern
from sieve_attn.patterns.reach import Reach
from sieve_attn.types import Offsets, Selection

Array = Any


class OffsetSet(Pattern):
    """Query ``i`` keeps the keys ``i - s`` for every ``s`` of an increasing set of positive offsets."""

    def up_to(self, limit: int) -> np.ndarray:
        """The offsets of at most ``limit``, int64, increasing."""
        raise TypeError(f"{type(self).__name__} must define `up_to`")

    def keeps(self, position: Array, key: Array) -> Array:
        xp = arrays.namespace(position, key)
        apart = position - key
        limit = max(int(apart.max()), 1)
        table = xp.asarray(_marks(Known(self), 1 << (limit - 1).bit_length()), xp.boolean, apart)
        inside = apart > 0
        return table[xp.where(inside, apart, 0)] & inside

    def selection(self, q_len: int, kv_len: int, *, causal: bool = True) -> Selection:
        return Selection((Offsets(q_len, kv_len, tuple(self.up_to(max(kv_len - 1, 0)).tolist())),))

    def reach(self, limit: int) -> Reach:
        return Reach(0, self.up_to(limit))


@lru_cache(maxsize=32)
def _marks(known: Known, limit: int) -> np.ndarray:
    """[limit + 1] bool: which distances are offsets."""
    marks = np.zeros(limit + 1, bool)
    marks[known.pattern.up_to(limit)] = True
    return marks


def first_terms(values: np.ndarray, terms: int | None) -> np.ndarray:
    return values if terms is None else values[:terms]


def check_terms(terms: int | None) -> None:
    if terms is not None:
        positive_int("terms", terms, "leave it out for as many as fit")


@dataclass(frozen=True)
class OffsetPattern(OffsetSet):
    """Keys ``i - s`` for the given ``offsets``: integers of at least 1, increasing."""

    offsets: tuple[int, ...]

    def __post_init__(self):
        try:
            given = tuple(self.offsets)
        except TypeError:
            raise error(
                "offsets", "must be a sequence of integers", repr(self.offsets), "pass for example (1, 2, 4, 8)"
            ) from None
        if not given:
            raise error("offsets", "must hold at least one offset", "none", "pass for example (1, 2, 4, 8)")
        for s in given:
            positive_int("offsets", s, "the query's own key belongs to a window: add `| Window(1)`")
        whole = tuple(int(s) for s in given)
        for before, after in pairwise(whole):
            if after <= before:
                raise error("offsets", "must increase", f"{after} after {before}", "pass sorted(set(offsets))")
        object.__setattr__(self, "offsets", whole)

    def up_to(self, limit: int) -> np.ndarray:
        every = np.asarray(self.offsets, np.int64)
        return every[: np.searchsorted(every, limit, "right")]
