"""Attention at fixed offsets on the device: a tile of rows goes over a list of offsets, each a run of consecutive keys.

The first ``prefix`` keys are a few dense columns; offset ``s`` is there for rows whose key, ``position - s``, lies behind them.
Keys gather their gradients along the same diagonals, a KV head at a time: no two programs write to one place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sieve_attn import triton as door
from sieve_attn.attend.triton.launch import power_of_two
from sieve_attn.attend.triton.tokens import rows_of
from sieve_attn.geometry.triton.kernels import place_of

ENTRIES = 2048  # rows times channels of one program
MOST_ROWS = 64


@triton.jit
def meet(top, mass, total, logit, seen, v):
    """One key a row into the running softmax: ``logit`` [rows], ``v`` [rows, channels]."""
    logit = tl.where(seen, logit, float("-inf"))
    higher = tl.maximum(top, logit)
    base = tl.where(higher == float("-inf"), 0.0, higher)
    weight, shrink = tl.exp(logit - base), tl.exp(top - base)
    # a weight of zero hides what is not a number
    share = tl.where(weight[:, None] == 0.0, 0.0, weight[:, None] * v)
    return higher, mass * shrink + weight, total * shrink[:, None] + share


@triton.jit
def forward(
    query, key, value, offsets, out, lse, q_len, kv_len, count, prefix, scale,
    q_b, q_h, q_m, q_d, key_b, key_h, key_m, key_d, value_b, value_h, value_m, value_d,
    heads: tl.constexpr, GROUP: tl.constexpr, dim: tl.constexpr, v_dim: tl.constexpr, PADDED: tl.constexpr,
    V_PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    tile, line = place_of(tl.cdiv(q_len, ROWS))
    batch, head = line // heads, line % heads
    row = tile * ROWS + tl.arange(0, ROWS)
    there = row < q_len
    position = row + (kv_len - q_len)
    q = rows_of(query + batch.to(tl.int64) * q_b + head.to(tl.int64) * q_h, row, there, q_m, q_d, dim, PADDED)
    key += batch.to(tl.int64) * key_b + (head // GROUP).to(tl.int64) * key_h
    value += batch.to(tl.int64) * value_b + (head // GROUP).to(tl.int64) * value_h
    top, mass = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, V_PADDED), tl.float32)
    last = tl.max(tl.where(there, position, -1), 0)
    for place in range(0, tl.minimum(prefix, last + 1)):
        seen = there & (position >= place)
        number = tl.zeros_like(row) + place
        k = rows_of(key, number, seen, key_m, key_d, dim, PADDED)
        v = rows_of(value, number, seen, value_m, value_d, v_dim, V_PADDED)
        top, mass, total = meet(top, mass, total, tl.sum(q * k, 1) * scale, seen, v)
    for which in range(0, count):
        number = position - tl.load(offsets + which).to(tl.int32)
        seen = there & (number >= prefix)
        k = rows_of(key, number, seen, key_m, key_d, dim, PADDED)
        v = rows_of(value, number, seen, value_m, value_d, v_dim, V_PADDED)
        top, mass, total = meet(top, mass, total, tl.sum(q * k, 1) * scale, seen, v)
    none = mass == 0.0
    total = tl.where(none[:, None], 0.0, total / tl.where(none, 1.0, mass)[:, None])
    channel = tl.arange(0, V_PADDED)
    one = line.to(tl.int64) * q_len
    at = (one + row)[:, None] * v_dim + channel[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), there[:, None] & (channel < v_dim)[None, :])
    tl.store(lse + one + row, tl.where(none, float("-inf"), top + tl.log(tl.where(none, 1.0, mass))), there)


@triton.jit
def slope_of(q, k, g, v, base, more, seen, scale):
    """``(weight, slope of the logit)`` of one pair a row."""
    weight = tl.where(seen, tl.exp(tl.sum(q * k, 1) * scale - base), 0.0)
    return weight, tl.where(seen, weight * (tl.sum(g * v, 1) + more) * scale, 0.0)


@triton.jit
def gradient_of_queries(
    query, key, value, offsets, pull, lse, shift, d_query, q_len, kv_len, count, prefix, scale,
    q_b, q_h, q_m, q_d, key_b, key_h, key_m, key_d, value_b, value_h, value_m, value_d, pull_b, pull_h, pull_m, pull_d,
    heads: tl.constexpr, GROUP: tl.constexpr, dim: tl.constexpr, v_dim: tl.constexpr, PADDED: tl.constexpr,
    V_PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    tile, line = place_of(tl.cdiv(q_len, ROWS))
    batch, head = line // heads, line % heads
    row = tile * ROWS + tl.arange(0, ROWS)
    there = row < q_len
    position = row + (kv_len - q_len)
    q = rows_of(query + batch.to(tl.int64) * q_b + head.to(tl.int64) * q_h, row, there, q_m, q_d, dim, PADDED)
    g = rows_of(pull + batch.to(tl.int64) * pull_b + head.to(tl.int64) * pull_h, row, there, pull_m, pull_d, v_dim, V_PADDED)
    key += batch.to(tl.int64) * key_b + (head // GROUP).to(tl.int64) * key_h
    value += batch.to(tl.int64) * value_b + (head // GROUP).to(tl.int64) * value_h
    one = line.to(tl.int64) * q_len
    base, more = tl.load(lse + one + row, there, 0.0), tl.load(shift + one + row, there, 0.0)
    base = tl.where(base == float("-inf"), 0.0, base)
    total = tl.zeros((ROWS, PADDED), tl.float32)
    last = tl.max(tl.where(there, position, -1), 0)
    for place in range(0, tl.minimum(prefix, last + 1)):
        seen = there & (position >= place)
        number = tl.zeros_like(row) + place
        k = rows_of(key, number, seen, key_m, key_d, dim, PADDED)
        v = rows_of(value, number, seen, value_m, value_d, v_dim, V_PADDED)
        total += slope_of(q, k, g, v, base, more, seen, scale)[1][:, None] * k
    for which in range(0, count):
        number = position - tl.load(offsets + which).to(tl.int32)
        seen = there & (number >= prefix)
        k = rows_of(key, number, seen, key_m, key_d, dim, PADDED)
        v = rows_of(value, number, seen, value_m, value_d, v_dim, V_PADDED)
        total += slope_of(q, k, g, v, base, more, seen, scale)[1][:, None] * k
    channel = tl.arange(0, PADDED)
    at = (one + row)[:, None] * dim + channel[None, :]
    tl.store(d_query + at, total.to(d_query.dtype.element_ty), there[:, None] & (channel < dim)[None, :])


@triton.jit
def gradients_of_keys(
    query, key, value, offsets, pull, lse, shift, d_key, d_value, q_len, kv_len, count, prefix, scale,
    q_b, q_h, q_m, q_d, key_b, key_h, key_m, key_d, value_b, value_h, value_m, value_d, pull_b, pull_h, pull_m, pull_d,
    kv_heads: tl.constexpr, GROUP: tl.constexpr, dim: tl.constexpr, v_dim: tl.constexpr, PADDED: tl.constexpr,
    V_PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Keys behind the prefix meet one query an offset; the keys of the prefix meet every query from their place on."""
    tile, line = place_of(tl.cdiv(kv_len, ROWS))
    batch, kv = line // kv_heads, line % kv_heads
    number = tile * ROWS + tl.arange(0, ROWS)
    there = number < kv_len
    k = rows_of(key + batch.to(tl.int64) * key_b + kv.to(tl.int64) * key_h, number, there, key_m, key_d, dim, PADDED)
    v = rows_of(
        value + batch.to(tl.int64) * value_b + kv.to(tl.int64) * value_h, number, there, value_m, value_d, v_dim, V_PADDED
    )
    to_key, to_value = tl.zeros((ROWS, PADDED), tl.float32), tl.zeros((ROWS, V_PADDED), tl.float32)
    first_position = kv_len - q_len
    in_prefix = there & (number < prefix)
    for mine in range(0, GROUP):
        head = kv * GROUP + mine
        one = (batch * kv_heads * GROUP + head).to(tl.int64) * q_len
        queries = query + batch.to(tl.int64) * q_b + head.to(tl.int64) * q_h
        pulls = pull + batch.to(tl.int64) * pull_b + head.to(tl.int64) * pull_h
        for which in range(0, count):
            row = number + tl.load(offsets + which).to(tl.int32) - first_position
            seen = there & (number >= prefix) & (row >= 0) & (row < q_len)
            q = rows_of(queries, row, seen, q_m, q_d, dim, PADDED)
            g = rows_of(pulls, row, seen, pull_m, pull_d, v_dim, V_PADDED)
            base, more = tl.load(lse + one + row, seen, 0.0), tl.load(shift + one + row, seen, 0.0)
            weight, slope = slope_of(q, k, g, v, base, more, seen, scale)
            to_key += slope[:, None] * q
            to_value += weight[:, None] * g
        some = tl.max(in_prefix.to(tl.int32), 0)
        if some != 0:
            for i in range(0, q_len):
                row = tl.zeros_like(number) + i
                seen = in_prefix & (number <= first_position + i)
                q = rows_of(queries, row, seen, q_m, q_d, dim, PADDED)
                g = rows_of(pulls, row, seen, pull_m, pull_d, v_dim, V_PADDED)
                base, more = tl.load(lse + one + row, seen, 0.0), tl.load(shift + one + row, seen, 0.0)
                weight, slope = slope_of(q, k, g, v, base, more, seen, scale)
                to_key += slope[:, None] * q
                to_value += weight[:, None] * g
    one = line.to(tl.int64) * kv_len
    channel, v_channel = tl.arange(0, PADDED), tl.arange(0, V_PADDED)
    at = (one + number)[:, None] * dim + channel[None, :]
    tl.store(d_key + at, to_key.to(d_key.dtype.element_ty), there[:, None] & (channel < dim)[None, :])
    at = (one + number)[:, None] * v_dim + v_channel[None, :]
    tl.store(d_value + at, to_value.to(d_value.dtype.element_ty), there[:, None] & (v_channel < v_dim)[None, :])


def _shape(query: Tensor, value: Tensor) -> dict[str, int]:
    dim, v_dim = int(query.shape[3]), int(value.shape[3])
    padded, v_padded = power_of_two(dim), power_of_two(v_dim)
    rows = max(1, min(MOST_ROWS, ENTRIES // max(padded, v_padded)))
    return {"dim": dim, "v_dim": v_dim, "PADDED": padded, "V_PADDED": v_padded, "ROWS": rows}


def within(offsets: Tensor, kv_len: int) -> int:
    """How many of the increasing ``offsets``, which live on the host, are below ``kv_len``."""
    return int(torch.searchsorted(offsets, torch.tensor(kv_len)))


def attend(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, prefix: int, scale: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """``(output, lse)``; ``offsets`` increasing from 0 on, on the host. The output is in the query's dtype, or in ``dtype``."""
    query, key, value = query.detach(), key.detach(), value.detach()
    batch, heads, q_len, _ = query.shape
    output = torch.empty((batch, heads, q_len, value.shape[3]), dtype=dtype or query.dtype, device=query.device)
    lse = torch.empty((batch, heads, q_len), dtype=torch.float32, device=query.device)
    if batch and q_len:
        shape, count = _shape(query, value), within(offsets, key.shape[2])
        with door.launching_on(query):
            forward[(triton.cdiv(q_len, shape["ROWS"]) * batch * heads,)](
                query, key, value, on_device(offsets, query), output, lse, q_len, key.shape[2], count, prefix, float(scale),
                *query.stride(), *key.stride(), *value.stride(), heads=heads, GROUP=heads // key.shape[1], **shape,
                num_warps=4, **door.PLAIN,
            )  # fmt: skip
    return output, lse


def backward(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, prefix: int, scale: float, grad_output: Tensor, grad_lse: Tensor,
    output: Tensor, lse: Tensor, dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key and value, in their dtype or in ``dtype``."""
    query, key, value = query.detach(), key.detach(), value.detach()
    batch, heads, q_len, _ = query.shape
    kv_heads, kv_len = key.shape[1:3]
    d_lse = torch.where(lse == -torch.inf, 0.0, grad_lse.float())
    shift = (d_lse - (grad_output.float() * output.float()).sum(-1)).contiguous()
    grads = tuple(torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device) for x in (query, key, value))
    if batch and q_len:
        shape, count, group = _shape(query, value), within(offsets, kv_len), heads // kv_heads
        given = (query, key, value, on_device(offsets, query), grad_output, lse.contiguous(), shift)
        sizes = (q_len, kv_len, count, prefix, float(scale))
        strides = (*query.stride(), *key.stride(), *value.stride(), *grad_output.stride())
        with door.launching_on(query):
            gradient_of_queries[(triton.cdiv(q_len, shape["ROWS"]) * batch * heads,)](
                *given, grads[0], *sizes, *strides, heads=heads, GROUP=group, **shape, num_warps=4, **door.PLAIN
            )
            gradients_of_keys[(triton.cdiv(kv_len, shape["ROWS"]) * batch * kv_heads,)](
                *given, *grads[1:], *sizes, *strides, kv_heads=kv_heads, GROUP=group, **shape, num_warps=8, **door.PLAIN
            )
    else:
        for x in grads:
            x.zero_()
    return grads


_HELD: dict[tuple, tuple[Tensor, Tensor]] = {}  # offsets by host array and device: copied once, and alive with their copy


def on_device(offsets: Tensor, like: Tensor) -> Tensor:
    """``offsets`` beside ``like``, copied once."""
    if like.device.type == "cpu":
        return offsets
    at = (id(offsets), str(like.device))
    if at not in _HELD:
        if len(_HELD) >= 64:
            _HELD.pop(next(iter(_HELD)))
        _HELD[at] = (offsets, offsets.to(like.device))
    return _HELD[at][1]
