"""Cases on a GPU: what is measured there, and the figures that an H200 is held to, in bf16 with heads of 128.

Ratios are over the fastest of SDPA flash, SDPA cuDNN and FlexAttention of the same run. Other sizes carry no figure.
"""

from __future__ import annotations

from collections.abc import Iterator

from sieve_attn.bench.cases import Case
from sieve_attn.bench.rows import Target
from sieve_attn.bench.settings import Settings

HEADS, KV_HEADS = 32, 8
LENGTH, KEYS = 16_384, 131_072
DENSITIES = (1.0, 0.1)
DENSE_SHARE = 0.75  # of the fastest dense kernel, with nothing left out
IDEAL_SHARE = {"prefill": 0.8, "backward": 0.6}  # of 1 / density
OVER_FLEX = 1.5
GATE_PERCENT, GATE_LENGTH = 10.0, 32_768
DECODE = {"centroids": 8.0, "4-bit sketch": 4.0}
BANDWIDTH_SHARE = 0.7
PUBLISHED = (
    ("4K uniform", 4096, "top_blocks(k=16)", "uniform", 1.0),
    ("32K clustered", 32_768, "top_blocks(k=64)", "clustered", 4.0),
    ("128K typical", 131_072, "top_blocks(k=64)", "typical", 7.0),
)
MILLION = "Policy(Mean(), TargetSparsity(0.99), block_size=64, query_stride=16)"
MILLION_MB = 141e3  # one card


def makers() -> dict:
    """``group: cases of it``"""
    return {"prefill": _prefill, "backward": _backward, "decode": _decode, "gate": _gate, "topk": _top_k}


def _attending(settings: Settings, group: str, heads: int, kv_heads: int) -> Iterator[Case]:
    n = settings.n or LENGTH
    for dtype in settings.dtypes or ("bfloat16",):
        for dim in settings.head_dims or (128, 64):
            for block in (64, 16):
                for density in DENSITIES:
                    targets: tuple[Target, ...] = ()
                    if (n, dtype, dim, block) == (LENGTH, "bfloat16", 128, 64):
                        targets = (Target("ratio", DENSE_SHARE if density == 1.0 else IDEAL_SHARE[group] / density),)
                        targets += (Target("ratio_flex", OVER_FLEX),) if density < 1.0 else ()
                    yield Case(group, f"random blocks {density:g}", dtype, n, n, dim, block, heads=heads, kv_heads=kv_heads,
                               density=density, targets=targets)  # fmt: skip


def _prefill(settings: Settings) -> Iterator[Case]:
    return _attending(settings, "prefill", HEADS, KV_HEADS)


def _backward(settings: Settings) -> Iterator[Case]:
    return _attending(settings, "backward", KV_HEADS, KV_HEADS)


def _gate(settings: Settings) -> Iterator[Case]:
    dtypes, dims = settings.dtypes or ("bfloat16",), settings.head_dims or (128,)
    stated = (dtypes, dims) == (("bfloat16",), (128,))
    for dtype in dtypes:
        for dim in dims:
            if settings.allows(GATE_LENGTH):
                few = max(1, round((0.1 * (GATE_LENGTH + 64) / 2 - 64) / 16))
                targets = (Target("gate_percent", GATE_PERCENT, most=True),) if stated else ()
                yield Case("gate", "share: 4-bit sketch", dtype, GATE_LENGTH, GATE_LENGTH, dim, 16, heads=HEADS,
                           kv_heads=KV_HEADS, policy=f"Policy(KeySketch(4, 8), TopK({few}), query_stride=4)",
                           targets=targets)  # fmt: skip
            for name, n, policy, keys, ratio in PUBLISHED:
                if settings.allows(n):
                    yield Case("gate", name, dtype, n, n, dim, 16, heads=HEADS, kv_heads=KV_HEADS, policy=policy, keys=keys,
                               targets=(Target("ratio", ratio),) if stated else ())  # fmt: skip
            if settings.long and settings.allows(1 << 20):
                yield Case("gate", "1M typical", dtype, 1 << 20, 1 << 20, dim, 64, heads=KV_HEADS, kv_heads=KV_HEADS,
                           policy=MILLION, keys="typical",
                           targets=(Target("resident_mb", MILLION_MB, most=True),) if stated else ())  # fmt: skip


def _decode(settings: Settings) -> Iterator[Case]:
    m, share = settings.keys, 0.05
    fine, coarse = (max(1, round(share * -(-m // block))) for block in (16, 64))
    modes = {
        "dense": (None, 16),
        "given selection": (None, 16),
        "centroids": (f"Policy(Mean(), TopK({coarse}), block_size=64)", 64),
        "4-bit sketch": (f"Policy(KeySketch(4, 8), TopK({fine}))", 16),
    }
    for dtype in settings.dtypes or ("bfloat16",):
        for dim in settings.head_dims or (128,):
            for name, (policy, block) in modes.items():
                stated = (m, dtype, dim) == (KEYS, "bfloat16", 128)
                targets = (Target("ratio_sdpa", DECODE[name]),) if stated and name in DECODE else ()
                targets += (Target("bandwidth_share", BANDWIDTH_SHARE),) if stated else ()
                yield Case("decode", name, dtype, 1, m, dim, block, heads=HEADS, kv_heads=KV_HEADS, policy=policy,
                           density=share if name == "given selection" else None, targets=targets)  # fmt: skip


def _top_k(settings: Settings) -> Iterator[Case]:
    n = settings.n or 4096
    for dtype in settings.dtypes or ("bfloat16",):
        for dim in settings.head_dims or (32,):
            yield Case("topk", "k = 8", dtype, n, n, dim, 1, heads=1, kv_heads=1)
