"""Backward: dQ over the selection, dK and dV over the selection turned round. Nothing is added up by atomics.

With ``P = exp(S - lse)``: ``dV = P^T dO``, ``dS = P (dO V^T + shift)``, ``shift = dlse - rowsum(dO O)``, ``dQ = scale dS K`` and
``dK = scale dS^T Q``, ``dS`` taken before the cap. Each program owns what it writes: rows of queries for dQ, a block of keys of
one KV head (all query heads of its group) for dK and dV, so every sum has one order and a dropped pair costs nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sieve_attn.attend.triton.tiles import (
    LOG2E,
    along,
    biased,
    capped,
    cells,
    cut_columns,
    cut_tiles,
    finite,
    in_order,
    interval,
    keys_of,
    lanes_of,
    load_rows,
    places,
    row_places,
    rows_of,
    store_rows,
    visible,
    walk_of,
)


@triton.jit(do_not_specialize=["q_len", "rows"])
def shift_kernel(
    grad, out, lse, grad_lse, shift, rows, q_heads, q_len, V_DIM: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr
):
    """``shift = dlse - rowsum(dO * O)`` [batch, q_heads, q_len]; a row that saw nothing has a constant lse."""
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = at < rows
    row = at % q_len
    head = at // q_len % q_heads
    batch = at // q_len // q_heads
    given = load_rows(grad.ptr, batch * grad.batch + head * grad.head + row * grad.row, there, grad.col, V_DIM, BLOCK_V, True)
    made = load_rows(out.ptr, batch * out.batch + head * out.head + row * out.row, there, out.col, V_DIM, BLOCK_V, True)
    total = tl.load(grad_lse.ptr + batch * grad_lse.batch + head * grad_lse.head + row * grad_lse.row, mask=there, other=0.0)
    empty = tl.load(lse + at, mask=there, other=0.0) == float("-inf")
    total = tl.where(empty, 0.0, total.to(tl.float32))
    tl.store(shift + at, total - tl.sum(given.to(tl.float32) * made.to(tl.float32), 1), mask=there)


@triton.jit
def weight_of(logit, log, AXIS: tl.constexpr):
    """``exp(logit - lse)``, at most one: both are rounded, and the difference is taken before anything scales it."""
    below = logit - along(log, AXIS)
    return tl.exp2(tl.minimum(below, 0.0, propagate_nan=tl.PropagateNan.ALL) * LOG2E)


@triton.jit
def slopes(product, log, shift, pull, scale, softcap, AXIS: tl.constexpr):
    """``(weight, dS before the bias, dS before the cap)`` of pairs that are all seen; rows lie along ``AXIS``."""
    logit = capped(product, scale, softcap)
    weight = weight_of(logit, log, AXIS)
    slope = weight * (pull + along(shift, AXIS))
    inner = slope
    if softcap is not None:
        part = logit / softcap
        inner = slope * (1.0 - part * part)
    return weight, slope, inner


@triton.jit
def cut_slopes(
    product, log, shift, pull, scale, softcap, seen, batch, head, row, key, bias, AXIS: tl.constexpr, WIDE: tl.constexpr
):
    """The same where pairs may be hidden: they get exactly zero, not even a NaN."""
    raw = capped(product, scale, softcap)
    logit, seen = biased(raw, seen, batch, head, row, key, bias, AXIS, WIDE)
    weight = tl.where(seen, weight_of(logit, log, AXIS), 0.0)
    slope = tl.where(seen, weight * (pull + along(shift, AXIS)), 0.0)
    inner = slope
    if softcap is not None:
        part = raw / softcap
        inner = tl.where(seen, slope * (1.0 - part * part), 0.0)
    return weight, slope, inner, seen


@triton.jit
def rows_and_gradients(
    query, grad, lse, shift, batch, first_head, head, row, there, q_heads, q_len,
    DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``(queries, output gradients, lse, shift)`` of the rows of a tile.

    An lse of +inf gives weights of zero: where there is no row, and where it saw nothing.
    """
    base, offset = row_places(head, row, there, batch, first_head, query, WIDE)
    rows = load_rows(base, offset, there, query.col, DIM, BLOCK_D, True)
    base, offset = row_places(head, row, there, batch, first_head, grad, WIDE)
    given = load_rows(base, offset, there, grad.col, V_DIM, BLOCK_V, True)
    start = (tl.cast(batch, tl.int64) * q_heads + first_head) * q_len
    at = (head - first_head) * q_len + row
    log = tl.load(lse + start + at, mask=there, other=float("inf"))
    log = tl.where(log == float("-inf"), float("inf"), log)
    return rows, given, log, tl.load(shift + start + at, mask=there, other=0.0)


@triton.jit(do_not_specialize=["q_len", "kv_len", "tiles", "chosen_heads", "first_batch", "first_pack"])
def query_kernel(
    query, key, value, grad, lse, shift, grad_query, grad_bias, row_sums, mask, bias, key_mask, sight, chosen,
    scale, softcap, q_heads, kv_heads, chosen_heads, q_len, kv_len, tiles, pieces, packs, first_batch, first_pack,
    DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr,
    PACK: tl.constexpr, BLOCK_N: tl.constexpr, Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr, CAUSAL: tl.constexpr,
    RANGES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``grad_query`` of a tile of rows; ``grad_bias`` where it differs by row and key, ``row_sums`` where it differs by row.

    A launch takes ``packs`` packs from ``first_pack`` of the sequences from ``first_batch`` on, so that launches one after
    another may add to a bias that heads or sequences share.
    """
    LISTED: tl.constexpr = RANGES == 0
    EVERYWHERE: tl.constexpr = (mask is not None) or (bias is not None) or (key_mask is not None) or (chosen.row_mask is not None)
    batch, kv_head, tile, piece, head, lane, row, row_there = rows_of(
        tl.program_id(0), tiles, pieces, packs, q_heads, kv_heads, q_len, chosen, first_batch, first_pack, Q_BLOCK, ROWS, PACK
    )
    first_head = kv_head * (q_heads // kv_heads)
    safe_head = tl.where(row_there, head, first_head)
    rows, given, log, moved = rows_and_gradients(
        query, grad, lse, shift, batch, first_head, head, row, row_there, q_heads, q_len, DIM, V_DIM, BLOCK_D, BLOCK_V, WIDE
    )
    total = tl.zeros([ROWS * PACK, BLOCK_D], tl.float32)
    sums = tl.zeros([ROWS * PACK], tl.float32)
    for turn in tl.static_range(2 if RANGES == 3 else 1):
        SECTION: tl.constexpr = turn + 1 if RANGES == 3 else RANGES
        start, low, high, low_first, high_last, a, b, c, d, _sound = walk_of(
            batch, kv_head, tile, piece, head, row, row_there, q_len, kv_len, q_heads, chosen_heads, sight, chosen,
            Q_BLOCK, ROWS, KV_BLOCK, CAUSAL, LISTED, SECTION, EVERYWHERE,
        )  # fmt: skip
        index = chosen.block_index
        if LISTED:
            index += start
        whole = (c - b) * KV_BLOCK // BLOCK_N
        if not EVERYWHERE:
            for step in tl.range(0, whole):
                found, _entry, _there = keys_of(b * KV_BLOCK + step * BLOCK_N, 0, index, BLOCK_N, KV_BLOCK, LISTED, True)
                base, offset = places(found, batch, kv_head, key, None, 0, WIDE)
                keys = load_rows(base, offset, found, key.col, DIM, BLOCK_D, False)
                base, offset = places(found, batch, kv_head, value, None, 0, WIDE)
                values = load_rows(base, offset, found, value.col, V_DIM, BLOCK_V, False)
                product = tl.dot(rows, tl.trans(keys), input_precision="ieee")
                pull = tl.dot(given, tl.trans(values), input_precision="ieee")
                _weight, _slope, slope = slopes(product, log, moved, pull, scale, softcap, 0)
                total = tl.dot(slope.to(keys.dtype), keys, total, input_precision="ieee")
        for step in tl.range(0, cut_tiles(a, b, d, whole, BLOCK_N, KV_BLOCK), num_stages=None if EVERYWHERE else 1):
            found, entry, there = cut_columns(step, a, b, d, whole, index, low_first, high_last, BLOCK_N, KV_BLOCK, LISTED)
            # a key that is no number shows in the lse of the rows that see it; others must not meet it
            base, offset = places(found, batch, kv_head, key, None, 0, WIDE)
            keys = load_rows(base, offset, there, key.col, DIM, BLOCK_D, True)
            if not EVERYWHERE:
                # and where their lse is a number all the same, its logit was -inf: no weight (0 * inf is no number)
                there &= tl.sum(keys.to(tl.float32) * 0.0, 1) == 0.0
            keys = finite(keys)
            base, offset = places(found, batch, kv_head, value, None, 0, WIDE)
            values = finite(load_rows(base, offset, there, value.col, V_DIM, BLOCK_V, True))
            seen = visible(
                batch, safe_head, row, lane, row_there, low, high, found, start + entry, there, chosen, mask, key_mask,
                Q_BLOCK, 0, WIDE,
            )  # fmt: skip
            product = tl.dot(rows, tl.trans(keys), input_precision="ieee")
            pull = tl.dot(given, tl.trans(values), input_precision="ieee")
            _weight, slope, inner, seen = cut_slopes(
                product, log, moved, pull, scale, softcap, seen, batch, safe_head, row, found, bias, 0, WIDE
            )
            if row_sums is not None:
                sums += tl.sum(slope, 1)
            if grad_bias is not None:
                place = cells(grad_bias, batch, safe_head, row, found, 0, WIDE)
                tl.store(place, tl.load(place, mask=seen, other=0.0) + slope, mask=seen)
            total = tl.dot(inner.to(keys.dtype), keys, total, input_precision="ieee")
    if row_sums is not None:
        tl.store(row_sums + (tl.cast(batch, tl.int64) * q_heads + safe_head) * q_len + row, sums, mask=row_there)
    row_base, row_offset = row_places(head, row, row_there, batch, first_head, grad_query, WIDE)
    store_rows(total * scale, row_base, row_offset, row_there, grad_query.col, DIM, BLOCK_D)


@triton.jit
def count_tiles(
    listed, count, first_key, stop_key, whole_stop, q_len, kv_len, sight, chosen, Q_BLOCK: tl.constexpr, CAUSAL: tl.constexpr,
    LISTED: tl.constexpr, SECTION: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """``(a, b, c, d)``: of the tiles that keep the keys, ``a..d`` see some and ``b..c`` see all of them with every row.

    ``whole_stop`` is ``stop_key``, or so large that no tile counts as one that sees all.
    """
    a = 0
    b = 0
    c = 0
    d = 0
    for begin in range(0, count, STEP):
        number = begin + tl.arange(0, STEP)
        there = number < count
        tile = number
        if LISTED:
            tile = tl.load(listed + number, mask=there, other=0)
        first_row = tl.maximum(tile * Q_BLOCK - chosen.lead, 0)
        last_row = tl.minimum(tile * Q_BLOCK - chosen.lead + Q_BLOCK, q_len) - 1
        low_first, high_first = interval(first_row, q_len, kv_len, sight, chosen, CAUSAL, SECTION)
        low_last, high_last = interval(last_row, q_len, kv_len, sight, chosen, CAUSAL, SECTION)
        a += tl.sum((there & (high_last <= first_key)).to(tl.int32), 0)
        b += tl.sum((there & (high_first < whole_stop)).to(tl.int32), 0)
        c += tl.sum((there & (low_last <= first_key)).to(tl.int32), 0)
        d += tl.sum((there & (low_first < stop_key)).to(tl.int32), 0)
    return in_order(a, b, c, d)


@triton.jit
def all_finite(base, offset, there, stride, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Whether rows of keys are numbers throughout; a few channels at a time, as whole rows would take registers."""
    # zero times what is no number is no number
    odd = offset * 0.0
    for first in range(0, BLOCK_D, 16):
        channel = first + tl.arange(0, 16)
        inside = there[:, None] & (channel < DIM)[None, :]
        x = tl.load(base + (offset[:, None] + (channel * stride)[None, :]), mask=inside, other=0.0).to(tl.float32)
        odd += tl.sum(x * 0.0, 1)
    return tl.sum(odd, 0) == 0.0


@triton.jit(do_not_specialize=["q_len", "kv_len", "chosen_heads", "blocks"])
def key_kernel(
    query, key, value, grad, lse, shift, grad_key, grad_value, key_sums, mask, bias, key_mask, sight, chosen, turned,
    scale, softcap, q_heads, kv_heads, chosen_heads, q_len, kv_len, pieces, blocks,
    DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr,
    PACK: tl.constexpr, BLOCK_N: tl.constexpr, Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr, CAUSAL: tl.constexpr,
    RANGES: tl.constexpr, SHARED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``grad_key`` and ``grad_value`` of up to ``BLOCK_N`` keys of one block, over every tile of queries that keeps it.

    Keys that lie beyond the block's end are computed along and not written: keys share nothing here.
    """
    LISTED: tl.constexpr = RANGES == 0
    EVERYWHERE: tl.constexpr = (mask is not None) or (bias is not None) or (key_mask is not None) or (chosen.row_mask is not None)
    PARTS: tl.constexpr = (KV_BLOCK + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    block = pid // PARTS % blocks
    kv_head = pid // (PARTS * blocks) % kv_heads
    batch = pid // (PARTS * blocks * kv_heads)
    group = q_heads // kv_heads
    first_key = block * KV_BLOCK + pid % PARTS * BLOCK_N
    stop_key = tl.minimum(tl.minimum(block * KV_BLOCK + KV_BLOCK, first_key + BLOCK_N), kv_len)
    found = first_key + tl.arange(0, BLOCK_N)
    there = found < stop_key
    found = tl.where(there, found, 0)
    base, offset = places(found, batch, kv_head, key, None, 0, WIDE)
    # rows that are not there are zeros, which must not meet infinities
    whole_stop = tl.where(all_finite(base, offset, there, key.col, DIM, BLOCK_D), stop_key, 1 << 30)
    keys = load_rows(base, offset, there, key.col, DIM, BLOCK_D, True)
    base, offset = places(found, batch, kv_head, value, None, 0, WIDE)
    values = load_rows(base, offset, there, value.col, V_DIM, BLOCK_V, True)
    d_key = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    d_value = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    # heads that share a list take turns at each of its tiles; others bring a list of their own
    packs = (group + PACK - 1) // PACK
    turns = pieces * packs if SHARED else pieces
    for own_pack in range(0, 1 if SHARED else packs):
        listed = turned.tile
        start = tl.full([], 0, tl.int64)
        count = chosen.tiles
        if LISTED:
            chosen_head = tl.where(chosen_heads == q_heads, kv_head * group + own_pack, kv_head)
            chosen_head = tl.where(chosen_heads == 1, 0, chosen_head)
            column = batch * turned.batch + chosen_head * turned.head + block
            start = tl.load(turned.ptr + column)
            count = (tl.load(turned.ptr + column + 1) - start).to(tl.int32)
            listed += start
        sums = tl.zeros([BLOCK_N], tl.float32)
        for turn in tl.static_range(2 if RANGES == 3 else 1):
            SECTION: tl.constexpr = turn + 1 if RANGES == 3 else RANGES
            a, b, c, d = count_tiles(
                listed,
                count,
                first_key,
                stop_key,
                whole_stop,
                q_len,
                kv_len,
                sight,
                chosen,
                Q_BLOCK,
                CAUSAL,
                LISTED,
                SECTION,
                128,
            )
            if EVERYWHERE:
                b = a
                c = a
            else:
                for step in tl.range(b * turns, c * turns):
                    tile = step // turns
                    pack = step % turns // pieces if SHARED else own_pack
                    if LISTED:
                        tile = tl.load(listed + tile)
                    head, lane, row, row_there = lanes_of(
                        tile, step % pieces, kv_head, pack, group, q_len, chosen, Q_BLOCK, ROWS, PACK
                    )
                    rows, given, log, moved = rows_and_gradients(
                        query,
                        grad,
                        lse,
                        shift,
                        batch,
                        kv_head * group,
                        head,
                        row,
                        row_there,
                        q_heads,
                        q_len,
                        DIM,
                        V_DIM,
                        BLOCK_D,
                        BLOCK_V,
                        WIDE,
                    )
                    product = tl.dot(keys, tl.trans(rows), input_precision="ieee")
                    pull = tl.dot(values, tl.trans(given), input_precision="ieee")
                    weight, _slope, slope = slopes(product, log, moved, pull, scale, softcap, 1)
                    d_value = tl.dot(weight.to(given.dtype), given, d_value, input_precision="ieee")
                    d_key = tl.dot(slope.to(rows.dtype), rows, d_key, input_precision="ieee")
            for step in tl.range(0, (b - a + d - c) * turns, num_stages=None if EVERYWHERE else 1):
                number = step // turns
                pack = step % turns // pieces if SHARED else own_pack
                number = tl.where(number < b - a, a + number, c + number - (b - a))
                tile = number
                if LISTED:
                    tile = tl.load(listed + number)
                head, lane, row, row_there = lanes_of(
                    tile, step % pieces, kv_head, pack, group, q_len, chosen, Q_BLOCK, ROWS, PACK
                )
                rows, given, log, moved = rows_and_gradients(
                    query,
                    grad,
                    lse,
                    shift,
                    batch,
                    kv_head * group,
                    head,
                    row,
                    row_there,
                    q_heads,
                    q_len,
                    DIM,
                    V_DIM,
                    BLOCK_D,
                    BLOCK_V,
                    WIDE,
                )
                low, high = interval(row, q_len, kv_len, sight, chosen, CAUSAL, SECTION)
                entry = found * 0 + number
                if chosen.row_mask is not None:
                    entry = found * 0 + tl.load(turned.entry + start + number)
                safe_head = tl.where(row_there, head, kv_head * group)
                seen = visible(
                    batch, safe_head, row, lane, row_there, low, high, found, entry, there, chosen, mask, key_mask,
                    Q_BLOCK, 1, WIDE,
                )  # fmt: skip
                # a row that is no number shows in its lse; keys that it does not see must not meet it
                rows = finite(rows)
                product = tl.dot(keys, tl.trans(rows), input_precision="ieee")
                pull = tl.dot(values, tl.trans(given), input_precision="ieee")
                weight, slope, inner, seen = cut_slopes(
                    product, log, moved, pull, scale, softcap, seen, batch, safe_head, row, found, bias, 1, WIDE
                )
                if key_sums is not None:
                    sums += tl.sum(slope, 1)
                d_value = tl.dot(weight.to(given.dtype), given, d_value, input_precision="ieee")
                d_key = tl.dot(inner.to(rows.dtype), rows, d_key, input_precision="ieee")
        if key_sums is not None:
            tl.store(
                key_sums + (tl.cast(batch, tl.int64) * q_heads + kv_head * group + own_pack) * kv_len + found, sums, mask=there
            )
    base, offset = places(found, batch, kv_head, grad_key, None, 0, WIDE)
    store_rows(d_key * scale, base, offset, there, grad_key.col, DIM, BLOCK_D)
    base, offset = places(found, batch, kv_head, grad_value, None, 0, WIDE)
    store_rows(d_value, base, offset, there, grad_value.col, V_DIM, BLOCK_V)
