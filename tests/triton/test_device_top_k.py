"""Exact top-k attention and lists of single keys on the device, against the reference and fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sieve_attn import attend
from sieve_attn.attend import reference as oracle
from sieve_attn.attend import top_k as stage
from sieve_attn.attend.triton import best_keys, tokens
from sieve_attn.functional import top_k_attention
from sieve_attn.testing import Shape, assert_close
from sieve_attn.testing.contracts import coins, draw
from sieve_attn.testing.strategies import gaussian, seeds
from sieve_attn.types import Call, Selection, Tokens

LAWS = settings(max_examples=8, deadline=None, derandomize=True)
SMALL = Shape(1, 4, 2, 30, 90, 24, 20)
CASES = {
    "plain": (SMALL, {}),
    "causal": (SMALL, {"causal": True}),
    "one query": (Shape(2, 4, 2, 1, 133, 16, 40), {"causal": True}),
    "more queries than keys": (Shape(1, 2, 1, 40, 17, 16, 8), {"causal": True}),
    "window": (SMALL, {"causal": True, "window": 13}),
    "window, both ways": (SMALL, {"window": 13}),
    "key_mask": (SMALL, {"key_mask": coins(2, 0.7, 1, 90)}),
    "mask": (SMALL, {"mask": coins(3, 0.5, 1, 4, 30, 90), "causal": True}),
    "packed": (Shape(1, 2, 2, 60, 60, 16, 16), {"cu_seqlens": torch.tensor([0, 5, 33, 60]), "causal": True}),
    "softcap": (SMALL, {"softcap": 2.0, "causal": True}),
    "sink": (SMALL, {"sink": draw(5, 4).float(), "causal": True}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_best_keys_are_chosen_and_attended_to(case, dtype):
    shape, options = CASES[case]
    q, k, v = gaussian(1, shape, dtype)
    out, lse, report = top_k_attention(q, k, v, 5, backend="triton", return_lse=True, return_report=True, **options)
    other = top_k_attention(q, k, v, 5, backend="reference", return_lse=True, return_report=True, **options)
    mine, theirs = report.selection.parts[0].index, other[2].selection.parts[0].index
    assert report.backend == "triton"
    assert mine.dtype == theirs.dtype
    assert torch.equal(mine, theirs)
    assert torch.equal(report.visible, other[2].visible)
    assert torch.equal(report.computed, other[2].computed)
    again, total = attend(*(x.double() for x in (q, k, v)), report.selection, backend="reference", **options)
    assert_close(out, again, plain=other[0], dtype=dtype)
    assert_close(lse, total, plain=other[1], dtype=torch.float32)


@LAWS
@given(seeds(), st.integers(1, 40), st.integers(1, 70), st.sampled_from([1, 2, 7, 64]), st.booleans())
def test_equal_keys_go_to_the_earlier_one(seed, q_len, kv_len, count, causal):
    """Few values, so that most logits tie; some are not numbers."""
    source = torch.Generator().manual_seed(seed)
    q = torch.randint(-1, 2, (1, 2, q_len, 8), generator=source).float()
    k = torch.randint(-1, 2, (1, 1, kv_len, 8), generator=source).float()
    k[:, :, ::13, 0] = torch.nan
    call = Call(q, k, k, causal=causal, scale=1.0)
    got, counts = best_keys.choose(call, min(count, kv_len))
    wanted, other = stage.choose(call, min(count, kv_len))
    assert torch.equal(got, wanted)
    assert torch.equal(counts, other)


def test_more_keys_than_registers_hold_are_chosen_by_array_operations(monkeypatch):
    q, k, v = gaussian(1, SMALL)
    whole = top_k_attention(q, k, v, 9, causal=True, backend="triton")
    monkeypatch.setattr(best_keys, "MOST", 8)
    assert torch.equal(top_k_attention(q, k, v, 9, causal=True, backend="triton"), whole)


BIAS = draw(9, 1, 4, 30, 90).float()
BIAS[..., ::7] = -torch.inf


GRADIENTS = {name: options for name, (shape, options) in CASES.items() if shape is SMALL} | {
    "a bias": {"bias": BIAS, "softcap": 3.0}
}


@pytest.mark.parametrize("options", GRADIENTS.values(), ids=GRADIENTS)
def test_lists_and_their_gradients(options):
    """Lists as a user may give them: keys that are not seen, -1 anywhere, one key twice."""
    q, k, v = (x.requires_grad_() for x in gaussian(4, SMALL))
    index = torch.randint(-1, 90, (1, 2, 30, 19), generator=torch.Generator().manual_seed(2), dtype=torch.int32)
    selection = Selection((Tokens(index, 90),))
    options = {n: x.clone().requires_grad_() if n in ("sink", "bias") else x for n, x in options.items()}
    wanting = [q, k, v, *(options[n] for n in ("sink", "bias") if n in options)]
    found = []
    for backend in ("triton", "reference"):
        out, lse = attend(q, k, v, selection, backend=backend, **options)
        pull = draw(7, *out.shape).to(out.dtype)
        seen = torch.where(lse.isfinite(), lse, 0.0).sum()
        found.append((out, lse, *torch.autograd.grad((out * pull).sum() + seen, wanting)))
    for mine, theirs in zip(*found, strict=True):
        assert torch.allclose(mine, theirs.to(mine.dtype), rtol=1e-4, atol=2e-5)


def test_what_is_not_a_number_reaches_those_who_attend_to_it_alone():
    q, k, v = gaussian(4, SMALL)
    v[0, 0, 5] = torch.inf
    index = torch.arange(90).expand(1, 4, 30, 90)[..., 10:20].contiguous()
    plain, _ = attend(q, k, v, Selection((Tokens(index, 90),)), backend="triton")
    assert plain.isfinite().all()
    index[0, 0, 3, 0] = 5
    touched, _ = attend(q, k, v, Selection((Tokens(index, 90),)), backend="triton")
    assert (~touched.isfinite()).nonzero()[:, :3].unique(dim=0).tolist() == [[0, 0, 3]]
    assert torch.equal(touched[0, 1:], plain[0, 1:])


def test_gradients_are_the_same_to_the_bit_each_time():
    q, k, v = gaussian(4, SMALL)
    call = Call(q, k, v, scale=0.2)
    selection = Selection((Tokens(stage.choose(call, 6)[0], 90),))
    out, lse = tokens.attend(call, selection)
    first, second = (tokens.backward(call, selection, out, lse, out, lse) for _ in range(2))
    wanted = oracle.backward(call, selection, out, lse)
    for name in ("query", "key", "value"):
        assert torch.equal(first[name], second[name])
        assert torch.allclose(first[name], wanted[name], rtol=1e-4, atol=1e-5)
