"""The published flags, the arrays that they mean, and what is reported for each variant."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sieve_attn import checks
from sieve_attn.bench.rows import OK
from sieve_attn.bench.settings import one_of

VARIANTS: dict[str, dict[str, bool]] = {
    "basic": {},
    "variance": {"use_variance": True},
    "tight": {"use_concentration": True},
    "full": {"use_variance": True, "use_concentration": True},
    "causal": {"is_causal": True},
}
OURS = "ours"
DTYPES = {"float32": "float32", "fp32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16", "float16": "float16",
          "fp16": "float16"}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """The published flags. ``data``: ``gaussian`` keys as published, or ``clustered`` ones, where there is something to find.

    Without ``all_variants`` basic and ours run. Ours keeps what ``target_sparsity`` asks for, and without one as much as basic.
    """

    batch_size: int = 4
    num_heads: int = 32
    head_dim: int = 128
    seq_len: int = 4096
    block_size: int = 64
    num_warmup: int = 3
    num_iterations: int = 20
    dtype: str = "bfloat16"
    threshold: float = 0.15
    target_sparsity: float | None = None
    all_variants: bool = False
    verify: bool = False
    sparsity_sweep: tuple[float, ...] = ()
    data: str = "gaussian"
    backend: str = "auto"
    seed: int = 0

    def __post_init__(self):
        for name in ("batch_size", "num_heads", "head_dim", "seq_len", "block_size", "num_iterations"):
            checks.positive_int(name, getattr(self, name), "leave it out for the published size")
        checks.positive_int("num_warmup", self.num_warmup, "use 0 for none", least=0)
        checks.threshold("threshold", self.threshold)
        for share in (*self.sparsity_sweep, *(() if self.target_sparsity is None else (self.target_sparsity,))):
            checks.share("target_sparsity", share, "0.8 drops 80 % of the blocks")
        one_of("dtype", (self.dtype,), tuple(DTYPES), "try bfloat16")
        one_of("data", (self.data,), ("gaussian", "clustered"), "gaussian is the published one")

    @property
    def variants(self) -> tuple[str, ...]:
        return (*VARIANTS, OURS) if self.all_variants else ("basic", OURS)


@dataclass(frozen=True)
class Outcome:
    """One variant at one request. Times are medians in ms, ``gate_ms`` the part of ``sparse_ms`` that chose.

    ``precision`` and ``recall`` are of the blocks that hold 90 % of a query's mass. ``kl_sparse_dense`` is the true one;
    ``kl_dense_sparse_clamped`` is the published form, whose true value is infinite.
    """

    variant: str
    requested_sparsity: float | None
    threshold: float | None
    sparsity: float | None = None
    theoretical_speedup: float | None = None
    measured_speedup: float | None = None
    dense_ms: float | None = None
    sparse_ms: float | None = None
    gate_ms: float | None = None
    metadata_ms: float | None = None
    cosine: float | None = None
    relative_l2: float | None = None
    dropped_mass: float | None = None
    kl_sparse_dense: float | None = None
    kl_dense_sparse_clamped: float | None = None
    precision: float | None = None
    recall: float | None = None
    entropy_change: float | None = None
    kv_mb_not_read: float | None = None
    backend: str | None = None
    status: str = OK
    note: str = ""


@dataclass(frozen=True)
class Cache:
    """The arrays of a run: query [batch, heads, 1, dim], key and value [batch, heads, seq_len, dim], dense probabilities."""

    query: Tensor
    key: Tensor
    value: Tensor
    probability: Tensor  # [batch, heads, 1, seq_len] fp64

    @classmethod
    def make(cls, o: Options) -> Cache:
        source, dtype = torch.Generator().manual_seed(o.seed), getattr(torch, DTYPES[o.dtype])
        query = torch.randn(o.batch_size, o.num_heads, 1, o.head_dim, generator=source)
        key, value = (torch.randn(o.batch_size, o.num_heads, o.seq_len, o.head_dim, generator=source) for _ in range(2))
        if o.data == "clustered":
            # runs of 64 keys near one of 16 centres, the query near one of them: logits of about 8 there
            centres = torch.nn.functional.normalize(torch.randn(16, o.head_dim, generator=source), dim=-1)
            strength = math.sqrt(8.0 * math.sqrt(o.head_dim))
            run = torch.randint(16, (-(-o.seq_len // 64),), generator=source).repeat_interleave(64)[: o.seq_len]
            key = 0.5 * key + strength * centres[run]
            query = 0.5 * query + strength * centres[torch.randint(16, query.shape[:3], generator=source)]
        query, key, value = (x.to(dtype) for x in (query, key, value))
        logits = torch.stack([q.double() @ k.double().transpose(-1, -2) for q, k in zip(query, key, strict=True)])
        return cls(query, key, value, torch.softmax(logits * o.head_dim**-0.5, -1))
