"""The arguments of a call, checked in Sieve's words before anything is traced further."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sieve_attn import checks
from sieve_attn.arrays import jax_ops
from sieve_attn.checks import error
from sieve_attn.types import Call as BaseCall
from sieve_attn.types import Rows

OPTIONAL = ("mask", "key_mask", "bias", "cu_seqlens", "sink", "kv_length")


@dataclass(frozen=True)
class Call(BaseCall):
    """A call on JAX arrays. ``kv_length``: how many keys of a cache of fixed size there are, the query's own the last of them."""

    kv_length: jax.Array | None = None

    @property
    def offset(self) -> Any:
        return super().offset if self.kv_length is None else self.kv_length - self.q_len

    @property
    def present(self) -> jax.Array | None:
        if self.kv_length is None:
            return self.key_mask
        filled = jnp.broadcast_to(jnp.arange(self.kv_len) < self.kv_length, (self.key.shape[0], self.kv_len))
        return filled if self.key_mask is None else self.key_mask & filled

    def rows_at(self, number: Any, kv_stop: int | None = None) -> Rows:
        rows = super().rows_at(number, kv_stop)
        if self.kv_length is None:
            return rows
        # what is not there cuts no block, as behind the end of the keys
        absent = jnp.arange(rows.structural.shape[-1])[None, :] >= self.kv_length
        return replace(rows, structural=rows.structural | absent)

    def lead(self, query_tile: int) -> int:
        # where a single query lies inside of its tile changes nothing
        return super().lead(query_tile) if self.kv_length is None else 0

    def kv_stop(self, stop: int, multiple: int = 1) -> int:
        return super().kv_stop(stop, multiple) if self.kv_length is None else self.kv_len


def put_together(held: dict[str, jax.Array], settled: tuple) -> Call:
    """A call from its arrays and from what is no array; see :func:`taken_apart`."""
    causal, scale, softcap, window = settled
    return Call(**held, causal=causal, scale=scale, softcap=softcap, window=window)


def taken_apart(call: Call) -> tuple[dict[str, jax.Array], tuple]:
    names = ("query", "key", "value", *OPTIONAL)
    held = {name: x for name in names if (x := getattr(call, name)) is not None}
    return held, (call.causal, call.scale, call.softcap, call.window)


def to_array(name: str, x: Any) -> jax.Array | None:
    """``x`` as a JAX array; what JAX would quietly narrow or copy from another framework is refused."""
    if x is None or isinstance(x, jax.Array):
        return x
    if not isinstance(x, (np.ndarray, np.generic, list, tuple)):
        raise error(name, "must be an array of JAX or NumPy", type(x).__name__, "convert it with jax.numpy.asarray", TypeError)
    plain = np.asarray(x)
    if plain.dtype == np.float64 and not jax.config.jax_enable_x64:
        raise error(
            name, "must not be float64 while jax_enable_x64 is off, where JAX would narrow it", "dtype float64",
            "cast it to float32, or set jax_enable_x64 before any array is made",
        )  # fmt: skip
    if plain.dtype == np.int64 and not jax.config.jax_enable_x64:
        plain = plain.astype(np.int32)
    return jnp.asarray(plain)


def make(query: Any, key: Any, value: Any, *, scale: Any, dropout: float = 0.0, **options: Any) -> Call:
    """The :class:`~sieve_attn.types.Call`, its values read only where they are known."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x is None:
            raise error(name, "must be an array", "None", "pass a JAX or NumPy array", TypeError)
    query, key, value = (to_array(n, x) for n, x in (("query", query), ("key", key), ("value", value)))
    length = options.pop("kv_length", None)
    options |= {name: to_array(name, options.get(name)) for name in OPTIONAL if name != "kv_length"}
    checks.qkv(query, key, value, xp=jax_ops)
    for name in ("causal", "scale", "softcap", "window"):
        if isinstance(options.get(name, scale if name == "scale" else None), jax.Array):
            raise error(name, "must be a Python number, known when the call is traced", "a JAX array",
                        "close over it, or name it in static_argnames of jax.jit")  # fmt: skip
    edges = options["cu_seqlens"]
    if edges is not None and (edges.ndim != 1 or not jnp.issubdtype(edges.dtype, jnp.integer)):
        raise error("cu_seqlens", "must be one axis of integers", f"{edges.dtype} of shape {edges.shape}", "pass int32 offsets")
    options["cu_seqlens"] = edges = None if edges is None else edges.astype(jnp.int32)
    checked = {name: options.get(name) for name in ("mask", "key_mask", "bias", "softcap", "cu_seqlens", "sink", "window")}
    if isinstance(edges, jax.core.Tracer):
        # where sequences begin is known only when the call runs; kernels check it then
        checked["cu_seqlens"] = None
        if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
            raise error("cu_seqlens", "must pack one batch with q_len == kv_len",
                        f"batch {query.shape[0]}, q_len {query.shape[2]}, kv_len {key.shape[2]}",
                        "pack along the length")  # fmt: skip
    checks.attention_options(query, key, scale=scale, dropout=dropout, xp=jax_ops, **checked)
    if length is not None:
        # what comes after the query is what is not there yet
        options |= {"kv_length": _length(length, query, key, edges), "causal": True}
    scale = query.shape[3] ** -0.5 if scale is None else float(scale)
    softcap = options.pop("softcap", None)
    window = options.pop("window", None)
    return Call(
        query, key, value, causal=bool(options.pop("causal", False)), scale=scale,
        softcap=None if softcap is None else float(softcap), window=None if window is None else int(window), **options,
    )  # fmt: skip


def _length(length: Any, query: jax.Array, key: jax.Array, edges: Any) -> jax.Array:
    """``kv_length`` as an int32 scalar."""
    length = jnp.asarray(length)
    if length.ndim or not jnp.issubdtype(length.dtype, jnp.integer):
        raise error("kv_length", "must be one integer for all sequences", f"{length.dtype} of shape {length.shape}",
                    "hide the keys of shorter sequences by key_mask")  # fmt: skip
    if query.shape[2] != 1 or edges is not None:
        raise error("kv_length", "must go with one query a sequence, which sits at the last key, and without cu_seqlens",
                    f"q_len {query.shape[2]}", "cut the cache to its filled part for a prefill")  # fmt: skip
    if not isinstance(length, jax.core.Tracer) and not 1 <= int(length) <= key.shape[2]:
        raise error("kv_length", f"must lie in 1..{key.shape[2]}", int(length), "write the keys into the cache first")
    return length.astype(jnp.int32)


def platform(x: jax.Array) -> str:
    """Where ``x`` lives, or where what is being traced runs by default."""
    if isinstance(x, jax.core.Tracer):
        return jax.default_backend()
    return next(iter(x.devices())).platform
