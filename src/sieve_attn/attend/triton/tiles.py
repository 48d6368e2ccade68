"""What the kernels of this folder share: which keys a row sees, how a tile walks over its kept keys, and masked logits.

A program owns a tile of rows: ``PACK`` query heads of one KV head times ``ROWS`` queries. The keys that its selection keeps are
numbered in order, so that blocks of any size fill whole tiles of ``BLOCK_N`` *columns*; column ``c`` is key
``block[c // KV_BLOCK] * KV_BLOCK + c % KV_BLOCK``. As blocks are in order, those that every row sees whole are a run in the
middle, which needs no mask, and what lies before and after it is cut by causality, a window or packing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from sieve_attn.geometry.triton.kernels import cap_of

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class View(NamedTuple):
    """An array of four axes as kernels see it."""

    ptr: Any
    batch: Any
    head: Any
    row: Any
    col: Any


class Chosen(NamedTuple):
    """The selection: compressed rows, or ranges where ``row_ptr`` is None."""

    row_ptr: Any
    block_index: Any
    row_mask: Any  # [entries, q_block] bool or None
    entries: Any  # how many block_index holds at most
    blocks: Any  # how many blocks there are to name
    batch: Any  # what one sequence or head moves the row by, 0 where they share
    head: Any
    tiles: Any
    lead: Any
    prefix: Any
    window: Any
    ahead: Any  # keys from the query's own on that the window of ranges holds


class Sight(NamedTuple):
    """What restricts the keys of a row to one interval."""

    window: Any  # None for none
    first: Any  # [q_len] first key of the row's packed sequence, or None
    stop: Any


@triton.jit
def interval(row, q_len, kv_len, sight, chosen, CAUSAL: tl.constexpr, SECTION: tl.constexpr):
    """``[low, high)``: the keys that query ``row`` sees. Both ends never fall from one row to the next."""
    position = row + (kv_len - q_len)
    low = position * 0
    high = low + kv_len
    if CAUSAL:
        high = tl.minimum(high, position + 1)
    if sight.window is not None:
        low = tl.maximum(low, position - sight.window + 1)
        if not CAUSAL:
            high = tl.minimum(high, position + sight.window)
    if sight.first is not None:
        inside = (row >= 0) & (row < q_len)
        low = tl.maximum(low, tl.load(sight.first + row, mask=inside, other=0))
        high = tl.minimum(high, tl.load(sight.stop + row, mask=inside, other=0))
    if SECTION == 1:
        high = tl.minimum(high, chosen.prefix)
    if SECTION == 2:
        low = tl.maximum(low, tl.maximum(position - chosen.window + 1, chosen.prefix))
        high = tl.minimum(high, position + chosen.ahead)
    return low, tl.maximum(high, 0)


@triton.jit
def entries_of(chosen, batch, head, tile):
    """``(start, count)`` of a tile's entries; a count of -1 where the row pointers are no such thing."""
    row = batch * chosen.batch + head * chosen.head + tile
    start = tl.load(chosen.row_ptr + row)
    stop = tl.load(chosen.row_ptr + row + 1)
    sound = (start >= 0) & (start <= stop) & (stop <= chosen.entries)
    return tl.where(sound, start, 0), tl.where(sound, (stop - start).to(tl.int32), -1)


@triton.jit
def count_blocks(index, count, low_first, low_last, high_first, high_last, blocks, KV_BLOCK: tl.constexpr, STEP: tl.constexpr):
    """``(a, b, c, d, sound)``: of the entries ``0..count``, ``a..d`` are seen by some row and ``b..c`` by every row whole.

    Entries must rise and name blocks that exist; whoever walks an unsound list would read beside the cache.
    """
    a = 0
    b = 0
    c = 0
    d = 0
    bad = 0
    for begin in range(0, count, STEP):
        entry = begin + tl.arange(0, STEP)
        there = entry < count
        block = tl.load(index + entry, mask=there, other=0)
        after = tl.load(index + entry + 1, mask=entry + 1 < count, other=2147483647)
        first = block * KV_BLOCK
        stop = first + KV_BLOCK
        a += tl.sum((there & (stop <= low_first)).to(tl.int32), 0)
        b += tl.sum((there & (first < low_last)).to(tl.int32), 0)
        c += tl.sum((there & (stop <= high_first)).to(tl.int32), 0)
        d += tl.sum((there & (first < high_last)).to(tl.int32), 0)
        bad += tl.sum((there & ((after <= block) | (block < 0) | (block >= blocks))).to(tl.int32), 0)
    return a, b, c, d, (bad == 0) & (count >= 0)


@triton.jit
def in_order(a, b, c, d):
    """``a <= b <= c <= d`` of the same meaning: a run of whole blocks may be empty."""
    d = tl.maximum(d, a)
    b = tl.minimum(tl.maximum(b, a), d)
    c = tl.minimum(tl.maximum(c, b), d)
    return a, b, c, d


@triton.jit
def keys_of(begin, stop, index, BLOCK_N: tl.constexpr, KV_BLOCK: tl.constexpr, LISTED: tl.constexpr, ALL_THERE: tl.constexpr):
    """``(key, entry, there)`` of the columns ``begin..begin + BLOCK_N``, those from ``stop`` on not there."""
    column = begin + tl.arange(0, BLOCK_N)
    there = column < stop
    entry = column // KV_BLOCK
    key = column
    if LISTED:
        if KV_BLOCK % BLOCK_N == 0:
            # one block, or a part of it: its address is one number
            block = tl.load(index + begin // KV_BLOCK)
            key = block * KV_BLOCK + (begin % KV_BLOCK) + tl.arange(0, BLOCK_N)
        elif ALL_THERE:
            key = tl.load(index + entry) * KV_BLOCK + column % KV_BLOCK
        else:
            key = tl.load(index + entry, mask=there, other=0) * KV_BLOCK + column % KV_BLOCK
    return key, entry, there


@triton.jit
def places(key, batch, head, cache, table, PAGE_SIZE: tl.constexpr, WIDE: tl.constexpr):
    """``(base, offsets)``: where the keys lie in ``cache``; with a block table, its pages come one after another."""
    if PAGE_SIZE:
        page = tl.load(table.ptr + batch * table.batch + key // PAGE_SIZE).to(tl.int64)
        return cache.ptr + tl.cast(head, tl.int64) * cache.head, page * cache.batch + (key % PAGE_SIZE) * cache.row
    else:
        base = cache.ptr + (tl.cast(batch, tl.int64) * cache.batch + tl.cast(head, tl.int64) * cache.head)
        return base, (tl.cast(key, tl.int64) if WIDE else key) * cache.row


@triton.jit
def row_places(head, row, there, batch, first_head, array, WIDE: tl.constexpr):
    """``(base, offsets)`` of the rows of a tile, each of its own head; offsets stay in 32 bits where they can."""
    base = array.ptr + (tl.cast(batch, tl.int64) * array.batch + tl.cast(first_head, tl.int64) * array.head)
    member, number = tl.where(there, head - first_head, 0), tl.where(there, row, 0)
    if WIDE:
        return base, tl.cast(member, tl.int64) * array.head + tl.cast(number, tl.int64) * array.row
    else:
        return base, member * array.head + number * array.row


@triton.jit
def cells_of(base, offset, stride, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D] pointers; one base and narrow offsets keep addresses out of the registers."""
    return base + (offset[:, None] + (tl.arange(0, BLOCK_D) * stride)[None, :])


@triton.jit
def load_rows(base, offset, there, stride, DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """[rows, BLOCK_D]; zeros for rows that are not there and for channels beyond ``DIM``."""
    pointer = cells_of(base, offset, stride, BLOCK_D)
    inside = tl.arange(0, BLOCK_D) < DIM
    if MASKED and DIM != BLOCK_D:
        x = tl.load(pointer, mask=there[:, None] & inside[None, :], other=0.0)
    elif MASKED:
        x = tl.load(pointer, mask=there[:, None], other=0.0)
    elif DIM != BLOCK_D:
        x = tl.load(pointer, mask=inside[None, :], other=0.0)
    else:
        x = tl.load(pointer)
    return x


@triton.jit
def store_rows(x, base, offset, there, stride, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    inside = there[:, None] & (tl.arange(0, BLOCK_D) < DIM)[None, :]
    tl.store(cells_of(base, offset, stride, BLOCK_D), x.to(base.dtype.element_ty), mask=inside)


@triton.jit
def finite(x):
    """``x`` with NaN and infinities replaced by zero."""
    return tl.where(tl.abs(x.to(tl.float32)) < float("inf"), x, 0.0).to(x.dtype)


@triton.jit
def capped(product, scale, softcap):
    """``cap * tanh(scale * product / cap)``, or the scaled product where there is no cap."""
    logit = product * scale
    if softcap is not None:
        logit = cap_of(logit, softcap)
    return logit


@triton.jit
def along(x, AXIS: tl.constexpr):
    """A vector along ``AXIS`` of a matrix."""
    return tl.expand_dims(x, 1 - AXIS)


@triton.jit
def cells(view, batch, head, row, key, ROW_AXIS: tl.constexpr, WIDE: tl.constexpr):
    """Pointers to the pairs of rows (each of its head) and keys; a stride of 0 is a broadcast axis."""
    at = tl.cast(batch, tl.int64) * view.batch + tl.cast(head, tl.int64) * view.head
    at += (tl.cast(row, tl.int64) if WIDE else row) * view.row
    return view.ptr + along(at, ROW_AXIS) + along((tl.cast(key, tl.int64) if WIDE else key) * view.col, 1 - ROW_AXIS)


@triton.jit
def visible(
    batch, head, row, lane, row_there, low, high, key, entry, key_there, chosen, mask, key_mask,
    Q_BLOCK: tl.constexpr, ROW_AXIS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Which of the pairs of rows and keys attend; ``entry`` counts from the selection's first, ``lane`` from the tile's first."""
    seen = along(row_there, ROW_AXIS) & along(key_there, 1 - ROW_AXIS)
    seen &= (along(key, 1 - ROW_AXIS) >= along(low, ROW_AXIS)) & (along(key, 1 - ROW_AXIS) < along(high, ROW_AXIS))
    if key_mask is not None:
        place = key_mask.ptr + tl.cast(batch, tl.int64) * key_mask.batch + key * key_mask.col
        seen &= along(tl.load(place, mask=key_there & (key >= 0), other=0) != 0, 1 - ROW_AXIS)
    if chosen.row_mask is not None:
        place = along(entry * Q_BLOCK, 1 - ROW_AXIS) + along(lane, ROW_AXIS)
        seen &= tl.load(chosen.row_mask + place, mask=seen, other=0) != 0
    if mask is not None:
        seen &= tl.load(cells(mask, batch, head, row, key, ROW_AXIS, WIDE), mask=seen, other=0) != 0
    return seen


@triton.jit
def biased(logit, seen, batch, head, row, key, bias, ROW_AXIS: tl.constexpr, WIDE: tl.constexpr):
    """The logits with their bias, -inf where a pair is not seen, and what is left of ``seen``: a bias of -inf hides."""
    if bias is not None:
        extra = tl.load(cells(bias, batch, head, row, key, ROW_AXIS, WIDE), mask=seen, other=0.0).to(tl.float32)
        seen &= extra != float("-inf")
        logit += extra
    return tl.where(seen, logit, float("-inf")), seen


@triton.jit
def rows_of(
    pid, tiles, pieces, packs, q_heads, kv_heads, q_len, chosen, first_batch, first_pack,
    Q_BLOCK: tl.constexpr, ROWS: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """A program's tile of rows: ``(batch, kv_head, tile, piece, head, lane, row, there)``, the last four for each row.

    Later tiles go first: under causality they have the most keys.
    """
    piece = pieces - 1 - pid % pieces
    tile = tiles - 1 - pid // pieces % tiles
    pack = first_pack + pid // (pieces * tiles) % packs
    batch = first_batch + pid // (pieces * tiles * packs)
    group = q_heads // kv_heads
    per_kv = (group + PACK - 1) // PACK
    kv_head = pack // per_kv
    head, lane, row, there = lanes_of(tile, piece, kv_head, pack % per_kv, group, q_len, chosen, Q_BLOCK, ROWS, PACK)
    return batch, kv_head, tile, piece, head, lane, row, there


@triton.jit
def lanes_of(
    tile, piece, kv_head, pack, group, q_len, chosen,
    Q_BLOCK: tl.constexpr, ROWS: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """``(head, lane in the tile, query, there)`` of each row of a tile's piece."""
    member = tl.arange(0, ROWS * PACK)
    in_group = pack * PACK + member // ROWS
    lane = piece * ROWS + member % ROWS
    row = tile * Q_BLOCK - chosen.lead + lane
    there = (in_group < group) & (lane < Q_BLOCK) & (row >= 0) & (row < q_len)
    return kv_head * group + in_group, lane, row, there


@triton.jit
def ends_of(tile, piece, q_len, chosen, Q_BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """First and last query of a piece of a tile."""
    begin = tile * Q_BLOCK - chosen.lead
    first = begin + piece * ROWS
    last = tl.minimum(begin + tl.minimum(piece * ROWS + ROWS, Q_BLOCK), q_len) - 1
    return tl.maximum(first, 0), last


@triton.jit
def walk_of(
    batch, kv_head, tile, piece, head, row, row_there, q_len, kv_len, q_heads, chosen_heads, sight, chosen,
    Q_BLOCK: tl.constexpr, ROWS: tl.constexpr, KV_BLOCK: tl.constexpr, CAUSAL: tl.constexpr, LISTED: tl.constexpr,
    SECTION: tl.constexpr, EVERYWHERE: tl.constexpr,
):  # fmt: skip
    """What a tile of rows walks over: ``(start, low, high, low_first, high_last, a, b, c, d, sound)``.

    ``a..d`` are the entries that some row sees, ``b..c`` those that need no mask; where single pairs are hidden, none.
    """
    low, high = interval(row, q_len, kv_len, sight, chosen, CAUSAL, SECTION)
    first_row, last_row = ends_of(tile, piece, q_len, chosen, Q_BLOCK, ROWS)
    low_first, high_first = interval(first_row, q_len, kv_len, sight, chosen, CAUSAL, SECTION)
    low_last, high_last = interval(last_row, q_len, kv_len, sight, chosen, CAUSAL, SECTION)
    start = tl.full([], 0, tl.int64)
    walks = first_row <= last_row
    sound = walks | True
    if LISTED:
        chosen_head = tl.where(chosen_heads == q_heads, tl.min(tl.where(row_there, head, q_heads), 0), kv_head)
        chosen_head = tl.where((chosen_heads == 1) | (first_row > last_row), 0, chosen_head)
        start, count = entries_of(chosen, batch, chosen_head, tile)
        index = chosen.block_index + start
        a, b, c, d, sound = count_blocks(index, count, low_first, low_last, high_first, high_last, chosen.blocks, KV_BLOCK, 128)
        walks &= sound
    else:
        a = low_first // KV_BLOCK
        b = (low_last + KV_BLOCK - 1) // KV_BLOCK
        c = high_first // KV_BLOCK
        d = (high_last + KV_BLOCK - 1) // KV_BLOCK
    a, b, c, d = in_order(tl.where(walks, a, 0), b, c, tl.where(walks, d, 0))
    if EVERYWHERE:
        b = a
        c = a
    return start, low, high, low_first, high_last, a, b, c, d, sound


@triton.jit
def cut_columns(
    turn, a, b, d, whole, index, low_first, high_last,
    BLOCK_N: tl.constexpr, KV_BLOCK: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """``(key, entry, there)`` of tile ``turn`` of the columns that need a mask: those before the whole tiles and behind them."""
    before = (b - a) * KV_BLOCK
    behind = b * KV_BLOCK + whole * BLOCK_N
    begin = turn * BLOCK_N
    if KV_BLOCK % BLOCK_N == 0:
        begin = tl.where(begin < before, a * KV_BLOCK + begin, behind + begin - before)
        key, entry, there = keys_of(begin, d * KV_BLOCK, index, BLOCK_N, KV_BLOCK, LISTED, False)
    else:
        # one tile may hold columns of both
        column = begin + tl.arange(0, BLOCK_N)
        there = column < before + d * KV_BLOCK - behind
        column = tl.where(column < before, a * KV_BLOCK + column, behind + column - before)
        entry = column // KV_BLOCK
        key = tl.load(index + entry, mask=there, other=0) * KV_BLOCK + column % KV_BLOCK
    there &= (key >= low_first) & (key < high_last)
    return tl.where(there, key, 0), entry, there


@triton.jit
def cut_tiles(a, b, d, whole, BLOCK_N: tl.constexpr, KV_BLOCK: tl.constexpr):
    """How many tiles of columns need a mask."""
    return ((b - a) * KV_BLOCK + d * KV_BLOCK - b * KV_BLOCK - whole * BLOCK_N + BLOCK_N - 1) // BLOCK_N
