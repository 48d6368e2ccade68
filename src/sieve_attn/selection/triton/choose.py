"""The choice on the device: one program turns the estimates of a unit into marks on its blocks, and marks become lists."""

from __future__ import annotations

import triton
import triton.language as tl

from sieve_attn.selection.triton.score import LOWEST, estimates, is_early, prepared
from sieve_attn.selection.triton.sight import interval, keys_between, reach, sight, tile_queries, unit_at

COUNT, SHARE, ABOVE, NEAR_BEST, MASS = (tl.constexpr(i) for i in range(5))  # rules; the first two rank


@triton.jit
def ordered(x):
    """Floats to integers in the same order; both zeros become one."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def wanted_blocks(visible, limit, share_bits, RULE: tl.constexpr):
    """How many blocks a rank rule keeps; ``share_bits`` are those of the fp64 share of visible blocks."""
    if RULE == COUNT:
        k = tl.minimum(visible, limit)
    else:
        wanted = visible.to(tl.float64) * share_bits.to(tl.int64).to(tl.float64, bitcast=True)
        below = tl.floor(wanted)
        rest = wanted - below
        whole = below.to(tl.int64)
        up = (rest > 0.5) | ((rest == 0.5) & (whole % 2 == 1))
        k = tl.maximum(whole + up.to(tl.int64), 1).to(tl.int32)
    return k


@triton.jit
def row_masses(top, total, row_lse, row_top, rows, splits, ROWS: tl.constexpr, SPLITS: tl.constexpr):
    """Of all rows of a unit the log mass over all blocks (0 where it is not finite) and the largest estimate."""
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        split = tl.arange(0, SPLITS)
        at = row[:, None] * splits + split[None, :]
        inside = (row < rows)[:, None] & (split < splits)[None, :]
        tops = tl.load(top + at, inside, float("-inf"))
        totals = tl.load(total + at, inside, 0.0)
        largest = tl.max(tops, 1)
        base = tl.where((largest > float("-inf")) & (largest < float("inf")), largest, 0.0)
        # the parts were summed about their own largest number
        part_base = tl.where((tops > float("-inf")) & (tops < float("inf")), tops, 0.0)
        mass = tl.sum(totals * tl.exp(tl.minimum(part_base - base[:, None], 0.0)), 1)
        lse = base + tl.log(tl.where(mass > 0, mass, 1.0))
        known = (largest > float("-inf")) & (largest < float("inf")) & (mass < float("inf"))
        tl.store(row_lse + row, tl.where(known, lse, 0.0), row < rows)
        tl.store(row_top + row, largest, row < rows)


@triton.jit
def kth_level(level, begin, stop, to_block, k, CHUNK: tl.constexpr):
    """``(the k-th largest of the levels, how many of those equal to it belong to the first k)``, eight bits a pass."""
    prefix = k.to(tl.int64) * 0
    left = k
    bins = tl.arange(0, 256)
    for step in tl.static_range(4):
        shift = 24 - 8 * step
        counts = tl.zeros((256,), tl.int32)
        for first in range(begin, stop, CHUNK):
            block = first + tl.arange(0, CHUNK)
            x = tl.load(level + block, block < to_block, 0).to(tl.int64) + 2147483648
            mine = (block < to_block) & ((x >> (shift + 8)) == prefix)
            counts += tl.histogram(((x >> shift) & 255).to(tl.int32), 256, mask=mine)
        at_least = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
        digit = tl.max(tl.where(at_least >= left, bins, 0), 0)
        left -= tl.sum(tl.where(bins > digit, counts, 0), 0)
        prefix = prefix * 256 + digit
    return (prefix - 2147483648).to(tl.int32), left


@triton.jit
def mark_mass(
    estimate, row_lse, chosen, rows, blocks, begin, stop, from_block, to_block, mass,
    ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Of every row the first blocks, by falling estimate and then by index, whose predecessors hold less than ``mass``."""
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        lse = tl.load(row_lse + row, row < rows, 0.0)
        low = tl.full((ROWS,), -2147483648, tl.int64)
        high = tl.full((ROWS,), 2147483647, tl.int64)
        # the lowest level above which less than `mass` lies
        for _ in range(32):
            middle = (low + high) >> 1
            above = tl.zeros((ROWS,), tl.float32)
            for first in range(begin, stop, CHUNK):
                block = first + tl.arange(0, CHUNK)
                inside = (row < rows)[:, None] & ((block >= from_block) & (block < to_block))[None, :]
                x = tl.load(estimate + row[:, None] * blocks + block[None, :], inside, float("-inf"))
                share = tl.where(x < float("inf"), tl.exp(tl.minimum(x - lse[:, None], 80.0)), 0.0)
                above += tl.sum(tl.where(ordered(x).to(tl.int64) > middle[:, None], share, 0.0), 1)
            enough = above < mass
            high = tl.where(enough, middle, high)
            low = tl.where(enough, low, middle + 1)
        before = tl.zeros((ROWS,), tl.float32)
        for first in range(begin, stop, CHUNK):
            block = first + tl.arange(0, CHUNK)
            inside = (row < rows)[:, None] & ((block >= from_block) & (block < to_block))[None, :]
            x = tl.load(estimate + row[:, None] * blocks + block[None, :], inside, float("-inf"))
            share = tl.where(x < float("inf"), tl.exp(tl.minimum(x - lse[:, None], 80.0)), 0.0)
            before += tl.sum(tl.where(ordered(x).to(tl.int64) > high[:, None], share, 0.0), 1)
        for first in range(begin, stop, CHUNK):
            block = first + tl.arange(0, CHUNK)
            there = (block >= from_block) & (block < to_block)
            inside = (row < rows)[:, None] & there[None, :]
            x = tl.load(estimate + row[:, None] * blocks + block[None, :], inside, float("-inf"))
            share = tl.where(x < float("inf"), tl.exp(tl.minimum(x - lse[:, None], 80.0)), 0.0)
            place = ordered(x).to(tl.int64)
            equal = tl.where(place == high[:, None], share, 0.0)
            ahead = before[:, None] + tl.cumsum(equal, 1) - equal
            kept = ((place > high[:, None]) | ((place == high[:, None]) & (ahead < mass))) & inside
            kept = kept & (x > float("-inf")) & (x < float("inf"))
            before += tl.sum(equal, 1)
            old = tl.load(chosen + block, there, 0)
            tl.store(chosen + block, tl.where(tl.max(kept.to(tl.int32), 0) != 0, 1, old), there)
        tl.debug_barrier()


@triton.jit
def settle(sights, marks, begin, stop, from_block, to_block, blocks, every, dense_above, MAY_TURN: tl.constexpr,
           CHUNK: tl.constexpr):  # fmt: skip
    """``(blocks, keys, whether the unit turned dense)`` of what is marked; a unit above ``dense_above`` keeps all it sees."""
    number, kept = every.to(tl.int32) * 0, every * 0
    for first in range(begin, stop, CHUNK):
        block = first + tl.arange(0, CHUNK)
        marked = tl.load(marks + block, block < blocks, 0) != 0
        keys = tl.load(sights + block, (block < blocks) & marked, 0) >> 1
        number += tl.sum(marked.to(tl.int32), 0)
        kept += tl.sum(keys.to(tl.int64), 0)
    dense = every < 0
    if MAY_TURN:
        dense = kept.to(tl.float32) > dense_above * every.to(tl.float32)
        if dense:
            number = number * 0
            for first in range(begin, stop, CHUNK):
                block = first + tl.arange(0, CHUNK)
                there = (block >= from_block) & (block < to_block)
                visible = (tl.load(sights + block, there, 0) >> 1) > 0
                number += tl.sum(visible.to(tl.int32), 0)
                tl.store(marks + block, visible.to(tl.int8), there)
            kept = every
    return number, kept, dense


@triton.jit(do_not_specialize=["first_unit", "q_len", "kv_len", "offset", "lead", "tiles", "blocks", "rows", "splits", "limit",
                               "share_bits"])  # fmt: skip
def choose(
    estimate, top, total, row_lse, row_top, level, sights, marks, number, kept, visible, dense, forgotten,
    finite, before, edges, finite_b, finite_h,
    first_unit, q_len, kv_len, offset, lead, tiles, blocks, rows, splits, window, sinks, near, limit, share_bits, amount,
    dense_above,
    heads: tl.constexpr, KV_EACH: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, PACKED: tl.constexpr, MASKED: tl.constexpr, SINKS: tl.constexpr, NEAR: tl.constexpr,
    RULE: tl.constexpr, EVERYTHING: tl.constexpr, MAY_FORGET: tl.constexpr, MAY_TURN: tl.constexpr, SIZE: tl.constexpr,
    ROWS: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Marks of one unit: what the rule keeps and what is forced, of what it sees; and whether a query was left with nothing."""
    local = tl.program_id(0)
    unit = first_unit + local
    batch, head, tile = unit_at(unit, tiles, heads)
    query, there = tile_queries(tile, q_len, lead, TILE, LANES)
    low, high = interval(query, edges, q_len, kv_len, offset, window, CAUSAL, WINDOW, PACKED, there)
    from_block, to_block = reach(low, high, there, kv_len, SIZE)
    begin, stop = from_block // CHUNK * CHUNK, to_block
    inner_low = tl.max(tl.where(there, low, 0), 0)
    inner_high = tl.min(tl.where(there, tl.where(low < high, high, 0), kv_len), 0)
    before += batch.to(tl.int64) * (kv_len + 1)
    finite += batch.to(tl.int64) * finite_b + (head // KV_EACH).to(tl.int64) * finite_h
    estimate += local.to(tl.int64) * rows * blocks
    row_lse += local * rows
    row_top += local * rows
    at = local.to(tl.int64) * blocks
    level += at
    sights += at
    marks += at
    for first in range(0, begin, CHUNK):
        tl.store(marks + first + tl.arange(0, CHUNK), tl.zeros((CHUNK,), tl.int8))
    if not EVERYTHING:
        row_masses(top + local.to(tl.int64) * rows * splits, total + local.to(tl.int64) * rows * splits, row_lse, row_top, rows,
                   splits, ROWS, SPLITS)  # fmt: skip
        tl.debug_barrier()

    seen, every = unit * 0, unit.to(tl.int64) * 0
    for first in range(begin, stop, CHUNK):
        block = first + tl.arange(0, CHUNK)
        inside = (block >= from_block) & (block < to_block)
        keys, forced = sight(
            block, low, high, query, there, inner_low, inner_high, finite, before, blocks, kv_len, offset, sinks, near,
            SIZE, MASKED, SINKS, NEAR,
        )  # fmt: skip
        tl.store(sights + block, keys * 2 + forced.to(tl.int32), inside)
        seen += tl.sum((inside & (keys > 0)).to(tl.int32), 0)
        every += tl.sum(tl.where(inside, keys, 0).to(tl.int64), 0)
        if EVERYTHING or RULE == MASS:
            tl.store(level + block, tl.where(keys > 0, 1 if EVERYTHING else 0, 0), inside)
        else:
            best = tl.full((CHUNK,), float("-inf"), tl.float32)
            for start in range(0, rows, ROWS):
                row = start + tl.arange(0, ROWS)
                some = (row < rows)[:, None] & inside[None, :]
                x = tl.load(estimate + row[:, None] * blocks + block[None, :], some, float("-inf"))
                if RULE == NEAR_BEST:
                    least = tl.load(row_top + row, row < rows, float("inf")) - amount
                    x = tl.where((x >= least[:, None]) & (x > float("-inf")), 1.0, float("-inf"))
                elif RULE != ABOVE:
                    x = x - tl.load(row_lse + row, row < rows, 0.0)[:, None]
                best = tl.maximum(best, tl.max(x, 0))
            if RULE == ABOVE:
                tl.store(level + block, (best > amount).to(tl.int32), inside)
            elif RULE == NEAR_BEST:
                tl.store(level + block, (best > 0).to(tl.int32), inside)
            else:
                # blocks that only queries between the strides see rank last, before the invisible ones
                tl.store(level + block, ordered(tl.where(keys > 0, tl.maximum(best, LOWEST), float("-inf"))), inside)
    tl.debug_barrier()

    cut, room = unit * 0, unit * 0
    RANKS: tl.constexpr = (RULE <= SHARE) and not EVERYTHING
    if RANKS:
        wanted = tl.minimum(wanted_blocks(seen, limit, share_bits, RULE), seen)
        # levels before the first block are not there
        cut, room = kth_level(level + from_block, 0, to_block - from_block, to_block - from_block, wanted, CHUNK)
    if RULE == MASS and not EVERYTHING:
        mark_mass(estimate, row_lse, level, rows, blocks, begin, stop, from_block, to_block, amount, ROWS, CHUNK)
    taken = unit * 0
    has = tl.zeros((LANES,), tl.int32)
    for first in range(begin, stop, CHUNK):
        block = first + tl.arange(0, CHUNK)
        inside = (block >= from_block) & (block < to_block)
        told = tl.load(sights + block, inside, 0)
        x = tl.load(level + block, inside, 0)
        if RANKS:
            equal = (inside & (x == cut)).to(tl.int32)
            rank = taken + tl.cumsum(equal, 0)
            chosen = (x > cut) | ((equal != 0) & (rank <= room))
            taken += tl.sum(equal, 0)
        else:
            chosen = x != 0
        chosen = inside & (chosen | (told % 2 == 1)) & (told >= 2)
        tl.store(marks + block, chosen.to(tl.int8), block < blocks)
        if MAY_FORGET:
            left = tl.maximum((block * SIZE)[None, :], low[:, None])
            right = tl.minimum(tl.minimum(block * SIZE + SIZE, kv_len)[None, :], high[:, None])
            n = tl.where((there[:, None] & (right > left)) & chosen[None, :], keys_between(before, left, right, MASKED), 0)
            has = tl.maximum(has, tl.max(n, 1))
    tl.debug_barrier()
    if MAY_FORGET:
        lost = there & (keys_between(before, low, high, MASKED) > 0) & (has == 0)
        tl.store(forgotten + local, tl.max(lost.to(tl.int32), 0))
    blocks_kept, keys_kept, is_dense = settle(
        sights, marks, begin, stop, from_block, to_block, blocks, every, dense_above, MAY_TURN and not MAY_FORGET, CHUNK
    )
    tl.store(number + unit, blocks_kept)
    tl.store(kept + unit, keys_kept)
    tl.store(visible + unit, every)
    tl.store(dense + unit, is_dense.to(tl.int8))


@triton.jit(do_not_specialize=["first_unit", "q_len", "kv_len", "offset", "lead", "tiles", "blocks", "calibration"])
def remember(
    query, key, codes, planes, key_scale, channel_scale, mean, radius, count, part, before, edges, calibrated,
    sights, marks, number, kept, visible, dense, forgotten,
    first_unit, q_len, kv_len, offset, lead, tiles, blocks, calibration, window, scale, softcap, dense_above,
    q_b, q_h, q_m, q_d, key_b, key_h, key_m, key_d, part_b, part_m, plane_stride, plane_b, plane_h,
    scale_b, scale_h, mean_b, mean_h, block_b, block_h,
    heads: tl.constexpr, GROUP: tl.constexpr, KV_EACH: tl.constexpr, dim: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr, MASKED: tl.constexpr, CAREFUL: tl.constexpr,
    SCORER: tl.constexpr, ROUNDED: tl.constexpr, BITS: tl.constexpr, SKETCH_BITS: tl.constexpr, EXPANDED: tl.constexpr,
    CAPPED: tl.constexpr, MAY_TURN: tl.constexpr, SIZE: tl.constexpr, EACH: tl.constexpr, BLOCKS: tl.constexpr,
    PADDED: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """In units that left a query with nothing, the best block of every such query is marked."""
    local = tl.program_id(0)
    unit = first_unit + local
    marks += local.to(tl.int64) * blocks
    sights += local.to(tl.int64) * blocks
    batch, head, tile = unit_at(unit, tiles, heads)
    lanes, lane_there = tile_queries(tile, q_len, lead, TILE, LANES)
    lane_low, lane_high = interval(lanes, edges, q_len, kv_len, offset, window, CAUSAL, WINDOW, PACKED, lane_there)
    from_block, to_block = reach(lane_low, lane_high, lane_there, kv_len, SIZE)
    begin = from_block // CHUNK * CHUNK
    lost_some = tl.load(forgotten + local) != 0
    if lost_some:
        kv = (head // KV_EACH).to(tl.int64)
        one = (batch * (heads // KV_EACH) + kv).to(tl.int64)
        befores = before + batch.to(tl.int64) * (kv_len + 1)
        end = calibration
        if CAREFUL and MASKED:
            end = tl.load(calibrated + one)
        for start in range(0, GROUP * TILE, ROWS):
            row = start + tl.arange(0, ROWS)
            asked = tile * TILE - lead + row % TILE
            there = (row < GROUP * TILE) & (asked >= 0) & (asked < q_len)
            low, high = interval(asked, edges, q_len, kv_len, offset, window, CAUSAL, WINDOW, PACKED, there)
            has = tl.zeros((ROWS,), tl.int32)
            for first in range(begin, to_block, CHUNK):
                block = first + tl.arange(0, CHUNK)
                marked = (tl.load(marks + block, block < blocks, 0) == 1) & (block >= from_block) & (block < to_block)
                left = tl.maximum((block * SIZE)[None, :], low[:, None])
                right = tl.minimum(tl.minimum(block * SIZE + SIZE, kv_len)[None, :], high[:, None])
                wide = (there[:, None] & (right > left)) & marked[None, :]
                has = tl.maximum(has, tl.max(tl.where(wide, keys_between(befores, left, right, MASKED), 0), 1))
            lost = there & (keys_between(befores, low, high, MASKED) > 0) & (has == 0)
            query_at = batch.to(tl.int64) * q_b + (head * GROUP + row // TILE).to(tl.int64) * q_h + asked.to(tl.int64) * q_m
            rows, factor, extra, sound = prepared(
                query, there, query_at, q_d, channel_scale + one * dim, dim, PADDED, SCORER, ROUNDED
            )
            early = is_early(asked, there, low, high, end, offset, kv_len)
            best, place = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.int32) + from_block
            for first in range(from_block // BLOCKS * BLOCKS, to_block, BLOCKS):
                found = estimates(
                    first, rows, factor, extra, sound, early, low, high, query_at,
                    query, key + batch.to(tl.int64) * key_b + kv * key_h, codes + one * kv_len * PADDED,
                    planes + batch.to(tl.int64) * plane_b + kv * plane_h, key_scale + batch.to(tl.int64) * scale_b + kv * scale_h,
                    mean + batch.to(tl.int64) * mean_b + kv * mean_h, radius + batch.to(tl.int64) * block_b + kv * block_h,
                    count + batch.to(tl.int64) * block_b + kv * block_h, part + batch.to(tl.int64) * part_b, befores,
                    q_d, key_m, key_d, part_m, plane_stride, kv_len, blocks, scale, softcap,
                    dim, SCORER, ROUNDED, BITS, SKETCH_BITS, EXPANDED, CAPPED, MASKED, CAREFUL, SIZE, EACH, BLOCKS, PADDED,
                )  # fmt: skip
                largest, which = tl.max(found, 1, return_indices=True)
                better = largest > best
                place = tl.where(better, first + which, place)
                best = tl.where(better, largest, best)
            # 2: not yet there for the rows that follow, which must not count on another row's block
            old = tl.load(marks + place, lost, 0)
            tl.store(marks + place, tl.where(old == 1, 1, 2).to(tl.int8), lost)
            tl.debug_barrier()
        every = tl.load(visible + unit)
        blocks_kept, keys_kept, is_dense = settle(
            sights, marks, begin, to_block, from_block, to_block, blocks, every, dense_above, MAY_TURN, CHUNK
        )
        tl.store(number + unit, blocks_kept)
        tl.store(kept + unit, keys_kept)
        tl.store(dense + unit, is_dense.to(tl.int8))
    elif MAY_TURN:
        every = tl.load(visible + unit)
        blocks_kept, keys_kept, is_dense = settle(
            sights, marks, begin, to_block, from_block, to_block, blocks, every, dense_above, MAY_TURN, CHUNK
        )
        tl.store(number + unit, blocks_kept)
        tl.store(kept + unit, keys_kept)
        tl.store(dense + unit, is_dense.to(tl.int8))


@triton.jit(do_not_specialize=["first_unit", "units", "blocks"])
def compact(marks, number, row_ptr, index, first_unit, units, blocks, UNITS: tl.constexpr, CHUNK: tl.constexpr):
    """Marks to lists behind those of earlier units: compressed rows, and their pointers."""
    local = tl.program_id(0)
    unit = tl.arange(0, UNITS)
    counts = tl.load(number + first_unit + unit, unit < units, 0).to(tl.int64)
    start = tl.load(row_ptr + first_unit) + tl.sum(tl.where(unit < local, counts, 0), 0)
    mine = tl.load(number + first_unit + local)
    tl.store(row_ptr + first_unit + local + 1, start + mine)
    marks += local.to(tl.int64) * blocks
    done = mine * 0
    first = mine * 0
    # forms a list as far as there are marks: what lies beyond the last one was never written
    while (done < mine) & (first < blocks):
        block = first + tl.arange(0, CHUNK)
        marked = (tl.load(marks + block, block < blocks, 0) != 0).to(tl.int32)
        slot = done + tl.cumsum(marked, 0) - marked
        tl.store(index + start + slot, block, marked != 0)
        done += tl.sum(marked, 0)
        first += CHUNK
