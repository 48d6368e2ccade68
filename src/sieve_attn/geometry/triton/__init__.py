"""Geometry on the device: one pass over the keys, nothing waits for the host.

Counts, means, norms, radii, boxes, value summaries and the key sketch come from one kernel; what few scorers ask for (variances,
directions, sub-means, spectral numbers) are the reference's array operations on the same device. Counts, boxes, codes and key
scales are the reference's to the last bit, given one channel scale; sums may differ in the last place, and of two clips that lose
equally much within rounding either may win.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sieve_attn import arrays
from sieve_attn import triton as door
from sieve_attn.geometry import reference
from sieve_attn.geometry.sketch import _CLIPS, _FINE_CLIPS, spectral_bounds
from sieve_attn.types import Geometry, Sketch, Statistics

Array = Any

LARGEST_DIM = 512
LARGEST_BLOCK = 256
RARE = ("variance", "direction", "sub_means")


def why_not(key: Array, block_size: int, value: Array | None = None, *, named: bool = False) -> tuple[str, ...]:
    """Every reason why the kernels cannot summarise ``key``; empty if they can. ``named``: the interpreter may serve."""
    reasons: list[str] = []
    for name, x in (("keys", key), ("values", value)):
        if x is None:
            continue
        where = str(getattr(x, "device", "cpu")).partition(":")[0]
        dtype = str(x.dtype).rpartition(".")[2]
        reasons += door.unsuitable(arrays.namespace(x).name, where, dtype, named=named)
        if x.shape[3] > LARGEST_DIM:
            reasons.append(f"kernels take at most {LARGEST_DIM} channels, not {name} of {x.shape[3]}")
    if block_size > LARGEST_BLOCK:
        reasons.append(f"kernels take blocks of at most {LARGEST_BLOCK} keys, not of {block_size}")
    return tuple(reasons)


def build(
    key: Array,
    block_size: int,
    asked: Statistics,
    *,
    value: Array | None = None,
    key_mask: Array | None = None,
    channel_scale: Array | None = None,
) -> Geometry:
    """As the reference's ``build``, for what :func:`why_not` lets through."""
    from sieve_attn.geometry.triton.launch import summarise

    xp = arrays.namespace(key)
    key = xp.detach(key)
    clips = _CLIPS.get(asked.sketch_bits, _FINE_CLIPS)
    made = summarise(key, block_size, asked, xp.detach(value) if asked.value else None, key_mask, channel_scale, clips)
    sketch = None
    if asked.sketch_bits:
        names = ("planes", "scale", "error", "metric_error", "channel_scale")
        sketch = Sketch(asked.sketch_bits, **{name: made.pop(name) for name in names})
    found = Geometry(block_size, int(key.shape[2]), asked, **made, sketch=sketch)
    rare = {name: getattr(asked, name) for name in RARE if getattr(asked, name)}
    if rare:
        found = replace(found, **_rare(key, block_size, Statistics(**rare), key_mask, found))
    if sketch is not None and asked.spectral:
        with xp.no_grad():
            found = replace(found, sketch=spectral_bounds(sketch, *_valid(xp, key, key_mask), block_size))
    return found


def _rare(key: Array, block_size: int, asked: Statistics, key_mask: Array | None, found: Geometry) -> dict[str, Array]:
    """The reference's statistics that ``found`` lacks."""
    other = reference.build(key, block_size, asked, key_mask=key_mask)
    names = ("variance", "channel_variance", "direction_mean", "direction_radius", "direction_variance", "concentration",
             "sub_means", "sub_counts")  # fmt: skip
    rest = {name: getattr(other, name) for name in names if getattr(other, name) is not None}
    if found.radius is None and asked.variance:
        rest["radius"] = other.radius
    return rest


def _valid(xp: Any, key: Array, key_mask: Array | None) -> tuple[Array, Array]:
    """Keys as fp32 with zeros for those that do not take part, and which do."""
    real = xp.cast(key, xp.float32)
    valid = xp.all_(xp.isfinite(real), -1)
    if key_mask is not None:
        valid = valid & key_mask[:, None, :]
    return xp.where(valid[..., None], real, 0.0), valid
