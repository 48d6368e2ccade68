"""Causal top-k attention with ternary projections."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sieve_attn import checks
from sieve_attn.flax.cached import Cached, check_tokens
from sieve_attn.flax.ternary import TernaryLinear
from sieve_attn.jax import top_k_attention


class SparseCausalAttention(Cached):
    """:class:`sieve_attn.layers.SparseCausalAttention` on JAX arrays: each token attends to the ``top_k`` largest logits among
    itself and what came before it.

    ``query``, ``key`` and ``value`` are three :class:`TernaryLinear`, plain with ``quantize=False``. ``x`` [batch, len, d_model]
    gives the same shape. Token by token: ``layer.init_cache(batch, max_length)``, then ``y = layer.step(x)`` with x [batch, new,
    d_model], whose rows equal those of the full call within rounding.

    Raises ValueError for heads that do not divide ``d_model`` and an ``x`` of another rank, width or batch. Under ``jit`` a step
    beyond ``max_length`` gives NaN.
    """

    def __init__(
        self, d_model: int, d_head: int = 32, top_k: int = 8, quantize: bool = True, heads: int = 1, *,
        dtype: Any = jnp.float32, rngs: nnx.Rngs,
    ):  # fmt: skip
        self.d_model = checks.positive_int("d_model", d_model, "try 256")
        self.d_head = checks.positive_int("d_head", d_head, "try 32")
        self.top_k = checks.positive_int("top_k", top_k, "try 8")
        self.heads = checks.positive_int("heads", heads, "try 1")
        if d_model % heads:
            raise checks.error(
                "heads", "must divide `d_model`", f"{heads} heads on a width of {d_model}", "choose a divisor of it"
            )
        make = {"quantize": quantize, "dtype": dtype, "rngs": rngs}
        self.query = TernaryLinear(d_model, heads * d_head, **make)
        self.key = TernaryLinear(d_model, heads * d_head, **make)
        self.value = TernaryLinear(d_model, d_model, **make)
        self._no_cache()

    def _split(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], self.heads, -1).swapaxes(1, 2)

    def _project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return tuple(self._split(project(x)) for project in (self.query, self.key, self.value))

    @staticmethod
    def _join(output: jax.Array) -> jax.Array:
        output = output.swapaxes(1, 2)
        return output.reshape(*output.shape[:2], -1)

    def __call__(self, x: jax.Array) -> jax.Array:
        check_tokens(x, self.d_model)
        return self._join(top_k_attention(*self._project(x), self.top_k, causal=True))

    def init_cache(self, batch_size: int, max_length: int, dtype: Any = None) -> None:
        """Makes room for ``max_length`` tokens of ``batch_size`` sequences; the dtype is that of the weights unless given."""
        widths = (self.d_head, self.d_model // self.heads)
        self._empty_cache(batch_size, max_length, self.heads, widths, dtype or self.query.weight.dtype)

    def step(self, x: jax.Array) -> jax.Array:
        """The rows of the next tokens ``x`` [batch, new, d_model], which join the cache."""
        self._needs_cache(x, self.d_model)
        query, *new = self._project(x)
        key, value, start, fits = self._append(*new)
        slot = jnp.arange(key.shape[2])
        rows = []
        for n in range(query.shape[2]):
            seen = jnp.broadcast_to(slot <= start + n, (x.shape[0], slot.shape[0]))
            rows.append(top_k_attention(query[:, :, n : n + 1], key, value, self.top_k, key_mask=seen))
        output = self._join(jnp.concatenate(rows, 2))
        return output if fits is None else jnp.where(fits, output, jnp.nan)
