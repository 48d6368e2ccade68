"""Geometry and block selection by the kernels, as foreign functions. Nothing here is differentiated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from sieve_attn.attend.native import ROUNDING
from sieve_attn.geometry.sketch import CALIBRATION
from sieve_attn.jax import ffi
from sieve_attn.jax.call import Call
from sieve_attn.jax.selection import PaddedBlocks
from sieve_attn.policies import Policy
from sieve_attn.scores import Euclidean, KeySketch
from sieve_attn.selection import native as prefill
from sieve_attn.selection import native_scan as decode
from sieve_attn.selection.certified import Certified
from sieve_attn.selection.kernels import ends
from sieve_attn.selection.top_k import TopK
from sieve_attn.types import Geometry, Sketch, Statistics

_SKETCH = ("planes", "scale", "error", "metric_error", "channel_scale", "spectral", "metric_spectral")


def geometry(
    key: jax.Array, block_size: int, asked: Statistics, key_mask: jax.Array | None, channel_scale: jax.Array | None = None
) -> Geometry:
    """As :func:`sieve_attn.geometry.native.build`."""
    batch, heads, kv_len, dim = key.shape
    blocks, bits = -(-kv_len // block_size), asked.sketch_bits

    def fresh(dtype, *shape: int):
        return jax.ShapeDtypeStruct((batch, heads, *shape), dtype)

    shapes = {"count": fresh(jnp.int32, blocks), "finite": fresh(bool, blocks), "mean": fresh(jnp.float32, blocks, dim),
              "key_norm": fresh(jnp.float32, blocks)}  # fmt: skip
    if asked.radius:
        shapes["radius"] = fresh(jnp.float32, blocks)
    if asked.box:
        shapes |= {side: fresh(jnp.float32, blocks, dim) for side in ("low", "high")}
    if bits:
        # the batch comes first, so that a mapped axis leads here as well
        shapes["planes"] = jax.ShapeDtypeStruct((bits, batch, heads, kv_len, -(-dim // 8)), jnp.uint8)
        shapes |= {name: fresh(jnp.float16, kv_len) for name in ("scale", "error", "metric_error")}
        if channel_scale is None:
            shapes["channel_scale"] = fresh(jnp.float32, dim)
        if asked.spectral:
            shapes |= {name: fresh(jnp.float32, blocks) for name in ("spectral", "metric_spectral")}
    inputs = {"key": jax.lax.stop_gradient(key), "key_mask": key_mask, "given_scale": channel_scale if bits else None}
    made = ffi.call("geometry", inputs, shapes, block_size=block_size, bits=bits)
    if bits and channel_scale is not None:
        made["channel_scale"] = channel_scale
    sketch = Sketch(bits, **{name: made.pop(name) for name in _SKETCH if name in made}) if bits else None
    return Geometry(block_size, kv_len, asked, **made, sketch=sketch)


def choose(call: Call, geometry: Geometry, policy: Policy, room: int, otherwise: Callable[[], Any]):
    """``(PaddedBlocks, (kept, visible, dense tiles))`` by the kernels, or None where they do not know the policy. Where data
    alone tells whether they may choose, ``otherwise`` is the other branch."""
    shape = jax.ShapeDtypeStruct
    plain = replace(call, query=shape(call.query.shape, call.query.dtype), key=shape(call.key.shape, call.key.dtype))
    held = replace(geometry, mean=shape(geometry.mean.shape, geometry.mean.dtype))
    if not decode.why_not(replace(plain, key_mask=None, kv_length=None), held, policy, False):
        hidden = call.key_mask is not None or call.kv_length is not None
        if not hidden or not isinstance(policy.scorer, KeySketch):
            return _by_kernels(call, geometry, policy, room, True)
        # which keys calibrate a sketch is data where keys are hidden
        after = _after_calibration(call, geometry)
        return jax.lax.cond(after, lambda: _by_kernels(call, geometry, policy, room, True), otherwise)
    if call.kv_length is not None or prefill.why_not(plain, held, policy, False):
        return None
    return _by_kernels(call, geometry, policy, room, False)


def _after_calibration(call: Call, geometry: Geometry) -> jax.Array:
    """Whether every query sees all keys that the channel scale of the sketch was measured on; see ``native_scan``."""
    known = jnp.cumsum(geometry.count, -1)
    end = ((known < CALIBRATION).sum(-1).max() + 1) * geometry.block_size
    late = call.offset >= end
    if not call.causal and call.window is None:
        late = late | (call.kv_len >= end)
    return late & (known[..., -1].min() >= CALIBRATION)


def _by_kernels(call: Call, geometry: Geometry, policy: Policy, room: int, scans: bool):
    shape = jax.ShapeDtypeStruct
    tiles = -(-(call.q_len + call.lead(policy.query_tile)) // policy.query_tile)
    heads = call.key.shape[1] if policy.share_group else call.query.shape[1]
    grid = (call.query.shape[0], heads, tiles)
    outputs = {name: shape(grid, jnp.int32) for name in ("counts", "kept", "visible")}
    outputs |= {"indices": shape((*grid, room), jnp.int32), "dense": shape(grid, jnp.bool_)}
    sinks, near = ends(policy.keep)
    numbers = {
        "causal": call.causal, "window": -1 if call.window is None else call.window, "scale": call.scale,
        "softcap": call.softcap or 0.0, "block_size": policy.block_size, "query_tile": policy.query_tile,
        "stride": policy.query_stride, "heads": heads, "sinks": sinks, "near": near, "lead": call.lead(policy.query_tile),
        "kv_len": call.kv_len,
    }  # fmt: skip
    inputs = {name: getattr(call, name) for name in ("query", "key", "key_mask", "cu_seqlens", "kv_length")}
    inputs |= {"count": geometry.count, "finite": geometry.finite}
    found = (_scan if scans else _gate)(call, geometry, policy, inputs, outputs, numbers)
    padded = PaddedBlocks(found["counts"], found["indices"], call.q_len, call.kv_len, policy.query_tile, policy.block_size,
                          call.lead(policy.query_tile))  # fmt: skip
    return padded, (found["kept"], found["visible"], found["dense"])


def _stopped(inputs: dict) -> dict:
    return {name: None if x is None else jax.lax.stop_gradient(x) for name, x in inputs.items()}


def _gate(call: Call, geometry: Geometry, policy: Policy, inputs: dict, outputs: dict, numbers: dict) -> dict:
    """Many queries, tile by tile; see :mod:`sieve_attn.selection.native`."""
    scorer, selector = policy.scorer, policy.selector
    by_keys, sketch = isinstance(scorer, KeySketch), geometry.sketch
    if by_keys:
        inputs |= {"planes": sketch.planes, "key_scale": sketch.scale, "channel_scale": sketch.channel_scale}
        numbers |= {
            "bits": min(scorer.bits, sketch.bits),
            "sketch_bits": sketch.bits,
            "round_queries": scorer.query_bits is not None,
        }
    else:
        inputs |= {"mean": geometry.mean, "radius": geometry.radius if type(scorer) is Euclidean else None}
    if type(selector) is Certified:
        inputs |= {"error": sketch.error, "metric_error": sketch.metric_error, "spectral": sketch.spectral,
                   "metric_spectral": sketch.metric_spectral, "key_norm": geometry.key_norm,
                   "sink": None if call.sink is None else call.sink.astype(jnp.float32)}  # fmt: skip
    amounts = ("threshold", "margin", "sparsity", "mass", "error")
    level = next((float(getattr(selector, name)) for name in amounts if hasattr(selector, name)), 0.0)
    return ffi.call(
        "select", _stopped(inputs), outputs, **numbers, scoring=prefill.SCORERS[type(scorer)],
        rule=prefill.SELECTORS[type(selector)], level=level, blocks=selector.blocks if type(selector) is TopK else 0,
        dense_above=float(policy.dense_above) if selector.may_turn_dense else 1.0,
    )  # fmt: skip


def _scan(call: Call, geometry: Geometry, policy: Policy, inputs: dict, outputs: dict, numbers: dict) -> dict:
    """A few queries over the sketch as it lies; see :mod:`sieve_attn.selection.native_scan`."""
    rule, amount = decode.RULES[type(policy.selector)]
    inputs |= {"key_norm": geometry.key_norm, "mean": geometry.mean, "radius": geometry.radius,
               "sink": None if call.sink is None else call.sink.astype(jnp.float32)}  # fmt: skip
    if isinstance(policy.scorer, KeySketch):
        sketch = geometry.sketch
        inputs |= {"planes": sketch.planes, "key_scale": sketch.scale, "channel_scale": sketch.channel_scale,
                   "error": sketch.error, "metric_error": sketch.metric_error, "spectral": sketch.spectral,
                   "metric_spectral": sketch.metric_spectral}  # fmt: skip
        exact = policy.scorer.query_bits is None
        digits = 2 if rule == "certified" else decode.DIGITS if exact else 1
        numbers |= {"bits": min(policy.scorer.bits, sketch.bits), "sketch_bits": sketch.bits, "digits": digits}
    return ffi.call(
        "scan", _stopped(inputs), outputs, **numbers, scorer=list(decode.SCORERS).index(type(policy.scorer)),
        rule=list(decode.RULES).index(type(policy.selector)), amount=float(getattr(policy.selector, amount)),
        dense_above=float(policy.dense_above), share_group=policy.share_group, unit=float(ROUNDING.unit),
        exponential=float(ROUNDING.exponential),
    )  # fmt: skip
