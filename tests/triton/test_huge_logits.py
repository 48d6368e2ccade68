"""Logits whose fp32 rounding is larger than an exponent may be, caps that round nothing, keys of infinity, arrays beyond 2^31."""

import math

import pytest
import torch

from sieve_attn import attend, attention, functional, policies
from sieve_attn.attend.triton import gradients
from sieve_attn.testing.oracle import plain_attention, visible_keys
from sieve_attn.types import Blocks, Call, Ranges, Selection

BACKENDS = ("triton", "reference")


def normal(seed, *size):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("options", [{}, {"softcap": 1e12}, {"bias": torch.zeros(1, 1, 1, 2)}], ids=["plain", "cap", "bias"])
@pytest.mark.parametrize("power", [12, 20, 25, 30, 34, 60])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_only_key_that_counts_weighs_one(backend, power, options):
    """Queries of many last places against a key and its negative: the scale, 8^-.5, rounds each of them otherwise."""
    source = torch.Generator().manual_seed(1)
    if power > 34 and "softcap" in options:
        pytest.skip("the cap would make both keys alike")
    q = torch.randint(2048, 4096, (40, 1, 1, 8), generator=source) / 4096 * (torch.arange(8) == 0) * 2.0**power
    k = torch.rand(40, 1, 1, 8, generator=source) + 0.5
    q, k, v = (x.requires_grad_() for x in (q, torch.cat([k, -k], 2), normal(2, 40, 1, 2, 1)))
    out, lse = attention(q, k, v, policies.Dense(), backend=backend, return_lse=True, **options)
    exact = plain_attention(*(x.detach().double() for x in (q, k, v)), torch.ones(40, 1, 1, 2, dtype=torch.bool), scale=8**-0.5,
                            **({"softcap": 1e12} if "softcap" in options else {}))  # fmt: skip
    torch.testing.assert_close(out.double(), exact[0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(lse.double(), exact[1], atol=1e-5, rtol=2e-6)
    (to_value,) = torch.autograd.grad(out.sum(), v)
    torch.testing.assert_close(to_value, torch.tensor([1.0, 0.0])[:, None].expand(40, 1, 2, 1))


@pytest.mark.parametrize("power", [0, 20, 24, 30, 34])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_logits_share_whatever_their_size(backend, power):
    """Tiles that every row sees whole and tiles cut by causality must round alike."""
    q, k, v = torch.zeros(1, 1, 64, 8), torch.zeros(1, 1, 200, 8), normal(3, 1, 1, 200, 8)
    q[..., 0], k[..., 0] = 1.0, 1.2345 * 2.0**power
    out = attention(q, k, v, policies.Dense(), causal=True, backend=backend)
    exact, _ = plain_attention(q.double(), k.double(), v.double(), visible_keys(64, 200, causal=True), scale=8**-0.5)
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=0)


@pytest.mark.parametrize("cap", [50.0, 1e4, 1e7])
def test_large_caps_lose_nothing(cap):
    q, k, v = normal(4, 1, 2, 16, 16) * 3, normal(5, 1, 2, 120, 16) * 3, normal(6, 1, 2, 120, 16)
    inputs, seen = [x.double() for x in (q, k, v)], visible_keys(16, 120, causal=True).expand(1, 2, 16, 120)
    options = {"causal": True, "softcap": cap, "backend": "triton", "return_lse": True}
    out, lse, report = attention(q, k, v, policies.Windowed(1, 8), return_report=True, **options)
    kept = report.selection.to_dense(q) & seen
    exact, exact_lse = plain_attention(*inputs, kept, scale=0.25, softcap=cap)
    whole = plain_attention(*inputs, seen, scale=0.25, softcap=cap)
    tolerance = {"atol": 2e-5, "rtol": 1e-6}
    torch.testing.assert_close(out.double(), exact, **tolerance)
    torch.testing.assert_close(lse.double(), exact_lse, **tolerance)
    assert (-torch.expm1(exact_lse - whole[1]) <= report.certificate.dropped_mass.double() + 1e-9).all()
    for mine, wanted in zip(functional.top_k_attention(q, k, v, 120, **options), whole, strict=True):
        torch.testing.assert_close(mine.double(), wanted, **tolerance)


def test_a_key_of_infinity_that_weighs_nothing_leaves_other_gradients_alone():
    q, k, v = normal(7, 1, 1, 20, 8).abs(), normal(8, 1, 1, 64, 8), normal(9, 1, 1, 64, 8)
    k[0, 0, 5, 2] = -math.inf
    found = []
    for backend in BACKENDS:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attention(*leaves, policies.Dense(), backend=backend)
        found.append(torch.autograd.grad(out.square().sum(), leaves[1:]))
    for mine, wanted in zip(*found, strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=1e-5)


def test_lists_begin_at_their_first_entry():
    blocks = Blocks(torch.tensor([1, 2, 3]), torch.tensor([2, 0, 1], dtype=torch.int32), 1, 1, 32, 48, q_block=16, kv_block=16)
    with pytest.raises(ValueError, match="from pointer 0 on"):
        attend(normal(1, 1, 1, 32, 8), *(normal(2, 1, 1, 48, 8),) * 2, Selection((blocks,)), backend="triton")


def test_a_gradient_that_is_larger_than_what_it_belongs_to_has_wide_offsets():
    n = 65_536
    q, bias = torch.zeros(1, 1, n, 16), torch.zeros(1).expand(1, 1, n, n)
    made = dict.fromkeys(("query", "key", "value"), q) | {"pair_bias": torch.empty(1, 1, n, n, device="meta")}
    call, rows = Call(q, q, q, scale=1.0, bias=bias), torch.zeros(1, 1, n)
    launch = next(gradients.launch_backward(call, Selection((Ranges(n, n, prefix=n),)), q, rows, rows, made))
    assert launch.arguments["grad_bias"].row * (n - 1) >= 2**31
    assert launch.arguments["WIDE"]
