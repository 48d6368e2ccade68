"""Forward: one program a tile of rows, which walks over its kept keys once with a running softmax.

Logits are kept in powers of two and the scale is folded into the exponent, so that a tile of keys that every row sees costs
two products, a maximum, one fused multiplication and ``exp2`` for each pair. With ``SPLITS`` several programs share a tile's
keys and write partial results, which :mod:`sieve_attn.attend.triton.decode` merges.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from sieve_attn import triton as door
from sieve_attn.attend.paged import Pages
from sieve_attn.attend.triton.decode import shared_out
from sieve_attn.attend.triton.launch import (
    Launch,
    every_pair,
    grid_of,
    key_mask_view,
    over_pairs,
    packing,
    power_of_two,
    sight_of,
    view,
    wide,
)
from sieve_attn.attend.triton.tiles import (
    LN2,
    LOG2E,
    View,
    biased,
    capped,
    cut_columns,
    cut_tiles,
    finite,
    keys_of,
    load_rows,
    places,
    row_places,
    rows_of,
    store_rows,
    visible,
    walk_of,
)
from sieve_attn.types import Call, Ranges, Selection


@triton.jit
def fold(total, top, mass, logit, factor, value, MASKED: tl.constexpr):
    """One tile of keys into the running output, maximum and sum of weights ``2^(factor * (logit - maximum))``.

    The difference comes before the factor: what rounds the maximum must not reach an exponent.
    """
    peak = tl.maximum(top, tl.max(logit, 1))
    base = peak
    if MASKED:
        # a row that has seen nothing yet has no maximum to subtract
        base = tl.where(peak == float("-inf"), 0.0, peak)
    weight = tl.exp2((logit - base[:, None]) * factor)
    shrink = tl.exp2((top - base) * factor)
    mass = mass * shrink + tl.sum(weight, 1)
    total = tl.dot(weight.to(value.dtype), value, total * shrink[:, None], input_precision="ieee")
    return total, peak, mass


@triton.jit
def restore(
    total, logit, found, there, batch, kv_head, value, table,
    V_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Adds the values that are not finite to the rows that attend to them, key by key: rare, and it must not cost registers."""
    channel = tl.arange(0, BLOCK_V)
    for number in range(0, BLOCK_N):
        mine = tl.arange(0, BLOCK_N) == number
        key = tl.sum(tl.where(mine, found, 0), 0)
        here = tl.max((mine & there).to(tl.int32), 0) > 0
        base, offset = places(key, batch, kv_head, value, table, PAGE_SIZE, WIDE)
        row = tl.load(base + offset + channel * value.col, mask=(channel < V_DIM) & here, other=0.0).to(tl.float32)
        strange = (row != row) | (tl.abs(row) == float("inf"))
        touched = tl.max((mine[None, :] & (logit != float("-inf"))).to(tl.int32), 1) > 0
        total += tl.where(touched[:, None] & strange[None, :], row[None, :], 0.0)
    return total


@triton.jit(do_not_specialize=["q_len", "kv_len", "tiles", "chosen_heads"])
def attend_kernel(
    query, key, value, out, lse, mask, bias, key_mask, sink, sight, chosen, table, lengths,
    scale, softcap, batch_size, q_heads, kv_heads, chosen_heads, q_len, kv_len, tiles, pieces, packs,
    DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr,
    PACK: tl.constexpr, BLOCK_N: tl.constexpr, Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr, CAUSAL: tl.constexpr,
    RANGES: tl.constexpr, PAGE_SIZE: tl.constexpr, SPLITS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``out`` [batch, q_heads, q_len, v_dim] and natural ``lse`` of a tile; [SPLITS x batch, ...] parts where SPLITS > 1.

    ``RANGES``: 0 a list of blocks, 1 a prefix, 2 a window, 3 a prefix and the window after it.
    """
    LISTED: tl.constexpr = RANGES == 0
    # whatever hides single pairs has to be looked at everywhere
    EVERYWHERE: tl.constexpr = (mask is not None) or (bias is not None) or (key_mask is not None) or (chosen.row_mask is not None)
    # logits are raw products where nothing but their scale is between the two
    NATURAL: tl.constexpr = (softcap is not None) or (bias is not None)
    pid = tl.program_id(0)
    split = pid % SPLITS
    batch, kv_head, tile, piece, head, lane, row, row_there = rows_of(
        pid // SPLITS, tiles, pieces, packs, q_heads, kv_heads, q_len, chosen, 0, 0, Q_BLOCK, ROWS, PACK
    )
    if lengths is not None:
        kv_len = tl.load(lengths + batch).to(tl.int32)
    first_head = kv_head * (q_heads // kv_heads)
    safe_head = tl.where(row_there, head, first_head)
    row_base, row_offset = row_places(head, row, row_there, batch, first_head, query, WIDE)
    rows = load_rows(row_base, row_offset, row_there, query.col, DIM, BLOCK_D, True)
    top = tl.full([ROWS * PACK], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS * PACK], tl.float32)
    total = tl.zeros([ROWS * PACK, BLOCK_V], tl.float32)
    for turn in tl.static_range(2 if RANGES == 3 else 1):
        SECTION: tl.constexpr = turn + 1 if RANGES == 3 else RANGES
        start, low, high, low_first, high_last, a, b, c, d, sound = walk_of(
            batch, kv_head, tile, piece, head, row, row_there, q_len, kv_len, q_heads, chosen_heads, sight, chosen,
            Q_BLOCK, ROWS, KV_BLOCK, CAUSAL, LISTED, SECTION, EVERYWHERE,
        )  # fmt: skip
        index = chosen.block_index
        if LISTED:
            index += start
        whole = (c - b) * KV_BLOCK // BLOCK_N
        if not EVERYWHERE:
            for step in tl.range(whole * split // SPLITS, whole * (split + 1) // SPLITS):
                found, _entry, _there = keys_of(b * KV_BLOCK + step * BLOCK_N, 0, index, BLOCK_N, KV_BLOCK, LISTED, True)
                base, offset = places(found, batch, kv_head, key, table, PAGE_SIZE, WIDE)
                keys = load_rows(base, offset, found, key.col, DIM, BLOCK_D, False)
                product = tl.dot(rows, tl.trans(keys), input_precision="ieee")
                base, offset = places(found, batch, kv_head, value, table, PAGE_SIZE, WIDE)
                values = load_rows(base, offset, found, value.col, V_DIM, BLOCK_V, False)
                if softcap is None:
                    total, top, mass = fold(total, top, mass, product, scale * LOG2E, values, False)
                else:
                    total, top, mass = fold(total, top, mass, capped(product, scale, softcap), LOG2E, values, False)
        cut = cut_tiles(a, b, d, whole, BLOCK_N, KV_BLOCK)
        # the few tiles at the border are not worth the registers of a pipeline
        for step in tl.range(cut * split // SPLITS, cut * (split + 1) // SPLITS, num_stages=None if EVERYWHERE else 1):
            found, entry, there = cut_columns(step, a, b, d, whole, index, low_first, high_last, BLOCK_N, KV_BLOCK, LISTED)
            # before the product, beside which what it takes would not fit the registers
            seen = visible(
                batch, safe_head, row, lane, row_there, low, high, found, start + entry, there, chosen, mask, key_mask,
                Q_BLOCK, 0, WIDE,
            )  # fmt: skip
            base, offset = places(found, batch, kv_head, key, table, PAGE_SIZE, WIDE)
            keys = load_rows(base, offset, there, key.col, DIM, BLOCK_D, True)
            product = tl.dot(rows, tl.trans(keys), input_precision="ieee")
            if NATURAL:
                product = capped(product, scale, softcap)
            logit, _seen = biased(product, seen, batch, safe_head, row, found, bias, 0, WIDE)
            base, offset = places(found, batch, kv_head, value, table, PAGE_SIZE, WIDE)
            values = load_rows(base, offset, there, value.col, V_DIM, BLOCK_V, True)
            # 0 * NaN is NaN: what a row does not see must not reach it, what it does see must
            clean = finite(values)
            total, top, mass = fold(total, top, mass, logit, LOG2E if NATURAL else scale * LOG2E, clean, True)
            if tl.max(tl.max((clean.to(tl.float32) != values.to(tl.float32)).to(tl.int32), 1), 0) > 0:
                total = restore(
                    total, logit, found, there, batch, kv_head, value, table, V_DIM, BLOCK_V, BLOCK_N, PAGE_SIZE, WIDE
                )
    if not NATURAL:
        top *= scale
    if sink is not None and SPLITS == 1:
        extra = tl.load(sink + safe_head).to(tl.float32)
        peak = tl.maximum(top, extra)
        base = tl.where(peak == float("-inf"), 0.0, peak)
        shrink = tl.exp2((top - base) * LOG2E)
        mass = mass * shrink + tl.exp2((extra - base) * LOG2E)
        total = total * shrink[:, None]
        top = peak
    empty = top == float("-inf")
    weight = total / tl.where(empty, 1.0, mass)[:, None]
    log = tl.where(empty, float("-inf"), top + tl.log2(tl.where(empty, 1.0, mass)) * LN2)
    log = tl.where(top == float("inf"), float("inf"), log)
    if LISTED:
        # a list that cannot be walked shows in every row that it was for
        weight = tl.where(sound, weight, float("nan"))
        log = tl.where(sound, log, float("nan"))
    part = split * batch_size + batch
    tl.store(lse + (tl.cast(part, tl.int64) * q_heads + safe_head) * q_len + row, log, mask=row_there)
    row_base, row_offset = row_places(head, row, row_there, part, first_head, out, WIDE)
    store_rows(weight, row_base, row_offset, row_there, out.col, V_DIM, BLOCK_V)


def tiling(
    dtype: torch.dtype, width: int, rows: int, capability: tuple[int, int], every_pair: bool = False
) -> tuple[int, int, int]:
    """``(columns, warps, stages)`` for tiles of ``rows`` rows, ``width`` the larger padded head dim.

    ``every_pair``: something is done to every logit (see :func:`every_pair`), which takes registers: more threads share them.

    A table and no search: the first call compiles one kernel. Shared memory holds the rows and ``stages`` tiles of keys and
    values, registers the output; both are held to their budgets by the ahead-of-time tests.
    """
    if dtype == torch.float32:
        # full fp32 products run on the ordinary cores: small tiles, all in registers
        if width > 128:
            return 16, 8, 1
        if rows <= 16:
            return (32, 4, 2) if width <= 64 else (16, 8, 2)
        # the next tile on its way would have no room
        wide_columns = width <= 32 or (every_pair and width <= 64)
        return 32 if wide_columns else 16, 8 if every_pair and width > 32 else 4, 1
    if width > 128:
        return (32, 4 if rows <= 16 else 8, 2) if rows <= 32 else (16, 8, 2)
    if rows <= 32:
        return 64, 4, 4 if width <= 64 else 3
    if capability < (9, 0):
        # products take both sides from registers
        return (32 if width <= 64 else 16, 8, 2)
    warps = 8 if rows >= 128 or every_pair else 4
    if capability >= (10, 0) and width > 64:
        return 32, warps, 2
    return 64 if width <= 64 or (rows >= 128 and not every_pair) else 32, warps, 3


def programs(dtype: torch.dtype, width: int, rows: int, capability: tuple[int, int]) -> int:
    """How many programs share a multiprocessor's registers, or 0; see :class:`~sieve_attn.attend.triton.launch.Launch`."""
    if width > 32 or capability >= (9, 0):
        return 0
    if dtype == torch.float32:
        return 5 if rows <= 16 else 0
    return 2 if rows > 32 else 0


def most_rows(dtype: torch.dtype, width: int, capability: tuple[int, int]) -> int:
    """How many rows a program may hold: their output lies in registers."""
    if dtype == torch.float32:
        return 32 if width <= 128 else 16
    return 128 if width <= 128 and capability >= (9, 0) else 64


def launch_forward(
    call: Call, selection: Selection, out: Tensor, lse: Tensor, capability: tuple[int, int] | None = None
) -> Launch:
    """The launch that writes ``out`` and ``lse``, for the device of the call or for a card of another ``capability``."""
    capability = capability or door.capability(call.query)
    batch, q_heads, q_len, dim = call.query.shape
    kv_heads, v_dim = call.key.shape[1], call.value.shape[3]
    block_d, block_v = power_of_two(dim, 16), power_of_two(v_dim, 16)
    width, group = max(block_d, block_v), q_heads // kv_heads
    most = most_rows(call.query.dtype, width, capability)
    part = selection.blocks
    q_block = min(power_of_two(q_len), most) if part is None else part.q_block
    shared = part is None or part.heads != q_heads or group == 1
    rows, pack = packing(q_block, group, shared, most)
    columns, warps, stages = tiling(call.query.dtype, width, rows * pack, capability, every_pair(call, selection))
    together = programs(call.query.dtype, width, rows * pack, capability)
    grid = grid_of(selection, q_block, columns)
    mask, bias = over_pairs(call.mask, call), over_pairs(call.bias, call)
    pieces, packs = -(-grid.q_block // rows), kv_heads * -(-group // pack)
    arguments = {
        "query": view(call.query), "key": view(call.key), "value": view(call.value), "out": view(out), "lse": lse, "mask": mask,
        "bias": bias, "key_mask": key_mask_view(call), "sink": call.sink, "sight": sight_of(call), "chosen": grid.chosen,
        "table": None, "lengths": None, "scale": float(call.scale), "softcap": call.softcap, "batch_size": batch,
        "q_heads": q_heads, "kv_heads": kv_heads, "chosen_heads": grid.heads, "q_len": q_len, "kv_len": call.kv_len,
        "tiles": grid.tiles, "pieces": pieces, "packs": packs, "DIM": dim, "V_DIM": v_dim, "BLOCK_D": block_d,
        "BLOCK_V": block_v, "ROWS": rows, "PACK": pack, "BLOCK_N": columns, "Q_BLOCK": grid.q_block, "KV_BLOCK": grid.kv_block,
        "CAUSAL": bool(call.causal), "RANGES": grid.ranges, "PAGE_SIZE": 0, "SPLITS": 1,
        "WIDE": wide(call, view(call.query), view(out), mask, bias),
    }  # fmt: skip
    return Launch(attend_kernel, grid.tiles * pieces * packs * batch, arguments, warps, stages, together)


def attend(call: Call, selection: Selection, splits: int | None = None) -> tuple[Tensor, Tensor]:
    """``(output, lse)``; see :func:`sieve_attn.attend.triton.attend`. ``splits``: programs that share a tile's keys."""
    out, lse = results(call.query, call.value)
    for launch in shared_out(launch_forward(call, selection, out, lse), selection, call.query, splits):
        launch.run(call.query)
    return out, lse


def attend_paged(pages: Pages, splits: int | None = None) -> tuple[Tensor, Tensor]:
    """``(output, lse)`` of a few queries a sequence over a cache in pages; see :mod:`sieve_attn.attend.paged`."""
    out, lse = results(pages.query, pages.value)
    table, q_len, page_size = pages.block_table.contiguous(), pages.query.shape[2], pages.key.shape[2]
    longest = table.shape[1] * page_size
    selection = pages.selection
    if selection is None:
        selection = Selection((Ranges(q_len, longest, prefix=longest),))
    call = Call(
        pages.query, pages.key, pages.value, causal=True, scale=pages.scale, softcap=pages.softcap, window=pages.window,
        sink=pages.sink,
    )  # fmt: skip
    launch = from_pages(launch_forward(call, selection, out, lse), table, pages.lengths, page_size)
    for part in shared_out(launch, selection, pages.query, splits):
        part.run(pages.query)
    return out, lse


def from_pages(launch: Launch, table: Tensor, lengths: Tensor, page_size: int) -> Launch:
    """The same over a cache in pages: key ``j`` of sequence ``b`` lies in page ``table[b, j // page_size]``."""
    paged = {
        "table": View(table, table.stride(0), 0, 0, 1), "lengths": lengths, "kv_len": table.shape[1] * page_size,
        "PAGE_SIZE": page_size,
    }  # fmt: skip
    return replace(launch, arguments=launch.arguments | paged)


def results(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Room for an output and its lse."""
    batch, heads, q_len, _ = query.shape
    out = torch.empty((batch, heads, q_len, value.shape[3]), dtype=query.dtype, device=query.device)
    return out, torch.empty((batch, heads, q_len), dtype=torch.float32, device=query.device)
