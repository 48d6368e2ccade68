"""Number-theoretic attention as layers: global tokens, a window and fixed offsets, with one-token steps over a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sieve_attn import checks, patterns
from sieve_attn.offset_attention import SparseWeights, offset_attention

_LEAST = 64  # positions of a first buffer


class _Buffer:
    """Keys and values [2, batch, heads, capacity, head_dim] that caches share, and how many positions are written."""

    def __init__(self, data: Tensor, used: int):
        self.data = data
        self.used = used


@dataclass(frozen=True)
class KeyValueCache:
    """The first ``length`` positions of a buffer. Appending to the newest cache writes behind them; appending to an older one
    copies, so that every cache stays what it was."""

    buffer: Any
    length: int

    @property
    def keys_and_values(self) -> Tensor:
        """[2, batch, heads, length, head_dim]"""
        return self.buffer.data[:, :, :, : self.length]

    def append(self, made: Tensor) -> KeyValueCache:
        """The cache with ``made`` [2, batch, heads, new, head_dim] behind it; amortised O(new) outside of autograd."""
        total = self.length + made.shape[3]
        old = self.buffer.data
        if torch.is_grad_enabled() and (made.requires_grad or old.requires_grad):
            return KeyValueCache(_Buffer(torch.cat([self.keys_and_values, made], 3), total), total)
        if (
            old.shape[3] < total
            or self.buffer.used != self.length
            or old.requires_grad
            or old.is_inference() != made.is_inference()
        ):
            capacity = max(_LEAST, 2 * total)
            bigger = old.new_empty(*old.shape[:3], capacity, old.shape[4])
            bigger[:, :, :, : self.length] = self.keys_and_values
            shared = _Buffer(bigger, self.length)
        else:
            shared = self.buffer
        shared.data[:, :, :, self.length : total] = made
        shared.used = total
        return KeyValueCache(shared, total)


class SparseIndexAttention(nn.Module):
    """Causal multi-head self-attention to ``global_tokens`` first tokens, the last ``window`` tokens, the token itself and the
    tokens at ``offsets`` before it.

    With positions from 1 on, query ``i`` reads ``{j <= global_tokens} | {i - window <= j <= i} | {i - s : s in offsets}`` where
    ``1 <= j <= i``; a token named twice counts once. One projection ``embed_dim -> 3 embed_dim`` and one ``embed_dim ->
    embed_dim``, both with bias; ``heads`` must divide ``embed_dim``. ``offsets``: an :class:`~sieve_attn.patterns.OffsetSet` or
    increasing integers of at least 1. Sequences beyond ``seq_len_max`` raise ValueError; None takes any length.
    ``upstream_compat`` counts global tokens inside of the window twice, as PrimeAttention.jl does. ``plan``: see
    :func:`sieve_attn.functional.offset_attention`.
    """

    def __init__(
        self,
        embed_dim: int,
        offsets: patterns.OffsetSet | Sequence[int],
        heads: int = 1,
        window: int = 3,
        global_tokens: int = 2,
        seq_len_max: int | None = 4096,
        *,
        upstream_compat: bool = False,
        plan: str = "auto",
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        self.embed_dim = checks.positive_int("embed_dim", embed_dim, "try 128")
        self.heads = checks.positive_int("heads", heads, "try 1 or 4")
        if self.embed_dim % self.heads:
            raise checks.error("heads", f"must divide embed_dim {embed_dim}", heads, "choose a divisor")
        self.window = checks.positive_int("window", window, "0 keeps the token itself alone", least=0)
        self.global_tokens = checks.positive_int("global_tokens", global_tokens, "use 0 for none", least=0)
        if seq_len_max is not None:
            checks.positive_int("seq_len_max", seq_len_max, "use None for any length")
        self.seq_len_max = seq_len_max
        self.upstream_compat = upstream_compat
        self.plan = plan
        self.offsets = offsets if isinstance(offsets, patterns.OffsetSet) else patterns.OffsetPattern(offsets)
        pattern = self.offsets | patterns.Window(self.window + 1)
        self.pattern = pattern | patterns.GlobalTokens(self.global_tokens) if self.global_tokens else pattern
        self.in_proj = nn.Linear(embed_dim, 3 * embed_dim, device=device, dtype=dtype)
        self.out_proj = nn.Linear(embed_dim, embed_dim, device=device, dtype=dtype)

    def forward(self, x: Tensor, *, return_attention: bool = False) -> Tensor | tuple[Tensor, SparseWeights]:
        """[batch, len, embed_dim] to the same shape; with ``return_attention`` also the weights of the kept tokens alone."""
        self._check(x, 0)
        query, key, value = self._project(x)
        return self._finish(self._attend(query, key, value, return_attention), return_attention)

    def empty_cache(self, batch_size: int, device: Any = None, dtype: Any = None) -> KeyValueCache:
        """A cache of no positions, on the device and in the dtype of the weights by default."""
        batch_size = checks.positive_int("batch_size", batch_size, "pass the batch of the inputs")
        like = self.in_proj.weight.detach()
        shape = (2, batch_size, self.heads, 0, self.embed_dim // self.heads)
        return KeyValueCache(_Buffer(like.new_empty(shape, device=device, dtype=dtype), 0), 0)

    def step(self, x: Tensor, cache: KeyValueCache, *, return_attention: bool = False) -> Any:
        """``(y, cache)`` of the next tokens ``x`` [batch, new, embed_dim]: the rows that ``forward`` gives for the whole.

        With ``return_attention``: ``(y, weights, cache)``.
        """
        self._check(x, cache.length)
        batch = cache.buffer.data.shape[1]
        if x.shape[0] != batch:
            raise checks.error(
                "x", f"must have the batch of the cache, {batch}", f"shape {tuple(x.shape)}", "use one cache a batch"
            )
        query, key, value = self._project(x)
        cache = cache.append(torch.stack([key, value]).to(cache.buffer.data.dtype))
        key, value = cache.keys_and_values.to(query.dtype)
        made = self._finish(self._attend(query, key, value, return_attention), return_attention)
        return (*made, cache) if return_attention else (made, cache)

    def _check(self, x: Tensor, before: int) -> None:
        if x.ndim != 3 or x.shape[2] != self.embed_dim or 0 in x.shape:
            rule = f"must have shape [batch, len, {self.embed_dim}] with at least one token"
            raise checks.error("x", rule, f"shape {tuple(x.shape)}", "reshape it, or skip the call for empty sequences")
        total = before + x.shape[1]
        if self.seq_len_max is not None and total > self.seq_len_max:
            raise checks.error(
                "x", f"must not go beyond seq_len_max {self.seq_len_max}", f"{total} tokens", "pass seq_len_max=None"
            )

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Three times [batch, heads, len, head_dim]."""
        made = self.in_proj(x).unflatten(-1, (3, self.heads, -1))
        return tuple(made.permute(2, 0, 3, 1, 4))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, return_attention: bool) -> Any:
        return offset_attention(
            query,
            key,
            value,
            self.pattern,
            plan=self.plan,
            return_attention=return_attention,
            upstream_compat=self.upstream_compat,
        )

    def _finish(self, made: Any, return_attention: bool) -> Any:
        output = made[0] if return_attention else made
        output = self.out_proj(output.transpose(1, 2).flatten(2))
        return (output, made[1]) if return_attention else output

    def extra_repr(self) -> str:
        plain = (
            f"{self.embed_dim}, {self.offsets!r}, heads={self.heads}, window={self.window}, global_tokens={self.global_tokens}"
        )
        return f"{plain}, seq_len_max={self.seq_len_max}" + (", upstream_compat=True" if self.upstream_compat else "")


def PrimeSelfAttention(
    embed_dim: int, heads: int = 1, window: int = 3, global_tokens: int = 2, seq_len_max: int | None = 4096, **options: Any
) -> SparseIndexAttention:
    """:class:`SparseIndexAttention` with the offsets 2, 3, 5, 7, 11, ..."""
    return SparseIndexAttention(embed_dim, patterns.Primes(), heads, window, global_tokens, seq_len_max, **options)


def SquareSelfAttention(
    embed_dim: int, heads: int = 1, window: int = 3, global_tokens: int = 2, seq_len_max: int | None = 4096, **options: Any
) -> SparseIndexAttention:
    """:class:`SparseIndexAttention` with the offsets 1, 4, 9, 16, ..."""
    return SparseIndexAttention(embed_dim, patterns.Squares(), heads, window, global_tokens, seq_len_max, **options)


def MianChowlaSelfAttention(
    embed_dim: int, heads: int = 1, window: int = 3, global_tokens: int = 2, seq_len_max: int | None = 4096, **options: Any
) -> SparseIndexAttention:
    """:class:`SparseIndexAttention` with the offsets 1, 2, 4, 8, 13, 21, ..., whose pairwise sums are all distinct."""
    return SparseIndexAttention(embed_dim, patterns.MianChowla(), heads, window, global_tokens, seq_len_max, **options)
