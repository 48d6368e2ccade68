"""The last tokens before a query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sieve_attn.checks import positive_int
from sieve_attn.patterns.base import Pattern
from sieve_attn.patterns.reach import Reach
from sieve_attn.types import Ranges, Selection

Array = Any


@dataclass(frozen=True)
class Window(Pattern):
    """Keys less than ``tokens`` positions away, the query's own included; ``tokens=1`` is the query's own key alone."""

    tokens: int

    def __post_init__(self):
        positive_int("tokens", self.tokens, "leave the pattern out for none")

    def keeps(self, position: Array, key: Array) -> Array:
        return (key > position - self.tokens) & (key < position + self.tokens)

    def reach(self, limit: int) -> Reach:
        return Reach(0, np.arange(min(self.tokens, limit + 1), dtype=np.int64))

    def selection(self, q_len: int, kv_len: int, *, causal: bool = True) -> Selection:
        return Selection((Ranges(q_len, kv_len, window=self.tokens, two_sided=not causal),))
