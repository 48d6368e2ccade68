"""Ternary layers: their definition, gradients, packing, and products with packed weights at every level."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

import sieve_attn
from sieve_attn import native
from sieve_attn.layers import PackedTernaryLinear, TernaryLinear, pack_ternary, packing
from sieve_attn.layers.ternary_op import matrix_of, reference, round_tokens, ternary_linear, ternary_linear_op
from sieve_attn.testing import assert_close

LEVELS = native.module().levels() if not native.missing() else []
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# below, at and above a row block, a column group, four of them, and what one call of a kernel takes
SIZES = [(1, 1), (3, 17), (16, 16), (17, 33), (32, 48), (65, 31), (50, 300), (131, 64), (150, 513), (40, 1100)]


@pytest.fixture(params=LEVELS)
def level(request):
    native.module().force_level(request.param)
    yield request.param
    native.module().force_level("")


def problem(rows, columns, tokens, dtype=torch.float32, per_row=True, seed=0):
    make = torch.Generator().manual_seed(seed)
    trits = torch.randint(-1, 2, (rows, columns), generator=make)
    alpha = torch.rand(rows if per_row else 1, generator=make) + 0.5
    return torch.randn(tokens, columns, generator=make).to(dtype), trits, alpha


def exact(x, trits, alpha):
    return functional.linear(x.double(), trits.double()) * alpha.double()


# the layer ---------------------------------------------------------------------------------------------------------------


def test_weights_are_the_definition():
    layer = TernaryLinear(40, 24)
    alpha = max(float(layer.weight.detach().abs().mean()), 1e-5)
    expected = torch.clamp(torch.round(layer.weight / alpha), -1, 1) * alpha
    assert torch.equal(layer.ternary_weight(), expected)
    rows = TernaryLinear(40, 24, per_row=True)
    alphas = rows.weight.abs().mean(1, keepdim=True).clamp_min(1e-5)
    assert torch.equal(rows.ternary_weight(), torch.clamp(torch.round(rows.weight / alphas), -1, 1) * alphas)
    x = torch.randn(5, 40)
    assert torch.equal(layer(x), functional.linear(x, expected))
    plain = TernaryLinear(40, 24, quantize=False)
    assert torch.equal(plain(x), functional.linear(x, plain.weight))
    assert not any("bias" in name for name, _ in layer.named_parameters())


def test_halves_round_to_even_and_small_weights_have_a_scale():
    layer = TernaryLinear(4, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.5, -0.5, 1.5, 1.5]]))  # alpha is 1
    assert layer.trits().tolist() == [[0, 0, 1, 1]]
    with torch.no_grad():
        layer.weight.zero_()
    assert float(layer.alpha()) == pytest.approx(1e-5)
    assert layer(torch.ones(1, 4)).item() == 0


def test_initial_weights_have_the_variance_of_one_over_the_width():
    torch.manual_seed(0)
    assert float(TernaryLinear(256, 256).weight.detach().std()) == pytest.approx(256**-0.5, rel=0.02)


@pytest.mark.parametrize("options", [{}, {"per_row": True}, {"lsq": True}])
def test_gradients_go_straight_through(options):
    layer = TernaryLinear(12, 7, **options)
    x, upstream = torch.randn(5, 12, requires_grad=True), torch.randn(5, 7)
    layer(x).backward(upstream)
    assert torch.allclose(layer.weight.grad, upstream.T @ x.detach(), rtol=0, atol=1e-6)
    assert torch.allclose(x.grad, upstream @ layer.ternary_weight().detach(), rtol=0, atol=1e-6)


def test_the_learned_scale_starts_at_the_mean_and_has_the_published_gradient():
    layer = TernaryLinear(12, 7, lsq=True)
    assert torch.equal(layer.scale.detach(), layer.weight.detach().abs().mean())
    x, upstream = torch.randn(5, 12), torch.randn(5, 7)
    layer(x).backward(upstream)
    ratio = layer.weight.detach() / layer.scale.detach()
    slope = torch.where(ratio.abs() < 1, torch.round(ratio) - ratio, ratio.sign())
    expected = (upstream.T @ x * slope).sum() / math.sqrt(84)
    assert torch.allclose(layer.scale.grad, expected, rtol=1e-5)
    with torch.no_grad():
        layer.scale.mul_(3)
    assert torch.equal(layer.ternary_weight(), torch.clamp(torch.round(layer.weight / layer.scale), -1, 1) * layer.scale)


def test_the_scale_learns():
    torch.manual_seed(0)
    layer = TernaryLinear(32, 16, lsq=True)
    with torch.no_grad():
        layer.scale.mul_(20.0)  # all trits are zero here
    x = torch.randn(64, 32)
    optimiser = torch.optim.Adam([layer.scale], lr=0.05)
    before = layer.scale.item()
    for _ in range(60):
        optimiser.zero_grad()
        (layer(x) - functional.linear(x, layer.weight.detach())).square().sum().backward()
        optimiser.step()
    assert layer.scale.item() < before / 1.5


# packing -----------------------------------------------------------------------------------------------------------------


@given(rows=st.integers(1, 40), columns=st.integers(1, 70), seed=st.integers(0, 99), form=st.sampled_from(packing.FORMS))
@settings(max_examples=60, deadline=None)
def test_unpacking_restores_trits_exactly(rows, columns, seed, form):
    trits = torch.randint(-1, 2, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    codes = packing.pack(trits, form)
    shape, _, dtype = packing.describe(rows, columns, form)
    assert tuple(codes.shape) == shape
    assert codes.dtype == dtype
    assert torch.equal(packing.unpack(codes, rows, columns), trits)


def test_the_two_bit_layout_is_what_the_module_says():
    trits = torch.zeros(32, 32, dtype=torch.int8)
    trits[21, 16 + 4 * 2 + 3] = 1  # row 21; group 1, j = 2, b = 3
    codes = packing.pack(trits)
    assert codes.shape == (1, 2, 32)
    where = (codes != 0x55555555).nonzero().tolist()
    assert where == [[0, 1, (32 * 3 + 21) // 4]]
    assert (int(codes[tuple(where[0])]) & 0xFFFFFFFF) ^ 0x55555555 == 0b11 << (8 * (21 % 4) + 2 * 2)


@pytest.mark.parametrize("form", packing.FORMS)
@pytest.mark.parametrize(
    "options", [{}, {"per_row": True}, {"hadamard": True}, {"lsq": True}, {"hadamard": True, "per_row": True}]
)
def test_a_packed_layer_is_the_layer(form, options):
    torch.manual_seed(1)
    layer = TernaryLinear(70, 33, **options)
    packed = layer.pack(form)
    assert torch.equal(packed.unpack(), layer.ternary_weight().detach())
    x = torch.randn(3, 5, 70)
    turned = x if layer.rotation is None else layer.rotation(x)
    weight = layer.ternary_weight().detach()
    assert_close(packed(x), functional.linear(turned.double(), weight.double()), plain=layer(x), dtype=torch.float32)
    other = PackedTernaryLinear(70, 33, form, per_row=layer.per_row, hadamard=layer.hadamard)
    assert torch.equal(other(x), torch.zeros(3, 5, 33))  # it starts with zero trits
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other(x), packed(x))


def test_packed_sizes():
    layer = TernaryLinear(256, 128)
    stored = layer.weight.numel() * 4
    two, three = layer.pack().codes, layer.pack("base-3").codes
    assert two.numel() * two.element_size() * 16 == stored
    assert three.numel() * three.element_size() * 20 <= stored + 20


def test_casting_a_module_leaves_the_scale():
    packed = TernaryLinear(20, 8, per_row=True).pack()
    alpha = packed.alpha.clone()
    packed.to(torch.bfloat16)
    assert packed.alpha.dtype == torch.float32
    assert torch.equal(packed.alpha, alpha)
    assert packed(torch.randn(2, 20, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_layers_inside_of_a_model_are_replaced():
    model = torch.nn.Sequential(TernaryLinear(8, 16), torch.nn.ReLU(), torch.nn.Sequential(TernaryLinear(16, 4, quantize=False)))
    x = torch.randn(3, 8)
    before = model(x)
    pack_ternary(model)
    assert isinstance(model[0], PackedTernaryLinear)
    assert isinstance(model[2][0], TernaryLinear)
    assert torch.allclose(model(x), before, atol=1e-6)


def test_a_base_3_layer_follows_its_codes():
    first, second = TernaryLinear(20, 8).pack("base-3"), TernaryLinear(20, 8).pack("base-3")
    x = torch.randn(2, 20)
    first(x)
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(x), second(x))
    assert torch.equal(copy.deepcopy(first)(x), second(x))


# products at every level -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 16, 17, 31, 140])
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_products_are_exact_sums(level, rows, columns, tokens, dtype):
    x, trits, alpha = problem(rows, columns, tokens, dtype)
    got = ternary_linear(x, packing.pack(trits), alpha, rows)
    plain = (functional.linear(x.float(), trits.float()) * alpha).to(dtype)
    assert_close(got, exact(x, trits, alpha), plain=plain, dtype=dtype)


@pytest.mark.parametrize("tokens", [1, 4, 7, 33])
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_eight_bit_products_are_exact_sums_of_rounded_tokens(level, rows, columns, tokens):
    x, trits, alpha = problem(rows, columns, tokens)
    got = ternary_linear(x, packing.pack(trits), alpha, rows, int8=True)
    q, scale = round_tokens(x)
    assert float(q.abs().max()) == 127
    assert_close(got, exact(q, trits, alpha) * scale, dtype=torch.float32)
    step = float(x.abs().max()) / 127
    assert float((got - exact(x, trits, alpha)).abs().max()) <= 0.5 * step * columns * float(alpha.max()) + 1e-4


def test_rows_of_one_call_equal_calls_of_one_row(level):
    x, trits, alpha = problem(70, 200, 4)
    codes = packing.pack(trits)
    for int8 in (False, True):
        together = ternary_linear(x, codes, alpha, 70, int8)
        alone = torch.cat([ternary_linear(row[None], codes, alpha, 70, int8) for row in x])
        assert torch.equal(together, alone)


def test_threads_change_nothing(level):
    x, trits, alpha = problem(600, 1000, 37)
    codes = packing.pack(trits)
    single = [ternary_linear(y, codes, alpha, 600, int8) for y in (x, x[:2]) for int8 in (False, True)]
    torch.set_num_threads(3)
    try:
        several = [ternary_linear(y, codes, alpha, 600, int8) for y in (x, x[:2]) for int8 in (False, True)]
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(single, several, strict=True))


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_token_and_shows(level, tokens, bad):
    x, trits, alpha = problem(40, 100, tokens)
    x[0, 37] = bad
    codes = packing.pack(trits)
    got, dense = ternary_linear(x, codes, alpha, 40), exact(x, trits, alpha)
    assert torch.equal(got[0].isnan(), dense[0].isnan())
    assert torch.equal(got[0].nan_to_num(0), dense[0].float().nan_to_num(0))
    assert torch.isfinite(got[1:]).all()
    eight = ternary_linear(x, codes, alpha, 40, int8=True)
    assert eight[0].isnan().all()
    assert torch.isfinite(eight[1:]).all()


@pytest.mark.parametrize("tokens", [1, 4, 40])
def test_tokens_of_zeros_give_zeros(level, tokens):
    x, trits, alpha = problem(40, 100, tokens)
    x[0] = 0.0
    x[-1] = -0.0
    got = ternary_linear(x, packing.pack(trits), alpha, 40)
    assert (got[0] == 0).all()
    assert (got[-1] == 0).all()
    assert_close(got, exact(x, trits, alpha), plain=functional.linear(x, trits.float()) * alpha, dtype=torch.float32)


@pytest.mark.parametrize("size", [1e-30, 1e30, 3.3e38])
def test_large_and_small_numbers(level, size):
    x, trits, _ = problem(20, 64, 20)
    x = torch.nn.functional.one_hot(torch.arange(20), 64).float() * size + torch.sign(x) * size * 2.0**-20
    x = x.clamp(-3.4e38, 3.4e38)
    got = ternary_linear(x, packing.pack(trits), torch.ones(20), 20)
    # one entry and others a millionth of it: every bit of fp32 counts
    expected = exact(x, trits, torch.ones(20))
    limit = 64 * torch.finfo(torch.float32).eps * x.abs().sum(1, keepdim=True).double()
    fits = expected.abs() < 3.4e38
    assert ((got.double() - expected).abs() <= limit)[fits].all()


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("largest", [1.0, 30.0, 1e3, 3e3, 1e5, 1e9, 1e30])
def test_one_large_channel_costs_the_others_no_digits(level, largest, tokens):
    x, trits, alpha = problem(64, 2000, tokens)
    x[:, 7] = largest
    trits[:32, 7] = 0
    got, expected = ternary_linear(x, packing.pack(trits), alpha, 64).double(), exact(x, trits, alpha)
    # as for sums of floats, the channels that take part set the rounding: half of the rows know nothing of the large one
    off = (got - expected).abs() / (torch.finfo(torch.float32).eps * exact(x.abs(), trits.abs(), alpha))
    assert off[:, :32].max() <= 1
    assert off.max() <= 8


@pytest.mark.parametrize("mantissa", DTYPES, ids=str)
@pytest.mark.parametrize("small", [1e-2, 1e-3, 1e-5, 1e-7, 1e-12])
@pytest.mark.parametrize(("columns", "share"), [(16, 0.5), (64, 0.95), (1000, 0.01), (1000, 0.06), (1000, 0.5)])
def test_rows_that_read_small_channels_alone_keep_their_digits(level, columns, share, small, mantissa):
    x, trits, alpha = problem(48, columns, 3)
    few = torch.arange(columns) < max(1, int(share * columns))
    # short mantissas end in digits that are zero, which are passed over: no others may be
    x = torch.where(few, small, 1.0) * (x.sign() + 0.3 * x).to(mantissa).float()
    x = x.to(mantissa).float() if mantissa == torch.bfloat16 else x
    trits[:32, ~few] = 0
    got, expected = ternary_linear(x, packing.pack(trits), alpha, 48).double(), exact(x, trits, alpha)
    assert ((got - expected).abs() <= 4 * torch.finfo(torch.float32).eps * exact(x.abs(), trits.abs(), alpha)).all()


@pytest.mark.parametrize("columns", [800, 1024, 4096])
def test_sums_of_normal_tokens_round_less_than_sums_of_floats(level, columns):
    x, trits, alpha = problem(256, columns, 2)
    got, plain = ternary_linear(x, packing.pack(trits), alpha, 256), functional.linear(x, trits.float()) * alpha
    expected, mass = exact(x, trits, alpha), exact(x.abs(), trits.abs(), alpha)
    rms = [((y.double() - expected) / mass).pow(2).mean().sqrt() for y in (got, plain)]
    assert rms[0] <= rms[1] * (1 if level == "avx2" else 2)  # others add floats too, in another order


def test_roundings_that_all_go_one_way_stay_within_their_bound(level):
    # entries that lie just below the middle between two numbers of three digits, and one that sets their unit
    columns = 2048
    unit = 1.0 / 8355000
    x = torch.full((1, columns), 0.0)
    x[0] = (torch.arange(columns) % 700 + 1_000_000 + 0.49).double().mul(unit).float()
    x[0, 5] = 1.0
    trits = torch.ones(32, columns, dtype=torch.long)
    trits[16:, 5] = 0
    got, expected = ternary_linear(x, packing.pack(trits), torch.ones(1), 32), exact(x, trits, torch.ones(1))
    assert ((got.double() - expected).abs() <= 2.0**-20 * exact(x.abs(), trits.abs(), torch.ones(1))).all()


def test_trits_written_into_codes_are_counted_again(level):
    x, trits, alpha = problem(32, 2000, 1)
    x[0, :40] *= 1e-5
    codes = packing.pack(trits)
    ternary_linear(x, codes, alpha, 32)
    trits[3, 40:] = 0  # a row that reads small channels alone
    codes.copy_(packing.pack(trits))
    got, expected = ternary_linear(x, codes, alpha, 32).double(), exact(x, trits, alpha)
    assert ((got - expected).abs() <= 4 * torch.finfo(torch.float32).eps * exact(x.abs(), trits.abs(), alpha)).all()
    assert matrix_of(codes, alpha, 32, 2000).kernel.fewest == int((trits != 0).sum(1).min())


@pytest.mark.parametrize("eight", [False, True])
def test_whole_numbers_are_multiplied_without_rounding(level, eight):
    # the largest sums of bytes that there are: every channel at the end of its range, every trit alike
    for sign in (1, -1):
        x = torch.full((4, 1100), 127.0) * sign * torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None]
        trits = torch.ones(48, 1100, dtype=torch.long)
        trits[16:32] = -1
        trits[32:] = torch.randint(-1, 2, (16, 1100))
        assert torch.equal(
            ternary_linear(x, packing.pack(trits), torch.ones(1), 48, int8=eight), functional.linear(x, trits.float())
        )


@pytest.mark.parametrize("edge", [0.5, 0.98, 0.99, 0.9961, 0.997, 1.0 - 2.0**-24])
def test_largest_channels_at_the_ends_of_a_power_of_two(level, edge):
    x, trits, alpha = problem(48, 1000, 2)
    x = edge * torch.where(x > 0, 1.0, -1.0) * torch.tensor([[1.0], [2.0**60]])
    got, expected = ternary_linear(x, packing.pack(trits), alpha, 48).double(), exact(x, trits, alpha)
    assert ((got - expected).abs() <= 4 * torch.finfo(torch.float32).eps * exact(x.abs(), trits.abs(), alpha)).all()


def test_strided_inputs(level):
    x, trits, alpha = problem(30, 50, 12)
    wide = torch.randn(12, 100)
    wide[:, ::2] = x
    assert torch.equal(
        ternary_linear(wide[:, ::2], packing.pack(trits), alpha, 30), ternary_linear(x, packing.pack(trits), alpha, 30)
    )
    turned = x.T.contiguous().T
    assert torch.equal(ternary_linear(turned, packing.pack(trits), alpha, 30), ternary_linear(x, packing.pack(trits), alpha, 30))


@pytest.mark.parametrize("int8", [False, True])
def test_the_reference_agrees_with_the_kernels(level, int8):
    for tokens in (1, 40):
        x, trits, alpha = problem(40, 100, tokens)
        codes = packing.pack(trits)
        got, plain = ternary_linear(x, codes, alpha, 40, int8), reference(x, codes, alpha, 40, int8)
        assert torch.allclose(got, plain, rtol=0, atol=1e-4)
    assert reference(x.double(), codes, alpha, 40, int8).dtype == torch.float64


def test_the_operator_follows_the_rules():
    x, trits, alpha = problem(6, 20, 3)
    codes = packing.pack(trits)
    x.requires_grad_()
    torch.library.opcheck(ternary_linear_op, (x, codes, alpha, 6, False))
    upstream = torch.randn(3, 6)
    (grad,) = torch.autograd.grad(ternary_linear(x, codes, alpha, 6), x, upstream)
    assert torch.allclose(grad, upstream @ (trits * alpha[:, None]), atol=1e-5)


def test_no_token_is_fine():
    packed = TernaryLinear(20, 8).pack()
    assert packed(torch.empty(2, 0, 20)).shape == (2, 0, 8)


@pytest.mark.parametrize("form", packing.FORMS)
def test_packed_layers_compile(form):
    torch._dynamo.reset()
    packed = TernaryLinear(20, 8).pack(form)
    x = torch.randn(2, 20)
    assert torch.equal(torch.compile(packed, backend="eager", fullgraph=True)(x), packed(x))


def test_codes_in_base_3_are_expanded_once():
    packed = TernaryLinear(20, 8).pack("base-3")
    first = matrix_of(packed.codes, packed.alpha, 8, 20)
    assert torch.equal(first.words, packing.pack(packed.trits()))
    assert matrix_of(packed.codes, packed.alpha, 8, 20) is first
    with torch.inference_mode():  # where writing counts no versions
        made = TernaryLinear(20, 8).pack("base-3")
        before = made(torch.ones(1, 20))
        made.codes.copy_(TernaryLinear(20, 8).pack("base-3").codes)
        assert not torch.equal(made(torch.ones(1, 20)), before)


@pytest.mark.parametrize("options", [{}, {"hadamard": True}])
def test_autocast_gives_the_dtype_of_the_unpacked_layer(options):
    layer, x = TernaryLinear(32, 8, **options), torch.randn(2, 32)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        dense, packed = layer(x), layer.pack()(x)
    assert packed.dtype == dense.dtype == torch.bfloat16
    assert torch.allclose(packed.float(), dense.float(), atol=0.1)


# bad input ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: TernaryLinear(8, 8, lsq=True, per_row=True), "`lsq` learns one scale .* and excludes `per_row`; got both"),
        (lambda: TernaryLinear(0, 8), "`in_features` must be an integer of at least 1; got 0"),
        (lambda: TernaryLinear(8, 2.5), r"`out_features` must be an integer of at least 1; got 2.5"),
        (lambda: TernaryLinear(8, 4, quantize=False).pack(), "`quantize` must be True to pack a layer: .*; got False"),
        (lambda: TernaryLinear(8, 4).pack("3-bit"), "`form` must be one of '2-bit', 'base-3'; got '3-bit'"),
        (lambda: PackedTernaryLinear(8, 4, "3-bit"), "`form` must be one of '2-bit', 'base-3'; got '3-bit'"),
        (lambda: TernaryLinear(8, 4)(torch.ones(3, 7)), r"`x` must have shape \[..., 8\] .* \[4, 8\]; got shape \(3, 7\)"),
        (lambda: TernaryLinear(8, 4).pack()(torch.ones(3, 7)), r"`x` must have shape \[..., 8\] .* got shape \(3, 7\)"),
        (lambda: TernaryLinear(8, 4)(torch.tensor(1.0)), r"got shape \(\)"),
        (lambda: TernaryLinear(8, 4).pack()(torch.ones(3, 8).long()), "`x` must be of a floating dtype; got torch.int64"),
        (lambda: packing.pack(torch.full((2, 2), 2)), "`trits` must be a matrix of -1, 0 and 1"),
    ],
)  # fmt: skip
def test_bad_input_in_words(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_weights_that_are_not_finite_are_not_packed():
    layer = TernaryLinear(8, 4)
    with torch.no_grad():
        layer.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="`weight` must be finite to be packed"):
        layer.pack()


def test_the_name_at_the_top():
    assert sieve_attn.TernaryLinear is TernaryLinear
