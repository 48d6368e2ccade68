"""Attention over the keys of a position pattern, on JAX arrays."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sieve_attn import native, patterns
from sieve_attn.arrays import jax_ops as xp
from sieve_attn.attend import offsets as stage
from sieve_attn.checks import error
from sieve_attn.jax import call as front
from sieve_attn.jax import ffi, gather
from sieve_attn.jax.call import Call
from sieve_attn.jax.top_k import choose
from sieve_attn.types import Rows
from sieve_attn.types.call import CHUNK_BYTES


def offset_attention(
    query: Any,
    key: Any,
    value: Any,
    pattern: patterns.Pattern,
    *,
    scale: float | None = None,
    plan: str = "auto",
    backend: str = "auto",
    return_lse: bool = False,
) -> Any:
    """Causal attention of every query to the keys that ``pattern`` keeps for its position: exact over those, nothing else.

    As :func:`sieve_attn.functional.offset_attention`, under ``jit``, ``grad`` and ``vmap``, for patterns made of first tokens,
    windows and offsets. ``backend``: ``native`` (CPU, both plans), ``gather`` (``jax.numpy``, a chunk of queries at a time) or
    ``auto``. Returns the output [batch, q_heads, q_len, v_dim], then ``lse`` with ``return_lse``.
    """
    if not isinstance(pattern, patterns.Pattern):
        raise error("pattern", "must be a Pattern", repr(pattern), "try patterns.Primes() | patterns.Window(4)", TypeError)
    call = front.make(query, key, value, causal=True, scale=scale)
    if plan not in stage.PLANS:
        raise error("plan", f"must be one of {', '.join(stage.PLANS)}", repr(plan), "use 'auto'")
    if not stage.made_of_offsets(pattern):
        raise error("pattern", "must be made of first tokens, windows and offsets", repr(pattern),
                    "pass pattern.selection(q_len, kv_len) to sieve_attn.jax.attend")  # fmt: skip
    found = stage.reach(pattern, call.kv_len)
    inside = tuple(found.offsets[: np.searchsorted(found.offsets, call.kv_len)].tolist())
    prefix = min(found.prefix, call.kv_len)
    if choose(backend, call) == "native":
        ran = stage.choose_plan(plan, found, call.q_len, call.kv_len, call.query.dtype.name, native.pace())
        output, lse = _offsets(call.query, call.key, call.value, inside, prefix, call.scale, ran.modulus, ran.residues)
    else:
        output, lse = _in_jnp(call, inside, prefix)
    return (output, lse) if return_lse else output


def _call(target: str, arrays: dict, outputs: dict, offsets: tuple, prefix: int, scale: float, **numbers: Any) -> dict:
    return ffi.call(target, arrays, outputs, offsets=np.asarray(offsets, np.int64), prefix=prefix, scale=scale, **numbers)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6, 7))
def _offsets(query, key, value, offsets: tuple, prefix: int, scale: float, modulus: int, residues: tuple):
    shape = query.shape[:3]
    outputs = {
        "output": jax.ShapeDtypeStruct((*shape, value.shape[3]), query.dtype),
        "lse": jax.ShapeDtypeStruct(shape, jnp.float32),
    }
    wheel = {"modulus": modulus, "residues": np.asarray(residues, np.int64)} if residues else {}
    found = _call("offsets", {"query": query, "key": key, "value": value}, outputs, offsets, prefix, scale, **wheel)
    return found["output"], found["lse"]


def _forward(query, key, value, *settled):
    output, lse = _offsets(query, key, value, *settled)
    return (output, lse), (query, key, value, output, lse)


def _backward(offsets, prefix, scale, modulus, residues, kept, gradients):
    query, key, value, output, lse = kept
    d_output, d_lse = gradients
    d_lse = jnp.where(jnp.isneginf(lse), 0.0, d_lse.astype(jnp.float32))
    shift = d_lse - (d_output.astype(jnp.float32) * output.astype(jnp.float32)).sum(-1)
    arrays = {"query": query, "key": key, "value": value, "d_output": d_output.astype(output.dtype), "lse": lse, "shift": shift}
    outputs = {f"d_{n}": jax.ShapeDtypeStruct(arrays[n].shape, arrays[n].dtype) for n in ("query", "key", "value")}
    found = _call("offsets_backward", arrays, outputs, offsets, prefix, scale)
    return tuple(found.values())


_offsets.defvjp(_forward, _backward)


def _in_jnp(call: Call, offsets: tuple[int, ...], prefix: int) -> tuple[jax.Array, jax.Array]:
    """Every query gathers the keys that it names, a chunk of queries at a time."""
    batch, heads, q_len, dim = call.query.shape
    query, key, value = (call.compute(name) for name in ("query", "key", "value"))
    group, width = heads // key.shape[1], prefix + len(offsets)
    if not width:
        # no key is that near
        nothing = jnp.zeros((batch, heads, q_len, value.shape[3]), call.query.dtype)
        return nothing, jnp.full((batch, heads, q_len), -jnp.inf, query.dtype)
    row = batch * heads * width * (dim + value.shape[3]) * 4
    step = max(1, min(q_len, CHUNK_BYTES // row))
    chunks = -(-q_len // step)
    numbers = jnp.asarray(np.minimum(np.arange(chunks * step), q_len - 1).reshape(chunks, step), jnp.int32)
    front_keys, back = jnp.arange(prefix), jnp.asarray(np.asarray(offsets, np.int32))

    def one(number):
        position = (number + call.offset)[:, None]
        behind = position - back
        place = jnp.concatenate([jnp.broadcast_to(front_keys, (step, prefix)), behind], 1)
        # a key that the prefix holds as well counts once
        real = jnp.concatenate([jnp.broadcast_to(front_keys, (step, prefix)) <= position, behind >= prefix], 1)
        place = jnp.where(real, place, 0)
        taken = [xp.repeat_each(x, group, 1)[:, :, place] for x in (key, value)]
        keys, values = (x.reshape(batch * heads * step, 1, width, x.shape[-1]) for x in taken)
        visible = jnp.broadcast_to(real, (batch, heads, step, width)).reshape(-1, 1, 1, width)
        rows = Rows(query[:, :, number].reshape(-1, 1, 1, dim), position[:, 0], visible, visible, call.scale)
        out, lse = gather.softmax(rows, keys, values, True, None)
        return out.reshape(batch, heads, step, -1), lse.reshape(batch, heads, step)

    with jax.default_matmul_precision("highest"):
        parts = jax.lax.map(jax.checkpoint(one), numbers)
    out, lse = (jnp.moveaxis(x, 0, 2).reshape(batch, heads, -1, *x.shape[4:])[:, :, :q_len] for x in parts)
    return out.astype(call.query.dtype), lse
