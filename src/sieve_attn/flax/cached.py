"""Keys and values of the tokens before, as NNX variables of one length: what stepping layers share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sieve_attn import checks


class Cached(nnx.Module):
    """A module with ``cached_key``, ``cached_value`` [batch, heads, max_length, width] and ``cache_index``, the tokens held.

    They are ``nnx.Cache`` variables: ``nnx.split(layer, nnx.Param, nnx.Cache)`` takes them apart from the parameters.
    """

    cached_key: nnx.Cache | None
    cached_value: nnx.Cache | None
    cache_index: nnx.Cache | None

    def _no_cache(self) -> None:
        self.cached_key = nnx.data(None)
        self.cached_value = nnx.data(None)
        self.cache_index = nnx.data(None)

    def _empty_cache(self, batch_size: int, max_length: int, heads: int, widths: tuple[int, int], dtype: Any) -> None:
        checks.positive_int("batch_size", batch_size, "try 1")
        checks.positive_int("max_length", max_length, "the longest sequence to step through")
        key, value = (jnp.zeros((batch_size, heads, max_length, width), dtype) for width in widths)
        self.cached_key, self.cached_value = nnx.Cache(key), nnx.Cache(value)
        self.cache_index = nnx.Cache(jnp.zeros((), jnp.int32))

    def _append(self, key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
        """The cache with ``key`` and ``value`` [batch, heads, new, width] behind it, the place of the first of them, and a
        boolean that says whether they fit, None where that is certain."""
        start, capacity = self.cache_index[...], self.cached_key.shape[2]
        total = start + key.shape[2]
        fits = None
        if isinstance(total, jax.core.Tracer):
            fits = total <= capacity
        elif int(total) > capacity:
            raise checks.error(
                "x", f"must fit the cache of max_length {capacity}", f"{int(total)} tokens", "make a longer one with init_cache"
            )
        for held, new in ((self.cached_key, key), (self.cached_value, value)):
            held[...] = jax.lax.dynamic_update_slice_in_dim(held[...], new.astype(held.dtype), start, 2)
        self.cache_index[...] = total
        return self.cached_key[...].astype(key.dtype), self.cached_value[...].astype(value.dtype), start, fits

    def _needs_cache(self, x: jax.Array, width: int) -> None:
        if self.cached_key is None:
            raise checks.error(
                "cache", "must be made before the first step", "no cache", "call init_cache(batch_size, max_length)"
            )
        batch = self.cached_key.shape[0]
        if x.ndim != 3 or (x.shape[0], x.shape[2]) != (batch, width) or 0 in x.shape:
            raise checks.error(
                "x",
                f"must have shape [{batch}, new, {width}], the batch of the cache",
                f"shape {x.shape}",
                "use one cache a batch",
            )


def check_tokens(x: jax.Array, width: int) -> None:
    if x.ndim != 3 or x.shape[2] != width or 0 in x.shape:
        raise checks.error(
            "x", f"must have shape [batch, len, {width}] with at least one token", f"shape {x.shape}", "reshape it first"
        )
