"""What a pattern is: a set of keys that follows from positions alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sieve_attn.types import Selection

Array = Any


class Pattern:
    """Keys chosen by position. ``a | b`` keeps what either keeps."""

    def keeps(self, position: Array, key: Array) -> Array:
        """Whether the query at ``position`` keeps the key at index ``key``; arrays that broadcast."""
        raise TypeError(f"{type(self).__name__} must define `keeps`")

    def selection(self, q_len: int, kv_len: int, *, causal: bool = True) -> Selection:
        """The pattern as a selection of single keys; queries are the last ``q_len`` of ``kv_len`` positions."""
        raise TypeError(f"{type(self).__name__} must define `selection`")

    def __or__(self, other: Pattern) -> Pattern:
        return Union((*members(self), *members(other)))


def members(pattern: Pattern) -> tuple[Pattern, ...]:
    return pattern.patterns if isinstance(pattern, Union) else (pattern,)


@dataclass(frozen=True)
class Union(Pattern):
    """What any of several patterns keeps."""

    patterns: tuple[Pattern, ...]

    def keeps(self, position: Array, key: Array) -> Array:
        kept = self.patterns[0].keeps(position, key)
        for pattern in self.patterns[1:]:
            kept = kept | pattern.keeps(position, key)
        return kept

    def selection(self, q_len: int, kv_len: int, *, causal: bool = True) -> Selection:
        chosen = self.patterns[0].selection(q_len, kv_len, causal=causal)
        for pattern in self.patterns[1:]:
            chosen = chosen | pattern.selection(q_len, kv_len, causal=causal)
        return chosen
