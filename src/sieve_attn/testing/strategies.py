"""Inputs that look for the exception: key generators by name, and Hypothesis strategies for shapes, dtypes and edits.

Every generator takes a seed and sizes and returns ``(query, key, value)``, [batch, heads, len, dim].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

QKV = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Shape:
    """The sizes of one call."""

    batch: int = 1
    q_heads: int = 4
    kv_heads: int = 2
    q_len: int = 64
    kv_len: int = 256
    dim: int = 32
    v_dim: int = 32


def _normal(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=source, dtype=torch.float32) for shape in shapes]


def _parts(seed: int, s: Shape) -> list[Tensor]:
    return _normal(
        seed,
        (s.batch, s.q_heads, s.q_len, s.dim),
        (s.batch, s.kv_heads, s.kv_len, s.dim),
        (s.batch, s.kv_heads, s.kv_len, s.v_dim),
    )


def gaussian(seed: int, shape: Shape = Shape(), dtype: torch.dtype = torch.float32) -> QKV:
    """Independent normal entries; scaled logits of standard deviation 2."""
    q, k, v = _parts(seed, shape)
    return (2 * q).to(dtype), k.to(dtype), v.to(dtype)


def clustered(seed: int, shape: Shape = Shape(), dtype: torch.dtype = torch.float32) -> QKV:
    """Runs of about 16 keys near one of a few centres, queries near a centre each: what attention to text looks like."""
    q, k, v = _parts(seed, shape)
    source = torch.Generator().manual_seed(seed + 1)
    centres = torch.randn(shape.batch, shape.kv_heads, 16, shape.dim, generator=source)
    runs = torch.randint(16, (shape.batch, shape.kv_heads, -(-shape.kv_len // 16)), generator=source)
    which = runs.repeat_interleave(16, 2)[:, :, : shape.kv_len]
    near = torch.gather(centres, 2, which[..., None].expand(-1, -1, -1, shape.dim))
    group = shape.q_heads // shape.kv_heads
    aim = torch.randint(16, (shape.batch, shape.q_heads, shape.q_len), generator=source)
    towards = torch.gather(centres.repeat_interleave(group, 1), 2, aim[..., None].expand(-1, -1, -1, shape.dim))
    return (0.8 * towards + 0.5 * q).to(dtype), (near + 0.3 * k).to(dtype), v.to(dtype)


def decaying_spectrum(seed: int, shape: Shape = Shape(), dtype: torch.dtype = torch.float32) -> QKV:
    """Keys whose principal variances decay as 1/i, in a random basis."""
    q, k, v = _parts(seed, shape)
    basis = torch.linalg.qr(_normal(seed + 1, (shape.dim, shape.dim))[0]).Q
    spectrum = torch.arange(1, shape.dim + 1) ** -0.5
    spectrum = spectrum * (shape.dim / (spectrum**2).sum()) ** 0.5
    return (2 * (q * spectrum) @ basis).to(dtype), ((k * spectrum) @ basis).to(dtype), v.to(dtype)


def outlier_channels(seed: int, shape: Shape = Shape(), dtype: torch.dtype = torch.float32) -> QKV:
    """Two channels of the keys are ten times larger and far from zero; the query hardly looks at them."""
    q, k, v = _parts(seed, shape)
    k[..., :2] = 10 * k[..., :2] + 20
    q[..., :2] = 0.1 * q[..., :2]
    return (2 * q).to(dtype), k.to(dtype), v.to(dtype)


def huge_norms(seed: int, shape: Shape = Shape(), dtype: torch.dtype = torch.float32) -> QKV:
    """Norms over many orders of magnitude, up to logits of thousands."""
    q, k, v = _parts(seed, shape)
    stretch = _normal(seed + 1, (shape.batch, shape.kv_heads, shape.kv_len, 1))[0]
    return (3 * q).to(dtype), (k * torch.exp(1.5 * stretch)).to(dtype), v.to(dtype)


def duplicates(seed: int, shape: Shape = Shape(), dtype: torch.dtype = torch.float32) -> QKV:
    """Only three different keys: ties everywhere."""
    q, k, v = _parts(seed, shape)
    which = torch.randint(3, (shape.kv_len,), generator=torch.Generator().manual_seed(seed))
    return (2 * q).to(dtype), k[:, :, which % min(3, shape.kv_len)].to(dtype), v.to(dtype)


def one_hot(seed: int, shape: Shape = Shape(), dtype: torch.dtype = torch.float32) -> QKV:
    """Each key has one channel that is not zero, and it is large."""
    q, k, v = _parts(seed, shape)
    channel = torch.randint(shape.dim, k.shape[:-1], generator=torch.Generator().manual_seed(seed))
    keys = torch.nn.functional.one_hot(channel, shape.dim) * 5.0
    return (2 * q).to(dtype), (keys * torch.sign(k[..., :1])).to(dtype), v.to(dtype)


def all_zero(seed: int, shape: Shape = Shape(), dtype: torch.dtype = torch.float32) -> QKV:
    """All keys are zero: every logit is equal."""
    q, k, v = _parts(seed, shape)
    return q.to(dtype), torch.zeros_like(k).to(dtype), v.to(dtype)


def bf16_rounded(seed: int, shape: Shape = Shape(), dtype: torch.dtype = torch.float32) -> QKV:
    """Values that bfloat16 can hold, with a mean far from zero: many equal entries, cancelling sums."""
    q, k, v = _parts(seed, shape)
    return tuple(x.to(torch.bfloat16).to(dtype) for x in (2 * q, k + 3, v))


def denormal(seed: int, shape: Shape = Shape(), dtype: torch.dtype = torch.float32) -> QKV:
    """Keys below the smallest normal number, every third one ordinary."""
    q, k, v = _parts(seed, shape)
    k[:, :, torch.arange(shape.kv_len) % 3 > 0] *= 1e-41
    return (2 * q).to(dtype), k.to(dtype), v.to(dtype)


def late_channels(seed: int, shape: Shape = Shape(), dtype: torch.dtype = torch.float32) -> QKV:
    """Half of the channels are silent in the 64 keys that the sketch takes its scales from; then one key in eleven uses one."""
    q, k, v = _parts(seed, shape)
    late = torch.arange(shape.dim) >= shape.dim // 2
    k[..., late] = 0.0
    loud = torch.arange(shape.kv_len) % 11 == 0
    loud[:64] = False
    channel = torch.randint(shape.dim // 2, shape.dim, k.shape[:-1], generator=torch.Generator().manual_seed(seed))
    k = torch.where(loud[:, None], 5.0 * torch.nn.functional.one_hot(channel, shape.dim) * torch.sign(k[..., :1]), k)
    return (2 * q).to(dtype), k.to(dtype), v.to(dtype)


def soft_capped(seed: int, shape: Shape = Shape(), dtype: torch.dtype = torch.float32) -> QKV:
    """Logits of standard deviation 12, to be capped at 8: both knees of the cap are in use."""
    q, k, v = _parts(seed, shape)
    return (12 * q).to(dtype), k.to(dtype), v.to(dtype)


def biased(seed: int, shape: Shape = Shape(), dtype: torch.dtype = torch.float32) -> QKV:
    """Gaussian, to be used with the bias of :func:`options`."""
    return gaussian(seed, shape, dtype)


GENERATORS: dict[str, Callable[..., QKV]] = {
    f.__name__: f
    for f in (gaussian, clustered, decaying_spectrum, outlier_channels, huge_norms, duplicates, one_hot, all_zero, bf16_rounded,
              denormal, late_channels, soft_capped, biased)
}  # fmt: skip


def options(name: str, seed: int, shape: Shape) -> dict[str, Any]:
    """The call options that belong to a generator: a cap for ``soft_capped``, a bias for ``biased``."""
    if name == "soft_capped":
        return {"softcap": 8.0}
    if name == "biased":
        size = (shape.batch, shape.q_heads, shape.q_len, shape.kv_len)
        return {"bias": 3 * torch.randn(size, generator=torch.Generator().manual_seed(seed + 2))}
    return {}


def shapes(max_len: int = 80, *, q_len: int | None = None) -> st.SearchStrategy[Shape]:
    """Grouped heads, ragged lengths on both sides, value dims of their own."""

    def build(batch, kv_heads, group, queries, keys, dim, v_dim):
        return Shape(batch, kv_heads * group, kv_heads, q_len or queries, keys, dim, v_dim)

    length = st.integers(1, max_len)
    return st.builds(
        build,
        st.integers(1, 2),
        st.integers(1, 2),
        st.integers(1, 3),
        length,
        length,
        st.sampled_from((4, 8, 17)),
        st.sampled_from((3, 8)),
    )


def seeds() -> st.SearchStrategy[int]:
    return st.integers(0, 2**31 - 1)


def generators() -> st.SearchStrategy[str]:
    return st.sampled_from(sorted(GENERATORS))


def dtypes() -> st.SearchStrategy[torch.dtype]:
    return st.sampled_from((torch.float16, torch.bfloat16, torch.float32, torch.float64))


def edits() -> st.SearchStrategy[list[tuple[str, int]]]:
    """What a cache goes through: ``("append", n)``, ``("crop", per mille of the length)``, ``("reorder", seed)``."""
    one = st.one_of(
        st.tuples(st.just("append"), st.integers(1, 70)),
        st.tuples(st.just("crop"), st.integers(1, 999)),
        st.tuples(st.just("reorder"), st.integers(0, 99)),
    )
    return st.lists(one, min_size=1, max_size=6)


def random_blocks(
    seed: int,
    shape: Shape,
    *,
    heads: int | None = None,
    q_block: int = 8,
    kv_block: int = 4,
    density: float = 0.4,
    per_query: bool = False,
    causal: bool = False,
    like: Tensor | None = None,
) -> Any:
    """A random block selection for ``shape``; with ``per_query`` every row keeps blocks of its own."""
    from sieve_attn.types import Blocks, Selection

    heads = shape.kv_heads if heads is None else heads
    lead = (shape.kv_len - shape.q_len) % q_block if causal else 0
    tiles, blocks = -(-(shape.q_len + lead) // q_block), -(-shape.kv_len // kv_block)
    source = torch.Generator().manual_seed(seed)
    kept = torch.rand(shape.batch, heads, tiles, blocks, generator=source) < density
    rows = None
    if per_query:
        rows = torch.rand(shape.batch, heads, shape.q_len, blocks, generator=source) < density
        tile = (torch.arange(shape.q_len) + lead) // q_block
        kept = torch.zeros(shape.batch, heads, tiles, blocks, dtype=torch.int64).index_add_(2, tile, rows.long()) > 0
    if like is not None:
        kept, rows = kept.to(like.device), None if rows is None else rows.to(like.device)
    return Selection(
        (
            Blocks.from_tiles(
                kept, q_len=shape.q_len, kv_len=shape.kv_len, q_block=q_block, kv_block=kv_block, lead=lead, rows=rows
            ),
        )
    )
