"""``index``: number-theoretic attention, forward, backward and one step, against dense causal attention.

``cases`` and ``index`` are registered like the other groups: a maker in ``cases.py``, a builder in ``driver.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from sieve_attn import patterns, policies
from sieve_attn.bench import peers, truth
from sieve_attn.bench.cases import Case
from sieve_attn.bench.inputs import inputs
from sieve_attn.bench.prepared import Prepared
from sieve_attn.bench.rows import Target
from sieve_attn.bench.settings import Settings
from sieve_attn.functional import offset_attention

LENGTH = 16_384
FAMILY = {"primes": "Policy(keep=Primes())", "squares": "Policy(keep=Squares())", "mian-chowla": "Policy(keep=MianChowla())"}
FORWARD = {"primes": {"float32": 3.5, "bfloat16": 4.0}, "squares": {"float32": 12.0}, "mian-chowla": {"float32": 18.0}}
SHARE_OF_BACKWARD = 1 / 3  # the forward pass over the backward pass
PLANS = ("auto", "diagonals", "wheel")


def cases(settings: Settings) -> Iterator[Case]:
    """Every pattern on every plan, its gradients, and steps against caches of growing length."""
    n, dtypes, dims = settings.n or LENGTH, settings.dtypes or ("float32", "bfloat16"), settings.head_dims or (64,)
    for dtype in dtypes:
        for dim in dims:
            for name, pattern in FAMILY.items():
                stated = FORWARD[name].get(dtype) if (n, dim) == (LENGTH, 64) else None
                for plan in PLANS:
                    held = () if stated is None or plan != "auto" else (Target("ratio_sdpa", stated),)
                    yield Case("index", f"{name}, {plan}", dtype, n, n, dim, 1, policy=pattern, targets=held)
                back = (Target("ratio", SHARE_OF_BACKWARD),)
                yield Case("index", f"{name}, backward", dtype, n, n, dim, 1, policy=pattern, targets=back)
                for length in (n // 16, n // 4, n):
                    yield Case("index", f"{name}, step", dtype, 1, length, dim, 1, policy=pattern)


def index(case: Case, settings: Settings) -> Prepared:
    """One row: the name says what is called, ``policy`` holds the offsets; window and global tokens are those of the layers."""
    query, key, value = inputs(case, settings.seed)
    pattern = policies.parse(case.policy).keep | patterns.Window(4) | patterns.GlobalTokens(2)
    what = case.name.rpartition(" ")[2]
    if what == "backward":
        return _backward(case.name, pattern, query, key, value)
    plan = what if what in PLANS else "auto"
    report = offset_attention(query, key, value, pattern, plan=plan, return_report=True)[1]
    selection = pattern.selection(case.q_len, case.kv_len, causal=True)
    note = f"{case.name}: {report.plan}" + (
        f" modulo {report.modulus}, {report.tiled_residues} residues" if report.modulus else ""
    )

    def check(result: Any) -> tuple[str, dict[str, Any]]:
        wrong, dropped = truth.check_attention(*result, query, key, value, selection, causal=True)
        return wrong, {
            "backend": report.backend,
            "density": report.density,
            "ideal": 1.0 / report.density,
            "dropped_mass": dropped,
        }

    return Prepared(
        lambda: offset_attention(query, key, value, pattern, plan=plan, return_lse=True),
        check,
        {"sdpa": lambda: peers.sdpa(query, key, value, True)},
        notes=(note,),
    )


def _backward(name: str, pattern: patterns.Pattern, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Prepared:
    """Gradients alone; the time beside them is that of our own forward pass."""
    query, key, value = (x.requires_grad_() for x in (query, key, value))
    output, report = offset_attention(query, key, value, pattern, return_report=True)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).to(output.dtype)
    rows = truth.sampled(query.shape[2], key.shape[2])
    few = torch.zeros_like(upstream).index_copy_(2, rows, upstream[:, :, rows])
    selection = pattern.selection(query.shape[2], key.shape[2], causal=True)

    def gradients(above: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(output, (query, key, value), above, retain_graph=True)

    def check(result: Any) -> tuple[str, dict[str, Any]]:
        wrong = truth.check_gradients(result, few, query, key, value, selection, rows, causal=True)
        return wrong, {"backend": report.backend, "density": report.density}

    def forward() -> Any:
        with torch.no_grad():
            return offset_attention(query, key, value, pattern)

    return Prepared(
        lambda: gradients(upstream),
        check,
        {"naive": lambda: peers.Peer(forward)},
        first=lambda: gradients(few),
        notes=("the ratio of `backward` rows is our forward pass over our backward pass", f"{name}: {report.gradient_plan}"),
    )
