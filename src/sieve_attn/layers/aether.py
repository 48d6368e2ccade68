"""AETHER's gate as a module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sieve_attn import checks
from sieve_attn.torch import aether_attention


class AetherAttention(nn.Module):
    """:func:`sieve_attn.aether_attention` with its threshold and block size fixed; it has no parameters.

    ``attn(query, key, value, attn_bias=None)`` on [batch, len, heads, head_dim], or on three or five axes as in the function:
    key blocks with ``max scale * (q.mu + ||q|| r) > sparsity_threshold`` over a tile of queries are kept.

    Raises ValueError for a NaN threshold and block sizes below 1, and when called for what the function refuses. Source: the
    AETHER operator proposed to xFormers. ``AetherAttention(-math.inf)`` is dense attention.
    """

    def __init__(
        self, sparsity_threshold: float = 0.15, block_size: int = 64, *, scale: float | None = None, causal: bool = False
    ):
        super().__init__()
        self.sparsity_threshold = checks.threshold("sparsity_threshold", sparsity_threshold)
        self.block_size = checks.positive_int("block_size", block_size, "try 48 or 64")
        self.scale = scale
        self.causal = causal

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None) -> Tensor:
        return aether_attention(
            query, key, value, self.sparsity_threshold, self.block_size, attn_bias=attn_bias, scale=self.scale, causal=self.causal
        )

    def extra_repr(self) -> str:
        return f"sparsity_threshold={self.sparsity_threshold}, block_size={self.block_size}, causal={self.causal}"
