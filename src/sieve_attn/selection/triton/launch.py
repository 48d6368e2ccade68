"""Launches of the gate: what is known before it runs, the chunks of units, and the lists that come out."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from sieve_attn import triton as door
from sieve_attn.geometry.sketch import CALIBRATION
from sieve_attn.scores import KeySketch
from sieve_attn.selection import triton as gate
from sieve_attn.selection.kernels import ends
from sieve_attn.selection.mass import Mass
from sieve_attn.selection.threshold import RelativeThreshold, Threshold
from sieve_attn.selection.top_k import TargetSparsity, TopK
from sieve_attn.selection.triton import choose as choosing
from sieve_attn.selection.triton import score as scoring
from sieve_attn.types import Blocks, Call, Geometry, Selection

CHUNK_BYTES = 1 << 26  # estimates that exist at a time
MOST_UNITS = 1024  # of a chunk
INDEX_BYTES = 1 << 30  # lists of more room than that are sized by what was found, for which the host waits
FEW_QUERIES = 16  # up to these the planes are unpacked where they are scored; more share one unpacked copy
LANES_TIMES_BLOCKS = 8192  # that one program looks at in one step
PROGRAMS = 4  # a multiprocessor, at the least, where the work can be cut so


@dataclass(frozen=True)
class Grid:
    """The units of a call and how their rows and blocks are cut."""

    batch: int
    heads: int  # that choose
    tiles: int
    lead: int
    blocks: int
    group: int  # query heads of a unit
    slots: int  # rows that a unit scores, of each of its heads
    stride: int
    rows_at_once: int
    blocks_at_once: int
    each: int  # keys of a block, padded
    padded: int  # channels

    @property
    def units(self) -> int:
        return self.batch * self.heads * self.tiles

    @property
    def rows(self) -> int:
        return -(-self.group * self.slots // self.rows_at_once) * self.rows_at_once


def grid_of(call: Call, policy: Any) -> Grid:
    batch, q_heads = call.query.shape[:2]
    kv_heads, tile = call.key.shape[1], policy.query_tile
    heads = kv_heads if policy.share_group else q_heads
    lead = call.lead(tile)
    stride = 1 if policy.selector.every_query else policy.query_stride
    # as many as a tile has; a few queries alone need no tile around them
    slots = min(-(-tile // stride), -(-(call.q_len - 1) // stride) + 1)
    each = triton.next_power_of_2(policy.block_size)
    sketch = isinstance(policy.scorer, KeySketch)
    group = q_heads // heads
    # the branch for queries before the calibration of the sketch needs registers of its own
    early = sketch and (call.key_mask is not None or call.offset < max(CALIBRATION, policy.block_size))
    rows_at_once = min(32 if early else 64, max(16, triton.next_power_of_2(group * slots)))
    return Grid(
        batch, heads, -(-(call.q_len + lead) // tile), lead, -(-call.kv_len // policy.block_size), group, slots, stride,
        rows_at_once=rows_at_once,
        blocks_at_once=max(1, (64 if rows_at_once > 16 else 128) // each) if sketch else 16, each=each,
        padded=max(32, triton.next_power_of_2(call.query.shape[3])),
    )  # fmt: skip


def may_forget(call: Call, policy: Any) -> bool:
    """Whether a query that sees keys might be left with none, from what is known before anything runs."""
    selector, single = policy.selector, call.q_len == 1
    if isinstance(selector, RelativeThreshold):
        return False  # every query keeps its best block
    if isinstance(selector, Mass):
        return not (selector.mass > 0 and (policy.query_stride == 1 or single))
    if isinstance(selector, Threshold):
        return selector.threshold != -math.inf
    if single:
        return False  # what is seen by one query is seen by all heads of its unit
    # else every query sees a block that is cut, its own, and cut blocks are kept
    plain = call.causal and call.window is None and call.cu_seqlens is None and call.key_mask is None
    aligned = policy.query_tile % policy.block_size == 0 and (call.offset + 1) % policy.block_size != 0
    return not (plain and aligned and policy.block_size > 1 and call.offset >= 0)


def capacity(call: Call, policy: Any, grid: Grid) -> int:
    """Room for every block that the tiles may see."""
    if not call.causal:
        return grid.units * grid.blocks
    ends = ((t + 1) * policy.query_tile - grid.lead for t in range(grid.tiles))
    seen = sum(min(grid.blocks, -(-max(0, call.offset + min(end, call.q_len)) // policy.block_size)) for end in ends)
    return grid.batch * grid.heads * seen


def select(call: Call, geometry: Geometry, policy: Any) -> tuple[Selection, tuple[Tensor, Tensor], Tensor]:
    """See ``selection.triton.select``."""
    grid = grid_of(call, policy)
    query = call.query.detach()
    shape = (grid.batch, grid.heads, grid.tiles)

    def empty(dtype: torch.dtype, *size: int) -> Tensor:
        return torch.empty(size, dtype=dtype, device=query.device)

    number = empty(torch.int32, grid.units)
    kept, visible, dense = empty(torch.int64, *shape), empty(torch.int64, *shape), empty(torch.bool, *shape)
    row_ptr = torch.zeros(grid.units + 1, dtype=torch.int64, device=query.device)
    room = capacity(call, policy, grid)
    with door.launching_on(query), torch.no_grad():
        run = _Run(call, geometry, policy, grid)
        late = 4 * room > INDEX_BYTES
        index = empty(torch.int32, 0 if late else room)
        for first in range(0, grid.units, run.at_once):
            units = min(run.at_once, grid.units - first)
            run.choose(first, units, number, kept, visible, dense)
            if late:
                # too much to have room for everything: the lists of each chunk are as long as they are
                index = torch.cat([index, empty(torch.int32, int(number[first : first + units].sum()))])
            run.list(first, units, number, row_ptr, index)
    blocks = Blocks(
        row_ptr, index, grid.batch, grid.heads, call.q_len, call.kv_len, policy.query_tile, policy.block_size, grid.lead
    )
    return Selection((blocks,)), (kept, visible), dense


class _Run:
    """One call's scratch memory and the arguments that its launches share."""

    def __init__(self, call: Call, geometry: Geometry, policy: Any, grid: Grid):
        self.call, self.policy, self.grid = call, policy, grid
        scorer, selector = policy.scorer, policy.selector
        query, key = call.query.detach(), call.key.detach()
        device, dim = query.device, int(query.shape[3])
        sketched = isinstance(scorer, KeySketch)
        masked, packed = call.key_mask is not None, call.cu_seqlens is not None
        sinks, near = ends(policy.keep)
        self.everything = (isinstance(selector, Threshold) and selector.threshold == -math.inf) or (
            isinstance(selector, Mass) and selector.mass == 1.0
        )
        self.forgets = not self.everything and may_forget(call, policy)
        turns = selector.may_turn_dense and policy.dense_above < 1.0

        part = call.key_mask.view(torch.uint8) if masked else row_of(device)
        before = row_of(device)
        if masked:
            before = torch.nn.functional.pad(call.key_mask.to(torch.int32).cumsum(1, dtype=torch.int32), (1, 0))
        edges = sequence_edges(call) if packed else row_of(device)
        calibration, calibrated, careful = _calibration(call, geometry, policy) if sketched else (0, row_of(device), False)
        sketch = geometry.sketch if sketched else None
        bits = min(scorer.bits, sketch.bits) if sketched else 0
        expanded = sketched and call.q_len > FEW_QUERIES and not self.everything
        planes, key_scale, channel_scale = (row_of(device),) * 3
        if sketched:
            planes, key_scale = rows_in_line(sketch.planes, 3), rows_in_line(sketch.scale, 2)
            channel_scale = sketch.channel_scale.contiguous()
        mean, count = rows_in_line(geometry.mean, 2), rows_in_line(geometry.count, 2)
        radius = count if geometry.radius is None else rows_in_line(geometry.radius, 2)
        if radius.stride() != count.stride():
            radius, count = radius.contiguous(), count.contiguous()
        codes = row_of(device)
        plane_strides = planes.stride()[:3] if sketched else (0, 0, 0)
        if expanded:
            codes = torch.empty((*key.shape[:3], grid.padded), dtype=torch.int8, device=device)
            scoring.expand[(triton.cdiv(call.kv_len, 64) * key.shape[0] * key.shape[1],)](
                planes, codes, *plane_strides, key.shape[1], call.kv_len, dim=dim, BITS=bits, PADDED=grid.padded, ROWS=64
            )
        self.scored = (
            query, key, codes, planes, key_scale, channel_scale, mean, radius, count, part, before, edges, calibrated,
        )  # fmt: skip
        self.places = (call.q_len, call.kv_len, call.offset, grid.lead, grid.tiles, grid.blocks)
        self.calibration = calibration
        self.window = call.window or 0
        self.cap = call.softcap or 1.0
        self.strides = (
            *query.stride(), *key.stride(), *(part.stride() if masked else (0, 0)), *plane_strides,
            *(key_scale.stride()[:2] if sketched else (0, 0)), *mean.stride()[:2], *count.stride()[:2],
        )  # fmt: skip
        lanes = max(2, triton.next_power_of_2(min(policy.query_tile, call.q_len)))
        self.seen = {
            "TILE": policy.query_tile, "LANES": lanes, "CAUSAL": bool(call.causal),
            "WINDOW": call.window is not None, "PACKED": packed, "MASKED": masked, "SIZE": policy.block_size,
        }  # fmt: skip
        self.heads = {"heads": grid.heads, "KV_EACH": grid.heads // key.shape[1]}
        self.scorer = {
            "GROUP": grid.group, "dim": dim, "CAREFUL": careful, "SCORER": gate.SCORERS[type(scorer)],
            "ROUNDED": sketched and scorer.query_bits is not None, "BITS": bits, "SKETCH_BITS": sketch.bits if sketched else 0,
            "EXPANDED": expanded, "CAPPED": call.softcap is not None, "EACH": grid.each, "BLOCKS": grid.blocks_at_once,
            "PADDED": grid.padded, "ROWS": grid.rows_at_once,
        }  # fmt: skip
        self.scorer_of_few = self.scorer | {"ROWS": 16} | ({} if sketched else {"BLOCKS": 2 * grid.blocks_at_once})
        self.warps = 8 if grid.rows_at_once > 16 else 4
        self.forced = {"SINKS": sinks > 0, "NEAR": near > 0}
        self.ends = (sinks, near)
        self.turns = turns
        finite = rows_in_line(geometry.finite, 2)
        self.frame = (finite.view(torch.int8), before, edges, *finite.stride()[:2])
        self.chunk = min(1024, max(64, min(triton.next_power_of_2(grid.blocks), LANES_TIMES_BLOCKS // lanes)))
        self.rows_chosen = max(1, min(64, grid.rows, 2048 // self.chunk))
        self.limit = selector.blocks if isinstance(selector, TopK) else 0
        share = 1.0 - selector.sparsity if isinstance(selector, TargetSparsity) else 0.0
        self.share_bits = struct.unpack("<q", struct.pack("<d", share))[0]
        self.amount = {Threshold: "threshold", RelativeThreshold: "margin", Mass: "mass"}.get(type(selector))
        self.amount = float(getattr(selector, self.amount)) if self.amount else 0.0
        self._scratch(device)

    def _scratch(self, device: torch.device) -> None:
        grid = self.grid
        room = max(1, grid.rows * grid.blocks * 4)
        self.at_once = max(1, min(grid.units, MOST_UNITS, CHUNK_BYTES // room))
        steps = triton.cdiv(grid.blocks, grid.blocks_at_once)
        row_tiles = grid.rows // grid.rows_at_once
        programs = PROGRAMS * door.multiprocessors(self.scored[0])
        self.splits = max(1, min(steps, 64, programs // max(1, self.at_once * row_tiles)))
        self.span = triton.cdiv(steps, self.splits) * grid.blocks_at_once
        rows = self.at_once * grid.rows

        def empty(dtype: torch.dtype, *size: int) -> Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        if self.everything:
            rows = 1
        self.estimate = empty(torch.float32, rows * grid.blocks)
        self.parts = (empty(torch.float32, rows * self.splits), empty(torch.float32, rows * self.splits))
        self.row = (empty(torch.float32, rows), empty(torch.float32, rows))
        self.level = empty(torch.int32, self.at_once * grid.blocks)
        self.sights = empty(torch.int32, self.at_once * grid.blocks)
        self.marks = empty(torch.int8, self.at_once * grid.blocks + self.chunk)
        self.forgotten = empty(torch.int32, self.at_once)

    def choose(self, first: int, units: int, number: Tensor, kept: Tensor, visible: Tensor, dense: Tensor) -> None:
        """Mark the blocks of ``units`` units from ``first`` on."""
        grid, policy = self.grid, self.policy
        row_tiles = grid.rows // grid.rows_at_once
        shared = self.heads | self.seen
        if not self.everything:
            scoring.score[(units, row_tiles, self.splits)](
                *self.scored, self.estimate, *self.parts, first, *self.places, self.span, self.calibration, self.window,
                float(self.call.scale), float(self.cap), *self.strides, STRIDE=grid.stride, SLOTS=grid.slots, **shared,
                **self.scorer, num_warps=self.warps, num_stages=2, **door.PLAIN,
            )  # fmt: skip
        found = (number, kept, visible, dense.view(torch.int8))
        choosing.choose[(units,)](
            self.estimate, *self.parts, *self.row, self.level, self.sights, self.marks, *found, self.forgotten, *self.frame,
            first, *self.places, grid.rows, self.splits, self.window, *self.ends, self.limit,
            self.share_bits, self.amount, float(policy.dense_above), RULE=gate.RULES[type(policy.selector)],
            EVERYTHING=self.everything, MAY_FORGET=self.forgets, MAY_TURN=self.turns, **shared, **self.forced,
            ROWS=self.rows_chosen, SPLITS=triton.next_power_of_2(self.splits), CHUNK=self.chunk, num_warps=8, **door.PLAIN,
        )  # fmt: skip
        if self.forgets:
            choosing.remember[(units,)](
                *self.scored, self.sights, self.marks, *found, self.forgotten, first, *self.places, self.calibration, self.window,
                float(self.call.scale), float(self.cap), float(policy.dense_above), *self.strides, MAY_TURN=self.turns, **shared,
                **self.scorer_of_few, CHUNK=min(64, self.chunk), num_warps=8, num_stages=2, **door.PLAIN,
            )  # fmt: skip

    def list(self, first: int, units: int, number: Tensor, row_ptr: Tensor, index: Tensor) -> None:
        """Write what was marked behind what is listed already."""
        choosing.compact[(units,)](
            self.marks, number, row_ptr, index, first, units, self.grid.blocks, UNITS=triton.next_power_of_2(self.at_once),
            CHUNK=self.chunk,
        )  # fmt: skip


def row_of(device: torch.device) -> Tensor:
    """Stands for an array that a launch does not read."""
    return torch.empty(1, dtype=torch.int32, device=device)


def rows_in_line(x: Tensor, axis: int) -> Tensor:
    """``x`` such that everything from ``axis`` on lies side by side; a streamed geometry does, and is read where it lies."""
    one = x[(0,) * axis]
    return x if one.is_contiguous() else x.contiguous()


def sequence_edges(call: Call) -> Tensor:
    """[2, q_len] int32: where the packed sequence of each query begins and ends."""
    edges = call.cu_seqlens.to(call.query.device)
    which = torch.searchsorted(edges, torch.arange(call.q_len, device=edges.device), right=True)
    low = torch.where(which > 0, edges[(which - 1).clamp_min(0)], 0)
    high = torch.where(which < len(edges), edges[which.clamp_max(len(edges) - 1)], call.kv_len)
    return torch.stack([low, high]).to(torch.int32)


def _calibration(call: Call, geometry: Geometry, policy: Any) -> tuple[int, Tensor, bool]:
    """``(end, ends [batch, kv_heads], careful)``: the place behind the last key that calibrated the sketch, beyond ``kv_len``
    where there are too few; and whether a query may come before it."""
    size, never = policy.block_size, call.kv_len + 1
    if call.key_mask is None:
        end = -(-CALIBRATION // size) * size if call.kv_len >= CALIBRATION else never
        end = min(end, call.kv_len) if end != never else never
        # the last of the causal queries before the end sees it
        careful = end == never or not (
            call.offset >= end or (not call.causal and call.window is None and call.cu_seqlens is None)
        )
        return end, row_of(call.query.device), careful
    known = geometry.count.cumsum(-1)
    ends = ((known < CALIBRATION).sum(-1) + 1) * size
    ends = torch.where(known[..., -1] < CALIBRATION, never, ends.clamp_max(call.kv_len)).to(torch.int32)
    return 0, ends.contiguous(), True
