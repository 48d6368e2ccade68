"""The Tilelli block: its equation, its paths, steps against full calls, gradients of the recurrence."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from sieve_attn import layers, native
from sieve_attn.layers import LocalPath, StatePath, TilelliBlock, pack_ternary
from sieve_attn.layers.scan_op import chunked, diagonal_scan, diagonal_scan_op
from sieve_attn.layers.tilelli import PATHS

LEVELS = native.module().levels() if not native.missing() else []


@pytest.fixture(params=LEVELS)
def level(request):
    native.module().force_level(request.param)
    yield request.param
    native.module().force_level("")


def loop(x, decay, start):
    """The recurrence as it is written."""
    states = []
    for n in range(x.shape[1]):
        start = decay * start + x[:, n]
        states.append(start)
    return torch.stack(states, 1)


def make(seed=0, batch=2, n=50, width=24, **options):
    torch.manual_seed(seed)
    block = TilelliBlock(width, **({"d_head": 8, "top_k": 5} | options))
    with torch.no_grad():
        block.norm.weight.normal_(1.0, 0.2)
    return block, torch.randn(batch, n, width)


def steps(module, x, cache=None):
    cache = module.empty_cache(x.shape[0]) if cache is None else cache
    rows = []
    for n in range(x.shape[1]):
        row, cache = module.forward_incremental(x[:, n : n + 1], cache)
        rows.append(row)
    return torch.cat(rows, 1), cache


# the recurrence ----------------------------------------------------------------------------------------------------------


def scan_problem(batch, n, width, seed=0):
    torch.manual_seed(seed)
    return torch.randn(batch, n, width), torch.tanh(torch.randn(width) * 2), torch.randn(batch, width)


@pytest.mark.parametrize(("batch", "n", "width"), [(1, 1, 1), (2, 7, 3), (1, 31, 17), (2, 32, 64), (3, 33, 130), (1, 1000, 5)])
def test_the_scan_is_the_loop(level, batch, n, width):
    x, decay, start = scan_problem(batch, n, width)
    expected = loop(x.double(), decay.double(), start.double())
    for got in (diagonal_scan(x, decay, start, False), chunked(x, decay, start)):
        assert torch.allclose(got.double(), expected, rtol=1e-4, atol=1e-5)
    back = diagonal_scan(x.flip(1), decay, start, True).flip(1)
    assert torch.equal(back, diagonal_scan(x, decay, start, False))
    assert torch.allclose(diagonal_scan(x.double(), decay.double(), start.double(), False), expected, rtol=1e-12, atol=1e-12)


def test_the_scan_takes_strided_inputs_and_threads(level):
    x, decay, start = scan_problem(3, 40, 200)
    got = diagonal_scan(x.transpose(0, 1).contiguous().transpose(0, 1), decay, start, False)
    torch.set_num_threads(3)
    try:
        x = x.repeat(1, 50, 1)
        several = diagonal_scan(x, decay, start, False)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(several[:, :40], got)
    assert torch.equal(several, diagonal_scan(x, decay, start, False))


@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_of_the_scan(reverse):
    x, decay, start = (t.double().requires_grad_() for t in scan_problem(2, 9, 3))
    assert torch.autograd.gradcheck(lambda *a: diagonal_scan(*a, reverse), (x, decay, start))
    assert torch.autograd.gradgradcheck(lambda *a: diagonal_scan(*a, reverse), (x, decay, start))


def test_the_scan_operator_follows_the_rules():
    x, decay, start = (t.requires_grad_() for t in scan_problem(2, 9, 3))
    torch.library.opcheck(diagonal_scan_op, (x, decay, start, False))


def test_a_state_that_is_not_finite_stays_in_its_channel():
    x, decay, start = scan_problem(1, 40, 20)
    x[0, 10, 3] = torch.nan
    got = diagonal_scan(x, decay, start, False)
    bad = got.isnan()
    assert bad[0, 10:, 3].all()
    assert int(bad.sum()) == 30


# paths -------------------------------------------------------------------------------------------------------------------


def test_the_local_path_is_a_depthwise_causal_convolution():
    torch.manual_seed(0)
    path, x = LocalPath(12, 4), torch.randn(2, 20, 12)
    alpha = path.weight.detach().abs().mean()
    weight = torch.clamp(torch.round(path.weight / alpha), -1, 1) * alpha
    padded = functional.pad(x.transpose(1, 2), (3, 0))
    expected = functional.conv1d(padded, weight[:, None], groups=12).transpose(1, 2)
    assert torch.allclose(path(x), expected, atol=1e-5)
    path(x).sum().backward()
    shifted = torch.stack([padded.transpose(1, 2)[:, n : n + 20].sum((0, 1)) for n in range(4)], 1)
    assert torch.allclose(path.weight.grad, shifted, atol=1e-4)


def test_the_state_path_is_its_recurrence():
    torch.manual_seed(0)
    path, x = StatePath(12), torch.randn(2, 20, 12)
    with torch.no_grad():
        for p in path.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    expected = path.c * loop(path.b * x, torch.tanh(path.decay), torch.zeros(2, 12))
    assert torch.allclose(path(x), expected, atol=1e-5)
    upstream = torch.randn(2, 20, 12)
    names = [n for n, _ in path.named_parameters()]
    got = torch.autograd.grad(path(x), [getattr(path, n) for n in names], upstream)
    known = torch.autograd.grad(expected, [getattr(path, n) for n in names], upstream)
    for name, a, b in zip(names, got, known, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4), name


@pytest.mark.parametrize("path", [LocalPath(24, 1), LocalPath(24, 5), StatePath(24)], ids=["kernel 1", "kernel 5", "state"])
def test_steps_of_these_paths_equal_the_full_call_bit_for_bit(level, path):
    x = torch.randn(2, 40, 24)
    with torch.no_grad():
        full = path(x)
        rows, _ = steps(path, x[:, 15:], path.warmup_cache(x[:, :15]))
        assert torch.equal(rows, full[:, 15:])
        assert torch.equal(steps(path, x)[0], full)


# the block ---------------------------------------------------------------------------------------------------------------


def test_the_block_is_its_equation():
    block, x = make()
    h = functional.layer_norm(x, (24,), block.norm.weight, block.norm.bias)
    routes = torch.softmax(functional.linear(h, block.router.ternary_weight()), -1)
    expected = x + sum(routes[..., n, None] * path(h) for n, path in enumerate(block.paths))
    assert torch.allclose(block(x), expected, atol=1e-6)
    assert torch.allclose(block.routing(x), routes)
    assert [type(p).__name__ for p in block.paths] == ["LocalPath", "StatePath", "SparseCausalAttention"]


@given(
    chosen=st.lists(st.sampled_from(PATHS), min_size=1, max_size=3, unique=True),
    n=st.integers(1, 60), prompt=st.integers(0, 30), heads=st.sampled_from([1, 2]), seed=st.integers(0, 50),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_steps_equal_the_full_call(chosen, n, prompt, heads, seed):
    block, x = make(seed, n=n, paths=chosen, heads=heads)
    prompt = min(prompt, n - 1)
    with torch.no_grad():
        full = block(x)
        head, cache = block.prefill(x[:, :prompt]) if prompt else (x[:, :0], None)
        rows, _ = steps(block, x[:, prompt:], cache)
    assert torch.allclose(torch.cat([head, rows], 1), full, atol=2e-5)


def test_warming_up_is_stepping():
    block, x = make()
    with torch.no_grad():
        last, token = block.warmup_cache(x[:, :49]), x[:, 49:]
        expected = block(x)[:, 49:]
        assert torch.allclose(block.forward_incremental(token, last)[0], expected, atol=2e-5)
        assert torch.allclose(block.forward_incremental(token, last)[0], expected, atol=2e-5)  # the cache was not changed


def test_gradients_through_steps_are_those_of_the_full_call():
    block, x = make(n=20)
    upstream = torch.randn(2, 20, 24)
    full = torch.autograd.grad(block(x), list(block.parameters()), upstream)
    stepped = torch.autograd.grad(steps(block, x)[0], list(block.parameters()), upstream)
    for (name, _), got, expected in zip(block.named_parameters(), stepped, full, strict=True):
        assert torch.allclose(got, expected, rtol=1e-3, atol=1e-3), name


@pytest.mark.parametrize("made", [lambda: LocalPath(8), lambda: StatePath(8), lambda: TilelliBlock(8)])
def test_caches_of_inference_mode_are_stepped_with_gradients(made):
    layer, x = made(), torch.randn(2, 7, 8)
    with torch.inference_mode():
        cache = layer.warmup_cache(x[:, :6])
    layer.forward_incremental(x[:, 6:], cache)[0].sum().backward()


def test_later_tokens_influence_nothing():
    block, x = make()
    with torch.no_grad():
        before = block(x)
        x[:, 30:] += 5
        assert torch.equal(block(x)[:, :30], before[:, :30])


def test_a_packed_block_steps():
    block, x = make()
    with torch.no_grad():
        before = block(x)
        pack_ternary(block)
        assert torch.allclose(steps(block, x)[0], before, atol=2e-5)


def test_bfloat16_blocks_keep_a_wide_state():
    block, x = make()
    block = block.to(torch.bfloat16)
    with torch.no_grad():
        rows, cache = steps(block, x.bfloat16())
        assert rows.dtype == torch.bfloat16
        assert cache[1].dtype == torch.float32
        close = (rows - block(x.bfloat16())).abs() < 0.1
        assert close.float().mean() > 0.99  # a choice of keys may turn where logits tie in bf16


def test_blocks_are_made_where_and_as_asked():
    block = TilelliBlock(24, d_head=8, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in block.parameters()} == {("meta", torch.bfloat16)}
    x = torch.ones(1, 3, 24, device="meta", dtype=torch.bfloat16)
    assert block(x).shape == (1, 3, 24)


def test_own_modules_are_paths_too():
    class Nothing(LocalPath):
        pass

    block = TilelliBlock(24, ["state", Nothing(24)])
    assert block.router.out_features == 2
    assert block(torch.randn(1, 3, 24)).shape == (1, 3, 24)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: TilelliBlock(24, []), r"`paths` must name at least one of 'local', 'state', 'sparse', .* got \[\]"),
        (lambda: TilelliBlock(24, ["local", "global"]), r"`paths` must name .*; got \['global'\]"),
        (lambda: TilelliBlock(0), "`d_model` must be an integer of at least 1; got 0"),
        (lambda: TilelliBlock(24, kernel_size=0), "`kernel_size` must be an integer of at least 1; got 0"),
        (lambda: TilelliBlock(24, heads=7), "`heads` must divide `d_model`; got 7 heads on a width of 24"),
        (lambda: make()[0](torch.ones(2, 3, 23)), r"`x` must have shape \[batch, len, 24\] .* got shape \(2, 3, 23\)"),
        (lambda: make()[0].forward_incremental(torch.ones(2, 24), ()), "`cache` must hold 3 entries, one a path; got 0"),
        (lambda: make()[0].forward_incremental(torch.ones(2, 2, 24), make()[0].empty_cache(2)),
         r"`x_step` must have shape \[2, 1, 24\].* got shape \(2, 2, 24\)"),
        (lambda: make()[0].forward_incremental(torch.ones(3, 1, 24), make()[0].empty_cache(2)),
         r"`x_step` must have shape \[2, 1, 24\].* got shape \(3, 1, 24\)"),
        (lambda: TilelliBlock(24, 3), r"`paths` must name .*; got \[3\]"),
        (lambda: make()[0].forward_incremental(torch.ones(2, 1, 24), None), "`cache` must hold 3 entries, .*; got NoneType"),
        (lambda: make()[0].forward_incremental(torch.ones(2, 1, 24), make()[0].empty_cache(2)[::-1]),
         r"`cache` must be a state \[batch, 4, 24\] on cpu; got GrowingArrays"),
        (lambda: LocalPath(24).forward_incremental(torch.ones(2, 1, 24), torch.ones(2, 7, 24)),
         r"`cache` must be a state \[batch, 4, 24\] on cpu; got \[7, 24\] on cpu"),
        (lambda: StatePath(24).forward_incremental(torch.ones(2, 1, 24), torch.ones(2, 7)),
         r"`cache` must be a state \[batch, 24\] on cpu; got \[7\] on cpu"),
        (lambda: diagonal_scan(torch.ones(2, 3, 8), torch.ones(7), torch.ones(2, 8)),
         r"`decay, start` must have shapes \[8\] and \[2, 8\]; got \[7\], \[2, 8\]"),
    ],
)  # fmt: skip
def test_bad_input_in_words(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_the_names():
    assert {"TernaryLinear", "SparseCausalAttention", "TilelliBlock", "PackedTernaryLinear"} <= set(layers.__all__)
