"""Stage 1 hands over: summaries of key blocks, and the low-bit copy of the keys."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

Array = Any


@dataclass(frozen=True)
class Statistics:
    """What a scorer asks of the geometry; ``a | b`` asks for both."""

    radius: bool = False
    box: bool = False
    variance: bool = False
    direction: bool = False
    value: bool = False
    sub_means: int = 0
    sketch_bits: int = 0
    spectral: bool = False  # the sketch's spectral numbers: only proofs read them, and they cost more than the sketch

    def __or__(self, other: Statistics) -> Statistics:
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return Statistics(**{name: type(a)(max(a, b)) for name, a, b in pairs})


@dataclass(frozen=True)
class Sketch:
    """A low-bit copy of the keys, one key at a time: ``k^_jd = channel_scale_d * scale_j * (code_jd - (2^bits - 1) / 2)``.

    The codes lie in bit planes, most significant first, so that the first ``p`` planes are themselves a ``p``-bit sketch.
    ``error`` and ``metric_error`` bound ``||k_j - k^_j||`` and ``||(k_j - k^_j) / a||`` (``a`` the channel scale);
    ``spectral`` and ``metric_spectral``, where asked for, bound the squared spectral norms of a block's error rows. All four
    round outward.
    """

    bits: int
    planes: Array  # [bits, batch, kv_heads, kv_len, ceil(dim / 8)] uint8
    scale: Array  # [batch, kv_heads, kv_len] fp16
    error: Array  # [batch, kv_heads, kv_len] fp16
    metric_error: Array  # [batch, kv_heads, kv_len] fp16
    channel_scale: Array  # [batch, kv_heads, dim] fp32
    spectral: Array | None = None  # [batch, kv_heads, blocks] fp32
    metric_spectral: Array | None = None  # [batch, kv_heads, blocks] fp32


@dataclass(frozen=True)
class Geometry:
    """Summaries of blocks of ``block_size`` keys; only what ``statistics`` names is there, the rest is None."""

    block_size: int
    kv_len: int
    statistics: Statistics
    count: Array  # [batch, kv_heads, blocks] int32: keys that take part (ragged tails and masked keys do not)
    finite: Array  # [batch, kv_heads, blocks] bool: False if any of them holds a NaN or an infinity
    mean: Array  # [batch, kv_heads, blocks, dim]
    key_norm: Array  # [batch, kv_heads, blocks] at least max ||k||
    radius: Array | None = None  # [batch, kv_heads, blocks] at least max ||k - mean||, about the stored mean
    low: Array | None = None  # [batch, kv_heads, blocks, dim] channel minima
    high: Array | None = None  # [batch, kv_heads, blocks, dim] channel maxima
    variance: Array | None = None  # [batch, kv_heads, blocks] at least the largest eigenvalue of the covariance
    channel_variance: Array | None = None  # [batch, kv_heads, blocks, dim]
    direction_mean: Array | None = None  # [batch, kv_heads, blocks, dim] unit vector, the mean direction of the keys
    direction_radius: Array | None = None  # [batch, kv_heads, blocks] max ||k^ - direction_mean||
    direction_variance: Array | None = None  # [batch, kv_heads, blocks] mean ||k^ - direction_mean||^2
    concentration: Array | None = None  # [batch, kv_heads, blocks] clamp(mean k^ . direction_mean, 0.1, 1)
    sub_means: Array | None = None  # [batch, kv_heads, blocks, parts, dim]
    sub_counts: Array | None = None  # [batch, kv_heads, blocks, parts] int32
    value_mean: Array | None = None  # [batch, kv_heads, blocks, v_dim]
    value_radius: Array | None = None  # [batch, kv_heads, blocks] at least max ||v - value_mean||
    sketch: Sketch | None = None

    @property
    def blocks(self) -> int:
        return self.count.shape[2]

    def has(self, asked: Statistics) -> bool:
        """Whether every statistic that ``asked`` names is present (a sketch of more bits serves for fewer)."""
        mine = self.statistics
        flags = ("radius", "box", "variance", "direction", "value", "spectral")
        return (
            all(getattr(mine, f) or not getattr(asked, f) for f in flags)
            and asked.sub_means in (0, mine.sub_means)
            and asked.sketch_bits <= mine.sketch_bits
        )
