"""Causal top-k attention with ternary projections, and its cache."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sieve_attn import checks
from sieve_attn.functional import top_k_attention
from sieve_attn.layers.growing import GrowingArrays, check_cache, step
from sieve_attn.layers.ternary import TernaryLinear


class SparseCausalAttention(nn.Module):
    """``y_i = sum_{j in T_i} softmax_{T_i}(q_i.k_j / sqrt(d_head)) v_j``: ``T_i`` the ``top_k`` largest of ``j <= i``.

    ``q = x W_q``, ``k = x W_k`` of width ``heads * d_head`` and ``v = x W_v`` of width ``d_model``, split over the heads: three
    :class:`~sieve_attn.layers.TernaryLinear`, plain with ``quantize=False``. A query attends to itself and what came
    before it, to all of it where that is no more than ``top_k``; the earlier key wins a tie. Exact: see
    :func:`sieve_attn.functional.top_k_attention`.

    ``x`` [batch, len, d_model] gives the same shape. Token by token: ``cache = layer.empty_cache(batch)`` or
    ``layer.warmup_cache(prompt)``, then ``y, cache = layer.forward_incremental(x_step, cache)``, whose rows equal those of the
    full call within rounding. A cache is never changed: one that was stepped from can be stepped from again.

    Raises ValueError for heads that do not divide ``d_model``, an ``x`` of another rank or width, a cache of another batch.
    """

    def __init__(
        self, d_model: int, d_head: int = 32, top_k: int = 8, quantize: bool = True, heads: int = 1, *,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        super().__init__()
        self.d_model = checks.positive_int("d_model", d_model, "try 256")
        self.d_head = checks.positive_int("d_head", d_head, "try 32")
        self.top_k = checks.positive_int("top_k", top_k, "try 8")
        self.heads = checks.positive_int("heads", heads, "try 1")
        if d_model % heads:
            raise checks.error(
                "heads", "must divide `d_model`", f"{heads} heads on a width of {d_model}", "choose a divisor of it"
            )
        make = {"quantize": quantize, "device": device, "dtype": dtype}
        self._widths = (self.d_head, self.d_model // self.heads)
        self.query = TernaryLinear(d_model, heads * d_head, **make)
        self.key = TernaryLinear(d_model, heads * d_head, **make)
        self.value = TernaryLinear(d_model, d_model, **make)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = top_k_attention(query, key, value, self.top_k, causal=True)
        return output.transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        check_tokens(x, self.d_model)
        return self._attend(self._split(self.query(x)), self._split(self.key(x)), self._split(self.value(x)))

    def empty_cache(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> GrowingArrays:
        """A cache of no token; device and dtype are those of the layer unless given. Steps attend in the cache's dtype."""
        checks.positive_int("batch_size", batch_size, "try 1")
        known = next((x for x in (*self.parameters(), *self.buffers()) if x.is_floating_point()), torch.empty(0))
        return GrowingArrays.empty(batch_size, self.heads, self._widths, device or known.device, dtype or known.dtype)

    def warmup_cache(self, x: Tensor) -> GrowingArrays:
        """The cache after the tokens ``x`` [batch, len, d_model]."""
        check_tokens(x, self.d_model)
        key, value = self._split(self.key(x)), self._split(self.value(x))
        return self.empty_cache(x.shape[0], key.device, key.dtype).append((key, value))

    def forward_incremental(self, x_step: Tensor, cache: GrowingArrays) -> tuple[Tensor, GrowingArrays]:
        """``(y [batch, 1, d_model], the cache with this token)`` for one token ``x_step`` [batch, 1, d_model]."""
        check_cache(cache, self.heads, self._widths, x_step.device)
        check_step(x_step, self.d_model, cache.batch)
        query, key, value = (self._split(project(x_step)) for project in (self.query, self.key, self.value))
        y, cache = step(cache, query, (key, value), self._attend)
        return y.to(query.dtype), cache

    def prefill(self, x: Tensor) -> tuple[Tensor, GrowingArrays]:
        """``(forward(x), warmup_cache(x))`` for the price of the first."""
        check_tokens(x, self.d_model)
        query, key, value = (self._split(project(x)) for project in (self.query, self.key, self.value))
        cache = self.empty_cache(x.shape[0], key.device, key.dtype).append((key, value))
        return self._attend(query, key, value), cache

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, d_head={self.d_head}, top_k={self.top_k}, heads={self.heads}"


def check_tokens(x: Tensor, width: int) -> None:
    if x.dim() != 3 or x.shape[2] != width or 0 in x.shape:
        raise checks.error(
            "x", f"must have shape [batch, len, {width}] with at least one token", f"shape {tuple(x.shape)}", "reshape it first"
        )


def check_step(x: Tensor, width: int, batch: int) -> None:
    if tuple(x.shape) != (batch, 1, width):
        raise checks.error(
            "x_step", f"must have shape [{batch}, 1, {width}]: one token for each sequence of the cache",
            f"shape {tuple(x.shape)}", "use warmup_cache for several tokens",
        )  # fmt: skip
