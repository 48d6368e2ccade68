"""Cases are data: what is measured, and the figures it is held to. Nothing is allocated here.

Figures are stated for one thread, 4 heads and N = 8,192 unless a table says otherwise; other sizes carry no figure.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from sieve_attn.bench.rows import Target
from sieve_attn.bench.settings import Settings

LENGTH = 8192
DENSITIES = (1.0, 0.21, 0.065)
FORWARD = {
    ("float32", 64): (1.15, 5.5, 15.0),
    ("float32", 128): (1.0, 4.6, 13.0),
    ("bfloat16", 64): (1.5, 6.5, 18.0),
    ("bfloat16", 128): (1.35, 6.0, 16.0),
}
BACKWARD = {("float32", 64): (1.0, 4.0, 11.0), ("float32", 128): (1.0, 4.0, 11.0)}
OVER_FLEX = 2.0
SCALING = 0.9  # of how SDPA scales
BLOCKS = {64: 1.0, 16: 0.8}  # key blocks, and the share of the figures that they are held to
GATE_PERCENT = {"centroids": {"float32": 6.0, "bfloat16": 6.0}, "4-bit sketch": {"float32": 6.0, "bfloat16": 10.0}}
BREAK_EVEN = (256, 512, 1024, 2048, 4096)
DECODE = {"dense": 3.5, "centroids": 70.0, "2-bit sketch": 26.0, "4-bit sketch": 18.0, "certified(0.05)": 8.0}
BANDWIDTH_SHARE = 0.7
MEGABYTES = {"top-k": 1e3, "1M": 6e3}


@dataclass(frozen=True)
class Case:
    """One row to be: sizes, how keys are made (a name in ``inputs.KEYS``), the policy as text, and targets."""

    group: str
    name: str
    dtype: str
    q_len: int
    kv_len: int
    dim: int
    block: int
    threads: int = 1
    heads: int = 4
    kv_heads: int = 4
    density: float | None = None
    policy: str | None = None
    keys: str = "uniform"
    targets: tuple[Target, ...] = ()


def cases(settings: Settings) -> list[Case]:
    """All cases of a run in the order in which they are measured, one thread count after the other."""
    from sieve_attn.bench import cuda_cases, index, jax, ternary

    makers = {
        "prefill": _prefill, "backward": _backward, "decode": _decode, "gate": _gate, "topk": _top_k,
        "ternary": ternary.cases, "index": index.cases, "jax": jax.cases,
    }  # fmt: skip
    if settings.device == "cuda":
        makers = cuda_cases.makers()
    return [_with_threads(case, t) for group in settings.groups for case in makers[group](settings) for t in settings.threads]


def _with_threads(case: Case, threads: int) -> Case:
    """Ratios are targets of one thread; more threads are held to how SDPA scales with them."""
    if threads == 1:
        return case
    kept = tuple(t for t in case.targets if not t.field.startswith("ratio"))
    scales = (Target("scaling", SCALING),) if len(kept) < len(case.targets) and case.group != "gate" else ()
    return replace(case, threads=threads, targets=(*kept, *scales))


def _attending(settings: Settings, group: str, figures: dict, dtypes: tuple[str, ...]) -> Iterator[Case]:
    n = settings.n or LENGTH
    for dtype in settings.dtypes or dtypes:
        for dim in settings.head_dims or (64, 128):
            for block, part in BLOCKS.items():
                stated = figures.get((dtype, dim), ()) if n == LENGTH else ()
                for place, density in enumerate(DENSITIES):
                    targets = (Target("ratio_sdpa", round(part * stated[place], 4)),) if stated else ()
                    if targets and group == "prefill":
                        targets += (Target("ratio_flex", OVER_FLEX),)
                    name = f"random blocks {density:g}"
                    yield Case(group, name, dtype, n, n, dim, block, density=density, targets=targets)


def _prefill(settings: Settings) -> Iterator[Case]:
    return _attending(settings, "prefill", FORWARD, ("float32", "bfloat16"))


def _backward(settings: Settings) -> Iterator[Case]:
    return _attending(settings, "backward", BACKWARD, ("float32",))


def gates(n: int, density: float) -> dict[str, tuple[str, int]]:
    """The two gates of the table as ``name: (policy, block size)``, keeping about ``density`` of a causal call.

    Blocks on the diagonal are always kept (64 keys a tile), so ``TopK`` gets what is left of the share.
    """
    few = {block: max(1, round((density * (n + 64) / 2 - 64) / block)) for block in (64, 16)}
    return {
        "centroids": (f"Policy(Mean(), TopK({few[64]}), block_size=64)", 64),
        "4-bit sketch": (f"Policy(KeySketch(4, 8), TopK({few[16]}), query_stride=4)", 16),
    }


def _gate(settings: Settings) -> Iterator[Case]:
    n, dtypes, dims = settings.n or LENGTH, settings.dtypes or ("bfloat16", "float32"), settings.head_dims or (64,)
    for dtype in dtypes:
        for dim in dims:
            for name, (policy, block) in gates(n, 0.1).items():
                held = GATE_PERCENT[name].get(dtype) if n >= LENGTH else None
                targets = () if held is None else (Target("gate_percent", held, most=True),)
                yield Case("gate", f"share: {name}", dtype, n, n, dim, block, policy=policy, targets=targets)
    for dtype in dtypes:
        for length in filter(settings.allows, BREAK_EVEN):
            for name, (policy, block) in gates(length, 0.1).items():
                targets = (Target("ratio_sdpa", 1.0),) if length >= 1024 else ()
                yield Case("gate", f"break-even: {name}", dtype, length, length, dims[0], block, policy=policy, targets=targets)
        if settings.allows(1024):
            near = Target("ratio_sdpa", 0.95, or_ms=0.05)
            short = "Policy(KeySketch(4, 8), Mass(0.99), min_seq_length=4096)"
            yield Case("gate", "turns dense", dtype, 1024, 1024, dims[0], 16, policy=short, targets=(near,))
    yield from _published(settings)


def _published(settings: Settings) -> Iterator[Case]:
    wanted = [
        ("4K uniform", 4096, "top_blocks(k=16)", "uniform", (Target("ratio_sdpa", 1.0),)),
        ("32K clustered", 32_768, "top_blocks(k=64)", "clustered", (Target("ratio_sdpa", 4.0),)),
    ]
    if settings.long:
        million = "Policy(Mean(), TargetSparsity(0.99), block_size=64, query_stride=16)"
        most = Target("resident_mb", MEGABYTES["1M"], most=True)
        wanted += [
            ("128K typical", 131_072, "top_blocks(k=64)", "typical", (Target("ratio_sdpa", 7.0),)),
            ("1M typical", 1_048_576, million, "typical", (most,)),
        ]
    for name, n, policy, keys, targets in wanted:
        if settings.allows(n):
            block = 64 if "block_size=64" in policy else 16
            yield Case("gate", name, "bfloat16", n, n, 64, block, policy=policy, keys=keys, targets=targets)


def _decode(settings: Settings) -> Iterator[Case]:
    m, share = settings.keys, 0.05
    fine, coarse = (max(1, round(share * -(-m // block))) for block in (16, 64))
    modes = {
        "dense": (None, 16, "uniform"),
        "given selection": (None, 16, "uniform"),
        "centroids": (f"Policy(Mean(), TopK({coarse}), block_size=64)", 64, "uniform"),
        "2-bit sketch": (f"Policy(KeySketch(2, 8), TopK({fine}))", 16, "uniform"),
        "4-bit sketch": (f"Policy(KeySketch(4, 8), TopK({fine}))", 16, "uniform"),
        "certified(0.05)": ("certified(error=0.05)", 16, "peaked"),
    }
    for dtype in settings.dtypes or ("bfloat16",):
        for dim in settings.head_dims or (128,):
            for name, (policy, block, keys) in modes.items():
                stated = name in DECODE and (m, dtype, dim) == (131_072, "bfloat16", 128)
                targets = (Target("ratio_sdpa", DECODE[name]),) if stated else ()
                targets += (Target("bandwidth_share", BANDWIDTH_SHARE),) if m == 131_072 else ()
                density = share if name == "given selection" else None
                yield Case("decode", name, dtype, 1, m, dim, block, heads=32, kv_heads=8, density=density, policy=policy,
                           keys=keys, targets=targets)  # fmt: skip


def _top_k(settings: Settings) -> Iterator[Case]:
    dtypes, dims, n = settings.dtypes or ("float32",), settings.head_dims or (32,), settings.n or 4096
    for dtype in dtypes:
        for dim in dims:
            stated = (n, dtype, dim) == (4096, "float32", 32)
            targets = (Target("ratio", 6.0),) if stated else ()
            yield Case("topk", "k = 8", dtype, n, n, dim, 1, heads=1, kv_heads=1, targets=targets)
            if settings.long and settings.allows(65_536):
                most = (Target("peak_mb", MEGABYTES["top-k"], most=True),)
                yield Case("topk", "k = 8, memory", dtype, 65_536, 65_536, dim, 1, heads=1, kv_heads=1, targets=most)
