"""Number-theoretic attention: global tokens, a window and fixed offsets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sieve_attn import checks, patterns
from sieve_attn.attend.offsets import reach
from sieve_attn.flax.cached import Cached, check_tokens
from sieve_attn.jax import offset_attention


class SparseIndexAttention(Cached):
    """:class:`sieve_attn.layers.SparseIndexAttention` on JAX arrays: causal multi-head self-attention to ``global_tokens`` first
    tokens, the last ``window`` tokens, the token itself and the tokens at ``offsets`` before it.

    ``in_proj`` (embed_dim -> 3 embed_dim) and ``out_proj`` are ``nnx.Linear`` with bias. ``x`` [batch, len, embed_dim] gives the
    same shape. Token by token: ``layer.init_cache(batch, max_length)``, then ``y = layer.step(x)`` with x [batch, new,
    embed_dim], whose rows equal those of the full call; a step reads the kept keys alone. ``upstream_compat`` counts global
    tokens inside of the window twice, as PrimeAttention.jl does.

    Raises ValueError for sizes that do not fit, beyond ``seq_len_max`` (None takes any length), and for an ``x`` of another
    shape. Under ``jit`` a step beyond the cache gives NaN.
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
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.embed_dim = checks.positive_int("embed_dim", embed_dim, "try 128")
        self.heads = checks.positive_int("heads", heads, "try 1 or 4")
        if self.embed_dim % self.heads:
            raise checks.error("heads", f"must divide embed_dim {embed_dim}", heads, "choose a divisor")
        self.window = checks.positive_int("window", window, "0 keeps the token itself alone", least=0)
        self.global_tokens = checks.positive_int("global_tokens", global_tokens, "use 0 for none", least=0)
        if seq_len_max is not None:
            checks.positive_int("seq_len_max", seq_len_max, "use None for any length")
        self.seq_len_max = seq_len_max
        self.upstream_compat = bool(upstream_compat)
        self.offsets = offsets if isinstance(offsets, patterns.OffsetSet) else patterns.OffsetPattern(offsets)
        pattern = self.offsets | patterns.Window(self.window + 1)
        self.pattern = pattern | patterns.GlobalTokens(self.global_tokens) if self.global_tokens else pattern
        self.in_proj = nnx.Linear(embed_dim, 3 * embed_dim, param_dtype=dtype, rngs=rngs)
        self.out_proj = nnx.Linear(embed_dim, embed_dim, param_dtype=dtype, rngs=rngs)
        self._no_cache()

    def __call__(self, x: jax.Array) -> jax.Array:
        check_tokens(x, self.embed_dim)
        self._check_length(x.shape[1])
        query, key, value = self._project(x)
        output = offset_attention(query, key, value, self.pattern)
        if self.upstream_compat:
            # only there do global tokens lie inside of a window
            first = min(self.global_tokens + self.window, x.shape[1])
            again = self._gathered(*(y[:, :, :first] for y in (query, key, value)), jnp.arange(first))
            output = jnp.concatenate([again.astype(output.dtype), output[:, :, first:]], 2)
        return self._finish(output)

    def init_cache(self, batch_size: int, max_length: int, dtype: Any = None) -> None:
        """Makes room for ``max_length`` tokens of ``batch_size`` sequences; the dtype is that of the weights unless given."""
        self._check_length(checks.positive_int("max_length", max_length, "the longest sequence to step through"))
        width = self.embed_dim // self.heads
        self._empty_cache(batch_size, max_length, self.heads, (width, width), dtype or self.in_proj.kernel.dtype)

    def step(self, x: jax.Array) -> jax.Array:
        """The rows of the next tokens ``x`` [batch, new, embed_dim], which join the cache."""
        self._needs_cache(x, self.embed_dim)
        query, *new = self._project(x)
        key, value, start, fits = self._append(*new)
        output = self._finish(self._gathered(query, key, value, start + jnp.arange(x.shape[1])))
        return output if fits is None else jnp.where(fits, output, jnp.nan)

    def _gathered(self, query: jax.Array, key: jax.Array, value: jax.Array, position: jax.Array) -> jax.Array:
        """Attention of queries [batch, heads, new, dim] at ``position`` [new] to the keys that the pattern names alone."""
        found = reach(self.pattern, key.shape[2])
        offsets = jnp.asarray(found.offsets[found.offsets < key.shape[2]])
        front = jnp.arange(min(found.prefix, key.shape[2]))
        front = jnp.broadcast_to(front, (position.shape[0], front.shape[0]))
        back = position[:, None] - offsets
        index = jnp.concatenate([front, back], 1)
        kept = jnp.concatenate([front <= position[:, None], back >= found.prefix], 1)
        place = jnp.where(kept, index, 0)
        wide = jnp.promote_types(query.dtype, jnp.float32)
        logits = jnp.einsum("bhnd,bhnkd->bhnk", query, key[:, :, place], preferred_element_type=wide)
        logits = logits * query.shape[-1] ** -0.5
        if self.upstream_compat:
            twice = kept & (index < found.prefix) & (index < position[:, None]) & (index >= position[:, None] - self.window)
            logits = logits + jnp.where(twice, math.log(2.0), 0.0)
        weight = jax.nn.softmax(jnp.where(kept, logits, -jnp.inf), -1)
        return jnp.einsum("bhnk,bhnkd->bhnd", weight.astype(value.dtype), value[:, :, place])

    def _check_length(self, total: int) -> None:
        if self.seq_len_max is not None and total > self.seq_len_max:
            raise checks.error(
                "x", f"must not go beyond seq_len_max {self.seq_len_max}", f"{total} tokens", "pass seq_len_max=None"
            )

    def _project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Three times [batch, heads, len, head_dim]."""
        made = self.in_proj(x).reshape(*x.shape[:2], 3, self.heads, -1)
        return tuple(made.transpose(2, 0, 3, 1, 4))

    def _finish(self, output: jax.Array) -> jax.Array:
        output = output.swapaxes(1, 2)
        return self.out_proj(output.reshape(*output.shape[:2], -1))


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
