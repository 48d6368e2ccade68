"""``prefill`` and ``backward``: ``attend`` over random block selections, causal; choosing is not part of it."""

from __future__ import annotations

from typing import Any

import torch

from sieve_attn.bench import peers, truth
from sieve_attn.bench.cases import Case
from sieve_attn.bench.inputs import density_of, inputs, random_blocks
from sieve_attn.bench.prepared import Prepared, which_backend
from sieve_attn.bench.settings import Settings
from sieve_attn.pipeline import attend


def prefill(case: Case, settings: Settings) -> Prepared:
    """Forward: output and lse against the truth, time against dense SDPA and FlexAttention on the same blocks."""
    query, key, value = inputs(case, settings.seed)
    selection, fields = _selection(case, settings)

    def check(result: Any) -> tuple[str, dict[str, Any]]:
        wrong, _ = truth.check_attention(*result, query, key, value, selection, causal=True)
        return wrong, fields | {"backend": which_backend(query, key, value, settings.backend)}

    def check_flex(output: torch.Tensor) -> str:
        return truth.check_attention(output, None, query, key, value, selection, causal=True)[0]

    return Prepared(
        lambda: attend(query, key, value, selection, causal=True, backend=settings.backend),
        check,
        {
            "sdpa": lambda: peers.sdpa(query, key, value, True),
            "flex": lambda: peers.flex(query, key, value, selection, True, check_flex),
        },
    )


def backward(case: Case, settings: Settings) -> Prepared:
    """Gradients alone, on a graph that is kept; FlexAttention has no backward on the CPU.

    They are checked with an upstream gradient that is zero but at sampled queries, which makes every entry checkable.
    """
    query, key, value = (x.requires_grad_() for x in inputs(case, settings.seed))
    selection, fields = _selection(case, settings)
    output, _ = attend(query, key, value, selection, causal=True, backend=settings.backend)
    dense = peers.sdpa(query, key, value, True).call()
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(settings.seed + 3)).to(output.dtype)
    rows = truth.sampled(case.q_len, case.kv_len)
    sparse_upstream = torch.zeros_like(upstream).index_copy_(2, rows, upstream[:, :, rows])

    def gradients(of: torch.Tensor, above: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(of, (query, key, value), above, retain_graph=True)

    def check(result: Any) -> tuple[str, dict[str, Any]]:
        wrong = truth.check_gradients(result, sparse_upstream, query, key, value, selection, rows, causal=True)
        return wrong, fields | {"backend": which_backend(query, key, value, settings.backend)}

    return Prepared(
        lambda: gradients(output, upstream),
        check,
        {
            "sdpa": lambda: peers.Peer(lambda: gradients(dense, upstream)),
            "flex": lambda: peers.Peer(why="no backward on the CPU"),
        },
        first=lambda: gradients(output, sparse_upstream),
    )


def _selection(case: Case, settings: Settings) -> tuple[Any, dict[str, float]]:
    """The case's random blocks, and what is known about them."""
    selection = random_blocks(
        settings.seed, case.density, heads=case.heads, q_len=case.q_len, kv_len=case.kv_len, block=case.block
    )
    density = density_of(selection, causal=True)
    return selection, {"density": density, "ideal": 1.0 / density}
