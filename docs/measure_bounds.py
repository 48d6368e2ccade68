"""The table of ``docs/math.md``: what share of the keys must be kept to prove that at most a tenth of the mass is dropped.

    python docs/measure_bounds.py

Every query chooses for itself with the streaming rule of ``selection.Certified``; nothing is forced. ``mean`` is over all
queries and heads, ``best`` the head with the smallest share. A second table says how wide each bracket is.
"""

from __future__ import annotations

import platform
from time import perf_counter

import torch

from sieve_attn import geometry, pipeline, scores, selection
from sieve_attn.policies import Policy
from sieve_attn.testing.strategies import Shape, clustered, gaussian
from sieve_attn.types import Call

ERROR = 0.1
SHAPE = Shape(batch=1, q_heads=4, kv_heads=4, q_len=128, kv_len=1024, dim=64, v_dim=8)
BOUNDS = {
    "the mass itself": scores.Exact(),
    "ball": scores.Euclidean(),
    "box": scores.Box(),
    "cosh": scores.Cosh(),
    "Bennett": scores.Bennett(),
    "Bennett and box": scores.Tightest((scores.Bennett(), scores.Box())),
    "2-bit keys": scores.KeySketch(2),
    "4-bit keys": scores.KeySketch(4),
    "8-bit keys": scores.KeySketch(8),
}


def share(bound: scores.Bound, inputs: tuple, block_size: int) -> str:
    policy = Policy(bound, selection.Certified(ERROR), block_size=block_size, query_tile=1, share_group=False)
    _, report = pipeline.attention(*inputs, policy, return_report=True)
    assert float(report.certificate.dropped_mass.max()) <= ERROR
    return f"{report.density:.3f} / {float(report.density_per_head.min()):.3f}"


def width(bound: scores.Bound, inputs: tuple, block_size: int) -> str:
    query, key, value = inputs
    call = Call(query, key, value, scale=query.shape[3] ** -0.5)
    found = bound.score(call.rows(0, call.q_len), geometry.build(key, block_size, bound.statistics), brackets=True)
    return f"{float((found.upper - found.lower).mean()):.3g}"


def table(what, title: str) -> None:
    cases = [(make, size) for make in (gaussian, clustered) for size in (16, 64)]
    print(f"\n{title}\n\n| bound | " + " | ".join(f"{make.__name__}, blocks of {size}" for make, size in cases) + " |")
    print("|---" * (len(cases) + 1) + "|")
    for name, bound in BOUNDS.items():
        print(f"| {name} | " + " | ".join(what(bound, make(0, SHAPE), size) for make, size in cases) + " |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    begun = perf_counter()
    print(f"torch {torch.__version__}, {platform.machine()}; {SHAPE}")
    table(share, f"Share of keys kept to prove delta <= {ERROR}: mean / best head")
    table(width, "Mean width of the log-mass bracket, upper minus lower")
    print(f"\n{perf_counter() - begun:.0f} s")
