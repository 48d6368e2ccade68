"""C++ kernels for the geometry: one pass over the keys for counts, means, norms, radii, boxes and the key sketch.

Statistics that they do not know (variance, direction, sub-means, values) are the reference's. Counts, boxes, codes and key
scales are the reference's to the last bit, given one channel scale; sums may differ in the last place, since they are added
in another order, and of two clips that lose equally much within rounding either may win.
"""

from __future__ import annotations

from typing import Any

from sieve_attn import arrays, native
from sieve_attn.types import Geometry, Sketch, Statistics

Array = Any

DTYPES = ("float32", "float16", "bfloat16")
LARGEST_DIM = 512


def why_not(key: Array, asked: Statistics) -> tuple[str, ...]:
    """Every reason why the kernels cannot summarise ``key``; empty if they can."""
    reasons = [*native.missing(), *native.unreadable(key)]
    device = str(getattr(key, "device", "cpu")).partition(":")[0]
    if device != "cpu":
        reasons.append(f"kernels run on cpu, not on {device}")
    dtype = str(key.dtype).rpartition(".")[2]
    if dtype not in DTYPES:
        reasons.append(f"kernels know {', '.join(DTYPES)}, not {dtype}")
    if key.shape[3] > LARGEST_DIM:
        reasons.append(f"kernels take at most {LARGEST_DIM} channels, not {key.shape[3]}")
    unknown = [name for name in ("variance", "direction", "value", "sub_means") if getattr(asked, name)]
    if unknown:
        reasons.append(f"kernels do not compute {', '.join(unknown)}")
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
    xp = arrays.namespace(key)
    batch, heads, kv_len, dim = key.shape
    blocks, bits = -(-kv_len // block_size), asked.sketch_bits
    made: dict[str, Array] = {}

    def fresh(name: str, dtype: Any, *shape: int) -> Array:
        made[name] = native.on_large_pages(xp.empty((batch, heads, *shape), dtype, key))
        return made[name]

    fresh("count", xp.int32, blocks)
    fresh("finite", xp.boolean, blocks)
    fresh("mean", xp.float32, blocks, dim)
    fresh("key_norm", xp.float32, blocks)
    if asked.radius:
        fresh("radius", xp.float32, blocks)
    if asked.box:
        fresh("low", xp.float32, blocks, dim)
        fresh("high", xp.float32, blocks, dim)
    per_block = dict(made)
    if bits:
        made["planes"] = native.on_large_pages(xp.empty((bits, batch, heads, kv_len, -(-dim // 8)), xp.uint8, key))
        for name in ("scale", "error", "metric_error"):
            fresh(name, xp.float16, kv_len)
        if channel_scale is None:
            fresh("channel_scale", xp.float32, dim)
        else:
            made["channel_scale"] = xp.contiguous(xp.cast(channel_scale, xp.float32))
        if asked.spectral:
            fresh("spectral", xp.float32, blocks)
            fresh("metric_spectral", xp.float32, blocks)
    if batch:
        _summarise(key, key_mask, block_size, bits, channel_scale is not None, (0, 0, 0), made)
    sketch = Sketch(bits, **{name: x for name, x in made.items() if name not in per_block}) if bits else None
    return Geometry(block_size, kv_len, asked, **per_block, sketch=sketch)


def extends(buffers: Geometry, key: Array) -> bool:
    """Whether :func:`extend` can write what follows ``key`` into ``buffers`` where they lie."""
    if not hasattr(key, "data_ptr") or why_not(key, buffers.statistics) or str(buffers.mean.dtype) != "torch.float32":
        return False
    return all(x.is_contiguous() and x.device == key.device for x in _written(buffers).values())


def extend(buffers: Geometry, key: Array, first_block: int, key_mask: Array | None = None) -> None:
    """Summarise ``key`` [batch, kv_heads, n, dim] in place: the blocks from ``first_block`` on, which ``buffers`` have room for.

    As :func:`build` on the channel scale of the buffers, without arrays of its own and their copies: a step of decoding is short.
    """
    if key.shape[0]:
        room = (first_block, buffers.blocks, buffers.kv_len)
        _summarise(key, key_mask, buffers.block_size, buffers.statistics.sketch_bits, True, room, _written(buffers))


def _written(geometry: Geometry) -> dict[str, Array]:
    held = vars(geometry) if geometry.sketch is None else vars(geometry) | vars(geometry.sketch)
    return {name: x for name in _OUTPUTS if (x := held.get(name)) is not None}


def _summarise(
    key: Array, key_mask: Array | None, block_size: int, bits: int, scale_is_given: bool, room: tuple[int, int, int], out: dict
) -> None:
    detached = arrays.namespace(key).detach(key)
    # a view has four axes, planes have five; of what is written, the kernels ask where it begins
    flat = {name: x if len(x.shape) < 5 else x.reshape(-1) for name, x in out.items()}
    native.module().geometry(
        native.view(detached), None if key_mask is None else native.view(key_mask), block_size, bits, scale_is_given,
        native.threads(key), *room, **{name: native.view(flat[name]) if name in flat else None for name in _OUTPUTS},
    )  # fmt: skip


_OUTPUTS = (
    "count", "finite", "mean", "key_norm", "radius", "low", "high", "planes", "scale", "error", "metric_error", "channel_scale",
    "spectral", "metric_spectral",
)  # fmt: skip
