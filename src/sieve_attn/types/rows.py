"""Between stages 2 and 3: a chunk of query rows and its scores. Neither outlives the chunk."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Array = Any


@dataclass(frozen=True)
class Rows:
    """One chunk of query rows with what they may see: the only place where anything of size rows x keys lives."""

    query: Array  # [batch, q_heads, rows, dim]
    position: Array  # [rows] absolute positions
    visible: Array  # [batch | 1, q_heads | 1, rows, kv_len] bool
    structural: Array  # [rows, kv_len] bool: what causality, window and packing alone allow
    scale: float
    softcap: float | None = None
    bias: Array | None = None  # [batch | 1, q_heads | 1, rows, kv_len], finite
    sink: Array | None = None  # [q_heads] a logit that takes mass and gives no value
    key: Array | None = None  # the keys themselves, for the exact scorer and for proofs by streaming
    memo: dict = field(default_factory=dict)  # what several scorers of one chunk share
    shared: dict = field(default_factory=dict)  # what the chunks of one call share


@dataclass(frozen=True)
class Scores:
    """Per (query, block), [batch, q_heads, rows, blocks]. Bounds give brackets of the block's log mass as well."""

    estimate: Array
    upper: Array | None = None
    lower: Array | None = None
