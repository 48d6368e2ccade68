"""Scores on the device: estimates of units of queries against blocks, a chunk of units at a time."""

from __future__ import annotations

import triton
import triton.language as tl

from sieve_attn.geometry.triton.kernels import cap_of, is_finite, place_of
from sieve_attn.selection.triton.sight import interval, keys_between, looked_at, reach, tile_queries, unit_at

LOWEST = tl.constexpr(-1e30)
SKETCH, MEAN, BALL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # scorers


@triton.jit
def unpack(planes, plane_stride, place, there, byte_there, BITS: tl.constexpr, BYTES: tl.constexpr):
    """Codes [keys, 8 * BYTES] int32 of the first ``BITS`` planes; ``place`` [keys] is the first byte of a key in a plane.

    The bytes of up to four planes become one word, of which a multiplication gathers the four bits of a channel.
    """
    byte = tl.arange(0, BYTES)
    at, apart = planes + place[:, None] + byte[None, :], tl.cast(plane_stride, tl.int64)
    allowed = there[:, None] & byte_there[None, :]
    shift = 7 - tl.arange(0, 8)
    FIRST: tl.constexpr = BITS if BITS < 4 else 4
    word = tl.zeros((place.shape[0], BYTES), tl.uint32)
    for plane in tl.static_range(FIRST):
        word = word | (tl.load(at + plane * apart, allowed, 0).to(tl.uint32) << (24 - 8 * plane))
    bits = (word[:, :, None] >> shift[None, None, :].to(tl.uint32)) & 0x01010101
    code = (bits * 0x01020408) >> (24 + 4 - FIRST)
    if BITS > 4:
        REST: tl.constexpr = BITS - 4
        word = tl.zeros((place.shape[0], BYTES), tl.uint32)
        for plane in tl.static_range(REST):
            word = word | (tl.load(at + (4 + plane) * apart, allowed, 0).to(tl.uint32) << (24 - 8 * plane))
        bits = (word[:, :, None] >> shift[None, None, :].to(tl.uint32)) & 0x01010101
        code = (code << REST) | ((bits * 0x01020408) >> (24 + 4 - REST))
    return code.to(tl.int32).reshape(place.shape[0], 8 * BYTES)


@triton.jit
def expand(planes, codes, plane_stride, plane_b, plane_h, kv_heads, kv_len, dim: tl.constexpr, BITS: tl.constexpr,
           PADDED: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """The codes of one head less 2^(bits - 1), [kv_len, PADDED] int8: what many tiles read is unpacked once."""
    tile, line = place_of(tl.cdiv(kv_len, ROWS))
    number = tile * ROWS + tl.arange(0, ROWS)
    there = number < kv_len
    key = line.to(tl.int64) * kv_len + number
    planes += (line // kv_heads).to(tl.int64) * plane_b + (line % kv_heads).to(tl.int64) * plane_h
    byte_there = tl.arange(0, PADDED // 8) * 8 < dim
    code = unpack(planes, plane_stride, number.to(tl.int64) * ((dim + 7) // 8), there, byte_there, BITS, PADDED // 8)
    channel = tl.arange(0, PADDED)
    tl.store(codes + key[:, None] * PADDED + channel[None, :], (code - 2 ** (BITS - 1)).to(tl.int8), there[:, None])


@triton.jit
def log_sum(x):
    """``log(sum(exp(x)))`` over the last of three axes, -inf where all is."""
    top = tl.max(x, 2)
    base = tl.where((top > float("-inf")) & (top < float("inf")), top, 0.0)
    total = tl.sum(tl.exp(x - base[:, :, None]), 2)
    return tl.where(top == float("-inf"), top, base + tl.log(tl.where(total > 0, total, 1.0)))


@triton.jit
def prepared(
    query, there, query_at, q_d, channel_scale, dim: tl.constexpr, PADDED: tl.constexpr, SCORER: tl.constexpr,
    ROUNDED: tl.constexpr,
):  # fmt: skip
    """``(rows as scored, factor, sum or norm, sound)``: stretched by the channel scale and rounded to int8, or as they are."""
    channel = tl.arange(0, PADDED)
    inside = there[:, None] & (channel < dim)[None, :]
    x = tl.load(query + query_at[:, None] + channel.to(tl.int64)[None, :] * q_d, inside, 0.0).to(tl.float32)
    if SCORER == SKETCH:
        x = x * tl.load(channel_scale + channel, channel < dim, 0.0)[None, :]
    sound = tl.min(is_finite(x).to(tl.int32), 1) != 0
    x = tl.where(sound[:, None], x, 0.0)
    step = tl.full((query_at.shape[0],), 1.0, tl.float32)
    if ROUNDED:
        step = tl.div_rn(tl.maximum(tl.max(tl.abs(x), 1), 1e-30), step * 127.0)
        x = tl.floor(tl.div_rn(x, step[:, None] + tl.zeros_like(x)) + 0.5)
    extra = tl.sum(x, 1)
    if SCORER == BALL:
        extra = tl.sqrt_rn(tl.sum(x * x, 1)) * (1.0 + dim * 2.0**-23)
    return x.to(tl.int8) if ROUNDED else x, step, extra, sound


@triton.jit
def estimates(
    first, rows, factor, extra, sound, early, low, high, query_at,
    query, key, codes, planes, key_scale, mean, radius, count, part, before,
    q_d, key_m, key_d, part_m, plane_stride, kv_len, blocks, scale, softcap,
    dim: tl.constexpr, SCORER: tl.constexpr, ROUNDED: tl.constexpr, BITS: tl.constexpr, SKETCH_BITS: tl.constexpr,
    EXPANDED: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr, CAREFUL: tl.constexpr, SIZE: tl.constexpr,
    EACH: tl.constexpr, BLOCKS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Estimates [rows, BLOCKS] of the blocks from ``first`` on, -inf where a row sees nothing; pointers are of the KV head."""
    if SCORER == SKETCH:
        KEYS: tl.constexpr = BLOCKS * EACH
        column = tl.arange(0, KEYS)
        number = (first + column // EACH) * SIZE + column % EACH
        there = (column % EACH < SIZE) & (number < kv_len)
        taking = there
        if MASKED:
            taking = there & (tl.load(part + number.to(tl.int64) * part_m, there, 0) != 0)
        seen = taking[None, :] & (number[None, :] >= low[:, None]) & (number[None, :] < high[:, None])
        channel = tl.arange(0, PADDED)
        if EXPANDED:
            expanded = codes + number.to(tl.int64)[:, None] * PADDED + channel[None, :]
            code = tl.load(expanded, there[:, None], 0)
        else:
            byte_there = tl.arange(0, PADDED // 8) * 8 < dim
            place = number.to(tl.int64) * ((dim + 7) // 8)
            code = (unpack(planes, plane_stride, place, there, byte_there, BITS, PADDED // 8) - 2 ** (BITS - 1)).to(tl.int8)
        if ROUNDED:
            # levels are codes and a half: the product is whole but for half the sum of the query
            dots = tl.dot(rows, tl.trans(code)).to(tl.float32) + 0.5 * extra[:, None]
        else:
            dots = tl.dot(rows, tl.trans(code.to(tl.float32) + 0.5), input_precision="tf32x3")
        step = tl.load(key_scale + number, there, 0.0).to(tl.float32) * 2.0 ** (SKETCH_BITS - BITS)
        logits = dots * (factor * scale)[:, None] * step[None, :]
        if CAPPED:
            logits = cap_of(logits, softcap)
        estimate = log_sum(tl.where(seen, logits, float("-inf")).reshape(rows.shape[0], BLOCKS, EACH))
        estimate = tl.where(sound[:, None], estimate, LOWEST)
        if CAREFUL:
            # queries that come before a key which calibrated the sketch read the keys themselves
            some_early = tl.max(early.to(tl.int32), 0) != 0
            if some_early:
                inside = (channel < dim)[None, :]
                x = tl.load(query + query_at[:, None] + channel.to(tl.int64)[None, :] * q_d, early[:, None] & inside, 0.0)
                whole_keys = key + number.to(tl.int64)[:, None] * key_m + channel.to(tl.int64)[None, :] * key_d
                k = tl.load(whole_keys, there[:, None] & inside, 0.0)
                exact = tl.dot(x, tl.trans(k), input_precision="ieee") * scale
                if CAPPED:
                    exact = cap_of(exact, softcap)
                exact = log_sum(tl.where(seen, exact, float("-inf")).reshape(rows.shape[0], BLOCKS, EACH))
                estimate = tl.where(early[:, None], exact, estimate)
        some = tl.max(seen.to(tl.int32).reshape(rows.shape[0], BLOCKS, EACH), 2) != 0
    else:
        block = first + tl.arange(0, BLOCKS)
        channel = tl.arange(0, PADDED)
        inside = (block < blocks)[:, None] & (channel < dim)[None, :]
        centre = tl.load(mean + block.to(tl.int64)[:, None] * dim + channel[None, :], inside, 0.0)
        estimate = tl.dot(rows, tl.trans(centre), input_precision="tf32x3") * scale
        if SCORER == BALL:
            estimate += scale * extra[:, None] * tl.load(radius + block, block < blocks, 0.0)[None, :]
        if CAPPED:
            estimate = cap_of(estimate, softcap)
        if SCORER == MEAN:
            n = tl.load(count + block, block < blocks, 0)
            estimate += tl.log(tl.maximum(n, 1).to(tl.float32))[None, :]
        estimate = tl.where(sound[:, None], estimate, LOWEST)
        start, end = block * SIZE, tl.minimum(block * SIZE + SIZE, kv_len)
        left, right = tl.maximum(start[None, :], low[:, None]), tl.minimum(end[None, :], high[:, None])
        some = keys_between(before, left, right, MASKED) > 0
        # the summary of a block that is cut also tells of keys that the row does not see
        whole = (low[:, None] <= start[None, :]) & (end[None, :] <= high[:, None])
        estimate = tl.where(whole, estimate, LOWEST)
    estimate = tl.where(estimate == estimate, tl.maximum(estimate, LOWEST), LOWEST)
    return tl.where(some, estimate, float("-inf"))


@triton.jit
def is_early(query, there, low, high, calibrated, offset, kv_len):
    """Whether a query comes before a key which the channel scale of the sketch was measured on, and does not see the last one."""
    last = tl.minimum(calibrated, kv_len) - 1
    sees = (low <= last) & (last < high)
    return there & ((calibrated > kv_len) | ((query + offset < calibrated) & (sees == 0)))


@triton.jit(do_not_specialize=["first_unit", "q_len", "kv_len", "offset", "lead", "tiles", "blocks", "span", "calibration"])
def score(
    query, key, codes, planes, key_scale, channel_scale, mean, radius, count, part, before, edges, calibrated,
    estimate, top, total,
    first_unit, q_len, kv_len, offset, lead, tiles, blocks, span, calibration, window, scale, softcap,
    q_b, q_h, q_m, q_d, key_b, key_h, key_m, key_d, part_b, part_m, plane_stride, plane_b, plane_h,
    scale_b, scale_h, mean_b, mean_h, block_b, block_h,
    heads: tl.constexpr, GROUP: tl.constexpr, KV_EACH: tl.constexpr, dim: tl.constexpr, TILE: tl.constexpr, STRIDE: tl.constexpr,
    SLOTS: tl.constexpr, LANES: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr,
    MASKED: tl.constexpr, CAREFUL: tl.constexpr, SCORER: tl.constexpr, ROUNDED: tl.constexpr, BITS: tl.constexpr,
    SKETCH_BITS: tl.constexpr, EXPANDED: tl.constexpr, CAPPED: tl.constexpr, SIZE: tl.constexpr, EACH: tl.constexpr,
    BLOCKS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Estimates [units, rows, blocks] of some rows of one unit, and the mass of each row over ``span`` blocks."""
    unit = first_unit + tl.program_id(0)
    batch, head, tile = unit_at(unit, tiles, heads)
    kv = (head // KV_EACH).to(tl.int64)
    kv_heads = heads // KV_EACH
    one = (batch * kv_heads + kv).to(tl.int64)
    lane_query, lane_there = tile_queries(tile, q_len, lead, TILE, LANES)
    befores = before + batch.to(tl.int64) * (kv_len + 1)
    low, high = interval(lane_query, edges, q_len, kv_len, offset, window, CAUSAL, WINDOW, PACKED, lane_there)
    from_block, to_block = reach(low, high, lane_there, kv_len, SIZE)

    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    number, mine, there = looked_at(row, tile, q_len, lead, TILE, STRIDE, SLOTS, GROUP)
    low, high = interval(number, edges, q_len, kv_len, offset, window, CAUSAL, WINDOW, PACKED, there)
    query_at = batch.to(tl.int64) * q_b + (head * GROUP + mine).to(tl.int64) * q_h + number.to(tl.int64) * q_m
    rows, factor, extra, sound = prepared(query, there, query_at, q_d, channel_scale + one * dim, dim, PADDED, SCORER, ROUNDED)
    end = calibration
    if CAREFUL and MASKED:
        end = tl.load(calibrated + one)
    early = is_early(number, there, low, high, end, offset, kv_len)
    begin = tl.maximum(tl.program_id(2) * span, from_block // BLOCKS * BLOCKS)
    stop = tl.minimum((tl.program_id(2) + 1) * span, to_block)
    largest, mass = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    ROOM: tl.constexpr = ROWS
    out = (tl.program_id(0) * tl.num_programs(1) * ROOM + row).to(tl.int64)
    for first in range(begin, stop, BLOCKS):
        found = estimates(
            first, rows, factor, extra, sound, early, low, high, query_at,
            query, key + batch.to(tl.int64) * key_b + kv * key_h, codes + one * kv_len * PADDED,
            planes + batch.to(tl.int64) * plane_b + kv * plane_h, key_scale + batch.to(tl.int64) * scale_b + kv * scale_h,
            mean + batch.to(tl.int64) * mean_b + kv * mean_h, radius + batch.to(tl.int64) * block_b + kv * block_h,
            count + batch.to(tl.int64) * block_b + kv * block_h, part + batch.to(tl.int64) * part_b, befores,
            q_d, key_m, key_d, part_m, plane_stride, kv_len, blocks, scale, softcap,
            dim, SCORER, ROUNDED, BITS, SKETCH_BITS, EXPANDED, CAPPED, MASKED, CAREFUL, SIZE, EACH, BLOCKS, PADDED,
        )  # fmt: skip
        found = tl.where(there[:, None], found, float("-inf"))
        block = first + tl.arange(0, BLOCKS)
        tl.store(estimate + out[:, None] * blocks + block[None, :], found, (block < blocks)[None, :])
        higher = tl.maximum(largest, tl.max(found, 1))
        base = tl.where((higher > float("-inf")) & (higher < float("inf")), higher, 0.0)
        mass = mass * tl.exp(tl.minimum(largest - base, 0.0)) + tl.sum(tl.exp(found - base[:, None]), 1)
        largest = higher
    splits = tl.num_programs(2)
    tl.store(top + out * splits + tl.program_id(2), largest)
    tl.store(total + out * splits + tl.program_id(2), mass)
