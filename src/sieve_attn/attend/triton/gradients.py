"""The backward pass as launches: the selection turned round on the device, then dQ, then dK and dV."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sieve_attn import triton as door
from sieve_attn.attend.triton.backward_kernels import key_kernel, query_kernel, shift_kernel
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
from sieve_attn.types import Blocks, Call, Selection


class Turned(NamedTuple):
    """The selection by columns: for each (sequence, head, block) the tiles that keep it, in order."""

    ptr: Any  # [batch * heads * blocks + 1] int64
    tile: Any  # [entries] int32
    entry: Any  # [entries] int64: where each stands in the selection, or None where nobody asks
    batch: Any
    head: Any


def turned(part: Blocks) -> Turned:
    """One stable sort of a fixed size: nothing waits for the device, and equal selections give equal bits."""
    like, groups = part.block_index, part.batch * part.heads
    row_ptr, index = part.row_ptr.to(torch.int64).contiguous(), like.to(torch.int64)
    entry = torch.arange(like.shape[0], device=like.device)
    row = torch.searchsorted(row_ptr[1:], entry, right=True)
    there = (entry >= row_ptr[0]) & (row < groups * part.tiles) & (index >= 0) & (index < part.blocks)
    column = torch.where(there, row // part.tiles * part.blocks + index, groups * part.blocks)
    kind = torch.int32 if groups * part.blocks < 2**31 else torch.int64
    column, order = torch.sort(column.to(kind), stable=True)
    edges = torch.arange(groups * part.blocks + 1, dtype=kind, device=like.device)
    return Turned(
        torch.searchsorted(column, edges), (row % part.tiles).to(torch.int32)[order],
        None if part.row_mask is None else order, 0 if part.batch == 1 else part.heads * part.blocks,
        0 if part.heads == 1 else part.blocks,
    )  # fmt: skip


def tiling(
    dtype: torch.dtype, width: int, kernel: str, kv_block: int | None, capability: tuple[int, int], every_pair: bool = False
) -> tuple[int, int, int, int]:
    """``(most rows, columns, warps, stages)`` of a kernel; see :func:`sieve_attn.attend.triton.forward.tiling`.

    dQ holds its rows' gradients in registers and looks at keys; dK and dV hold those of their keys and look at rows.
    """
    old = capability < (9, 0)
    if dtype == torch.float32:
        if width > 64:
            return 16, 16, 4 if width <= 128 and kernel == "query" and every_pair else 8, 1
        return 32, 16 if (kernel == "key") + (width <= 32) + every_pair > 1 else 32, 4, 1
    if kernel == "query":
        if width > 128:
            return 32, 32, 8, 1
        if old:
            return (64, 32, 8, 2) if width > 64 else (64, 16, 4, 2)
        return 128, 32 if width <= 64 and (every_pair or (width <= 32 and capability >= (10, 0))) else 64, 8, 2
    limit = 32 if width > 128 or (old and width <= 64) else 64 if old else 128
    columns = min(limit, power_of_two(kv_block or 128, 16))
    if width <= 64 and not old:
        return 32 if columns == 128 and capability >= (10, 0) else 64, columns, 8 if columns == 128 or every_pair else 4, 2
    if 64 < width <= 128 and every_pair:
        return 64, min(columns, 32), 8, 2
    rows = 32 if width > 128 or width <= 32 or columns >= 64 else 64 if columns == 32 or old else 128
    return rows, columns, 8, 2 if width <= 128 else 1


def programs(
    dtype: torch.dtype, width: int, kernel: str, columns: int, warps: int, capability: tuple[int, int], every_pair: bool
) -> int:
    """How many programs share a multiprocessor's registers, or 0; see :class:`~sieve_attn.attend.triton.launch.Launch`."""
    if dtype == torch.float32 or every_pair:
        return 0
    # 12.0 has no memory for the results of products: they lie in registers, and more of those are wanted
    if capability[0] == 10 and width <= 32:
        return {("query", 8): 2, ("key", 4): 3}.get((kernel, warps), 0)
    return 2 if capability < (9, 0) and kernel == "key" and 64 < width <= 128 and columns == 16 else 0


def launch_shift(out: Tensor, lse: Tensor, grad_output: Tensor, grad_lse: Tensor, shift: Tensor) -> Launch:
    v_dim = out.shape[3]
    block_v = power_of_two(v_dim, 16)
    rows, number = max(4096 // block_v, 1), lse.numel()
    batch, head, row = grad_lse.stride()
    given = view(grad_lse[..., None])._replace(batch=batch, head=head, row=row)
    arguments = {
        "grad": view(grad_output), "out": view(out), "lse": lse, "grad_lse": given, "shift": shift, "rows": number,
        "q_heads": out.shape[1], "q_len": out.shape[2], "V_DIM": v_dim, "BLOCK_V": block_v, "ROWS": rows,
    }  # fmt: skip
    return Launch(shift_kernel, -(-number // rows), arguments, 4, 1)


def launch_backward(
    call: Call, selection: Selection, grad_output: Tensor, lse: Tensor, shift: Tensor, made: dict[str, Tensor],
    capability: tuple[int, int] | None = None,
) -> Iterator[Launch]:  # fmt: skip
    """Launches that fill ``made``: query, key, value, and one of pair_bias, row_sums and key_sums where there is a bias."""
    capability = capability or door.capability(call.query)
    batch, q_heads, q_len, dim = call.query.shape
    kv_heads, v_dim = call.key.shape[1], call.value.shape[3]
    block_d, block_v = power_of_two(dim, 16), power_of_two(v_dim, 16)
    width, group = max(block_d, block_v), q_heads // kv_heads
    mask, bias, part = over_pairs(call.mask, call), over_pairs(call.bias, call), selection.blocks
    shared = part is None or part.heads != q_heads or group == 1
    pair_bias, laden = made.get("pair_bias"), every_pair(call, selection)
    place = None if pair_bias is None else view(pair_bias.expand(batch, q_heads, q_len, call.kv_len))
    common = {
        "query": view(call.query), "key": view(call.key), "value": view(call.value), "grad": view(grad_output), "lse": lse,
        "shift": shift, "mask": mask, "bias": bias, "key_mask": key_mask_view(call), "sight": sight_of(call),
        "scale": float(call.scale), "softcap": call.softcap, "q_heads": q_heads, "kv_heads": kv_heads, "q_len": q_len,
        "kv_len": call.kv_len, "DIM": dim, "V_DIM": v_dim, "BLOCK_D": block_d, "BLOCK_V": block_v, "CAUSAL": bool(call.causal),
        "WIDE": wide(
            call, view(call.query), view(grad_output), view(made["query"]), mask, bias, place, keys=(made["key"], made["value"])
        ),
    }  # fmt: skip

    def plan(kernel: str, one_head: bool):
        most, columns, warps, stages = tiling(call.query.dtype, width, kernel, part and part.kv_block, capability, laden)
        q_block = min(power_of_two(q_len), most) if part is None else part.q_block
        rows, pack = packing(q_block, group, shared and not one_head, most)
        if kernel == "query" and rows * pack < most and width <= 128:
            columns, warps = (64 if capability >= (10, 0) and width > 64 else min(columns, 32)), 8 if laden else 4
        grid = grid_of(selection, q_block, columns)
        sizes = {
            **common, "chosen": grid.chosen, "chosen_heads": grid.heads, "pieces": -(-grid.q_block // rows), "ROWS": rows,
            "PACK": pack, "BLOCK_N": columns, "Q_BLOCK": grid.q_block, "KV_BLOCK": grid.kv_block, "RANGES": grid.ranges,
        }  # fmt: skip
        together = programs(call.query.dtype, width, kernel, columns, warps, capability, laden)
        return grid, sizes, (warps, stages, together)

    # a bias that sequences or heads share is added to by one launch after another
    turns = [(0, batch, 0, None)]
    if pair_bias is not None:
        over_batch = [(b, 1) for b in range(batch)] if pair_bias.shape[0] == 1 else [(0, batch)]
        over_heads = [(h, 1) for h in range(q_heads)] if pair_bias.shape[1] == 1 else [(0, q_heads)]
        turns = [(*b, *h) for b, h in product(over_batch, over_heads)]
    grid, sizes, threads = plan("query", pair_bias is not None)
    for first_batch, sequences, first_pack, packs in turns:
        packs = kv_heads * -(-group // sizes["PACK"]) if packs is None else packs
        own = {
            **sizes, "grad_query": view(made["query"]), "grad_bias": place, "row_sums": made.get("row_sums"),
            "tiles": grid.tiles, "packs": packs, "first_batch": first_batch, "first_pack": first_pack,
        }  # fmt: skip
        yield Launch(query_kernel, grid.tiles * sizes["pieces"] * packs * sequences, own, *threads)
    grid, sizes, threads = plan("key", "key_sums" in made)
    blocks = -(-call.kv_len // grid.kv_block)
    own = {
        **sizes, "grad_key": view(made["key"]), "grad_value": view(made["value"]), "key_sums": made.get("key_sums"),
        "blocks": blocks, "SHARED": shared and "key_sums" not in made,
        "turned": Turned(None, None, None, 0, 0) if part is None else turned(part),
    }  # fmt: skip
    parts = -(-grid.kv_block // sizes["BLOCK_N"])
    yield Launch(key_kernel, parts * blocks * kv_heads * batch, own, *threads)


def backward(
    call: Call, selection: Selection, grad_output: Tensor, grad_lse: Tensor, output: Tensor, lse: Tensor
) -> dict[str, Tensor]:
    """Gradients of query, key and value, and of bias and sink where the call has them."""
    lse = lse.contiguous()
    shift = torch.empty_like(lse)
    made = {n: torch.empty(getattr(call, n).shape, dtype=call.query.dtype, device=lse.device) for n in ("query", "key", "value")}
    batch, heads, q_len = lse.shape
    if call.bias is not None:
        kind = "row_sums" if call.bias.shape[3] == 1 else "key_sums" if call.bias.shape[2] == 1 else "pair_bias"
        size = {"row_sums": (batch, heads, q_len), "key_sums": (batch, heads, call.kv_len), "pair_bias": call.bias.shape}[kind]
        made[kind] = torch.zeros(size, dtype=torch.float32, device=lse.device)
    launch_shift(output, lse, grad_output, grad_lse, shift).run(lse)
    for launch in launch_backward(call, selection, grad_output, lse, shift, made):
        launch.run(lse)
    grads = {n: made[n] for n in ("query", "key", "value")}
    if call.bias is not None:
        grads["bias"] = _of_shape(made[kind], call.bias, kind).to(call.bias.dtype)
    if call.sink is not None:
        weight = torch.exp(call.sink.float()[None, :, None] - lse)
        grads["sink"] = torch.where(torch.isfinite(lse), weight * shift, 0.0).sum((0, 2)).to(call.sink.dtype)
    return grads


def _of_shape(sums: Tensor, bias: Tensor, kind: str) -> Tensor:
    """Sums over every axis that the bias was broadcast along."""
    if kind == "pair_bias":
        return sums
    for axis in (0, 1):
        if bias.shape[axis] == 1:
            sums = sums.sum(axis, keepdim=True)
    sums = sums[..., None] if kind == "row_sums" else sums[:, :, None]
    return sums.sum(2, keepdim=True) if bias.shape[2] == 1 else sums
