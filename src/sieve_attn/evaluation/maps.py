"""Pictures of selections: which share of every (query range, key range) cell was kept."""

from __future__ import annotations

from typing import Any

import numpy as np

from sieve_attn.types import Selection

HIDDEN = 255
CELLS = 1_200_000  # of all maps of one page together


def side(maps: int) -> int:
    """The side of each of so many square maps."""
    return int(max(24, min(160, (CELLS / max(maps, 1)) ** 0.5)))


def kept_share(selection: Selection, like: Any, cells: int, rows: int = 64) -> np.ndarray:
    """[heads, cells, cells] uint8 of batch row 0: ``round(254 * kept / visible)`` keys of the cell, 255 where it is not visible.

    Causal order is taken for granted: query ``i`` sees the keys up to ``kv_len - q_len + i``.
    """
    q_len, kv_len = selection.q_len, selection.kv_len
    cells_q, cells_k = min(cells, -(-q_len // 16)), min(cells, -(-kv_len // 16))
    of_query = np.arange(q_len) * cells_q // q_len
    edges = (np.arange(cells_k) * kv_len + cells_k - 1) // cells_k
    kept, seen = None, np.zeros((cells_q, cells_k))
    key = np.arange(kv_len)
    for start in range(0, q_len, rows):
        stop = min(start + rows, q_len)
        visible = key[None] <= np.arange(start, stop)[:, None] + (kv_len - q_len)
        chosen = selection.rows(start, stop, like)[0].cpu().numpy() & visible
        if kept is None:
            kept = np.zeros((chosen.shape[0], cells_q, cells_k))
        np.add.at(seen, of_query[start:stop], np.add.reduceat(visible, edges, -1, dtype=np.int64))
        for head, one in enumerate(chosen):
            np.add.at(kept[head], of_query[start:stop], np.add.reduceat(one, edges, -1, dtype=np.int64))
    share = np.rint(254 * kept / np.maximum(seen, 1)).astype(np.uint8)
    return np.where(seen > 0, share, HIDDEN).astype(np.uint8)
