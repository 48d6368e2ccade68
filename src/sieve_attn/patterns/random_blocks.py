"""Random blocks of keys, the same for the same seed: with window and global blocks, what BigBird keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sieve_attn import arrays
from sieve_attn.checks import positive_int
from sieve_attn.patterns.base import Pattern
from sieve_attn.types import Blocks, Selection

Array = Any


@dataclass(frozen=True)
class RandomBlocks(Pattern):
    """Every block of ``block_size`` queries keeps ``blocks`` random earlier blocks of keys, as far as there are so many.

    ``window`` blocks that end with the queries' own and the first ``global_blocks`` are kept too. What a block of queries
    draws depends on the seed and on its position alone, so that a prefill in pieces keeps what one prefill does.
    """

    blocks: int
    block_size: int = 64
    seed: int = 0
    window: int = 0
    global_blocks: int = 0

    def __post_init__(self):
        positive_int("blocks", self.blocks, "use 0 for none", least=0)
        positive_int("block_size", self.block_size, "try 16 or 64")
        positive_int("window", self.window, "use 0 for none", least=0)
        positive_int("global_blocks", self.global_blocks, "use 0 for none", least=0)

    def drawn(self, first: int, last: int) -> np.ndarray:
        """[last - first, blocks] int64: what query blocks ``first .. last - 1`` draw, -1 where fewer lie before them."""
        number = np.arange(first, last, dtype=np.int64)
        out = np.full((len(number), self.blocks), -1, np.int64)
        for n in range(self.blocks):
            there = number > n
            earlier = np.where(there, number, 1)
            pick = _mixed(number, n, self.seed) % earlier
            for _ in range(n):  # drawn before: take the next one
                pick = np.where((out[:, :n] == pick[:, None]).any(1), (pick + 1) % earlier, pick)
            out[:, n] = np.where(there, pick, -1)
        return out

    def keeps(self, position: Array, key: Array) -> Array:
        xp = arrays.namespace(position, key)
        row, column = position // self.block_size, key // self.block_size
        last = max(int(row.max()), 0) + 1
        drawn = xp.asarray(self.drawn(0, last), xp.int64, row)
        kept = (column > row - self.window) & (column <= row) | (column < self.global_blocks) & (row == row)
        for n in range(self.blocks):
            kept = kept | (drawn[xp.where(row >= 0, row, 0), n] == column) & (row >= 0)
        return kept

    def selection(self, q_len: int, kv_len: int, *, causal: bool = True) -> Selection:
        size, offset = self.block_size, kv_len - q_len
        lead, wide = offset % size, -(-kv_len // size)
        first = (offset - lead) // size
        tiles = -(-(q_len + lead) // size)
        kept = np.zeros((tiles, wide), bool)
        row = np.arange(first, first + tiles)[:, None]
        column = np.arange(wide)[None, :]
        kept |= (column > row - self.window) & (column <= row) | (column < self.global_blocks)
        start = max(first, 0)
        if start < first + tiles:
            drawn = self.drawn(start, first + tiles)
            tile, n = np.nonzero(drawn >= 0)
            kept[tile + start - first, drawn[tile, n]] = True
        grid = {"q_len": q_len, "kv_len": kv_len, "q_block": size, "kv_block": size, "lead": lead}
        return Selection((Blocks.from_tiles(kept[None, None], **grid),))


def _mixed(number: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Non-negative pseudo-random int64 of each number (SplitMix64)."""
    with np.errstate(over="ignore"):
        x = number.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(
            (n * 0xD1B54A32D192ED03 + seed * 0x2545F4914F6CDD1D) % 2**64
        )
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        return ((x ^ (x >> np.uint64(31))) >> np.uint64(1)).astype(np.int64)
