"""Stage 1 on JAX arrays: summaries of key blocks as a pytree."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import jax

from sieve_attn import geometry as stage
from sieve_attn.checks import error
from sieve_attn.geometry import native as kernels
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
    if backend in ("auto", "native") and channel_scale is None and not why_not(key, asked):
        from sieve_attn.jax import ffi_stages

        return ffi_stages.geometry(key, size, asked, key_mask)
    return build(key, size, asked, value, key_mask, channel_scale)


def build(key: jax.Array, block_size: int, asked: Statistics, value: Any, key_mask: Any, channel_scale: Any = None) -> Geometry:
    """By the shared stages on ``jax.numpy``."""
    return stage.build(key, block_size, asked, value=value, key_mask=key_mask, channel_scale=channel_scale, backend="reference")


def why_not(key: jax.Array, asked: Statistics) -> tuple[str, ...]:
    """Every reason why kernels cannot summarise ``key``; empty if they can."""
    reasons = kernels.why_not(jax.ShapeDtypeStruct(key.shape, key.dtype), asked)
    where = front.platform(key)
    return reasons if where == "cpu" else (f"kernels run on cpu, not on {where}", *reasons)
