"""The key sketch: a low-bit copy of the keys that both ranks blocks and proves what was dropped.

``k^_jd = a_d t_j (u_jd - (2^b - 1) / 2)``: symmetric half-integer levels, one scale ``t_j`` a key, one channel scale
``a_d`` a head, fixed by the first keys of the sequence. No centring and nothing per block, so a key is sketched when it
arrives; the codes are integers, so a kernel can score them with integer dot products.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxtyping import Bool, Float, UInt8

from sieve_attn import arrays
from sieve_attn.bounds import UNIT, largest_eigenvalue
from sieve_attn.types import Sketch

Array = Any

CALIBRATION = 64  # the channel scale is the rms of this many first keys of a sequence, then fixed
_CLIPS = {
    1: (0.6, 0.5, 0.4, 0.3, 0.2),
    2: (0.9, 0.75, 0.65, 0.55, 0.45),
    3: (1.0, 0.9, 0.8, 0.7, 0.6),
    4: (1.0, 0.92, 0.84, 0.76),
}
_FINE_CLIPS = (1.0, 0.95)
_LARGEST_HALF = 65504.0


def channel_scale(
    key: Float[Array, "batch kv_heads kv_len dim"], valid: Bool[Array, "batch kv_heads kv_len"]
) -> Float[Array, "batch kv_heads dim"]:
    """[batch, kv_heads, dim]: the rms of each channel over the first ``CALIBRATION`` valid keys, never zero."""
    xp = arrays.namespace(key)
    first = valid & (xp.cumsum(xp.cast(valid, xp.int32), -1) <= CALIBRATION)
    chosen = xp.where(first[..., None], key, 0.0)
    largest = xp.amax(xp.amax(abs(chosen), -1), -1)[..., None, None]
    largest = xp.where(largest > 0, largest, 1.0)
    n = xp.maximum(xp.cast(xp.total(first, -1), key.dtype), 1.0)[..., None]
    rms = xp.sqrt(((chosen / largest) ** 2).sum(-2) / n)
    return xp.maximum(xp.where(xp.amax(rms, -1)[..., None] > 0, rms, 1.0), 2.0**-10) * largest[..., 0]


def quantise(
    key: Float[Array, "batch kv_heads kv_len dim"], scale: Float[Array, "batch kv_heads dim"], bits: int
) -> tuple[Array, Array]:
    """``(codes uint8, key scales fp16)`` of ``key`` [..., kv_len, dim]: the best of a few clips in L2, key by key."""
    xp = arrays.namespace(key)
    white = key / scale[..., None, :]
    top_level = (2**bits - 1) / 2
    peak = xp.amax(abs(white), -1)
    best = None
    for clip in _CLIPS.get(bits, _FINE_CLIPS):
        step = xp.cast(xp.minimum(clip * peak / top_level, _LARGEST_HALF), xp.float16)
        wide = xp.cast(step, key.dtype)[..., None]
        code = xp.floor(white / xp.where(wide > 0, wide, 1.0) + (top_level + 0.5))
        code = xp.minimum(xp.maximum(code, 0.0), 2.0**bits - 1)
        loss = (((code - top_level) * wide - white) ** 2).sum(-1)
        if best is None:
            best = (loss, code, step)
        else:
            better = loss < best[0]
            best = (xp.where(better, loss, best[0]), xp.where(better[..., None], code, best[1]), xp.where(better, step, best[2]))
    return xp.cast(best[1], xp.uint8), best[2]


def pack(codes: UInt8[Array, "*axes dim"], bits: int) -> UInt8[Array, "{bits} *axes bytes"]:
    """Codes [..., dim] to bit planes [bits, ..., ceil(dim / 8)], most significant plane first."""
    xp = arrays.namespace(codes)
    codes = xp.pad_end(codes, -1, -codes.shape[-1] % 8, 0)
    weights = xp.asarray([128, 64, 32, 16, 8, 4, 2, 1], xp.uint8, codes)
    planes = []
    for plane in range(bits):
        bit = (codes >> (bits - 1 - plane)) & 1
        planes.append(xp.total(bit.reshape(*bit.shape[:-1], -1, 8) * weights, -1, xp.uint8))
    return xp.stack(planes, 0)


def unpack(planes: UInt8[Array, "bits *axes bytes"], dim: int) -> UInt8[Array, "*axes {dim}"]:
    """Bit planes to codes [..., dim] uint8; fewer planes than were packed give the leading bits."""
    xp = arrays.namespace(planes)
    shifts = xp.asarray([7, 6, 5, 4, 3, 2, 1, 0], xp.uint8, planes)
    codes = None
    for plane in planes:
        bit = ((plane[..., None] >> shifts) & 1).reshape(*plane.shape[:-1], -1)[..., :dim]
        codes = bit if codes is None else (codes << 1) | bit
    return codes


def decode(sketch: Sketch, bits: int | None = None, dtype: Any = None) -> Float[Array, "batch kv_heads kv_len dim"]:
    """The keys as the first ``bits`` planes know them, [batch, kv_heads, kv_len, dim]."""
    xp = arrays.namespace(sketch.planes)
    bits = sketch.bits if bits is None else bits
    dtype = sketch.channel_scale.dtype if dtype is None else dtype
    codes = xp.cast(unpack(sketch.planes[:bits], sketch.channel_scale.shape[-1]), dtype)
    step = xp.cast(sketch.scale, dtype) * 2.0 ** (sketch.bits - bits)
    return (codes - (2**bits - 1) / 2) * step[..., None] * xp.cast(sketch.channel_scale, dtype)[:, :, None, :]


def build_sketch(
    key: Array, valid: Array, bits: int, block_size: int, scale: Array | None, taking_part: Array, spectral: bool
) -> Sketch:
    """Sketch ``key`` [batch, kv_heads, kv_len, dim] (finite; ``valid`` marks the keys that take part)."""
    xp = arrays.namespace(key)
    # counted like the blocks, non-finite keys included (they are zeros here), so that appending knows when it is settled
    scale = channel_scale(key, taking_part) if scale is None else scale
    codes, step = quantise(key, xp.cast(scale, key.dtype), bits)
    sketch = Sketch(bits, pack(codes, bits), step, step, step, scale)
    norms = [xp.half_above(xp.norm(e) * _outward(key)) for e in _errors(sketch, key, valid)]
    sketch = Sketch(bits, sketch.planes, step, *norms, scale)
    return spectral_bounds(sketch, key, valid, block_size) if spectral else sketch


def spectral_bounds(sketch: Sketch, key: Array, valid: Array, block_size: int) -> Sketch:
    """``sketch`` of ``key`` with bounds on the squared spectral norms of its blocks' error rows."""
    xp = arrays.namespace(key)
    per_block = []
    for e in _errors(sketch, key, valid):
        padded = xp.pad_end(e, 2, -e.shape[2] % block_size, 0.0)
        rows = padded.reshape(*e.shape[:2], -1, block_size, e.shape[-1])
        per_block.append(largest_eigenvalue(xp, rows) * _outward(key))
    return replace(sketch, spectral=per_block[0], metric_spectral=per_block[1])


def _outward(key: Array) -> float:
    """The decoded value itself is rounded: widen by what a unit of its size can hide."""
    return 1.0 + (key.shape[-1] + 16) * UNIT


def _errors(sketch: Sketch, key: Array, valid: Array) -> tuple[Array, Array]:
    """What the codes lose of each key, and the same over the channel scale."""
    xp = arrays.namespace(key)
    error = xp.where(valid[..., None], key - decode(sketch, dtype=key.dtype), 0.0)
    return error, error / xp.cast(sketch.channel_scale, key.dtype)[:, :, None, :]
