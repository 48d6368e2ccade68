"""One query per (batch, head) against a cache; metadata is built beforehand, from the very keys that are attended to.

Measured time, achieved sparsity and ``theoretical_speedup = 1 / (1 - sparsity)`` are three columns; quality stands beside them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sieve_attn import geometry as stage_geometry
from sieve_attn import policies
from sieve_attn.aether import precompute_metadata, run_aether_sparse
from sieve_attn.bench import timing, truth
from sieve_attn.bench.aether.cases import OURS, VARIANTS, Cache, Options, Outcome
from sieve_attn.bench.gating import split
from sieve_attn.bench.prepared import which_backend
from sieve_attn.bench.rows import FAILED
from sieve_attn.evaluation import metrics
from sieve_attn.pipeline import attend, attention
from sieve_attn.types import Blocks, Selection


def keep_something(mask: Tensor, scores: Tensor) -> Tensor:
    """``mask`` [batch, heads, blocks], and the best block of a query that would keep none."""
    return mask | (~mask.any(-1, keepdim=True) & (torch.arange(mask.shape[-1]) == scores.argmax(-1, keepdim=True)))


def selection_of(mask: Tensor, seq_len: int, block_size: int) -> Selection:
    return Selection((Blocks.from_tiles(mask[:, :, None], q_len=1, kv_len=seq_len, q_block=1, kv_block=block_size),))


def run(o: Options, tell: Callable[[str, float], None] = lambda stage, done: None) -> Iterator[Outcome]:
    """Every variant at every requested sparsity (``sparsity_sweep``, else the one request), correctness first."""
    cache = Cache.make(o)
    requests = o.sparsity_sweep or (o.target_sparsity,)
    for place, request in enumerate(requests):
        basic = None
        for number, variant in enumerate(o.variants):
            tell("aether", (place + number / len(o.variants)) / len(requests))
            asked = replace(o, target_sparsity=request)
            try:
                found = _ours(asked, cache, basic) if variant == OURS else _theirs(asked, cache, variant)
            except Exception as why:
                found = Outcome(variant, request, None, status=FAILED, note=f"{type(why).__name__}: {why}")
            basic = found.sparsity if variant == "basic" else basic
            yield found
    tell("aether", 1.0)


def _theirs(o: Options, cache: Cache, variant: str) -> Outcome:
    started = time.perf_counter()
    metadata = precompute_metadata(cache.key, o.block_size, compute_variance=True, compute_concentration=True)
    metadata_ms = 1e3 * (time.perf_counter() - started)
    query = cache.query[:, :, 0]

    def call() -> tuple[Any, ...]:
        start = time.perf_counter()
        mask, scores = run_aether_sparse(
            query, *metadata, threshold=o.threshold, target_sparsity=o.target_sparsity, **VARIANTS[variant]
        )
        selection = selection_of(keep_something(mask, scores), o.seq_len, o.block_size)
        gate = time.perf_counter() - start
        return *attend(cache.query, cache.key, cache.value, selection, backend=o.backend), selection, gate

    threshold = o.threshold if o.target_sparsity is None else None
    outcome = Outcome(variant, o.target_sparsity, threshold, metadata_ms=metadata_ms)
    return _measured(outcome, o, cache, call, o.block_size)


def _ours(o: Options, cache: Cache, basic: float | None) -> Outcome:
    """The 4-bit sketch on blocks of 16 keys."""
    asked = o.target_sparsity if o.target_sparsity is not None else basic or 0.0
    policy = policies.Policy(policies.KeySketch(4), policies.TargetSparsity(asked))
    started = time.perf_counter()
    geometry = stage_geometry.build(cache.key, policy.block_size, policy.statistics)
    metadata_ms = 1e3 * (time.perf_counter() - started)

    def call() -> tuple[Any, ...]:
        output, lse, report = attention(
            cache.query, cache.key, cache.value, policy, geometry=geometry, backend=o.backend, return_lse=True,
            return_report=True,
        )  # fmt: skip
        return output, lse, report.selection, split(report)["gate"]

    outcome = Outcome(OURS, asked, None, metadata_ms=metadata_ms, note=f"4-bit sketch, {policy.block_size} keys a block")
    return _measured(outcome, o, cache, call, policy.block_size)


def _measured(outcome: Outcome, o: Options, cache: Cache, call: Callable[[], tuple[Any, ...]], block_size: int) -> Outcome:
    """The outcome with quality and, if the output is right, with times."""
    query, key, value = cache.query, cache.key, cache.value
    output, lse, selection, _ = call()
    wrong, _ = truth.check_attention(output, lse, query, key, value, selection, causal=False)
    if wrong:
        return replace(outcome, status=FAILED, note=wrong)

    def dense() -> Tensor:
        return scaled_dot_product_attention(query, key, value)

    kept = selection.to_dense(query)
    found = metrics.evaluate(cache.probability, kept, dense(), output, block_size=block_size).mean
    calls = {"dense": dense, "sparse": call}
    for _ in range(o.num_warmup):
        for warm in calls.values():
            warm()

    def parts(name: str, result: Any) -> dict[str, float]:
        return {"gate": result[3]} if name == "sparse" else {}

    ms = {n: timing.median_ms(s) for n, s in timing.interleave(calls, o.num_iterations, parts, least_seconds=0.0).items()}
    names = {f.name for f in fields(Outcome)}
    size = int((~kept).sum()) * (o.head_dim + value.shape[-1]) * key.itemsize / 1e6
    return replace(
        outcome,
        **{name: value for name, value in found.items() if name in names},
        dropped_mass=found["total_variation"], dense_ms=ms["dense"], sparse_ms=ms["sparse"], gate_ms=ms["gate"],
        measured_speedup=metrics.measured_speedup(ms["dense"], ms["sparse"]), kv_mb_not_read=size,
        backend=which_backend(query, key, value, o.backend),
    )  # fmt: skip
