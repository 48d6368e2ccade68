"""Keep a number, or a share, of the visible blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sieve_attn import arrays
from sieve_attn.checks import positive_int, share
from sieve_attn.selection.base import RankSelector

Array = Any


@dataclass(frozen=True)
class TopK(RankSelector):
    """The ``blocks`` highest-ranked blocks of every tile (all of them where fewer are visible)."""

    blocks: int

    def __post_init__(self):
        positive_int("blocks", self.blocks, "keep at least one block")

    def k(self, visible_blocks: Array) -> Array:
        return arrays.namespace(visible_blocks).minimum(visible_blocks, self.blocks)

    def takes_all(self, blocks: int) -> bool:
        return blocks <= self.blocks


@dataclass(frozen=True)
class TargetSparsity(RankSelector):
    """``max(1, round(visible * (1 - sparsity)))`` blocks of every tile; forced blocks come on top."""

    sparsity: float = 0.8

    def __post_init__(self):
        share("sparsity", self.sparsity, "0.8 drops 80 % of the blocks")

    @property
    def requested_sparsity(self) -> float:
        return self.sparsity

    def k(self, visible_blocks: Array) -> Array:
        return target_blocks(visible_blocks, self.sparsity)


def target_blocks(visible_blocks: Array, sparsity: float) -> Array:
    """``max(1, round(visible * (1 - sparsity)))``, halves to even as Python's ``round``."""
    xp = arrays.namespace(visible_blocks)
    wanted = xp.cast(visible_blocks, xp.float64) * (1.0 - sparsity)
    below = xp.floor(wanted)
    rest = wanted - below
    odd = below - 2.0 * xp.floor(below / 2.0)
    up = (rest > 0.5) | ((rest == 0.5) & (odd == 1.0))
    return xp.maximum(xp.cast(below + xp.cast(up, xp.float64), xp.int64), 1)
