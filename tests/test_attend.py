"""The attend stage and dense attention against PyTorch: outputs, gradients, autocast, dtypes."""

import pytest
import torch
from hypothesis import given, settings
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from sieve_attn import attend, attention
from sieve_attn.policies import Dense, Policy
from sieve_attn.scores import Exact, KeySketch, Mean
from sieve_attn.selection import TopK
from sieve_attn.testing import Shape, assert_close, oracle
from sieve_attn.testing.contracts import coins, draw
from sieve_attn.testing.strategies import dtypes, gaussian, random_blocks, seeds, shapes
from sieve_attn.types import Offsets, Ranges, Selection, Tokens
from sieve_attn.types import call as call_module

LAWS = settings(max_examples=25, deadline=None, derandomize=True)


@LAWS
@given(shapes(40), seeds(), dtypes())
def test_dense_attention_is_what_pytorch_computes(shape, seed, dtype):
    q, k, v = gaussian(seed, shape, dtype)
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True)
    plain = scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert_close(attention(q, k, v), exact, plain=plain, dtype=dtype)


@LAWS
@given(shapes(40), seeds())
def test_causal_attention_aligns_bottom_right(shape, seed):
    q, k, v = gaussian(seed, shape, torch.float64)
    out, lse = attention(q, k, v, Dense(), causal=True, return_lse=True)
    seen = oracle.visible_keys(shape.q_len, shape.kv_len, causal=True)
    exact, exact_lse = oracle.plain_attention(q, k, v, seen)
    assert_close(out, exact)
    assert_close(lse, exact_lse)


@LAWS
@given(shapes(40), seeds())
def test_a_full_selection_equals_dense(shape, seed):
    q, k, v = gaussian(seed, shape, torch.float64)
    full = random_blocks(seed, shape, density=1.1)
    assert torch.equal(attend(q, k, v, full)[0], attention(q, k, v))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rows_may_be_cut_anywhere(dtype, monkeypatch):
    shape = Shape(2, 4, 2, 33, 50, 8, 8)
    q, k, v = gaussian(5, shape, dtype)
    selection = random_blocks(6, shape, causal=True)
    whole = attend(q, k, v, selection, causal=True)
    monkeypatch.setattr(call_module, "CHUNK_BYTES", 1)
    parts = attend(q, k, v, selection, causal=True)
    assert_close(parts[0], whole[0], dtype=dtype)
    assert_close(parts[1], whole[1], dtype=torch.float32)


def test_gradients_pass_gradcheck():
    shape = Shape(1, 2, 1, 5, 7, 3, 2)
    q, k, v = (x.requires_grad_() for x in gaussian(1, shape, torch.float64))
    bias, sink = draw(2, 1, 2, 1, 7).requires_grad_(), draw(3, 2).requires_grad_()
    selection = random_blocks(4, shape, q_block=2, kv_block=2, density=0.7)

    def run(q, k, v, bias, sink):
        out, lse = attend(q, k, v, selection, causal=True, bias=bias, sink=sink, softcap=1.3)
        return out, torch.where(torch.isfinite(lse), lse, 0.0)

    assert torch.autograd.gradcheck(run, (q, k, v, bias, sink))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("policy", [None, TopK(1)], ids=["dense", "blocks"])
def test_gradients_under_checkpointing_are_those_without(policy, backend):
    # what was saved may be asked for once only there, and is computed again in between
    q, k, v = (x.requires_grad_() for x in gaussian(1, Shape(1, 2, 1, 20, 40, 8, 4)))
    chosen = policy and Policy(KeySketch(4), policy, block_size=8, query_tile=8)

    def run(q, k, v):
        return attention(q, k, v, chosen, causal=True, sink=k[0, 0, :2, 0], backend=backend, return_lse=True)

    grads = []
    for out, lse in (run(q, k, v), checkpoint(run, q, k, v, use_reentrant=False)):
        grads.append(torch.autograd.grad(out.square().sum() + lse.sum(), (q, k, v)))
    for plain, again in zip(*grads, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("softcap", [None, 6.0])
def test_far_field_gradients_pass_gradcheck(softcap):
    shape = Shape(1, 2, 1, 2, 12, 3, 2)
    # small logits: where the estimate is clipped into its bracket, the bracket counts as a constant
    q, k, v = gaussian(1, shape, torch.float64)
    q, k, v = (0.05 * q).requires_grad_(), k.requires_grad_(), v.requires_grad_()
    policy = Policy(Exact(), TopK(1), block_size=4, query_tile=2, far_field=True)

    def run(q, k, v):
        return attention(q, k, v, policy, softcap=softcap, return_lse=True)

    # under a cap along random directions only: one by one takes seconds, and was done without a cap
    assert torch.autograd.gradcheck(run, (q, k, v), fast_mode=softcap is not None)


def test_the_far_field_adds_mass_and_keeps_what_is_near():
    shape = Shape(1, 4, 2, 16, 128, 16, 8)
    q, k, v = gaussian(3, shape, torch.float64)
    near = Policy(KeySketch(4), TopK(2), query_tile=16)
    _, near_lse = attention(q, k, v, near, return_lse=True)
    out, lse = attention(q, k, v, Policy(KeySketch(4), TopK(2), query_tile=16, far_field=True), return_lse=True)
    assert (lse > near_lse).all()
    everything = Policy(KeySketch(4), TopK(8), query_tile=16, far_field=True)
    assert_close(attention(q, k, v, everything), attention(q, k, v))
    dense = attention(q, k, v)
    assert (out - dense).norm() < (attention(q, k, v, near) - dense).norm()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("future", [False, True])
def test_the_far_field_reads_nothing_that_is_hidden(poison, future):
    q, k, v = gaussian(1, Shape(1, 2, 1, 40, 40, 8, 4))
    there = torch.arange(40) < 39 if future else torch.arange(40) % 5 != 0
    options = {"causal": True} if future else {"key_mask": there[None]}
    policy = Policy(Mean(), TopK(1), block_size=8, query_tile=8, far_field=True)
    # the last query sees the future of the others: it has no part in the sums
    stop = 39 if future else 40

    def run(key, value):
        leaves = [x.clone().requires_grad_() for x in (q, key, value)]
        out, lse = attention(*leaves, policy, return_lse=True, **options)
        grads = torch.autograd.grad(out[:, :, :stop].square().sum() + lse[:, :, :stop].sum(), leaves)
        rows = [x[:, :, :stop] for x in (out, lse, grads[0])]
        return rows if future else rows + [x[:, :, there] for x in grads[1:]]

    plain = run(k, v)
    bad_k, bad_v = (x.masked_fill(~there[:, None], poison) for x in (k, v))
    for key, value in ((bad_k, v), (k, bad_v), (bad_k, bad_v)):
        for mine, other in zip(run(key, value), plain, strict=True):
            assert torch.equal(mine, other)


def test_gradients_through_a_policy_are_those_of_its_selection():
    shape = Shape(1, 4, 2, 40, 70, 8, 8)
    policy = Policy(KeySketch(4), TopK(2), block_size=8, query_tile=16)

    def grads(run):
        leaves = [x.requires_grad_() for x in gaussian(1, shape, torch.float64)]
        return torch.autograd.grad(run(*leaves).square().sum(), leaves)

    _, report = attention(*gaussian(1, shape, torch.float64), policy, causal=True, return_report=True)
    by_policy = grads(lambda q, k, v: attention(q, k, v, policy, causal=True))
    by_selection = grads(lambda q, k, v: attend(q, k, v, report.selection, causal=True)[0])
    for a, b in zip(by_policy, by_selection, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("policy", [None, Policy(KeySketch(4), TopK(2))])
def test_autocast_casts_the_three_together(policy):
    q, k, v = gaussian(1, Shape(1, 2, 2, 20, 70, 8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v, policy)
        mixed = attention(q, k.bfloat16(), v, policy)
    assert out.dtype == mixed.dtype == torch.bfloat16
    assert torch.equal(out, mixed)
    assert torch.equal(out, attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), policy))
    leaf = q.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        attention(leaf, k, v, policy).float().sum().backward()
    assert leaf.grad.dtype == torch.float32


def test_fp64_stays_fp64_under_autocast():
    q, k, v = gaussian(1, Shape(1, 2, 2, 4, 8, 8, 8), torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(q, k, v).dtype == torch.float64


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_keys_give_what_dense_gives(poison):
    q, k, v = gaussian(1, Shape(1, 4, 2, 40, 96, 8, 8))
    k[0, 1, 50, 3] = poison
    v[0, 0, 70] = poison
    dense = attention(q, k, v, causal=True)
    sparse = attention(q, k, v, Policy(KeySketch(8), TopK(6), query_tile=16), causal=True)
    assert torch.equal(sparse.isnan(), dense.isnan())
    clean = dense.isfinite().all(-1)
    assert clean.any()
    assert torch.allclose(sparse[clean], dense[clean], atol=1e-5)


def test_every_kind_of_selection_attends():
    shape = Shape(1, 2, 1, 12, 20, 4, 4)
    q, k, v = gaussian(1, shape, torch.float64)
    index = torch.randint(-1, 20, (1, 2, 12, 5), generator=torch.Generator().manual_seed(0))
    for part in (
        Ranges(12, 20, prefix=3, window=4),
        Offsets(12, 20, (0, 2, 5)),
        Tokens(index, 20),
        Ranges(12, 20, window=3, two_sided=True),
    ):
        for causal in (False, True):
            selection = Selection((part,))
            allowed = selection.to_dense(q) & oracle.visible_keys(12, 20, causal=causal)
            exact, exact_lse = oracle.plain_attention(q, k, v, allowed)
            out, lse = attend(q, k, v, selection, causal=causal)
            assert_close(out, exact)
            assert_close(lse, exact_lse)


def test_masks_of_every_broadcast_shape_mean_the_same():
    shape = Shape(2, 4, 2, 10, 14, 4, 4)
    q, k, v = gaussian(1, shape, torch.float64)
    mask = coins(2, 0.7, 1, 1, 10, 14)
    wide = mask.expand(2, 4, 10, 14)
    assert torch.equal(attention(q, k, v, mask=mask), attention(q, k, v, mask=wide))
    hidden = torch.where(mask, 0.0, -torch.inf).double()
    assert_close(attention(q, k, v, bias=hidden), attention(q, k, v, mask=mask))
