"""``prefill`` and ``backward``: ``attend`` over random block selections, causal; choosing is not part of it."""

from __future__ import annotations

from typing import Any

import torch

from sieve_attn.bench import peers, truth
from sieve_attn.bench.cases import Case
from sieve_attn.bench.inputs import density_of, inputs, random_blocks
from sieve_attn.bench.prepared import Prepared, moved, which_backend
from sieve_attn.bench.settings import Settings
from sieve_attn.pipeline import attend


def prefill(case: Case, settings: Settings) -> Prepared:
    """Forward: output and lse against the truth, time against dense SDPA and FlexAttention on the same blocks."""
    host = inputs(case, settings.seed)
    exact, fields = _selection(case, settings)
    query, key, value = moved(host, settings.device)
    selection = moved(exact, settings.device)

    def check(result: Any) -> tuple[str, dict[str, Any]]:
        wrong, _ = truth.check_attention(*moved(result, "cpu"), *host, exact, causal=True)
        return wrong, fields | {"backend": which_backend(query, key, value, settings.backend)}

    def check_flex(output: torch.Tensor) -> str:
        return truth.check_attention(moved(output, "cpu"), None, *host, exact, causal=True)[0]

    return Prepared(
        lambda: attend(query, key, value, selection, causal=True, backend=settings.backend),
        check,
        {**peers.dense(query, key, value, True), "flex": lambda: peers.flex(query, key, value, selection, True, check_flex)},
    )


def backward(case: Case, settings: Settings) -> Prepared:
    """Gradients alone, on a graph that is kept; FlexAttention has no backward on the CPU.

    They are checked with an upstream gradient that is zero but at sampled queries, which makes every entry checkable.
    """
    host = inputs(case, settings.seed)
    exact, fields = _selection(case, settings)
    query, key, value = (moved(x, settings.device).detach().requires_grad_() for x in host)
    selection = moved(exact, settings.device)
    output, _ = attend(query, key, value, selection, causal=True, backend=settings.backend)
    drawn = torch.randn(output.shape, generator=torch.Generator().manual_seed(settings.seed + 3)).to(output.dtype)
    rows = truth.sampled(case.q_len, case.kv_len)
    sampled = torch.zeros_like(drawn).index_copy_(2, rows, drawn[:, :, rows])
    upstream, sparse_upstream = moved((drawn, sampled), settings.device)

    def gradients(of: torch.Tensor, above: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(of, (query, key, value), above, retain_graph=True)

    def differentiated(peer: peers.Peer) -> peers.Peer:
        if peer.call is None:
            return peer
        dense = peer.call()
        return peers.Peer(lambda: gradients(dense, upstream))

    def flex() -> peers.Peer:
        if settings.device == "cpu":
            return peers.Peer(why="no backward on the CPU")
        return differentiated(peers.flex(query, key, value, selection, True, lambda output: ""))

    def check(result: Any) -> tuple[str, dict[str, Any]]:
        wrong = truth.check_gradients(moved(result, "cpu"), sampled, *host, exact, rows, causal=True)
        return wrong, fields | {"backend": which_backend(query, key, value, settings.backend)}

    return Prepared(
        lambda: gradients(output, upstream),
        check,
        {
            **{name: lambda make=make: differentiated(make()) for name, make in peers.dense(query, key, value, True).items()},
            "flex": flex,
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
