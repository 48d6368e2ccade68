"""The kernels' attention as a differentiable function: forward and backward are foreign functions."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sieve_attn.jax import ffi
from sieve_attn.jax.call import Call
from sieve_attn.jax.selection import PaddedBlocks
from sieve_attn.types import Offsets, Ranges, Selection

FLOATS = ("query", "key", "value", "bias", "sink")


def attend(call: Call, selection: PaddedBlocks | Selection) -> tuple[jax.Array, jax.Array]:
    """``(output [batch, q_heads, q_len, v_dim] in the query's dtype, lse [batch, q_heads, q_len])``."""
    floats = {name: getattr(call, name) for name in FLOATS}
    others = {name: getattr(call, name) for name in ("mask", "key_mask", "cu_seqlens", "kv_length")}
    numbers = {"causal": call.causal, "scale": call.scale, "window": -1 if call.window is None else call.window,
               "softcap": call.softcap or 0.0}  # fmt: skip
    if isinstance(selection, PaddedBlocks):
        # handlers read int32
        others |= {name: getattr(selection, name).astype(jnp.int32) for name in ("counts", "indices")}
        if selection.rows is not None:
            others |= {"rows": selection.rows.reshape(*selection.indices.shape[:3], -1)}
        numbers |= {name: getattr(selection, name) for name in ("q_block", "kv_block", "lead")}
    else:
        numbers |= _of_positions(selection)
    return _attend(floats, others, tuple(sorted(numbers.items())))


def _of_positions(selection: Selection) -> dict[str, Any]:
    """A selection that follows from positions alone, in numbers."""
    numbers: dict[str, Any] = {}
    for part in selection.parts:
        if isinstance(part, Ranges):
            numbers |= {"prefix": part.prefix, "near": part.window, "two_sided": part.two_sided}
        elif isinstance(part, Offsets):
            numbers |= {"offsets": part.offsets, "first_key": part.first_key}
    return numbers


def plain(numbers: tuple) -> dict[str, Any]:
    """Attributes from a hashable tuple; lists become arrays."""
    return {name: np.asarray(x, np.int64) if isinstance(x, tuple) else x for name, x in numbers}


def _inputs(floats: dict, others: dict) -> dict[str, jax.Array | None]:
    known = floats | others
    if known.get("sink") is not None:
        known["sink"] = known["sink"].astype(jnp.float32)
    bias = known.get("bias")
    if bias is not None and bias.dtype.name not in ("float32", "float16", "bfloat16"):
        known["bias"] = bias.astype(jnp.float32)
    return known


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _attend(floats: dict, others: dict, numbers: tuple) -> tuple[jax.Array, jax.Array]:
    query, value = floats["query"], floats["value"]
    shape = query.shape[:3]
    outputs = {
        "output": jax.ShapeDtypeStruct((*shape, value.shape[3]), query.dtype),
        "lse": jax.ShapeDtypeStruct(shape, jnp.float32),
    }
    found = ffi.call("attend", _inputs(floats, others), outputs, **plain(numbers))
    return found["output"], found["lse"]


def _forward(floats: dict, others: dict, numbers: tuple):
    output, lse = _attend(floats, others, numbers)
    return (output, lse), (floats, others, output, lse)


def _backward(numbers: tuple, kept: tuple, gradients: tuple[jax.Array, jax.Array]):
    floats, others, output, lse = kept
    d_output, d_lse = gradients
    d_lse = jnp.where(jnp.isneginf(lse), 0.0, d_lse.astype(jnp.float32))
    shift = d_lse - (d_output.astype(jnp.float32) * output.astype(jnp.float32)).sum(-1)
    inputs = _inputs(floats, others)
    outputs = {f"d_{n}": jax.ShapeDtypeStruct(floats[n].shape, floats[n].dtype) for n in ("query", "key", "value")}
    if floats["bias"] is not None:
        outputs["d_bias"] = jax.ShapeDtypeStruct(floats["bias"].shape, jnp.float32)
    found = ffi.call(
        "attend_backward",
        inputs | {"d_output": d_output.astype(output.dtype), "lse": lse, "shift": shift},
        outputs,
        **plain(numbers),
    )
    grads = {name: found.get(f"d_{name}") for name in FLOATS}
    if grads["bias"] is not None:
        grads["bias"] = grads["bias"].astype(floats["bias"].dtype)
    if floats["sink"] is not None:
        weight = jnp.exp(floats["sink"].astype(jnp.float32)[None, :, None] - lse)
        weight = jnp.where(jnp.isneginf(floats["sink"])[None, :, None], 0.0, weight)
        grads["sink"] = (weight * shift).sum((0, 2)).astype(floats["sink"].dtype)
    return grads, jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), others)


_attend.defvjp(_forward, _backward)
