"""Attention to single keys of each query (``Tokens``): rows gather their keys, and gradients of keys gather their rows.

What a query does not see of its list is taken out first, so that the kernels know lists alone. For the gradients of keys and
values the pairs are sorted by key; every key then sums its own pairs in their order: the same to the bit each time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sieve_attn import triton as door
from sieve_attn.attend.triton.launch import power_of_two
from sieve_attn.geometry.triton.kernels import cap_of, place_of
from sieve_attn.types import Call, Selection

ENTRIES = 4096  # keys times channels that a program holds at a time


@triton.jit
def gather(x, index, there, row_stride, channel_stride, dim: tl.constexpr, PADDED: tl.constexpr):
    """[rows, slots, PADDED] fp32"""
    channel = tl.arange(0, PADDED).to(tl.int64)
    at = index.to(tl.int64)[:, :, None] * row_stride + channel[None, None, :] * channel_stride
    return tl.load(x + at, there[:, :, None] & (channel < dim)[None, None, :], 0.0).to(tl.float32)


@triton.jit
def rows_of(x, row, there, row_stride, channel_stride, dim: tl.constexpr, PADDED: tl.constexpr):
    """[rows, PADDED] fp32"""
    channel = tl.arange(0, PADDED).to(tl.int64)
    at = row.to(tl.int64)[:, None] * row_stride + channel[None, :] * channel_stride
    return tl.load(x + at, there[:, None] & (channel < dim)[None, :], 0.0).to(tl.float32)


@triton.jit
def forward(
    query, key, value, index, bias, sink, out, lse, q_len, count, scale, softcap,
    q_b, q_h, q_m, q_d, key_b, key_h, key_m, key_d, value_b, value_h, value_m, value_d,
    heads: tl.constexpr, GROUP: tl.constexpr, dim: tl.constexpr, v_dim: tl.constexpr, BIASED: tl.constexpr, SINK: tl.constexpr,
    CAPPED: tl.constexpr, PADDED: tl.constexpr, V_PADDED: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    tile, line = place_of(tl.cdiv(q_len, ROWS))
    batch, head = line // heads, line % heads
    row = tile * ROWS + tl.arange(0, ROWS)
    there = row < q_len
    q = rows_of(query + batch.to(tl.int64) * q_b + head.to(tl.int64) * q_h, row, there, q_m, q_d, dim, PADDED)
    key += batch.to(tl.int64) * key_b + (head // GROUP).to(tl.int64) * key_h
    value += batch.to(tl.int64) * value_b + (head // GROUP).to(tl.int64) * value_h
    one = line.to(tl.int64) * q_len
    top, mass = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, V_PADDED), tl.float32)
    for first in range(0, count, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        at = (one + row)[:, None] * count + slot[None, :]
        inside = there[:, None] & (slot < count)[None, :]
        which = tl.load(index + at, inside, -1)
        kept = which >= 0
        k = gather(key, which, kept, key_m, key_d, dim, PADDED)
        logit = tl.sum(q[:, None, :] * k, 2) * scale
        if CAPPED:
            logit = cap_of(logit, softcap)
        if BIASED:
            logit += tl.load(bias + at, kept, 0.0)
        logit = tl.where(kept, logit, float("-inf"))
        higher = tl.maximum(top, tl.max(logit, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp(logit - base[:, None])
        shrink = tl.exp(top - base)
        v = gather(value, which, kept, value_m, value_d, v_dim, V_PADDED)
        mass = mass * shrink + tl.sum(weight, 1)
        # a weight of zero hides what is not a number
        share = tl.where(weight[:, :, None] == 0.0, 0.0, weight[:, :, None] * v)
        total = total * shrink[:, None] + tl.sum(share, 1)
        top = higher
    if SINK:
        extra = tl.load(sink + head)
        higher = tl.maximum(top, extra)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp(top - base)
        mass = mass * shrink + tl.exp(extra - base)
        total = total * shrink[:, None]
        top = higher
    found = mass > 0
    total = tl.where((mass == 0.0)[:, None], 0.0, total / tl.where(mass == 0.0, 1.0, mass)[:, None])
    channel = tl.arange(0, V_PADDED)
    place = (one + row)[:, None] * v_dim + channel[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), there[:, None] & (channel < v_dim)[None, :])
    tl.store(
        lse + one + row, tl.where(mass == 0.0, float("-inf"), top + tl.log(tl.where(found | (mass != mass), mass, 1.0))), there
    )


@triton.jit
def gradients(
    query, key, value, index, bias, pull, lse, shift, d_query, weights, slopes, d_bias, q_len, count, scale, softcap,
    q_b, q_h, q_m, q_d, key_b, key_h, key_m, key_d, value_b, value_h, value_m, value_d, pull_b, pull_h, pull_m, pull_d,
    heads: tl.constexpr, GROUP: tl.constexpr, dim: tl.constexpr, v_dim: tl.constexpr, BIASED: tl.constexpr, CAPPED: tl.constexpr,
    PADDED: tl.constexpr, V_PADDED: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Gradients of queries, and of every pair its weight and the slope of its logit."""
    tile, line = place_of(tl.cdiv(q_len, ROWS))
    batch, head = line // heads, line % heads
    row = tile * ROWS + tl.arange(0, ROWS)
    there = row < q_len
    q = rows_of(query + batch.to(tl.int64) * q_b + head.to(tl.int64) * q_h, row, there, q_m, q_d, dim, PADDED)
    g = rows_of(pull + batch.to(tl.int64) * pull_b + head.to(tl.int64) * pull_h, row, there, pull_m, pull_d, v_dim, V_PADDED)
    key += batch.to(tl.int64) * key_b + (head // GROUP).to(tl.int64) * key_h
    value += batch.to(tl.int64) * value_b + (head // GROUP).to(tl.int64) * value_h
    one = line.to(tl.int64) * q_len
    base = tl.load(lse + one + row, there, 0.0)
    base = tl.where(base == float("-inf"), 0.0, base)
    more = tl.load(shift + one + row, there, 0.0)
    total = tl.zeros((ROWS, PADDED), tl.float32)
    for first in range(0, count, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        at = (one + row)[:, None] * count + slot[None, :]
        inside = there[:, None] & (slot < count)[None, :]
        which = tl.load(index + at, inside, -1)
        kept = which >= 0
        k = gather(key, which, kept, key_m, key_d, dim, PADDED)
        logit = tl.sum(q[:, None, :] * k, 2) * scale
        slope = tl.full((ROWS, SLOTS), 1.0, tl.float32)
        if CAPPED:
            logit = cap_of(logit, softcap)
            slope = 1.0 - (logit / softcap) * (logit / softcap)
        if BIASED:
            logit += tl.load(bias + at, kept, 0.0)
        weight = tl.where(kept, tl.exp(logit - base[:, None]), 0.0)
        v = gather(value, which, kept, value_m, value_d, v_dim, V_PADDED)
        ahead = tl.where(kept, weight * (tl.sum(g[:, None, :] * v, 2) + more[:, None]), 0.0)
        if BIASED:
            tl.store(d_bias + at, ahead, inside)
        ahead = ahead * slope * scale
        tl.store(weights + at, weight, inside)
        tl.store(slopes + at, ahead, inside)
        total += tl.sum(ahead[:, :, None] * k, 1)
    channel = tl.arange(0, PADDED)
    place = (one + row)[:, None] * dim + channel[None, :]
    tl.store(d_query + place, total.to(d_query.dtype.element_ty), there[:, None] & (channel < dim)[None, :])


@triton.jit
def gradients_of_keys(
    query, pull, weights, slopes, pairs, ends, d_key, d_value, q_len, kv_len, count,
    q_b, q_h, q_m, q_d, pull_b, pull_h, pull_m, pull_d,
    kv_heads: tl.constexpr, GROUP: tl.constexpr, dim: tl.constexpr, v_dim: tl.constexpr, PADDED: tl.constexpr,
    V_PADDED: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """One key: the sums over its pairs, which lie between ``ends``; a pair is a place in [group, q_len, count]."""
    line = tl.program_id(0) // kv_len
    batch, kv = line // kv_heads, line % kv_heads
    one = line.to(tl.int64) * GROUP * q_len * count
    # a list of ends has one more than there are keys
    start = tl.load(ends + tl.program_id(0).to(tl.int64) + line)
    stop = tl.load(ends + tl.program_id(0).to(tl.int64) + line + 1)
    channel, v_channel = tl.arange(0, PADDED), tl.arange(0, V_PADDED)
    to_key, to_value = tl.zeros((PADDED,), tl.float32), tl.zeros((V_PADDED,), tl.float32)
    for first in range(start, stop, PAIRS):
        place = first + tl.arange(0, PAIRS)
        there = place < stop
        pair = tl.load(pairs + one + place, there, 0)
        row, head = pair // count % q_len, kv * GROUP + pair // (count * q_len)
        q_at = batch.to(tl.int64) * q_b + head * q_h + row * q_m
        q = tl.load(query + q_at[:, None] + channel.to(tl.int64)[None, :] * q_d, there[:, None] & (channel < dim)[None, :], 0.0)
        g_at = batch.to(tl.int64) * pull_b + head * pull_h + row * pull_m
        inside = there[:, None] & (v_channel < v_dim)[None, :]
        g = tl.load(pull + g_at[:, None] + v_channel.to(tl.int64)[None, :] * pull_d, inside, 0.0)
        slope, weight = tl.load(slopes + one + pair, there, 0.0), tl.load(weights + one + pair, there, 0.0)
        to_key += tl.sum(slope[:, None] * q.to(tl.float32), 0)
        to_value += tl.sum(weight[:, None] * g.to(tl.float32), 0)
    out = tl.program_id(0).to(tl.int64)
    tl.store(d_key + out * dim + channel, to_key.to(d_key.dtype.element_ty), channel < dim)
    tl.store(d_value + out * v_dim + v_channel, to_value.to(d_value.dtype.element_ty), v_channel < v_dim)


def in_order(index: Tensor, kv_len: int) -> Tensor:
    """Each row's keys in increasing order and then -1; a key that is named twice counts once."""
    ordered = torch.where(index < 0, kv_len, index).to(torch.int32).sort(-1).values
    again = torch.zeros_like(ordered, dtype=torch.bool)
    again[..., 1:] = ordered[..., 1:] == ordered[..., :-1]
    ordered = torch.where(again, kv_len, ordered).sort(-1).values
    return torch.where(ordered == kv_len, -1, ordered).to(torch.int32)


def lists_of(call: Call, selection: Selection) -> tuple[Tensor, Tensor | None]:
    """``(index [batch, q_heads, q_len, count] int32 of keys that the query sees, their bias in fp32)``."""
    batch, heads, q_len, _ = call.query.shape
    index = in_order(selection.parts[0].index, call.kv_len)
    index = index.repeat_interleave(heads // index.shape[1], 1) if index.shape[1] not in (1, heads) else index
    index = index.expand(batch, heads, *index.shape[2:])
    at = index.long().clamp_min(0)
    position = torch.arange(q_len, device=index.device)[:, None] + call.offset
    kept = index >= 0
    if call.causal:
        kept = kept & (at <= position)
    if call.window is not None:
        kept = kept & (at > position - call.window)
        kept = kept if call.causal else kept & (at < position + call.window)
    if call.cu_seqlens is not None:
        edges = call.cu_seqlens.to(index.device).contiguous()
        mine = torch.searchsorted(edges, torch.arange(q_len, device=index.device), right=True)[:, None]
        kept = kept & (torch.searchsorted(edges, at, right=True) == mine)
    if call.key_mask is not None:
        kept = kept & call.key_mask[:, None, None].expand(batch, heads, q_len, -1).gather(3, at)
    if call.mask is not None:
        kept = kept & call.mask.expand(batch, heads, q_len, call.kv_len).gather(3, at)
    bias = None
    if call.bias is not None:
        bias = call.bias.detach().float().expand(batch, heads, q_len, call.kv_len).gather(3, at).contiguous()
        kept = kept & (bias != -torch.inf)
        bias = torch.where(kept, bias, 0.0)
    return torch.where(kept, index, -1).contiguous(), bias


def _shape(call: Call) -> dict[str, int]:
    dim, v_dim = int(call.query.shape[3]), int(call.value.shape[3])
    padded, v_padded = power_of_two(dim), power_of_two(v_dim)
    slots = 16
    rows = max(1, ENTRIES // (slots * max(padded, v_padded)))
    return {"dim": dim, "v_dim": v_dim, "PADDED": padded, "V_PADDED": v_padded, "ROWS": rows, "SLOTS": slots}


def attend(call: Call, selection: Selection) -> tuple[Tensor, Tensor]:
    """``(output, lse)`` over the listed keys that a query sees."""
    query, key, value = (x.detach() for x in (call.query, call.key, call.value))
    batch, heads, q_len, _ = query.shape
    index, bias = lists_of(call, selection)
    output = torch.empty((batch, heads, q_len, value.shape[3]), dtype=query.dtype, device=query.device)
    lse = torch.empty((batch, heads, q_len), dtype=torch.float32, device=query.device)
    if output.shape[0] and q_len:
        shape = _shape(call)
        sink = lse if call.sink is None else call.sink.detach().float().contiguous()
        with door.launching_on(query):
            forward[(triton.cdiv(q_len, shape["ROWS"]) * batch * heads,)](
                query, key, value, index, lse if bias is None else bias, sink, output, lse, q_len, index.shape[3],
                float(call.scale), float(call.softcap or 1.0), *query.stride(), *key.stride(), *value.stride(), heads=heads,
                GROUP=heads // key.shape[1], BIASED=bias is not None, SINK=call.sink is not None, CAPPED=call.softcap is not None,
                **shape, num_warps=4, **door.PLAIN,
            )  # fmt: skip
    return output, lse


def backward(
    call: Call, selection: Selection, grad_output: Tensor, grad_lse: Tensor, output: Tensor, lse: Tensor
) -> dict[str, Tensor]:
    """Gradients of query, key and value, and of bias and sink where the call has them; see the reference."""
    query, key, value = (x.detach() for x in (call.query, call.key, call.value))
    batch, heads, q_len, _ = query.shape
    kv_heads, kv_len = key.shape[1:3]
    index, bias = lists_of(call, selection)
    count, group = int(index.shape[3]), heads // kv_heads
    d_lse = torch.where(lse == -torch.inf, 0.0, grad_lse.float())
    shift = (d_lse - (grad_output.float() * output.float()).sum(-1)).contiguous()
    lse = lse.contiguous()
    grads = {name: torch.empty(x.shape, dtype=x.dtype, device=x.device) for name, x in (("query", query), ("key", key))}
    grads["value"] = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    weights, slopes = (torch.empty(index.shape, dtype=torch.float32, device=query.device) for _ in range(2))
    d_bias = torch.empty_like(weights) if bias is not None else weights
    if batch and q_len:
        shape = _shape(call)
        with door.launching_on(query):
            gradients[(triton.cdiv(q_len, shape["ROWS"]) * batch * heads,)](
                query, key, value, index, lse if bias is None else bias, grad_output, lse, shift, grads["query"], weights, slopes,
                d_bias, q_len, count, float(call.scale), float(call.softcap or 1.0), *query.stride(), *key.stride(),
                *value.stride(), *grad_output.stride(), heads=heads, GROUP=group, BIASED=bias is not None,
                CAPPED=call.softcap is not None, **shape, num_warps=4, **door.PLAIN,
            )  # fmt: skip
            # pairs by key; those that are not there come last
            flat = torch.where(index < 0, kv_len, index).reshape(batch * kv_heads, -1)
            ordered, pairs = flat.sort(dim=1, stable=True)
            every = torch.arange(kv_len + 1, dtype=ordered.dtype, device=query.device).expand(batch * kv_heads, -1)
            ends = torch.searchsorted(ordered, every.contiguous())
            widths = {name: shape[name] for name in ("dim", "v_dim", "PADDED", "V_PADDED")}
            gradients_of_keys[(kv_len * batch * kv_heads,)](
                query, grad_output, weights, slopes, pairs, ends, grads["key"], grads["value"], q_len, kv_len, count,
                *query.stride(), *grad_output.stride(), kv_heads=kv_heads, GROUP=group, PAIRS=8, **widths, num_warps=2,
                **door.PLAIN,
            )  # fmt: skip
    if bias is not None:
        full = torch.zeros((batch, heads, q_len, kv_len + 1), dtype=torch.float32, device=query.device)
        full.scatter_(3, torch.where(index < 0, kv_len, index).long(), d_bias)
        grads["bias"] = full[..., :kv_len].sum_to_size(call.bias.shape).to(call.bias.dtype)
    if call.sink is not None:
        weight = torch.exp(call.sink.float()[None, :, None] - lse)
        grads["sink"] = (weight * shift).sum(-1).sum(0).to(call.sink.dtype)
    return grads
