"""The device kernels of the geometry: the channel scale of a sketch, and all that one pass over the keys yields.

They are compiled and run without fused operations, since what a code decodes to is defined rounding by rounding.
"""

from __future__ import annotations

import triton
import triton.language as tl

UNIT = tl.constexpr(2.0**-24)
CALIBRATION = tl.constexpr(64)  # as in geometry/sketch.py


@triton.jit
def place_of(tiles):
    """``(tile, head)`` of a program, tiles of a head first: one axis counts both, since the others of a grid end at 65,535."""
    return tl.program_id(0) % tiles, tl.program_id(0) // tiles


@triton.jit
def tanh(x):
    """``tanh x`` to a few units of the last place, of small numbers too."""
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)
    z = size * size
    series = size * (1.0 + z * (-1.0 / 3.0 + z * (2.0 / 15.0 + z * (-17.0 / 315.0 + z * (62.0 / 2835.0)))))
    size = tl.where(size < 0.3, series, (1.0 - e) / (1.0 + e))
    return tl.where(x < 0, -size, size)


@triton.jit
def cap_of(x, softcap):
    """``cap * tanh(x / cap)``."""
    return softcap * tanh(x / softcap)


@triton.jit
def is_finite(x):
    return (x.to(tl.int32, bitcast=True) & 0x7F800000) != 0x7F800000


@triton.jit
def norms(x):
    """Euclidean norms of the rows of ``x`` [n, d], before any rounding outward; they neither overflow nor lose small numbers."""
    top = tl.max(tl.abs(x), 1)
    exponent = (top.to(tl.int32, bitcast=True) >> 23) & 0xFF
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    # powers of two: the products are exact
    smaller = x * ((254 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]
    return tl.sqrt_rn(tl.sum(smaller * smaller, 1)) * (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def norms_above(x, outward: tl.constexpr):
    """At least the norms of the rows of ``x``. Roundings are relative, but for the smallest, which get two more."""
    norm = norms(x) * outward
    bumped = (norm.to(tl.int32, bitcast=True) + 2).to(tl.float32, bitcast=True)
    return tl.where((norm > 0) & (norm < 1e-36), bumped, norm)


@triton.jit
def half_above(x):
    """The smallest fp16 number that is at least ``x >= 0``."""
    near = tl.minimum(x, 65504.0).to(tl.float16)
    bumped = (near.to(tl.int16, bitcast=True) + 1).to(tl.float16, bitcast=True)
    return tl.where(near.to(tl.float32) < x, bumped, near)


@triton.jit
def load_rows(x_ptr, number, there, stride, channel_stride, dim: tl.constexpr, PADDED: tl.constexpr):
    """Rows as fp32 [n, PADDED], zero where they are not there and behind the last channel."""
    channel = tl.arange(0, PADDED)
    place = number.to(tl.int64)[:, None] * stride + channel.to(tl.int64)[None, :] * channel_stride
    return tl.load(x_ptr + place, there[:, None] & (channel < dim)[None, :], 0.0).to(tl.float32)


@triton.jit
def calibrate(
    key, mask, out, kv_heads, kv_len,
    key_b, key_h, key_m, key_d, mask_b, mask_m,
    dim: tl.constexpr, MASKED: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The channel scale of one head: the rms of each channel over the first ``CALIBRATION`` keys that take part."""
    batch, head = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    keys = key + batch.to(tl.int64) * key_b + head.to(tl.int64) * key_h
    masks = mask + batch.to(tl.int64) * mask_b
    row = tl.arange(0, ROWS)
    largest, counted, start = 0.0, 0, 0
    while (start < kv_len) & (counted < CALIBRATION):
        part = start + row < kv_len
        if MASKED:
            part = part & (tl.load(masks + (start + row).to(tl.int64) * mask_m, part, 0) != 0)
        # keys that are not finite count and are zeros, so that appending knows when the scale is settled
        first = part & (counted + tl.cumsum(part.to(tl.int32), 0) <= CALIBRATION)
        x = load_rows(keys, start + row, first, key_m, key_d, dim, PADDED)
        sound = tl.min(is_finite(x).to(tl.int32), 1) != 0
        largest = tl.maximum(largest, tl.max(tl.where(sound[:, None], tl.abs(x), 0.0)))
        counted += tl.sum(part.to(tl.int32), 0)
        start += ROWS
    largest = tl.where(largest > 0, largest, 1.0)
    total = tl.zeros((PADDED,), tl.float32)
    counted, start = 0, 0
    while (start < kv_len) & (counted < CALIBRATION):
        part = start + row < kv_len
        if MASKED:
            part = part & (tl.load(masks + (start + row).to(tl.int64) * mask_m, part, 0) != 0)
        first = part & (counted + tl.cumsum(part.to(tl.int32), 0) <= CALIBRATION)
        x = load_rows(keys, start + row, first, key_m, key_d, dim, PADDED)
        sound = tl.min(is_finite(x).to(tl.int32), 1) != 0
        y = tl.div_rn(tl.where(sound[:, None], x, 0.0), tl.zeros_like(x) + largest)
        total += tl.sum(y * y, 0)
        counted += tl.sum(part.to(tl.int32), 0)
        start += ROWS
    keys_counted = tl.minimum(tl.maximum(counted, 1), CALIBRATION).to(tl.float32)
    rms = tl.sqrt_rn(tl.div_rn(total, tl.zeros_like(total) + keys_counted))
    rms = tl.where(tl.max(rms, 0) > 0, rms, 1.0)
    channel = tl.arange(0, PADDED)
    scale = tl.maximum(rms, 0.0009765625) * largest
    tl.store(out + tl.program_id(0).to(tl.int64) * dim + channel, scale, channel < dim)


@triton.jit
def codes_at(quotient, HALF: tl.constexpr, LEVELS: tl.constexpr):
    """The levels, as floats, that quotients of whitened keys and steps fall on."""
    return tl.minimum(tl.maximum(tl.floor(quotient + (HALF + 0.5)), 0.0), LEVELS)


@triton.jit
def try_clip(
    white, peak, live, best, least, clip: tl.constexpr, HALF: tl.constexpr, LEVELS: tl.constexpr, FIRST: tl.constexpr = False
):
    """``(step, loss)`` of each key after one more clip was tried; the earlier one wins a tie."""
    step = tl.minimum(tl.div_rn(clip * peak, tl.zeros_like(peak) + HALF), 65504.0).to(tl.float16)
    wide = step.to(tl.float32)
    # what is compared needs no exact quotient: next to the border of two levels, both lose equally much
    inverse = 1.0 / tl.where(wide > 0, wide, 1.0)
    code = codes_at(white * inverse[:, None], HALF, LEVELS)
    lost = tl.where(live, (code - HALF) * wide[:, None] - white, 0.0)
    loss = tl.sum(lost * lost, 1)
    better = (loss < least) | FIRST
    return tl.where(better, step, best), tl.where(better, loss, least)


@triton.jit
def summarise(
    key, value, mask,
    count, finite, mean, key_norm, radius, low, high, value_mean, value_radius,
    channel_scale, planes, scale, error, metric_error,
    kv_heads, kv_len, blocks, plane_stride,
    key_b, key_h, key_m, key_d, value_b, value_h, value_m, value_d, mask_b, mask_m,
    clip0: tl.constexpr, clip1: tl.constexpr, clip2: tl.constexpr, clip3: tl.constexpr, clip4: tl.constexpr,
    dim: tl.constexpr, v_dim: tl.constexpr, block_size: tl.constexpr, MASKED: tl.constexpr, RADIUS: tl.constexpr,
    BOX: tl.constexpr, VALUE: tl.constexpr, STATISTICS: tl.constexpr, BITS: tl.constexpr, PADDED: tl.constexpr,
    V_PADDED: tl.constexpr, EACH: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """``BLOCKS`` blocks of one head, each padded to ``EACH`` rows: summaries if ``STATISTICS``, and the sketch of the keys."""
    ROWS: tl.constexpr = BLOCKS * EACH
    tile, line = place_of(tl.cdiv(blocks, BLOCKS))
    batch, head = line // kv_heads, line % kv_heads
    one = line.to(tl.int64)
    row = tl.arange(0, ROWS)
    number = (tile * BLOCKS + row // EACH) * block_size + row % EACH
    there = (row % EACH < block_size) & (number < kv_len)
    part = there
    if MASKED:
        part = there & (tl.load(mask + batch.to(tl.int64) * mask_b + number.to(tl.int64) * mask_m, there, 0) != 0)
    x = load_rows(key + batch.to(tl.int64) * key_b + head.to(tl.int64) * key_h, number, part, key_m, key_d, dim, PADDED)
    good = tl.min(is_finite(x).to(tl.int32), 1) != 0
    valid = part & good
    x = tl.where(valid[:, None], x, 0.0)

    channel = tl.arange(0, PADDED)
    if STATISTICS:
        block = tile * BLOCKS + tl.arange(0, BLOCKS)
        block_there = block < blocks
        at_block = one * blocks + block
        at_channel = at_block[:, None] * dim + channel[None, :]
        inside = block_there[:, None] & (channel < dim)[None, :]
        tl.store(count + at_block, tl.sum(part.to(tl.int32).reshape(BLOCKS, EACH), 1), block_there)
        sound = tl.sum(valid.to(tl.int32).reshape(BLOCKS, EACH), 1)
        n = tl.maximum(sound, 1).to(tl.float32)
        centre = tl.sum(x.reshape(BLOCKS, EACH, PADDED), 1)
        centre = tl.div_rn(centre, n[:, None] + tl.zeros_like(centre))
        outward: tl.constexpr = 1.0 + (dim + 8) * UNIT
        longest = tl.max(norms_above(x, outward).reshape(BLOCKS, EACH), 1)
        broken = tl.max((part & (good == 0)).to(tl.int32).reshape(BLOCKS, EACH), 1) != 0
        whole = (broken == 0) & is_finite(longest) & (tl.min(is_finite(centre).to(tl.int32), 1) != 0)
        centre = tl.where(whole[:, None], centre, 0.0)
        tl.store(finite + at_block, whole.to(tl.int8), block_there)
        tl.store(key_norm + at_block, longest, block_there)
        tl.store(mean + at_channel, centre, inside)
        if RADIUS:
            apart = x.reshape(BLOCKS, EACH, PADDED) - centre[:, None, :]
            apart = tl.where(valid[:, None], apart.reshape(ROWS, PADDED), 0.0)
            tl.store(radius + at_block, tl.max(norms_above(apart, outward).reshape(BLOCKS, EACH), 1), block_there)
        if BOX:
            least = tl.min(tl.where(valid[:, None], x, float("inf")).reshape(BLOCKS, EACH, PADDED), 1)
            greatest = tl.max(tl.where(valid[:, None], x, float("-inf")).reshape(BLOCKS, EACH, PADDED), 1)
            empty = (sound == 0)[:, None]
            tl.store(low + at_channel, tl.where(empty, 0.0, least), inside)
            tl.store(high + at_channel, tl.where(empty, 0.0, greatest), inside)
        if VALUE:
            v_channel = tl.arange(0, V_PADDED)
            values = value + batch.to(tl.int64) * value_b + head.to(tl.int64) * value_h
            v = load_rows(values, number, part, value_m, value_d, v_dim, V_PADDED)
            worthy = tl.min(is_finite(v).to(tl.int32), 1) != 0
            lost = tl.max((part & (worthy == 0)).to(tl.int32).reshape(BLOCKS, EACH), 1) != 0
            v = tl.where((valid & worthy)[:, None], v, 0.0)
            middle = tl.sum(v.reshape(BLOCKS, EACH, V_PADDED), 1)
            middle = tl.div_rn(middle, n[:, None] + tl.zeros_like(middle))
            away = tl.where(valid[:, None], (v.reshape(BLOCKS, EACH, V_PADDED) - middle[:, None, :]).reshape(ROWS, V_PADDED), 0.0)
            v_outward: tl.constexpr = 1.0 + (v_dim + 8) * UNIT
            spread = tl.max(norms_above(away, v_outward).reshape(BLOCKS, EACH), 1)
            v_inside = block_there[:, None] & (v_channel < v_dim)[None, :]
            tl.store(value_mean + at_block[:, None] * v_dim + v_channel[None, :], middle, v_inside)
            # no distance covers a value that is not a number
            tl.store(value_radius + at_block, tl.where(lost, float("inf"), spread), block_there)
    if BITS:
        LEVELS: tl.constexpr = 2**BITS - 1
        HALF: tl.constexpr = LEVELS / 2
        a = tl.load(channel_scale + one * dim + channel, channel < dim, 1.0)[None, :] + tl.zeros_like(x)
        white = tl.div_rn(x, a)
        live = (channel < dim)[None, :]
        peak = tl.max(tl.abs(white), 1)
        best, least_loss = tl.zeros((ROWS,), tl.float16), tl.full((ROWS,), float("inf"), tl.float32)
        best, least_loss = try_clip(white, peak, live, best, least_loss, clip0, HALF, LEVELS, True)
        best, least_loss = try_clip(white, peak, live, best, least_loss, clip1, HALF, LEVELS)
        if clip2 > 0:
            best, least_loss = try_clip(white, peak, live, best, least_loss, clip2, HALF, LEVELS)
            best, least_loss = try_clip(white, peak, live, best, least_loss, clip3, HALF, LEVELS)
        if clip4 > 0:
            best, least_loss = try_clip(white, peak, live, best, least_loss, clip4, HALF, LEVELS)
        wide = best.to(tl.float32)[:, None] + tl.zeros_like(white)
        code = codes_at(tl.div_rn(white, tl.where(wide > 0, wide, 1.0)), HALF, LEVELS)
        decoded = (code - HALF) * wide * a
        e = tl.where(valid[:, None] & live, x - decoded, 0.0)
        sketch_outward: tl.constexpr = 1.0 + (dim + 18) * UNIT
        at_key = one * kv_len + number
        tl.store(scale + at_key, best, there)
        tl.store(error + at_key, half_above(norms_above(e, sketch_outward)), there)
        tl.store(metric_error + at_key, half_above(norms_above(e / a, sketch_outward)), there)
        BYTES: tl.constexpr = PADDED // 8
        whole_code = tl.where(live, code, 0.0).to(tl.int32).reshape(ROWS, BYTES, 8)
        place = 7 - tl.arange(0, 8)  # the first channel is the highest bit
        byte = tl.arange(0, BYTES)
        at_byte = at_key[:, None] * ((dim + 7) // 8) + byte[None, :]
        byte_there = there[:, None] & (byte * 8 < dim)[None, :]
        for plane in tl.static_range(BITS):
            bit = (whole_code >> (BITS - 1 - plane)) & 1
            packed = tl.sum(bit << place[None, None, :], 2)
            tl.store(planes + plane * tl.cast(plane_stride, tl.int64) + at_byte, packed.to(tl.uint8), byte_there)
