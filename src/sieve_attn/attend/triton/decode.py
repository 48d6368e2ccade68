"""Few queries against many keys: several programs share a tile's keys, and a second kernel merges what they found.

The forward kernel does the work, with the query heads of a group side by side so that every key is read once, from one array or
from pages; here is how many programs share, and the merge. How keys are shared depends on shapes and the device alone.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from sieve_attn import triton as door
from sieve_attn.attend.triton.launch import Launch, power_of_two, view
from sieve_attn.attend.triton.tiles import LN2, LOG2E
from sieve_attn.types import Blocks, Selection

MOST_SPLITS = 64


@triton.jit(do_not_specialize=["rows", "q_len"])
def merge_kernel(
    parts, part_lse, out, lse, sink, rows, q_heads, q_len,
    V_DIM: tl.constexpr, BLOCK_V: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One row: its parts weighted by what they hold of its mass, and the sink, which belongs to no part."""
    row = tl.program_id(0).to(tl.int64)
    number = tl.arange(0, BLOCK_S)
    channel = tl.arange(0, BLOCK_V)
    at = number * rows + row
    log = tl.load(part_lse + at, mask=number < SPLITS, other=float("-inf"))
    inside = (number < SPLITS)[:, None] & (channel < V_DIM)[None, :]
    part = tl.load(parts + at[:, None] * V_DIM + channel[None, :], mask=inside, other=0.0)
    top = tl.max(log, 0)
    if sink is not None:
        extra = tl.load(sink + row // q_len % q_heads).to(tl.float32)
        top = tl.maximum(top, extra)
    base = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2((log - base) * LOG2E)
    mass = tl.sum(weight, 0)
    if sink is not None:
        mass += tl.exp2((extra - base) * LOG2E)
    empty = mass == 0.0
    mass = tl.where(empty, 1.0, mass)
    total = tl.sum(weight[:, None] * part, 0) / mass
    found = tl.where(empty, float("-inf"), base + tl.log2(mass) * LN2)
    tl.store(lse + row, tl.where(top == float("inf"), float("inf"), found))
    place = row // q_len // q_heads * out.batch + row // q_len % q_heads * out.head + row % q_len * out.row
    tl.store(out.ptr + place + channel * out.col, total.to(out.ptr.dtype.element_ty), mask=channel < V_DIM)


def splits_of(launch: Launch, selection: Selection, processors: int) -> int:
    """How many programs share a tile's keys: enough for two on every multiprocessor, each with a tile or more of its own."""
    part = selection.parts[0]
    if isinstance(part, Blocks):
        rows = max(part.batch * part.heads * part.tiles, 1)
        keys = -(-part.block_index.shape[0] // rows) * part.kv_block
    else:
        keys = min(part.prefix + part.window * (2 if part.two_sided else 1), part.kv_len)
    wanted = -(-2 * processors // max(launch.grid, 1))
    return max(1, min(wanted, keys // launch.arguments["BLOCK_N"], MOST_SPLITS))


def split(launch: Launch, splits: int, like: Tensor) -> list[Launch]:
    """The launches that compute the same in ``splits`` parts and merge them."""
    if splits == 1:
        return [launch]
    given = launch.arguments
    out, sink = given["out"].ptr, given["sink"]
    batch, q_heads, q_len, v_dim = out.shape
    parts = torch.empty((splits * batch, q_heads, q_len, v_dim), dtype=torch.float32, device=like.device)
    part_lse = torch.empty((splits * batch, q_heads, q_len), dtype=torch.float32, device=like.device)
    first = replace(
        launch,
        grid=launch.grid * splits,
        arguments={**given, "out": view(parts), "lse": part_lse, "sink": None, "SPLITS": splits},
    )
    return [first, merge(parts, part_lse, out, given["lse"], sink, splits, given["BLOCK_V"])]


def merge(parts: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor, sink: Tensor | None, splits: int, block_v: int) -> Launch:
    """The launch that merges ``splits`` parts into ``out`` and ``lse``."""
    batch, q_heads, q_len, v_dim = out.shape
    rows = batch * q_heads * q_len
    arguments = {
        "parts": parts, "part_lse": part_lse, "out": view(out), "lse": lse, "sink": sink, "rows": rows,
        "q_heads": q_heads, "q_len": q_len, "V_DIM": v_dim, "BLOCK_V": block_v, "SPLITS": splits,
        "BLOCK_S": power_of_two(splits, 2),
    }  # fmt: skip
    return Launch(merge_kernel, rows, arguments, 4, 1)


def shared_out(launch: Launch, selection: Selection, like: Tensor, splits: int | None = None) -> list[Launch]:
    """``launch`` in as many parts as the device of ``like`` can use, or in ``splits``."""
    return split(launch, splits_of(launch, selection, door.multiprocessors(like)) if splits is None else splits, like)
