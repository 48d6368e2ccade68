"""Geometry of a changing cache. Sealed blocks are never touched; the open block is summarised again from its keys."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from sieve_attn import arrays
from sieve_attn.checks import error
from sieve_attn.geometry.build import build
from sieve_attn.geometry.sketch import CALIBRATION
from sieve_attn.types import Geometry, Sketch

Array = Any

PER_BLOCK = tuple(f.name for f in fields(Geometry) if f.name not in ("block_size", "kv_len", "statistics", "sketch"))
SKETCH_PER_KEY = {"planes": 3, "scale": 2, "error": 2, "metric_error": 2}  # name -> the axis of the keys
SKETCH_PER_BLOCK = ("spectral", "metric_spectral")


def sealed_blocks(geometry: Geometry, length: int) -> int:
    """How many leading blocks stay as they are when the cache continues from ``length`` keys."""
    if geometry.sketch is not None:
        # until a sequence has its first CALIBRATION keys, its channel scale may still change
        xp = arrays.namespace(geometry.count)
        counted = geometry.count[:, :, : length // geometry.block_size]
        if counted.shape[2] == 0 or int(xp.total(counted, -1).min()) < CALIBRATION:
            return 0
    return length // geometry.block_size


def tail(geometry: Geometry, sealed: int, key: Array, value: Array | None, key_mask: Array | None) -> Geometry:
    """The geometry of everything after the first ``sealed`` blocks, on the scales that the sealed ones fixed."""
    start = sealed * geometry.block_size
    scale = geometry.sketch.channel_scale if geometry.sketch is not None and sealed else None
    return build(
        key[:, :, start:], geometry.block_size, geometry.statistics, channel_scale=scale,
        value=None if value is None else value[:, :, start:], key_mask=None if key_mask is None else key_mask[:, start:],
    )  # fmt: skip


def append(geometry: Geometry, key: Array, *, value: Array | None = None, key_mask: Array | None = None) -> Geometry:
    """The geometry of ``key`` [batch, kv_heads, kv_len, dim] (the *whole* cache), of which ``geometry`` covers the front.

    Only the new keys and the open block are read. Equal to building it anew.
    """
    if int(key.shape[2]) < geometry.kv_len:
        raise error(
            "key", f"must hold the whole cache, at least {geometry.kv_len} keys", f"{key.shape[2]} keys", "use crop to shorten"
        )
    return _continue(geometry, geometry.kv_len, key, value, key_mask)


def crop(geometry: Geometry, length: int, key: Array, *, value: Array | None = None, key_mask: Array | None = None) -> Geometry:
    """The geometry of the first ``length`` keys; the block that is cut open is summarised again from ``key``."""
    if not 0 < length <= geometry.kv_len:
        raise error("length", f"must lie in 1..{geometry.kv_len}", length, "drop the geometry for an empty cache")
    cut = None if value is None else value[:, :, :length]
    return _continue(geometry, length, key[:, :, :length], cut, None if key_mask is None else key_mask[:, :length])


def _continue(geometry, length, key, value, key_mask) -> Geometry:
    sealed = sealed_blocks(geometry, length)
    kv_len = int(key.shape[2])
    if sealed * geometry.block_size == kv_len:
        return map_arrays(geometry, lambda x, axis, n: head(x, axis, n), sealed, kv_len, kv_len)
    rest = tail(geometry, sealed, key, value, key_mask)
    if sealed == 0:
        return rest
    xp = arrays.namespace(key)
    return join(xp, geometry, rest, sealed, kv_len)


def head(x: Array, axis: int, n: int) -> Array:
    """The first ``n`` entries along ``axis``."""
    return x[(slice(None),) * axis + (slice(0, n),)]


def map_arrays(geometry: Geometry, change: Any, blocks: int, keys: int, kv_len: int) -> Geometry:
    """``change(array, axis, length)`` on every array that grows with the sequence."""
    new = {f: change(getattr(geometry, f), 2, blocks) for f in PER_BLOCK if getattr(geometry, f) is not None}
    if geometry.sketch is not None:
        s = geometry.sketch
        new_sketch = {f: change(getattr(s, f), axis, keys) for f, axis in SKETCH_PER_KEY.items()}
        new_sketch |= {f: change(getattr(s, f), 2, blocks) for f in SKETCH_PER_BLOCK if getattr(s, f) is not None}
        new["sketch"] = replace(s, **new_sketch)
    return replace(geometry, kv_len=kv_len, **new)


def join(xp: Any, front: Geometry, rest: Geometry, sealed: int, kv_len: int) -> Geometry:
    """The first ``sealed`` blocks of ``front`` followed by ``rest``."""
    new = {
        f: xp.concat([getattr(front, f)[:, :, :sealed], getattr(rest, f)], 2) for f in PER_BLOCK if getattr(front, f) is not None
    }
    if front.sketch is not None:
        a, b, keys = front.sketch, rest.sketch, sealed * front.block_size
        both = {f: xp.concat([head(getattr(a, f), axis, keys), getattr(b, f)], axis) for f, axis in SKETCH_PER_KEY.items()}
        per_block = [f for f in SKETCH_PER_BLOCK if getattr(a, f) is not None]
        both |= {f: xp.concat([getattr(a, f)[:, :, :sealed], getattr(b, f)], 2) for f in per_block}
        new["sketch"] = replace(a, **both)
    return replace(front, kv_len=kv_len, **new)


def reorder(geometry: Geometry, index: Array) -> Geometry:
    """The geometry of the sequences ``index`` of the batch: beam search, batch repeat and batch selection."""
    new = {f: getattr(geometry, f)[index] for f in PER_BLOCK if getattr(geometry, f) is not None}
    if geometry.sketch is not None:
        s = geometry.sketch
        kept = [f.name for f in fields(Sketch) if f.name not in ("bits", "planes") and getattr(s, f.name) is not None]
        picked = {name: getattr(s, name)[index] for name in kept}
        new["sketch"] = replace(s, planes=s.planes[:, index], **picked)
    return replace(geometry, **new)
