"""AETHER's gate as an NNX module."""

from __future__ import annotations

import jax
from flax import nnx

from sieve_attn import checks, policies
from sieve_attn.jax import attention


class AetherAttention(nnx.Module):
    """:class:`sieve_attn.layers.AetherAttention` on JAX arrays: AETHER's Euclidean gate, without parameters.

    ``attn(query, key, value, attn_bias=None)`` on [batch, len, heads, head_dim], [batch, len, head_dim] (one head) or [batch,
    len, groups, heads, head_dim]. A block of ``block_size`` keys is kept for a tile of as many queries iff
    ``max over the tile of scale * (q.mu + ||q|| r) > sparsity_threshold``; at ``-inf`` this is dense attention. ``attn_bias`` is
    added to the scaled logits and broadcasts to [batch, heads, q_len, kv_len]. ``max_blocks``: see
    :func:`sieve_attn.jax.attention`. Returns the shape of ``query`` with the head_dim of ``value``.

    Raises ValueError on shapes and on thresholds and sizes that are no static numbers.
    """

    def __init__(
        self,
        sparsity_threshold: float = 0.15,
        block_size: int = 64,
        *,
        scale: float | None = None,
        causal: bool = False,
        max_blocks: int | None = None,
    ):
        for name, given in (("sparsity_threshold", sparsity_threshold), ("block_size", block_size)):
            if isinstance(given, jax.core.Tracer):
                raise checks.error(name, "must be static: it fixes the program", given, "make the module outside of jit")
        self.sparsity_threshold = checks.threshold("sparsity_threshold", sparsity_threshold)
        self.block_size = checks.positive_int("block_size", block_size, "try 48 or 64")
        self.scale = scale
        self.causal = bool(causal)
        self.max_blocks = max_blocks

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, attn_bias: jax.Array | None = None) -> jax.Array:
        ranks = {query.ndim, key.ndim, value.ndim}
        if len(ranks) != 1 or query.ndim not in (3, 4, 5):
            raise checks.error(
                "query, key, value", "must all have 3, 4 or 5 axes: [batch, len, (groups,) (heads,) head_dim]",
                f"{query.ndim}, {key.ndim} and {value.ndim}", "add the missing axes with reshape",
            )  # fmt: skip
        heads = query.shape[2:-1]
        for name, x in (("key", key), ("value", value)):
            if query.ndim == 5 and x.shape[2:-1] != heads:
                raise checks.error(
                    name, f"must have the groups and heads of `query`, {heads}", x.shape[2:-1], "broadcast it over the group"
                )

        def flat(x):
            return x.reshape(*x.shape[:2], -1, x.shape[-1]).swapaxes(1, 2)

        bias = attn_bias
        if bias is not None:
            if not 2 <= bias.ndim <= 5:
                raise checks.error("attn_bias", "must have 2 to 5 axes", f"shape {bias.shape}", "see the axes of the logits")
            if bias.ndim == 5:
                bias = bias.reshape(bias.shape[0], -1, *bias.shape[3:])
            bias = bias[None, None] if bias.ndim == 2 else bias[:, None] if bias.ndim == 3 else bias
        policy = policies.Aether(self.sparsity_threshold, self.block_size)
        output = attention(
            flat(query),
            flat(key),
            flat(value),
            policy,
            causal=self.causal,
            scale=self.scale,
            bias=bias,
            max_blocks=self.max_blocks,
        )
        return output.swapaxes(1, 2).reshape(*query.shape[:-1], value.shape[-1])
