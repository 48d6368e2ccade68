"""The first tokens of a sequence: where attention parks what it does not need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sieve_attn.checks import positive_int
from sieve_attn.patterns.base import Pattern
from sieve_attn.patterns.reach import NO_OFFSETS, Reach
from sieve_attn.types import Ranges, Selection

Array = Any


@dataclass(frozen=True)
class Sinks(Pattern):
    """Keys ``0 .. tokens - 1``."""

    tokens: int

    def __post_init__(self):
        positive_int("tokens", self.tokens, "leave the pattern out for none")

    def keeps(self, position: Array, key: Array) -> Array:
        return (key < self.tokens) & (position == position)

    def reach(self, limit: int) -> Reach:
        return Reach(self.tokens, NO_OFFSETS)

    def selection(self, q_len: int, kv_len: int, *, causal: bool = True) -> Selection:
        return Selection((Ranges(q_len, kv_len, prefix=self.tokens, two_sided=not causal),))
