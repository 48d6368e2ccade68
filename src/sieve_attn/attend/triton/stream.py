"""One kernel reads the geometry, decides and attends: the walk of :class:`~sieve_attn.selection.RunningMaximum`.

A program owns the rows of a tile that choose together and one run of keys. It meets the forced keys at both ends first, then
goes through its run from the last step to the first: the balls of a step's blocks against the largest logit met, a list of what
is left, and that list as columns, as in :mod:`sieve_attn.attend.triton.forward`. A block that is passed by is never loaded. The
parts of the runs are merged as those of split decoding are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sieve_attn import triton as door
from sieve_attn.attend.streaming import tile_rows
from sieve_attn.attend.triton.decode import merge
from sieve_attn.attend.triton.forward import fold, restore, results
from sieve_attn.attend.triton.launch import Launch, key_mask_view, power_of_two, view, wide
from sieve_attn.attend.triton.tiles import LN2, LOG2E, capped, finite, load_rows, places, row_places, store_rows
from sieve_attn.geometry.triton.kernels import cap_of
from sieve_attn.selection.kernels import ends
from sieve_attn.selection.triton.choose import compact
from sieve_attn.selection.triton.launch import row_of, rows_in_line, sequence_edges
from sieve_attn.selection.triton.sight import interval, sight, unit_at
from sieve_attn.types import Blocks, Call, Geometry, Selection

UNIT = tl.constexpr(2.0**-24)
COMPACTED = 1024  # units whose lists are written by one launch


@triton.jit
def write_list(listed, block, taken):
    """The blocks that are ``taken``, in order, to the program's own list; returns how many."""
    one = taken.to(tl.int32)
    tl.debug_barrier()  # whoever still reads the list before
    tl.store(listed + tl.cumsum(one, 0) - one, block, taken)
    tl.debug_barrier()
    return tl.sum(one, 0)


@triton.jit
def logits_of(
    step, listed, count, rows, there, low, high, batch, kv_head, key, key_mask, scale, softcap, kv_len,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``(logits, their largest number a row, key, key there)`` of tile ``step`` of the listed columns."""
    column = step * BLOCK_N + tl.arange(0, BLOCK_N)
    here = column < count * SIZE
    found = tl.load(listed + column // SIZE, mask=here, other=0) * SIZE + column % SIZE
    here &= found < kv_len
    found = tl.where(here, found, 0)
    base, offset = places(found, batch, kv_head, key, None, 0, WIDE)
    keys = load_rows(base, offset, here, key.col, DIM, BLOCK_D, True)
    product = tl.dot(rows, tl.trans(keys), input_precision="ieee")
    seen = there[:, None] & here[None, :] & (found[None, :] >= low[:, None]) & (found[None, :] < high[:, None])
    if key_mask is not None:
        place = key_mask.ptr + tl.cast(batch, tl.int64) * key_mask.batch + found * key_mask.col
        seen &= (tl.load(place, mask=here, other=0) != 0)[None, :]
    logit = tl.where(seen, capped(product, scale, softcap), float("-inf"))
    largest = tl.max(tl.where(tl.abs(logit) < float("inf"), logit, float("-inf")), 1)
    return logit, largest, found, here


@triton.jit(do_not_specialize=["q_len", "kv_len", "offset", "lead", "tiles", "blocks", "batch_size"])
def stream_kernel(
    query, key, value, parts, part_lse, mean, radius, key_norm, finite_blocks, before, edges, key_mask, lists, marks, counts,
    scale, softcap, margin, batch_size, q_heads, kv_heads, q_len, kv_len, offset, lead, tiles, blocks, window, sinks, near,
    mean_b, mean_h,
    DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, LANES: tl.constexpr,
    PACK: tl.constexpr, BLOCK_N: tl.constexpr, TILE: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr,
    COLUMNS: tl.constexpr, STEPS: tl.constexpr, RUNS: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr, MASKED: tl.constexpr, SINKS: tl.constexpr,
    NEAR: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Parts [RUNS x batch, q_heads, q_len, v_dim] of the output, their lse, and where ``marks`` [units, blocks] is given what was
    read; ``counts`` [units, RUNS, 3] are blocks read, keys of them, keys seen."""
    pid = tl.program_id(0)
    run = pid % RUNS
    unit = pid // RUNS
    batch, head, tile = unit_at(unit, tiles, HEADS)
    kv_head = head // (HEADS // kv_heads)
    member = tl.arange(0, LANES * PACK)
    lane = member % LANES + tl.where(tile == 0, lead, 0)
    row = tile * TILE - lead + lane
    there = (member // LANES < GROUP) & (lane < TILE) & (row >= 0) & (row < q_len)
    first_head = head * GROUP
    mine = tl.where(there, first_head + member // LANES, first_head)
    row_base, row_offset = row_places(mine, row, there, batch, first_head, query, WIDE)
    rows = load_rows(row_base, row_offset, there, query.col, DIM, BLOCK_D, True)
    norm = tl.sqrt(tl.sum(rows.to(tl.float32) * rows.to(tl.float32), 1)) * (1.0 + DIM * 2.0 * UNIT)

    low, high = interval(row, edges, q_len, kv_len, offset, window, CAUSAL, WINDOW, PACKED, there)
    high = tl.maximum(high, low)
    inner_low = tl.max(tl.where(there, low, 0), 0)
    inner_high = tl.min(tl.where(there, tl.where(low < high, high, 0), kv_len), 0)
    before += batch.to(tl.int64) * (kv_len + 1)
    one = (batch * kv_heads + kv_head).to(tl.int64)
    finite_blocks += one * blocks
    radius += one * blocks
    key_norm += one * blocks
    mean += batch.to(tl.int64) * mean_b + kv_head.to(tl.int64) * mean_h
    lists += pid.to(tl.int64) * COLUMNS

    # the forced keys of the first and the last step that a row sees, before anything else
    sees = there & (low < high)
    first_step = low // SIZE // STEP
    last_step = (high - 1) // SIZE // STEP
    begin = tl.min(tl.where(sees, first_step, 1 << 30), 0)
    begin_last = tl.max(tl.where(sees, first_step, -1), 0)
    stop = tl.max(tl.where(sees, last_step, -1), 0)
    stop_first = tl.maximum(tl.min(tl.where(sees, last_step, 1 << 30), 0), begin_last + 1)
    met = tl.full([LANES * PACK], float("-inf"), tl.float32)
    front = tl.maximum(begin_last + 1 - begin, 0)
    for turn in range(0, front + tl.maximum(stop + 1 - stop_first, 0)):
        step = tl.where(turn < front, begin + turn, stop_first + turn - front)
        block = step * STEP + tl.arange(0, COLUMNS)
        inside = (tl.arange(0, COLUMNS) < STEP) & (block < blocks)
        keys, forced = sight(
            block, low, high, row, there, inner_low, inner_high, finite_blocks, before, blocks, kv_len, offset, sinks, near,
            SIZE, MASKED, SINKS, NEAR,
        )  # fmt: skip
        count = write_list(lists, block, forced & inside)
        takes = sees & ((first_step == step) | (last_step == step))
        for number in range(0, (count * SIZE + BLOCK_N - 1) // BLOCK_N):
            _logit, largest, _found, _here = logits_of(
                number, lists, count, rows, there, low, high, batch, kv_head, key, key_mask, scale, softcap, kv_len,
                DIM, BLOCK_D, BLOCK_N, SIZE, WIDE,
            )  # fmt: skip
            met = tl.maximum(met, tl.where(takes, largest, float("-inf")))

    top = tl.full([LANES * PACK], float("-inf"), tl.float32)
    mass = tl.zeros([LANES * PACK], tl.float32)
    total = tl.zeros([LANES * PACK, BLOCK_V], tl.float32)
    number_read = tile * 0
    keys_read = tile.to(tl.int64) * 0
    keys_seen = tile.to(tl.int64) * 0
    last = tl.minimum(run * STEPS + STEPS - 1, stop)
    for turn in range(0, last + 1 - tl.maximum(run * STEPS, begin)):
        block = (last - turn) * STEP + tl.arange(0, COLUMNS)
        inside = (tl.arange(0, COLUMNS) < STEP) & (block < blocks)
        keys, forced = sight(
            block, low, high, row, there, inner_low, inner_high, finite_blocks, before, blocks, kv_len, offset, sinks, near,
            SIZE, MASKED, SINKS, NEAR,
        )  # fmt: skip
        centre = tl.zeros([LANES * PACK, COLUMNS], tl.float32)
        for channel in range(0, BLOCK_D, CHANNELS):
            at = channel + tl.arange(0, CHANNELS)
            some = tl.load(
                row_base + (row_offset[:, None] + (at * query.col)[None, :]), mask=there[:, None] & (at < DIM)[None, :], other=0.0
            )
            centres = tl.load(
                mean + block.to(tl.int64)[:, None] * DIM + at[None, :], mask=inside[:, None] & (at < DIM)[None, :], other=0.0
            )
            centre = tl.dot(some.to(tl.float32), tl.trans(centres), centre, input_precision="ieee")
        held = tl.maximum(keys, 1).to(tl.float32)
        reached = centre * scale + scale * norm[:, None] * tl.load(radius + block, inside, 0.0)[None, :]
        if softcap is not None:
            reached = cap_of(reached, softcap)
        upper = tl.log(held)[None, :] + reached
        rounding = (held + (DIM + 16)) * UNIT * tl.load(key_norm + block, inside, 0.0)
        upper += rounding[None, :] * (scale * norm)[:, None] + 8 * UNIT * (1.0 + tl.abs(upper))
        left = tl.maximum((block * SIZE)[None, :], low[:, None])
        right = tl.minimum(tl.minimum(block * SIZE + SIZE, kv_len)[None, :], high[:, None])
        # what is no number is not below anything, and kept
        wanted = there[:, None] & (right > left) & ((upper < (met - margin)[:, None]) == 0)
        taken = inside & (keys > 0) & (forced | (tl.max(wanted.to(tl.int32), 0) != 0))
        number_read += tl.sum(taken.to(tl.int32), 0)
        keys_read += tl.sum(tl.where(taken, keys, 0).to(tl.int64), 0)
        keys_seen += tl.sum(tl.where(inside, keys, 0).to(tl.int64), 0)
        if marks is not None:
            tl.store(marks + unit.to(tl.int64) * blocks + block, taken.to(tl.int8), inside)
        count = write_list(lists, block, taken)
        for number in range(0, (count * SIZE + BLOCK_N - 1) // BLOCK_N):
            logit, largest, found, here = logits_of(
                number, lists, count, rows, there, low, high, batch, kv_head, key, key_mask, scale, softcap, kv_len,
                DIM, BLOCK_D, BLOCK_N, SIZE, WIDE,
            )  # fmt: skip
            met = tl.maximum(met, largest)
            base, place = places(found, batch, kv_head, value, None, 0, WIDE)
            values = load_rows(base, place, here, value.col, V_DIM, BLOCK_V, True)
            clean = finite(values)
            total, top, mass = fold(total, top, mass, logit, LOG2E, clean, True)
            if tl.max(tl.max((clean.to(tl.float32) != values.to(tl.float32)).to(tl.int32), 1), 0) > 0:
                total = restore(total, logit, found, here, batch, kv_head, value, None, V_DIM, BLOCK_V, BLOCK_N, 0, WIDE)
    if counts is not None:
        counts += pid.to(tl.int64) * 3
        tl.store(counts, number_read.to(tl.int64))
        tl.store(counts + 1, keys_read)
        tl.store(counts + 2, keys_seen)
    empty = top == float("-inf")
    weight = total / tl.where(empty, 1.0, mass)[:, None]
    log = tl.where(empty, float("-inf"), top + tl.log2(tl.where(empty, 1.0, mass)) * LN2)
    log = tl.where(top == float("inf"), float("inf"), log)
    part = run * batch_size + batch
    tl.store(part_lse + (tl.cast(part, tl.int64) * q_heads + mine) * q_len + row, log, mask=there)
    row_base, row_offset = row_places(mine, row, there, part, first_head, parts, WIDE)
    store_rows(weight, row_base, row_offset, there, parts.col, V_DIM, BLOCK_V)


def tiling(full: bool, width: int, queries: int) -> tuple[int, int, int, int]:
    """``(columns, channels, warps, stages)``; ``channels`` of a product with block means are looked at at once.

    fp32 rows and means must not fill the registers, and a pipeline takes some that only a few rows leave free.
    """
    broad = width > 128
    columns = 16 if full else 64 if width == 64 else 32
    return columns, 32 if width <= 32 else 16, 8 if full or broad else 4, 1 if full or broad or queries > 1 else 2


def launches(
    call: Call, geometry: Geometry, policy: Any, out: Tensor, lse: Tensor, marks: Tensor | None, made: dict[str, Tensor]
) -> list[Launch]:
    """The walk and the merge of its runs; ``made["counts"]`` is filled where there are ``marks``."""
    batch, q_heads, q_len, dim = call.query.shape
    kv_heads, v_dim, device = call.key.shape[1], call.value.shape[3], call.query.device
    size, selector = policy.block_size, policy.selector
    heads = kv_heads if policy.share_group else q_heads
    queries, group = tile_rows(call, policy)
    lanes = power_of_two(queries)
    pack = max(power_of_two(group), 16 // lanes)
    step, steps = selector.step_blocks(size), selector.run // selector.step
    lead = call.lead(policy.query_tile)
    tiles, blocks = -(-(q_len + lead) // policy.query_tile), geometry.blocks
    # a power of two, so that a growing cache compiles no more than a few kernels
    runs = power_of_two(-(-blocks // (step * steps)))
    units = batch * heads * tiles
    block_d, block_v = power_of_two(dim, 16), power_of_two(v_dim, 16)
    masked, packed = call.key_mask is not None, call.cu_seqlens is not None
    before, edges = row_of(device), row_of(device)
    if masked:
        before = torch.nn.functional.pad(call.key_mask.to(torch.int32).cumsum(1, dtype=torch.int32), (1, 0))
    if packed:
        edges = sequence_edges(call)
    sinks, near = ends(policy.keep)
    parts = torch.empty((runs * batch, q_heads, q_len, v_dim), dtype=torch.float32, device=device)
    part_lse = torch.empty((runs * batch, q_heads, q_len), dtype=torch.float32, device=device)
    columns = max(16, step)
    made["counts"] = torch.empty((units, runs, 3), dtype=torch.int64, device=device)
    mean = rows_in_line(geometry.mean, 2)
    columns_read, channels, warps, stages = tiling(call.query.element_size() > 2, max(block_d, block_v), queries)
    arguments = {
        "query": view(call.query.detach()), "key": view(call.key.detach()), "value": view(call.value.detach()),
        "parts": view(parts), "part_lse": part_lse, "mean": mean, "radius": geometry.radius.contiguous(),
        "key_norm": geometry.key_norm.contiguous(), "finite_blocks": geometry.finite.contiguous().view(torch.int8),
        "before": before, "edges": edges, "key_mask": key_mask_view(call),
        "lists": torch.empty(units * runs * columns, dtype=torch.int32, device=device), "marks": marks,
        "counts": None if marks is None else made["counts"], "scale": float(call.scale), "softcap": call.softcap,
        "margin": float(selector.margin), "batch_size": batch, "q_heads": q_heads, "kv_heads": kv_heads, "q_len": q_len,
        "kv_len": call.kv_len, "offset": call.offset, "lead": lead, "tiles": tiles, "blocks": blocks,
        "window": call.window or 0, "sinks": sinks, "near": near, "mean_b": mean.stride(0), "mean_h": mean.stride(1),
        "DIM": dim, "V_DIM": v_dim, "BLOCK_D": block_d, "BLOCK_V": block_v, "LANES": lanes, "PACK": pack,
        "BLOCK_N": columns_read, "TILE": policy.query_tile, "SIZE": size, "STEP": step, "COLUMNS": columns,
        "STEPS": steps, "RUNS": runs, "HEADS": heads, "GROUP": group, "CAUSAL": bool(call.causal),
        "WINDOW": call.window is not None, "PACKED": packed, "MASKED": masked, "SINKS": sinks > 0, "NEAR": near > 0,
        "CHANNELS": channels,
        "WIDE": wide(call, view(call.query), view(parts)),
    }  # fmt: skip
    first = Launch(stream_kernel, units * runs, arguments, warps, stages)
    return [first, merge(parts, part_lse, out, lse, call.sink, runs, block_v)]


def attend(call: Call, geometry: Geometry, policy: Any, marked: bool) -> tuple[Tensor, Tensor, Callable[[], tuple]]:
    """See :func:`sieve_attn.attend.streaming.attend`."""
    batch, q_heads, q_len, _ = call.query.shape
    heads = call.key.shape[1] if policy.share_group else q_heads
    out, lse = results(call.query, call.value)
    lead = call.lead(policy.query_tile)
    tiles = -(-(q_len + lead) // policy.query_tile)
    units, blocks = batch * heads * tiles, geometry.blocks
    # what lies before and behind what a tile sees is marked by nobody
    marks = torch.zeros(units * blocks + COMPACTED, dtype=torch.int8, device=call.query.device) if marked else None
    made: dict[str, Tensor] = {}
    for launch in launches(call, geometry, policy, out, lse, marks, made):
        launch.run(call.query)

    def chosen() -> tuple:
        number, kept, visible = made["counts"].sum(1).unbind(-1)
        number = number.to(torch.int32)
        row_ptr = torch.zeros(units + 1, dtype=torch.int64, device=marks.device)
        index = torch.empty(units * blocks, dtype=torch.int32, device=marks.device)
        with door.launching_on(call.query):
            for first in range(0, units, COMPACTED):
                count = min(COMPACTED, units - first)
                compact[(count,)](
                    marks[first * blocks :], number, row_ptr, index, first, count, blocks, UNITS=power_of_two(count),
                    CHUNK=min(1024, max(64, power_of_two(blocks))),
                )  # fmt: skip
        part = Blocks(row_ptr, index, batch, heads, q_len, call.kv_len, policy.query_tile, policy.block_size, lead)
        shape = (batch, heads, tiles)
        dense = torch.zeros(shape, dtype=torch.bool, device=marks.device)
        return Selection((part,)), (kept.reshape(shape), visible.reshape(shape)), dense

    return out, lse, chosen
