"""Exact top-k attention on JAX arrays."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sieve_attn import checks
from sieve_attn.arrays import jax_ops as xp
from sieve_attn.checks import error
from sieve_attn.jax import backends, ffi, ffi_attend, gather
from sieve_attn.jax import call as front
from sieve_attn.jax.call import Call
from sieve_attn.types.call import CHUNK_BYTES

BACKENDS = ("native", "gather")


def top_k_attention(
    query: Any,
    key: Any,
    value: Any,
    top_k: int,
    *,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    mask: Any = None,
    key_mask: Any = None,
    cu_seqlens: Any = None,
    sink: Any = None,
    window: int | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    return_index: bool = False,
) -> Any:
    """Exact top-k attention: every query attends to the ``top_k`` visible keys with the largest scaled logits.

    As :func:`sieve_attn.functional.top_k_attention`, under ``jit``, ``grad`` and ``vmap``: the earlier key wins a tie, logits are
    compared before any cap, gradients treat the choice as a constant. Returns the output [batch, q_heads, q_len, v_dim], then
    ``lse`` with ``return_lse`` and, with ``return_index``, the keys [batch, q_heads, q_len, top_k] int32, increasing and then -1.
    ``backend``: ``native`` (CPU), ``gather`` (``jax.lax.top_k`` a chunk of queries at a time) or ``auto``.
    """
    top_k = checks.positive_int("top_k", top_k, "try 8")
    call = front.make(
        query, key, value, causal=causal, scale=scale, softcap=softcap, mask=mask, key_mask=key_mask, bias=None,
        cu_seqlens=cu_seqlens, sink=sink, window=window,
    )  # fmt: skip
    name = choose(backend, call)
    run = _native if name == "native" else _in_jnp
    output, lse, index = run(call, min(top_k, call.kv_len))
    results = (output, *([lse] if return_lse else []), *([index] if return_index else []))
    return results[0] if len(results) == 1 else results


def choose(backend: str, call: Call) -> str:
    """``native`` or ``gather``; what is named runs or raises."""
    if backend not in ("auto", *BACKENDS):
        raise error("backend", f"must be 'auto' or one of {', '.join(BACKENDS)}", repr(backend), "use 'auto'")
    reasons = backends.native_why_not(call) if backend != "gather" else ()
    if backend == "native" and reasons:
        raise error("backend", f"cannot run this call: {'; '.join(reasons)}", "'native'", "use backend='auto'")
    return "gather" if backend == "gather" or reasons else "native"


def _native(call: Call, top_k: int):
    floats = {name: getattr(call, name) for name in ffi_attend.FLOATS}
    others = {name: getattr(call, name) for name in ("mask", "key_mask", "cu_seqlens")}
    numbers = {"causal": call.causal, "scale": call.scale, "window": -1 if call.window is None else call.window,
               "softcap": call.softcap or 0.0}  # fmt: skip
    return _top_k(floats, others, tuple(sorted(numbers.items())), top_k)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _top_k(floats: dict, others: dict, numbers: tuple, top_k: int):
    query, value = floats["query"], floats["value"]
    shape = query.shape[:3]
    outputs = {
        "output": jax.ShapeDtypeStruct((*shape, value.shape[3]), query.dtype), "lse": jax.ShapeDtypeStruct(shape, jnp.float32),
        "index": jax.ShapeDtypeStruct((*shape, top_k), jnp.int32),
    }  # fmt: skip
    found = ffi.call("top_k", ffi_attend._inputs(floats, others), outputs, top_k=top_k, **dict(numbers))
    return found["output"], found["lse"], found["index"]


def _forward(floats: dict, others: dict, numbers: tuple, top_k: int):
    output, lse, index = _top_k(floats, others, numbers, top_k)
    return (output, lse, index), (floats, others | {"index": index}, output, lse)


def _backward(numbers: tuple, top_k: int, kept: tuple, gradients: tuple):
    grads, others = ffi_attend._backward(numbers, kept, gradients[:2])
    others.pop("index")
    return grads, others


_top_k.defvjp(_forward, _backward)


def _in_jnp(call: Call, top_k: int):
    """``jax.lax.top_k`` over the logits of a chunk of queries, then attention over what it names."""
    batch, heads = call.query.shape[:2]
    row = batch * heads * call.kv_len * xp.itemsize(xp.compute_dtype(call.query))
    step = max(1, min(call.q_len, CHUNK_BYTES // max(row, 1)))
    chunks = -(-call.q_len // step)
    numbers = jnp.asarray(np.minimum(np.arange(chunks * step), call.q_len - 1).reshape(chunks, step), jnp.int32)
    key, value = call.compute("key"), call.compute("value")
    group = heads // key.shape[1]

    def one(number):
        rows = replace(call, shared={}).rows_at(number)
        dim = rows.query.shape[3]
        query = jax.lax.stop_gradient(rows.query).reshape(batch, key.shape[1], -1, dim)
        logits = (query @ xp.transpose_last(jax.lax.stop_gradient(key))).reshape(batch, heads, step, -1) * call.scale
        ranked = jnp.where(rows.visible, logits, -jnp.inf)
        _, index = jax.lax.top_k(ranked, top_k)
        seen = jnp.take_along_axis(jnp.broadcast_to(rows.visible, ranked.shape), index, -1)
        index = jnp.sort(jnp.where(seen, index, call.kv_len), -1)
        real = index < call.kv_len
        place = jnp.where(real, index, 0)
        # one query a tile of its own: its keys lie side by side
        taken = [jnp.take_along_axis(xp.repeat_each(x, group, 1)[:, :, None], place[..., None], 3) for x in (key, value)]
        single = (batch * heads * step, 1)
        query = rows.query.reshape(*single, 1, dim)
        keys, values = (x.reshape(*single, top_k, x.shape[-1]) for x in taken)
        mine = replace(rows, query=query, visible=real.reshape(*single, 1, top_k))
        sink = None if call.sink is None else jnp.broadcast_to(call.sink[None, :, None], (batch, heads, step)).reshape(-1)
        out, lse = gather.softmax(mine, keys, values, True, None if sink is None else sink[:, None, None, None])
        shape = (batch, heads, step)
        return out.reshape(*shape, -1), lse.reshape(shape), jnp.where(real, index, -1).astype(jnp.int32)

    with jax.default_matmul_precision("highest"):
        parts = jax.lax.map(jax.checkpoint(one), numbers)
    out, lse, index = (jnp.moveaxis(x, 0, 2).reshape(batch, heads, -1, *x.shape[4:])[:, :, : call.q_len] for x in parts)
    return out.astype(call.query.dtype), lse, index
