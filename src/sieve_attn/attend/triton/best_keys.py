"""Exact top-k attention on the device: every row keeps its best keys so far while tiles of logits pass by.

A logit and the place of its key make one integer whose order is that of the rule: larger logits first, NaN above everything, the
earlier key where two are equal. No two are the same, so the choice does not depend on how keys are cut into tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sieve_attn import triton as door
from sieve_attn.attend import top_k as stage
from sieve_attn.attend.triton import tokens
from sieve_attn.selection.triton.launch import row_of, sequence_edges
from sieve_attn.selection.triton.sight import interval
from sieve_attn.types import Call, Selection, Tokens

MOST = 128  # keys of a row that fit the registers; more are chosen by array operations
ENTRIES = 2048  # logits of one program at a time
# Heads of all sequences in one launch: the second axis of a grid ends there. Counted along the first, with a division, they cost
# registers that full fp32 does not have.
MOST_LINES = 65_535


@triton.jit
def best_keys(
    query, key, part, mask, edges, index, counts, q_len, kv_len, offset, window, scale, top_k,
    q_b, q_h, q_m, q_d, key_b, key_h, key_m, key_d, part_b, part_m, mask_b, mask_h, mask_m, mask_n,
    heads: tl.constexpr, GROUP: tl.constexpr, dim: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    PACKED: tl.constexpr, KEY_MASKED: tl.constexpr, MASKED: tl.constexpr, PADDED: tl.constexpr, KEPT: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """``index`` [batch, q_heads, q_len, top_k]: the places of the largest logits, -1 where there are fewer, in no order."""
    LOWEST: tl.constexpr = -(2**63)
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < q_len
    low, high = interval(row, edges, q_len, kv_len, offset, window, CAUSAL, WINDOW, PACKED, there)
    channel = tl.arange(0, PADDED)
    at = (
        batch.to(tl.int64) * q_b + head.to(tl.int64) * q_h + row.to(tl.int64)[:, None] * q_m + channel.to(tl.int64)[None, :] * q_d
    )
    q = tl.load(query + at, there[:, None] & (channel < dim)[None, :], 0.0)
    key += batch.to(tl.int64) * key_b + (head // GROUP).to(tl.int64) * key_h
    part += batch.to(tl.int64) * part_b
    mask += batch.to(tl.int64) * mask_b + head.to(tl.int64) * mask_h
    slot = tl.arange(0, KEPT)
    # places that are one too many never are the worst
    best = tl.where(slot[None, :] < top_k, LOWEST, 2**63 - 1) + tl.zeros((ROWS, KEPT), tl.int64)
    seen_keys = tl.zeros((ROWS,), tl.int32)
    begin = tl.min(tl.where(there & (low < high), low, kv_len), 0) // KEYS * KEYS
    for first in range(begin, tl.max(tl.where(there, high, 0), 0), KEYS):
        number = first + tl.arange(0, KEYS)
        place = key + number.to(tl.int64)[:, None] * key_m + channel.to(tl.int64)[None, :] * key_d
        k = tl.load(place, (number < kv_len)[:, None] & (channel < dim)[None, :], 0.0)
        logit = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        seen = there[:, None] & (number[None, :] >= low[:, None]) & (number[None, :] < high[:, None])
        if KEY_MASKED:
            seen = seen & (tl.load(part + number.to(tl.int64) * part_m, number < kv_len, 0) != 0)[None, :]
        if MASKED:
            pair = mask + row.to(tl.int64)[:, None] * mask_m + number.to(tl.int64)[None, :] * mask_n
            seen = seen & (tl.load(pair, seen, 0) != 0)
        seen_keys += tl.sum(seen.to(tl.int32), 1)
        bits = (logit + 0.0).to(tl.int32, bitcast=True)
        order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        order = tl.where(logit == logit, order, 0x7FFFFFFF).to(tl.int64)
        order = tl.where(seen, (order << 32) | (0xFFFFFFFF - number.to(tl.int64))[None, :], LOWEST)
        # the best of the tile replaces the worst that is kept, for as long as some row gains by it
        largest, least = tl.max(order, 1), tl.min(best, 1)
        gains = tl.max((largest > least).to(tl.int32), 0)
        while gains != 0:
            worst = slot[None, :] == tl.argmin(best, 1)[:, None]
            best = tl.where(worst & (largest > least)[:, None], largest[:, None], best)
            order = tl.where(order == largest[:, None], LOWEST, order)
            largest, least = tl.max(order, 1), tl.min(best, 1)
            gains = tl.max((largest > least).to(tl.int32), 0)
    found = tl.where(best == LOWEST, -1, 0xFFFFFFFF - (best & 0xFFFFFFFF)).to(tl.int32)
    out = (tl.program_id(1).to(tl.int64) * q_len + row)[:, None] * top_k + slot[None, :]
    tl.store(index + out, found, there[:, None] & (slot < top_k)[None, :])
    tl.store(counts + tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0), tl.sum(seen_keys.to(tl.int64), 0))


def choose(call: Call, top_k: int) -> tuple[Tensor, Tensor]:
    """As the reference's ``choose``: ``(index, counts)``, chosen keys in increasing order and then -1."""
    query, key = call.query.detach(), call.key.detach()
    batch, heads, q_len, dim = query.shape
    kept = max(2, triton.next_power_of_2(top_k))
    keys = 64
    rows = max(16, min(64, ENTRIES // max(keys, kept)))
    tiles = triton.cdiv(q_len, rows)
    index = torch.empty((batch, heads, q_len, top_k), dtype=torch.int32, device=query.device)
    partial = torch.zeros((batch, heads, max(tiles, 1)), dtype=torch.int64, device=query.device)
    nothing = row_of(query.device)
    part = nothing if call.key_mask is None else call.key_mask.view(torch.uint8)
    mask = nothing if call.mask is None else call.mask.expand(batch, heads, q_len, call.kv_len).view(torch.uint8)
    edges = sequence_edges(call) if call.cu_seqlens is not None else nothing
    each = max(1, MOST_LINES // heads)

    def cut(x: Tensor, first: int) -> Tensor:
        return x if batch <= each else x[first : first + each]

    for first in range(0, batch if index.numel() else 0, each):
        with door.launching_on(query):
            best_keys[(tiles, min(each, batch - first) * heads)](
                cut(query, first), cut(key, first), part if call.key_mask is None else cut(part, first),
                mask if call.mask is None else cut(mask, first), edges, cut(index, first), cut(partial, first), q_len,
                call.kv_len, call.offset, call.window or 0, float(call.scale), top_k, *query.stride(), *key.stride(),
                *((0, 0) if call.key_mask is None else part.stride()), *((0,) * 4 if call.mask is None else mask.stride()),
                heads=heads, GROUP=heads // key.shape[1], dim=dim, CAUSAL=bool(call.causal), WINDOW=call.window is not None,
                PACKED=call.cu_seqlens is not None, KEY_MASKED=call.key_mask is not None, MASKED=call.mask is not None,
                PADDED=max(16, triton.next_power_of_2(dim)), KEPT=kept, ROWS=rows, KEYS=keys, num_warps=4, num_stages=2,
                **door.PLAIN,
            )  # fmt: skip
    return tokens.in_order(index, call.kv_len), partial.sum(-1)[..., None].expand(batch, heads, 2).contiguous()


def top_k(call: Call, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`sieve_attn.attend.top_k.attend`."""
    index, counts = (choose if count <= MOST else stage.choose)(call, count)
    output, lse = tokens.attend(call, Selection((Tokens(index, call.kv_len),)))
    return output, lse, index, counts
