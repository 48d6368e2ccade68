"""Logits so large that fp32 exponents round away: where they are exact, results are those of fp64 attention all the same."""

import pytest
import torch

from sieve_attn import attention, functional, patterns
from sieve_attn.policies import Dense, TopBlocks
from sieve_attn.testing import oracle

CALLS = {
    "dense": lambda q, k, v, scale: attention(q, k, v, Dense(), causal=True, scale=scale, return_lse=True),
    "blocks": lambda q, k, v, scale: attention(
        q, k, v, TopBlocks(3), causal=True, scale=scale, return_lse=True, return_report=True
    ),
    "top-k": lambda q, k, v, scale: functional.top_k_attention(q, k, v, 8, causal=True, scale=scale, return_lse=True),
    "diagonals": lambda q, k, v, scale: functional.offset_attention(
        q, k, v, OFFSETS, plan="diagonals", scale=scale, return_lse=True
    ),
    "wheel": lambda q, k, v, scale: functional.offset_attention(q, k, v, OFFSETS, plan="wheel", scale=scale, return_lse=True),
}
SCALES = (0.125, 0.3)  # one that rounds nothing, one that rounds everything
OFFSETS = patterns.Primes() | patterns.Window(6)


def one_channel_each(*size):
    """Queries of one entry, 1 or -1, that is not zero."""
    source = torch.Generator().manual_seed(1)
    sign = torch.randint(2, size[:-1], generator=source) * 2.0 - 1.0
    return sign[..., None] * torch.nn.functional.one_hot(torch.randint(size[-1], size[:-1], generator=source), size[-1])


def all_different(batch, heads, n, dim):
    """Keys whose entries in a channel are the integers from -n / 2: no two logits of a query are equal."""
    order = torch.rand(batch, heads, n, dim, generator=torch.Generator().manual_seed(2)).argsort(2)
    return order.float() - n // 2


def kept_by(name, q, k, found, scale):
    seen = oracle.visible_keys(q.shape[2], k.shape[2], causal=True).expand(*q.shape[:3], k.shape[2])
    if name == "blocks":
        return found[2].selection.to_dense(q) & seen
    if name in ("diagonals", "wheel"):
        return torch.from_numpy(OFFSETS.to_dense(q.shape[2], k.shape[2])).expand_as(seen)
    if name == "top-k":
        logits = oracle.plain_logits(q.double(), k.double(), seen, scale=scale)
        return torch.zeros_like(seen).scatter(-1, logits.topk(8).indices, True) & seen
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("power", [0, 10, 15, 19, 23, 28, 34, 60])
@pytest.mark.parametrize(("q_len", "scale"), [(1, SCALES[1]), *((70, x) for x in SCALES)])
@pytest.mark.parametrize("name", CALLS)
def test_logits_far_apart_give_exact_weights(name, q_len, scale, power, dtype):
    q, k = (
        one_channel_each(1, 2, q_len, 16) * 2.0 ** (power // 2) / 0.125,
        all_different(1, 2, 150, 16) * 2.0 ** (power - power // 2),
    )
    v = torch.randn(1, 2, 150, 16, generator=torch.Generator().manual_seed(3))
    q, k, v = (x.to(dtype).requires_grad_() for x in (q, k, v))
    found = CALLS[name](q, k, v, scale)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact, exact_lse = oracle.plain_attention(*wide, kept_by(name, q.detach(), k.detach(), found, scale), scale=scale)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    assert (found[0].double() - exact).abs().max() <= tolerance
    assert ((found[1].double() - exact_lse).abs() <= 1e-5 + 1e-6 * exact_lse.abs()).all()
    by = torch.randn(exact.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    ours = torch.autograd.grad((found[0].double() * by).sum(), (q, k, v))
    # sums of weights times what may be as large as a key or a query, which cancel where one weight is all; values are not large
    large = 75 * 2.0 ** ((power + 1) // 2)
    for mine, wanted, size in zip(ours, torch.autograd.grad((exact * by).sum(), wide), (large, large, 1.0), strict=True):
        assert (mine.double() - wanted).abs().max() <= 3 * tolerance * (size + wanted.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("q_len", [1, 70])
@pytest.mark.parametrize("name", [name for name in CALLS if name != "blocks"])
def test_denormal_queries_are_not_taken_for_zero_where_keys_make_up_for_them(name, q_len, dtype):
    """Instructions that multiply bf16 would."""
    q, k = one_channel_each(1, 2, q_len, 16) * 2.0**-127, all_different(1, 2, 150, 16) * 2.0**120
    v = torch.randn(1, 2, 150, 16, generator=torch.Generator().manual_seed(3))
    q, k, v = (x.to(dtype) for x in (q, k, v))
    found = CALLS[name](q, k, v, 8.0)
    exact, exact_lse = oracle.plain_attention(*(x.double() for x in (q, k, v)), kept_by(name, q, k, found, 8.0), scale=8.0)
    assert exact_lse.max() > 4.0
    assert (found[0].double() - exact).abs().max() <= (1e-4 if dtype == torch.float32 else 2e-2)
    assert (found[1].double() - exact_lse).abs().max() <= 1e-4
