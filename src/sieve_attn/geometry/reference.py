"""Reference geometry: every statistic of every block from the keys, in fp32 (fp64 for fp64 keys), rounded outward."""

from __future__ import annotations

from typing import Any

from sieve_attn import arrays
from sieve_attn.bounds import UNIT, largest_eigenvalue
from sieve_attn.checks import error
from sieve_attn.geometry.sketch import build_sketch
from sieve_attn.types import Geometry, Statistics

Array = Any


def build(
    key: Array,
    block_size: int,
    asked: Statistics,
    *,
    value: Array | None = None,
    key_mask: Array | None = None,
    channel_scale: Array | None = None,
) -> Geometry:
    """What :func:`sieve_attn.geometry.build` promises, in array operations; arguments are checked there."""
    xp = arrays.namespace(key)
    with xp.no_grad():
        return _build(xp, key, block_size, asked, value, key_mask, channel_scale)


def _build(xp, key, block_size, asked, value, key_mask, channel_scale) -> Geometry:
    dtype = xp.compute_dtype(key)
    batch, heads, kv_len, dim = key.shape
    real = xp.cast(key, dtype)
    good = xp.all_(xp.isfinite(real), -1)
    real = xp.where(good[..., None], real, 0.0)
    takes_part = xp.full((batch, heads, kv_len), True, xp.boolean, key)
    if key_mask is not None:
        takes_part = takes_part & key_mask[:, None, :]
    valid = takes_part & good

    def blocked(x, fill=0):
        x = xp.pad_end(x, 2, -kv_len % block_size, fill)
        return x.reshape(batch, heads, -1, block_size, *x.shape[3:])

    outward = 1.0 + (dim + 8) * UNIT
    in_block = blocked(valid, False)
    keys = xp.where(in_block[..., None], blocked(real), 0.0)
    count = xp.total(blocked(takes_part, False), -1, xp.int32)
    n = xp.maximum(xp.cast(xp.total(in_block, -1, xp.int32), dtype), 1.0)
    mean = keys.sum(3) / n[..., None]
    key_norm = xp.amax(xp.norm(keys), -1) * outward
    broken = xp.any_(blocked(takes_part & ~good, False), -1)
    finite = ~broken & xp.isfinite(key_norm) & xp.all_(xp.isfinite(mean), -1)
    mean = xp.where(finite[..., None], mean, 0.0)
    parts: dict[str, Any] = {}
    if asked.radius or asked.variance:
        centred = xp.where(in_block[..., None], keys - mean[:, :, :, None, :], 0.0)
        parts["radius"] = xp.amax(xp.norm(centred), -1) * outward
    if asked.variance:
        parts["variance"] = largest_eigenvalue(xp, centred) / n * outward
        parts["channel_variance"] = (centred**2).sum(3) / n[..., None]
    if asked.box:
        infinity = float("inf")
        parts["low"] = xp.amin(xp.where(in_block[..., None], keys, infinity), 3)
        parts["high"] = xp.amax(xp.where(in_block[..., None], keys, -infinity), 3)
        empty = (xp.total(in_block, -1) == 0)[..., None]
        parts["low"], parts["high"] = (xp.where(empty, 0.0, parts[side]) for side in ("low", "high"))
    if asked.direction:
        parts |= _directions(xp, keys, in_block, n)
    if asked.sub_means:
        parts |= _sub_means(xp, keys, in_block, asked.sub_means, dtype)
    if asked.value:
        worth = xp.cast(value, dtype)
        sound = xp.all_(xp.isfinite(worth), -1)
        lost = xp.any_(blocked(takes_part & ~sound, False), -1)
        worth = blocked(xp.where(sound[..., None], worth, 0.0))
        worth = xp.where(in_block[..., None], worth, 0.0)
        parts["value_mean"] = worth.sum(3) / n[..., None]
        spread = xp.where(in_block[..., None], worth - parts["value_mean"][:, :, :, None, :], 0.0)
        radius = xp.amax(xp.norm(spread), -1) * (1.0 + (worth.shape[-1] + 8) * UNIT)
        # no distance covers a value that is not a number
        parts["value_radius"] = xp.where(lost, float("inf"), radius)
    if asked.sketch_bits:
        clean = xp.where(valid[..., None], real, 0.0)
        parts["sketch"] = build_sketch(clean, valid, asked.sketch_bits, block_size, channel_scale, takes_part, asked.spectral)
    return Geometry(block_size, kv_len, asked, count, finite, mean, key_norm, **parts)


def _directions(xp, keys, in_block, n) -> dict[str, Array]:
    """Statistics of the normalised keys (Event Radar): they rank, they bound nothing."""
    length = xp.norm(keys)[..., None]
    unit = keys / xp.where(length > 0, length, 1.0)
    centre = unit.sum(3) / n[..., None]
    length = xp.norm(centre)[..., None]
    centre = centre / xp.where(length > 0, length, 1.0)
    apart = xp.where(in_block, xp.norm(unit - centre[:, :, :, None, :]), 0.0)
    aligned = xp.where(in_block, (unit * centre[:, :, :, None, :]).sum(-1), 0.0).sum(-1) / n
    return {
        "direction_mean": centre,
        "direction_radius": xp.amax(apart, -1),
        "direction_variance": (apart**2).sum(-1) / n,
        "concentration": xp.minimum(xp.maximum(aligned, 0.1), 1.0),
    }


def _sub_means(xp, keys, in_block, size, dtype) -> dict[str, Array]:
    block_size = keys.shape[3]
    if block_size % size:
        raise error("sub_means", f"must divide the block size {block_size}", size, f"try {block_size // 4 or 1}")
    shape = (*keys.shape[:3], block_size // size, size)
    counts = xp.total(in_block.reshape(shape), -1, xp.int32)
    sums = keys.reshape(*shape, keys.shape[-1]).sum(4)
    return {"sub_means": sums / xp.maximum(xp.cast(counts, dtype), 1.0)[..., None], "sub_counts": counts}
