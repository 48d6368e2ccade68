"""What a pattern of first tokens, windows and offsets keeps, as one list: the form that counting and the kernels take."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Reach:
    """What a query keeps: the first ``prefix`` keys and those ``offsets`` before it, its own (offset 0) included if listed."""

    prefix: int
    offsets: np.ndarray  # int64, increasing, from 0 on

    def __or__(self, other: Reach) -> Reach:
        return Reach(max(self.prefix, other.prefix), np.union1d(self.offsets, other.offsets))

    def pairs(self, q_len: int, kv_len: int) -> int:
        """How many (query, key) pairs are kept under causality."""
        rows = min(q_len, kv_len)
        first = kv_len - rows
        position = np.arange(first, kv_len, dtype=np.int64)
        prefix = int(np.minimum(position + 1, self.prefix).sum())
        # offset s is there for positions from s + prefix on
        start = np.maximum(self.offsets + self.prefix, first)
        return prefix + int(np.maximum(kv_len - start, 0).sum())

    def density(self, q_len: int, kv_len: int) -> float:
        """Kept over visible pairs; 1.0 when nothing is visible."""
        rows = min(q_len, kv_len)  # queries with a position below 0 see nothing
        visible = rows * (kv_len - rows) + rows * (rows + 1) // 2
        return self.pairs(q_len, kv_len) / visible if visible else 1.0


NO_OFFSETS = np.zeros(0, np.int64)
