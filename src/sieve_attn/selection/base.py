"""What a selector is. It sees scores, never keys, and says which blocks to keep.

A :class:`RowSelector` decides for every query, and a tile keeps the union. A :class:`RankSelector` orders the blocks of a
tile by the largest estimated share over its queries and keeps the first ``k``; with ``per_query`` each query is its own tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sieve_attn.types import Rows, Scores

Array = Any


@dataclass(frozen=True)
class Candidates:
    """The visible blocks of one chunk of queries, with what a row selector may look at."""

    scores: Scores  # [batch, q_heads, rows, blocks]; -inf where a query sees nothing of the block
    visible: Array  # [batch, q_heads, rows, blocks] bool
    forced: Array  # the same shape: kept whatever the selector says
    weight: Array  # [batch, q_heads, rows, blocks] visible keys of the block
    rows: Rows
    geometry: Any


class Selector:
    """Turns scores into kept blocks."""

    needs_brackets = False
    may_turn_dense = False
    keeps_some = False  # True where every query that sees a block keeps one
    every_query = False  # True where a promise covers every query, so that a stride may pass over none

    @property
    def requested_sparsity(self) -> float | None:
        return None

    def takes_all(self, blocks: int) -> bool:
        """Whether a tile that sees at most ``blocks`` of them keeps every one, whatever the scores are."""
        return False


class RowSelector(Selector):
    """Every query chooses for itself."""

    def keep(self, candidates: Candidates) -> Array:
        """[batch, q_heads, rows, blocks] bool"""
        raise TypeError(f"{type(self).__name__} must define `keep`")


class RankSelector(Selector):
    """A tile keeps its first ``k`` blocks by share."""

    def k(self, visible_blocks: Array) -> Array:
        """How many blocks to keep where ``visible_blocks`` [...] (int) are visible."""
        raise TypeError(f"{type(self).__name__} must define `k`")
