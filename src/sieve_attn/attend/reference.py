"""The oracle: dense, masked, float64-capable. It knows no tile size and calls no kernel; every backend must match it.

``out_i = sum_{j kept} exp(s_ij - lse_i) v_j``, ``lse_i = log(sum_{j kept} exp(s_ij) [+ exp(sink)])``, with
``s = cap(scale * q.k) + bias``. A query with nothing to see gives zeros and ``lse = -inf``.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from jaxtyping import Bool, Float

from sieve_attn import arrays
from sieve_attn.attend import far_field as far
from sieve_attn.attend.far_field import FarField
from sieve_attn.attend.weighted import finite_only, weighted
from sieve_attn.bounds import FP32, soft_cap
from sieve_attn.types import Call, Rows, Selection

Array = Any


ROUNDING = FP32


def why_not(request: Any) -> tuple[str, ...]:
    """The reference runs everything."""
    return ()


def attend(call: Call, selection: Selection, far_field: FarField | None = None) -> tuple[Array, Array]:
    """``(output [batch, q_heads, q_len, v_dim] in the query's dtype, lse [batch, q_heads, q_len])``."""
    xp = arrays.namespace(call.query)
    outputs, sums = [], []
    for start, stop in call.chunks():
        rows = call.rows(start, stop, call.kv_stop(stop))
        kept = call.kept(selection, start, stop, rows.visible.shape[-1])
        out, lse = attend_rows(*_only_kept(rows, call.compute("value"), kept))
        if far_field is not None:
            out, lse = far.add_far_field(rows, kept, out, lse, far_field, call)
        outputs.append(xp.cast(out, call.query.dtype))
        sums.append(lse)
    return xp.concat(outputs, 2), xp.concat(sums, 2)


def _only_kept(rows: Rows, value: Array, kept: Array) -> tuple[Rows, Array, Array]:
    """The chunk without the keys that none of its rows keeps: they are never read."""
    xp = arrays.namespace(rows.query)
    used = xp.any_((kept & rows.visible).reshape(-1, kept.shape[-1]), 0)
    # a chunk that keeps nothing reads one key, and hides it
    column = xp.nonzero(used)[0] if bool(used.any()) else xp.arange(0, 1, kept)
    if 2 * column.shape[0] > kept.shape[-1]:
        return rows, value, kept
    bias = None if rows.bias is None else rows.bias[..., column]
    few = replace(rows, visible=rows.visible[..., column], key=rows.key[:, :, column], bias=bias)
    return few, value[:, :, column], kept[..., column]


def _masked_logits(rows: Rows, kept: Array) -> tuple[Array, Array]:
    """``(capped logits before the bias, final logits)``, the latter -inf wherever a key is not kept or not visible."""
    xp = arrays.namespace(rows.query)
    batch, heads, n, dim = rows.query.shape
    logits = rows.query.reshape(batch, rows.key.shape[1], -1, dim) @ xp.transpose_last(rows.key)
    capped = soft_cap(xp, logits.reshape(batch, heads, n, -1) * rows.scale, rows.softcap)
    return capped, xp.where(kept & rows.visible, capped if rows.bias is None else capped + rows.bias, -math.inf)


def _softmax(xp, logits: Array) -> tuple[Array, Array]:
    """``(weights, lse)`` over the last axis. Weights are not taken from lse: of large logits that rounds by a factor."""
    top = xp.amax(logits, -1)
    # exp is slow where it underflows: keep it above, and give what is not attended to its exact zero afterwards
    low = xp.maximum(logits - xp.where(top == -math.inf, 0.0, top)[..., None], -80.0)
    weights = xp.where(logits == -math.inf, 0.0, xp.exp(low))
    total = weights.sum(-1)
    none = top == -math.inf
    lse = xp.where(none | (top == math.inf), top, top + xp.log(xp.where(none, 1.0, total)))
    return weights / xp.where(none, 1.0, total)[..., None], lse


def _share(xp, part: Array, whole: Array) -> Array:
    """``exp(part - whole)``: what of a mass belongs to a part of it; 0 where neither has any."""
    none = part == -math.inf
    return xp.where(none, 0.0, xp.exp(part - xp.where(none, 0.0, whole)))


def attend_rows(
    rows: Rows, value: Float[Array, "batch kv_heads keys v_dim"], kept: Bool[Array, "b h rows seen"]
) -> tuple[Float[Array, "batch q_heads rows v_dim"], Float[Array, "batch q_heads rows"]]:
    """One chunk: softmax over the visible keys that ``kept`` [batch | 1, heads | 1, rows, keys] keeps."""
    xp = arrays.namespace(rows.query)
    _, logits = _masked_logits(rows, kept)
    p, lse = _softmax(xp, logits)
    if rows.sink is not None:
        alone, lse = lse, xp.logaddexp(lse, xp.cast(rows.sink, lse.dtype)[None, :, None])
        p = p * _share(xp, alone, lse)[..., None]
    value = value[:, :, : logits.shape[-1]]
    return weighted(xp, p, value), lse


def backward(
    call: Call,
    selection: Selection,
    grad_output: Float[Array, "batch q_heads q_len v_dim"],
    grad_lse: Float[Array, "batch q_heads q_len"],
    far_field: FarField | None = None,
    *,
    output: Array | None = None,
    lse: Array | None = None,
) -> dict[str, Array]:
    """Gradients of query, key and value, and of bias and sink where the call has them. The kept set is a constant.

    ``output`` and ``lse`` are what the forward pass returned; backends that keep more precision compute them again.

    ``dV = P^T dO``; ``dS = P * (dO V^T - rowsum(dO * O) + dlse)``; ``dQ = scale dS' K``, ``dK = scale dS'^T Q`` with ``dS'`` the
    gradient before the cap; a sink logit has the value zero.
    """
    xp = arrays.namespace(call.query)
    dtype = xp.compute_dtype(call.query)
    grads = {n: xp.zeros(tuple(getattr(call, n).shape), dtype, call.query) for n in ("query", "key", "value", "bias", "sink")
             if getattr(call, n) is not None}  # fmt: skip
    for start, stop in call.chunks():
        rows = call.rows(start, stop, call.kv_stop(stop))
        seen = rows.visible.shape[-1]
        kept = call.kept(selection, start, stop, seen)
        value = call.compute("value")[:, :, :seen]
        out, lse = attend_rows(rows, value, kept)
        d_out = xp.cast(grad_output[:, :, start:stop], dtype)
        # a row with nothing to see has a constant output and lse
        d_lse = xp.where(lse == -math.inf, 0.0, xp.cast(grad_lse[:, :, start:stop], dtype))
        if far_field is not None:
            out, lse = far.add_far_field(rows, kept, out, lse, far_field, call)
        shift = d_lse - (d_out * out).sum(-1)
        if far_field is not None:
            far.add_far_gradients(rows, kept, lse, shift, d_out, far_field, call, grads, start)
        capped, logits = _masked_logits(rows, kept)
        p, alone = _softmax(xp, logits)
        if rows.sink is not None or far_field is not None:
            p = p * _share(xp, alone, lse)[..., None]
        batch, heads, n, _ = p.shape
        kv_heads = rows.key.shape[1]

        def by_group(x, batch=batch, kv_heads=kv_heads):
            return x.reshape(batch, kv_heads, -1, x.shape[-1])

        grads["value"][:, :, :seen] += xp.transpose_last(by_group(p)) @ by_group(d_out)
        d_logits = p * ((by_group(d_out) @ xp.transpose_last(finite_only(xp, value))).reshape(p.shape) + shift[..., None])
        if rows.sink is not None:
            to_sink = _share(xp, xp.cast(rows.sink, dtype)[None, :, None], lse) * shift
            grads["sink"] += to_sink.sum(-1).sum(0)
        if rows.bias is not None:
            _add_bias_gradient(grads["bias"], d_logits, start, stop, seen)
        if rows.softcap is not None:
            d_logits = d_logits * (1.0 - (capped / rows.softcap) ** 2)
        # what was not attended to has no part in any gradient, not even as a NaN
        d_logits = xp.where(p == 0, 0.0, d_logits * rows.scale)
        query, key = (finite_only(xp, x) for x in (rows.query, rows.key))
        grads["query"][:, :, start:stop] += (by_group(d_logits) @ key).reshape(batch, heads, n, -1)
        grads["key"][:, :, :seen] += xp.transpose_last(by_group(d_logits)) @ by_group(query)
    return {n: xp.cast(g, getattr(call, n).dtype) for n, g in grads.items()}


def _add_bias_gradient(total: Array, d_logits: Array, start: int, stop: int, seen: int) -> None:
    """Sum over whatever axes the bias was broadcast along."""
    for axis in (0, 1):
        if total.shape[axis] == 1:
            d_logits = d_logits.sum(axis)[(slice(None),) * axis + (None,)]
    rows = slice(None) if total.shape[2] == 1 else slice(start, stop)
    if total.shape[2] == 1:
        d_logits = d_logits.sum(2)[:, :, None]
    if total.shape[3] == 1:
        total[:, :, rows] += d_logits.sum(3)[..., None]
    else:
        total[:, :, rows, :seen] += d_logits
