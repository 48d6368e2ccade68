"""From a call and its selection to kernel arguments: views, tile sizes and grids. Nothing here waits for the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sieve_attn import triton as door
from sieve_attn.attend.triton.tiles import Chosen, Sight, View
from sieve_attn.checks import error
from sieve_attn.types import Blocks, Call, Ranges, Selection

REGISTERS = 65_536  # of a multiprocessor


@dataclass(frozen=True)
class Launch:
    """One kernel launch, ready to run or to be compiled ahead of time."""

    kernel: Any
    grid: int
    arguments: dict[str, Any]
    warps: int
    stages: int
    programs: int = 0  # that are to share a multiprocessor's registers; 0 leaves that to the assembler

    @property
    def options(self) -> dict[str, Any]:
        """How the kernel is compiled.

        An assembler that is told how many registers there are fits the kernel into them; one that stops there of its own accord,
        to run a program more, keeps a few bytes elsewhere.
        """
        options = {"num_warps": self.warps, "num_stages": self.stages, **door.PLAIN}
        if self.programs:
            # a thread's are handed out by eights
            options["maxnreg"] = REGISTERS // (32 * self.warps * self.programs) // 8 * 8
        return options

    def run(self, like: Tensor) -> None:
        with door.launching_on(like):
            self.kernel[(self.grid,)](**self.arguments, **self.options)


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least ``n``."""
    return max(least, 1 << max(n - 1, 0).bit_length())


def view(x: Tensor) -> View:
    return View(x, *x.stride())


def over_pairs(x: Tensor | None, call: Call) -> View | None:
    """A mask or bias of [batch, q_heads, q_len, kv_len] with stride 0 along what is shared."""
    if x is None:
        return None
    if x.dtype == torch.float64:
        x = x.float()
    return view(x.expand(call.query.shape[0], call.query.shape[1], call.q_len, call.kv_len))


def every_pair(call: Call, selection: Selection) -> bool:
    """Whether every logit is masked, biased or capped on its own: what that takes lies in registers beside the tile."""
    rows_of_their_own = selection.blocks is not None and selection.blocks.row_mask is not None
    return rows_of_their_own or any(x is not None for x in (call.mask, call.bias, call.softcap))


def key_mask_view(call: Call) -> View | None:
    if call.key_mask is None:
        return None
    batch, key = call.key_mask.stride()
    return View(call.key_mask, batch, 0, 0, key)


def sight_of(call: Call) -> Sight:
    """The interval of keys that packing leaves each query, from the edges on the device."""
    if call.cu_seqlens is None:
        return Sight(call.window, None, None)
    if "packed" not in call.shared:
        edges = call.cu_seqlens.to(torch.int32)
        number = torch.arange(call.q_len, dtype=torch.int32, device=call.query.device)
        segment = torch.searchsorted(edges, number, right=True)
        call.shared["packed"] = edges[segment - 1], edges[segment]
    return Sight(call.window, *call.shared["packed"])


@dataclass(frozen=True)
class Grid:
    """The selection as kernels walk it: its arguments, its tiles of queries and its blocks of keys."""

    chosen: Chosen
    heads: int
    q_block: int
    kv_block: int
    tiles: int
    ranges: int  # 0 a list of blocks, 1 a prefix, 2 a window, 3 both
    blocks: Blocks | None


def check_blocks(part: Blocks) -> None:
    """ValueError for a grid that is none, and for a malformed list where it can be read without waiting for a device."""
    good = part.q_block > 0 and part.kv_block > 0 and 0 <= part.lead < part.q_block
    if not good:
        got = f"q_block {part.q_block}, kv_block {part.kv_block}, lead {part.lead}"
        raise error("selection", "must have positive blocks and a lead below q_block", got, "build it with Blocks.from_tiles")
    sizes = part.row_ptr.shape[0], None if part.row_mask is None else tuple(part.row_mask.shape)
    wanted = part.batch * part.heads * part.tiles + 1, (part.block_index.shape[0], part.q_block)
    if sizes[0] != wanted[0] or sizes[1] not in (None, wanted[1]):
        rule = f"must have {wanted[0]} row pointers and a row_mask of shape {wanted[1]} or none"
        raise error("selection", rule, f"{sizes[0]} and {sizes[1]}", "build it with Blocks.from_tiles")
    if part.row_ptr.is_cuda:
        return
    pointer, index = part.row_ptr.to(torch.int64), part.block_index.to(torch.int64)
    rises = bool((pointer[1:] >= pointer[:-1]).all()) and int(pointer[0]) == 0 and int(pointer[-1]) <= index.shape[0]
    if rises:
        used = index[: int(pointer[-1])]
        starts = torch.zeros(used.shape[0] + 1, dtype=torch.bool)
        starts[pointer] = True
        rises = bool(((used >= 0) & (used < part.blocks)).all()) and bool(((used[1:] > used[:-1]) | starts[1:-1]).all())
    if not rises:
        rule = f"must list the blocks of every tile in increasing order, each below {part.blocks}, from pointer 0 on"
        raise error("selection", rule, "other lists", "build it with Blocks.from_tiles")


def grid_of(selection: Selection, q_block: int, kv_block: int) -> Grid:
    """``q_block`` and ``kv_block`` cut ranges, which have no blocks of their own."""
    part = selection.parts[0]
    if isinstance(part, Ranges):
        kind = 3 if part.prefix and part.window else 2 if part.window else 1
        tiles = -(-part.q_len // q_block)
        ahead = part.window if part.two_sided else 1
        chosen = Chosen(None, None, None, 0, 0, 0, 0, tiles, 0, min(part.prefix, part.kv_len), part.window, ahead)
        return Grid(chosen, 1, q_block, kv_block, tiles, kind, None)
    chosen = Chosen(
        part.row_ptr.to(torch.int64).contiguous(), part.block_index.to(torch.int32).contiguous(),
        None if part.row_mask is None else part.row_mask.contiguous(), part.block_index.shape[0], part.blocks,
        0 if part.batch == 1 else part.heads * part.tiles, 0 if part.heads == 1 else part.tiles, part.tiles, part.lead, 0, 0, 0,
    )  # fmt: skip
    return Grid(chosen, part.heads, part.q_block, part.kv_block, part.tiles, 0, part)


def wide(call: Call, *views: View | None, keys: tuple[Tensor, ...] = ()) -> bool:
    """Whether an offset inside of one group of heads of some array needs more than 32 bits.

    ``views``: arrays of query rows, and masks or biases over pairs, which may reach over keys where others have channels;
    ``keys``: arrays of rows of keys beside the call's own.
    """
    group = call.query.shape[1] // call.key.shape[1]
    last = max(call.kv_len, call.query.shape[3], call.value.shape[3])
    reach = [call.kv_len * x.stride(2) + last * x.stride(3) for x in (call.key, call.value, *keys)]
    reach += [group * v.head + call.q_len * v.row + last * v.col for v in views if v is not None]
    return max(reach) >= 2**31


def packing(q_block: int, group: int, shared: bool, most_rows: int) -> tuple[int, int]:
    """``(rows, pack)``: queries and query heads of one program, at least 16 together, for the tensor cores' sake."""
    rows = min(power_of_two(q_block), most_rows)
    pack = min(power_of_two(group), max(most_rows // rows, 1)) if shared else 1
    return max(rows, 16 // pack), pack
