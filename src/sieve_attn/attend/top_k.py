"""Exact top-k attention: per query the ``top_k`` largest scaled logits, chosen and attended to. The reference chooses here.

Keys are compared by ``scale * q.k`` before any cap; the earlier key wins a tie; NaN is above everything, so that what it
touches shows it. The choice is a ``Tokens`` selection, and attention over that selection is the meaning of the result.
"""

from __future__ import annotations

from typing import Any

from sieve_attn import arrays, dispatch
from sieve_attn.types import Call, Selection, Tokens

Array = Any


def attend(call: Call, top_k: int, backend: str) -> tuple[Array, Array, Array, Array]:
    """``(output, lse, index [batch, q_heads, q_len, top_k], counts [batch, q_heads, 2])``.

    ``index`` holds the chosen keys in increasing order and then -1; ``counts`` the visible (query, key) pairs and those whose
    logit was computed. A backend without a kernel of its own attends to what the reference chooses.
    """
    module = dispatch.module(backend)
    if hasattr(module, "top_k"):
        return module.top_k(call, top_k)
    index, counts = choose(call, top_k)
    output, lse = module.attend(call, Selection((Tokens(index, call.kv_len),)), None)
    return output, lse, index, counts


def choose(call: Call, top_k: int) -> tuple[Array, Array]:
    """The reference's ``(index, counts)``: every visible logit is computed, one chunk of queries at a time."""
    xp = arrays.namespace(call.query)
    batch, heads = call.query.shape[:2]
    counts, parts = xp.zeros((batch, heads, 2), xp.int64, call.query), []
    for start, stop in call.chunks():
        rows = call.rows(start, stop, max(call.kv_stop(stop), min(top_k, call.kv_len)))
        dim = rows.query.shape[3]
        logits = rows.query.reshape(batch, rows.key.shape[1], -1, dim) @ xp.transpose_last(rows.key)
        logits = logits.reshape(batch, heads, stop - start, -1) * rows.scale
        parts.append(largest(xp, logits, xp.broadcast_to(rows.visible, logits.shape), top_k))
        counts += xp.total(xp.total(rows.visible, -1, xp.int64), -1)[..., None]
    return xp.concat(parts, 2), counts


def largest(xp: Any, logits: Array, visible: Array, top_k: int) -> Array:
    """[..., top_k] int32: the places of the ``top_k`` largest visible logits in increasing order, then -1."""
    ranked = xp.where(visible, logits, -float("inf"))
    least = xp.kth_largest(ranked, min(top_k, ranked.shape[-1]))
    unknown, all_unknown = xp.isnan(ranked), xp.isnan(least)
    above = (ranked > least) | (unknown & ~all_unknown)
    equal = xp.where(all_unknown, unknown, ranked == least) & visible
    room = top_k - xp.total(above, -1, xp.int64)[..., None]
    keep = above | (equal & (xp.cumsum(xp.cast(equal, xp.int64), -1) <= room))
    slot = xp.cumsum(xp.cast(keep, xp.int64), -1) - 1
    index = xp.full((*logits.shape[:-1], top_k), -1, xp.int32, logits)
    *row, key = xp.nonzero(keep)
    index[(*row, slot[(*row, key)])] = xp.cast(key, xp.int32)
    return index
