"""Launches of the geometry kernels: shapes, tiles and warps."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from sieve_attn import triton as door
from sieve_attn.geometry.triton import kernels
from sieve_attn.types import Statistics

CALIBRATION_ROWS = 16
ENTRIES, ENTRIES_A_THREAD = 2048, 8  # keys times channels of one program, and of one thread, where blocks are not larger


def tile(block_size: int, dim: int, v_dim: int = 1) -> dict[str, int]:
    """How many blocks one program summarises, each padded to a power of two, and its warps."""
    each = triton.next_power_of_2(block_size)
    padded, v_padded = (max(16, triton.next_power_of_2(d)) for d in (dim, v_dim))
    wide = max(padded, v_padded)
    blocks = max(1, ENTRIES // (each * wide))
    warps = max(4, min(32, blocks * each * wide // (32 * ENTRIES_A_THREAD)))
    return {"EACH": each, "BLOCKS": blocks, "PADDED": padded, "V_PADDED": v_padded, "num_warps": warps}


def passes(block_size: int, dim: int, v_dim: int, bits: int) -> list[tuple[int, bool, int]]:
    """``(keys a block, block statistics, bits of the sketch)`` of each launch: one, or two where a block fills the registers.

    The sketch knows no blocks, so that a pass of its own goes by few keys at a time.
    """
    wide = triton.next_power_of_2(max(16, dim, v_dim))
    if not bits or triton.next_power_of_2(block_size) * wide <= ENTRIES:
        return [(block_size, True, bits)]
    return [(block_size, True, 0), (min(16, max(1, ENTRIES // wide)), False, bits)]


def summarise(
    key: Tensor, block_size: int, asked: Statistics, value: Tensor | None, key_mask: Tensor | None, channel_scale: Tensor | None,
    clips: tuple[float, ...],
) -> dict[str, Tensor]:  # fmt: skip
    """The arrays of a geometry by name, those of its sketch among them."""
    batch, heads, kv_len, dim = key.shape
    v_dim = 1 if value is None else int(value.shape[3])
    blocks, bits = -(-kv_len // block_size), asked.sketch_bits
    made: dict[str, Tensor] = {}

    def fresh(name: str, dtype: torch.dtype, *shape: int) -> None:
        made[name] = torch.empty((batch, heads, *shape), dtype=dtype, device=key.device)

    fresh("count", torch.int32, blocks)
    fresh("finite", torch.bool, blocks)
    fresh("mean", torch.float32, blocks, dim)
    fresh("key_norm", torch.float32, blocks)
    if asked.radius:
        fresh("radius", torch.float32, blocks)
    if asked.box:
        fresh("low", torch.float32, blocks, dim)
        fresh("high", torch.float32, blocks, dim)
    if asked.value:
        fresh("value_mean", torch.float32, blocks, v_dim)
        fresh("value_radius", torch.float32, blocks)
    if bits:
        made["planes"] = torch.empty((bits, batch, heads, kv_len, -(-dim // 8)), dtype=torch.uint8, device=key.device)
        for name in ("scale", "error", "metric_error"):
            fresh(name, torch.float16, kv_len)
    if not batch:
        if bits:
            fresh("channel_scale", torch.float32, dim)
        return made
    masked = key_mask is not None
    masks = key_mask.view(torch.uint8) if masked else made["count"]
    mask_strides = masks.stride() if masked else (0, 0)
    if bits and channel_scale is None:
        fresh("channel_scale", torch.float32, dim)
        kernels.calibrate[(batch * heads,)](
            key, masks, made["channel_scale"], heads, kv_len, *key.stride(), *mask_strides, dim=dim, MASKED=masked,
            PADDED=max(16, triton.next_power_of_2(dim)), ROWS=CALIBRATION_ROWS, num_warps=8, **door.PLAIN,
        )  # fmt: skip
    elif bits:
        made["channel_scale"] = channel_scale.float().contiguous()
    values = key if value is None else value
    at = {name: made.get(name, made["count"]) for name in (
        "count", "finite", "mean", "key_norm", "radius", "low", "high", "value_mean", "value_radius", "channel_scale", "planes",
        "scale", "error", "metric_error",
    )}  # fmt: skip
    at["finite"] = made["finite"].view(torch.int8)
    for size, statistics, planes in passes(block_size, dim, v_dim, bits):
        shape = tile(size, dim, v_dim if statistics else 1)
        pieces = -(-kv_len // size)
        kernels.summarise[(triton.cdiv(pieces, shape["BLOCKS"]) * batch * heads,)](
            key, values, masks, *at.values(), heads, kv_len, pieces, batch * heads * kv_len * (-(-dim // 8)),
            *key.stride(), *values.stride(), *mask_strides, *(clips + (0.0,) * (5 - len(clips))),
            dim=dim, v_dim=v_dim, block_size=size, MASKED=masked, RADIUS=asked.radius, BOX=asked.box, VALUE=asked.value,
            STATISTICS=statistics, BITS=planes, **shape, **door.PLAIN,
        )  # fmt: skip
    return made
