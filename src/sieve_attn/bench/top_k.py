"""``topk``: exact top-k attention against the naive scores, ``topk``, scatter and softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sieve_attn.bench import peers, truth
from sieve_attn.bench.cases import Case
from sieve_attn.bench.inputs import inputs
from sieve_attn.bench.prepared import Prepared, Unavailable, moved
from sieve_attn.bench.settings import Settings

K = 8
NAIVE_LIMIT = 1 << 14  # the naive form holds several arrays of queries x keys


def top_k(case: Case, settings: Settings) -> Prepared:
    """``functional.top_k_attention`` with k = 8, causal."""
    from sieve_attn import functional

    if not hasattr(functional, "top_k_attention"):
        raise Unavailable("sieve_attn.functional.top_k_attention is not part of this installation")
    host = inputs(case, settings.seed)
    query, key, value = moved(host, settings.device)

    def check(result: Any) -> tuple[str, dict[str, Any]]:
        visible = case.q_len * (case.q_len + 1) / 2
        kept = sum(min(K, n + 1) for n in range(case.q_len)) / visible
        output = result[0] if isinstance(result, tuple) else result
        return check_top_k(moved(output, "cpu"), *host), {"density": kept, "ideal": 1.0 / kept}

    def other() -> peers.Peer:
        if case.q_len > NAIVE_LIMIT:
            size = case.q_len**2 * 4 / 1e9
            return peers.Peer(why=f"not run at {case.q_len:,} tokens, where one array of its scores takes {size:.0f} GB")
        return peers.Peer(lambda: naive(query, key, value))

    return Prepared(lambda: functional.top_k_attention(query, key, value, K, causal=True), check, {"naive": other})


def naive(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Scores, ``topk``, scatter, softmax: four arrays of queries x keys."""
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).triu(1), -torch.inf)
    best, index = scores.topk(min(K, scores.shape[-1]), -1)
    return torch.softmax(torch.full_like(scores, -torch.inf).scatter_(-1, index, best), -1) @ value


def check_top_k(output: Tensor, query: Tensor, key: Tensor, value: Tensor) -> str:
    """What is wrong at sampled queries; those whose k-th and next logit tie within rounding are passed over."""
    rows = truth.sampled(query.shape[2], key.shape[2])
    seen = torch.arange(key.shape[2]) <= rows[:, None]
    for head in range(query.shape[1]):
        q, k, v = query[0, head, rows], key[0, head], value[0, head]
        logits = (q.double() @ k.double().T * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        near = ordered[:, K - 1] - ordered[:, K] < 64 * torch.finfo(torch.float32).eps * (1.0 + ordered[:, 0].abs())
        kept = torch.zeros_like(seen).scatter_(-1, order[:, :K], True) & seen
        clear = ~near | (rows < K)
        exact, _ = truth.plain(q.double()[None], k.double(), v.double(), kept[None])
        rough, _ = truth.plain(q[None], k, v, kept[None])
        wrong = truth.complaint("the output", output[0, head, rows][clear][None], exact[:, clear], rough[:, clear])
        if wrong:
            return wrong
    return ""
