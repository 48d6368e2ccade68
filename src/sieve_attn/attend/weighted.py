"""Weights times values, where what has no weight has no part: not even as a NaN."""

from __future__ import annotations

import math
from typing import Any

Array = Any


def weighted(xp: Any, weight: Array, value: Array) -> Array:
    """``weight`` [batch, q_heads, rows, n] times ``value`` [batch, kv_heads, n, v_dim]: [batch, q_heads, rows, v_dim].

    A weight of exactly zero hides even a NaN or an infinity.
    """
    shape = (*weight.shape[:3], value.shape[-1])
    flat = weight.reshape(weight.shape[0], value.shape[1], -1, weight.shape[-1])
    good = xp.isfinite(value)
    if bool(good.all()):
        return (flat @ value).reshape(shape)
    out = flat @ xp.where(good, value, 0.0)
    touched = xp.cast(flat != 0, value.dtype)
    for kind, mark in ((xp.isnan(value), math.nan), (value == math.inf, math.inf), (value == -math.inf, -math.inf)):
        hits = touched @ xp.cast(kind, value.dtype)
        out = xp.where(hits > 0, out + mark, out)
    return out.reshape(shape)


def finite_only(xp: Any, x: Array) -> Array:
    """``x`` with zeros for what is not finite: as a factor of gradients that are zero there."""
    return xp.where(xp.isfinite(x), x, 0.0)
