"""Number-theoretic attention as layers: global tokens, a window and fixed offsets, with one-token steps over a cache."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sieve_attn import checks, patterns
from sieve_attn.attend import offset_op
from sieve_attn.attend import offsets as stage
from sieve_attn.layers.growing import GrowingArrays, check_cache, step
from sieve_attn.offset_attention import SparseWeights, offset_attention


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
        if plan not in stage.PLANS:
            raise checks.error("plan", f"must be one of {', '.join(stage.PLANS)}", repr(plan), "use 'auto'")
        self.plan = plan
        self.offsets = offsets if isinstance(offsets, patterns.OffsetSet) else patterns.OffsetPattern(offsets)
        pattern = self.offsets | patterns.Window(self.window + 1)
        self.pattern = pattern | patterns.GlobalTokens(self.global_tokens) if self.global_tokens else pattern
        offset_op.text_of(self.pattern)  # a pattern of one's own is known from here on, whatever compiles the layer
        self._widths = (self.embed_dim // self.heads,) * 2
        self.in_proj = nn.Linear(embed_dim, 3 * embed_dim, device=device, dtype=dtype)
        self.out_proj = nn.Linear(embed_dim, embed_dim, device=device, dtype=dtype)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        offset_op.text_of(self.pattern)  # a copy's, too

    def forward(self, x: Tensor, *, return_attention: bool = False) -> Tensor | tuple[Tensor, SparseWeights]:
        """[batch, len, embed_dim] to the same shape; with ``return_attention`` also the weights of the kept tokens alone."""
        self._check(x, 0)
        query, key, value = self._project(x)
        return self._finish(self._attend(query, key, value, return_attention), query.dtype)

    def empty_cache(self, batch_size: int, device: Any = None, dtype: Any = None) -> GrowingArrays:
        """A cache of no positions; device and dtype are those of the weights unless given. Steps attend in the cache's dtype."""
        batch_size = checks.positive_int("batch_size", batch_size, "pass the batch of the inputs")
        like = self.in_proj.weight
        return GrowingArrays.empty(batch_size, self.heads, self._widths, device or like.device, dtype or like.dtype)

    def step(self, x: Tensor, cache: GrowingArrays, *, return_attention: bool = False) -> Any:
        """``(y, cache)`` of the next tokens ``x`` [batch, new, embed_dim]: the rows that ``forward`` gives for the whole.

        With ``return_attention``: ``(y, weights, cache)``. A cache is never changed: one that was stepped from can be stepped
        from again.
        """
        check_cache(cache, self.heads, self._widths, x.device)
        self._check(x, len(cache))
        if x.shape[0] != cache.batch:
            raise checks.error(
                "x", f"must have the batch of the cache, {cache.batch}", f"shape {tuple(x.shape)}", "use one cache a batch"
            )
        query, key, value = self._project(x)
        made, cache = step(cache, query, (key, value), partial(self._attend, return_attention=return_attention))
        made = self._finish(made, query.dtype)
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

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, return_attention: bool = False) -> Any:
        return offset_attention(
            query,
            key,
            value,
            self.pattern,
            plan=self.plan,
            return_attention=return_attention,
            upstream_compat=self.upstream_compat,
        )

    def _finish(self, made: Any, dtype: torch.dtype) -> Any:
        output, *weights = made if isinstance(made, tuple) else (made,)
        output = self.out_proj(output.transpose(1, 2).flatten(2).to(dtype))
        return (output, *weights) if weights else output

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
