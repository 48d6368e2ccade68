"""Stage 1 on JAX arrays: summaries of key blocks as a pytree."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sieve_attn import geometry as stage
from sieve_attn.checks import error, positive_int
from sieve_attn.geometry import native as kernels
from sieve_attn.geometry.edit import map_arrays
from sieve_attn.geometry.sketch import CALIBRATION
from sieve_attn.jax import call as front
from sieve_attn.policies import Policy
from sieve_attn.types import Geometry, Sketch, Statistics

_STATIC = {Sketch: ("bits",), Geometry: ("block_size", "kv_len", "statistics")}
for _kind, _meta in _STATIC.items():
    jax.tree_util.register_dataclass(_kind, [f.name for f in fields(_kind) if f.name not in _meta], list(_meta))


def geometry(
    key: Any,
    policy: Policy | None = None,
    *,
    block_size: int | None = None,
    statistics: Statistics | None = None,
    value: Any = None,
    key_mask: Any = None,
    channel_scale: Any = None,
    backend: str = "auto",
) -> Geometry:
    """Summaries of ``key`` [batch, kv_heads, kv_len, dim] that ``policy`` selects by, or those that ``statistics`` names.

    As :func:`sieve_attn.geometry.build`, under ``jit`` and ``vmap`` too: the result is a pytree whose block size and length are
    static. ``backend``: ``"native"`` or ``"auto"`` run the C++ kernels where they know all that is asked for.
    """
    key, value, key_mask = (front.to_array(n, x) for n, x in (("key", key), ("value", value), ("key_mask", key_mask)))
    if policy is None and block_size is None:
        raise error("policy", "must be given, or block_size and statistics instead", "None", "try policies.TopBlocks(64)")
    asked = statistics or (Statistics() if policy is None else policy.statistics)
    size = policy.block_size if block_size is None else block_size
    return _best(key, size, asked, value, key_mask, channel_scale, backend)


def append(
    geometry: Geometry, key: Any, start: Any, new: int, *, value: Any = None, key_mask: Any = None, backend: str = "auto"
) -> Geometry:
    """The geometry of a cache of fixed size after ``new`` keys (a Python integer) were written from place ``start`` on.

    ``key`` [batch, kv_heads, cache_len, dim] is the cache with the new keys, ``geometry`` what was known of it before (at first
    ``geometry(cache, policy, key_mask=nothing)``); ``start`` may be traced. ``key_mask`` [batch, cache_len] leaves keys out; what
    comes after the new keys is out anyway. Only the blocks that the new keys lie in are summarised, on the channel scale that
    the first 64 keys fixed; until those are there, everything is. Equal to building it anew with the same ``key_mask``.
    """
    from sieve_attn.jax import ffi

    key, value, key_mask = (front.to_array(n, x) for n, x in (("key", key), ("value", value), ("key_mask", key_mask)))
    new = positive_int("new", new, "how many keys were written")
    kv_len = geometry.kv_len
    if tuple(key.shape[2:3]) != (kv_len,):
        raise error("key", f"must hold the cache that the geometry describes, {kv_len} places", f"shape {tuple(key.shape)}",
                    "build the geometry over the whole cache, filled or not")  # fmt: skip
    if new > kv_len:
        raise error("new", f"must fit the cache of {kv_len} places", new, "make the cache longer")
    return _append(geometry, key, jnp.asarray(start, jnp.int32), value, key_mask, new, backend, ffi.threads())


@partial(jax.jit, static_argnums=(5, 6, 7))
def _append(geometry: Geometry, key, start, value, key_mask, new: int, backend: str, threads: int) -> Geometry:
    """``threads`` of the kernels: what was compiled for another count is compiled again."""
    size, blocks, kv_len, asked = geometry.block_size, geometry.blocks, geometry.kv_len, geometry.statistics
    there = jnp.broadcast_to(jnp.arange(kv_len) < start + new, (key.shape[0], kv_len))
    there = there if key_mask is None else there & key_mask
    touched = min(-(-(new - 1) // size) + 1, blocks)
    first = jnp.minimum(start // size, blocks - touched)

    def of_everything() -> Geometry:
        return _best(key, size, asked, value, there, None, backend)

    def of_touched() -> Geometry:
        # the last block may be short
        place = first * size + jnp.arange(touched * size)
        inside = jnp.minimum(place, kv_len - 1)
        cut = tuple(None if x is None else x[:, :, inside] for x in (key, value))
        mask = there[:, inside] & (place < kv_len)
        scale = None if geometry.sketch is None else geometry.sketch.channel_scale
        return _written(geometry, _best(cut[0], size, asked, cut[1], mask, scale, backend), first, place)

    if geometry.sketch is None:
        return of_touched()
    sealed = jnp.where(jnp.arange(blocks) < first, geometry.count, 0).sum(-1).min()
    return jax.lax.cond(sealed >= CALIBRATION, of_touched, of_everything)


def _written(geometry: Geometry, part: Geometry, first: jax.Array, place: jax.Array) -> Geometry:
    """``geometry`` with the blocks of ``part`` from block ``first`` on; its keys belong to the places ``place``."""
    sources: list[jax.Array] = []
    map_arrays(part, lambda x, axis, kind: sources.append(x), 0, 1, part.kv_len)
    rest, index = iter(sources), (first + jnp.arange(part.blocks), place)

    def put(x: jax.Array, axis: int, kind: int) -> jax.Array:
        """Into blocks (kind 0) or single keys (kind 1)."""
        at = (*(slice(None),) * axis, index[kind])
        return x.at[at].set(next(rest), mode="drop", indices_are_sorted=True, unique_indices=True)

    return map_arrays(geometry, put, 0, 1, geometry.kv_len)


def _best(key: jax.Array, size: int, asked: Statistics, value: Any, key_mask: Any, scale: Any, backend: str) -> Geometry:
    if backend in ("auto", "native") and not why_not(key, asked):
        from sieve_attn.jax import ffi_stages

        return ffi_stages.geometry(key, size, asked, key_mask, scale)
    return build(key, size, asked, value, key_mask, scale)


def build(key: jax.Array, block_size: int, asked: Statistics, value: Any, key_mask: Any, channel_scale: Any = None) -> Geometry:
    """By the shared stages on ``jax.numpy``."""
    return stage.build(key, block_size, asked, value=value, key_mask=key_mask, channel_scale=channel_scale, backend="reference")


def why_not(key: jax.Array, asked: Statistics) -> tuple[str, ...]:
    """Every reason why kernels cannot summarise ``key``; empty if they can."""
    from sieve_attn.jax import ffi

    reasons = kernels.why_not(jax.ShapeDtypeStruct(key.shape, key.dtype), asked) or ffi.why_not()
    where = front.platform(key)
    return reasons if where == "cpu" else (f"kernels run on cpu, not on {where}", *reasons)
