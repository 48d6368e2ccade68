"""The contract of every backend, and what only these kernels could get wrong: tile sizes, head dims, strides, malformed lists."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sieve_attn import attend, attention, dispatch
from sieve_attn.testing import BackendContract, assert_close
from sieve_attn.testing.contracts import draw, spread_heads
from sieve_attn.testing.oracle import plain_attention, visible_keys
from sieve_attn.testing.strategies import Shape, gaussian, random_blocks
from sieve_attn.types import Blocks, Offsets, Ranges, Selection


class TestTriton(BackendContract):
    backend = "triton"
    dtypes = (torch.float16, torch.float32)


class TestTritonRanges(BackendContract):
    """Ranges in place of blocks: a prefix, a window, both, everything."""

    backend = "triton"
    dtypes = (torch.float32,)

    def case(self, name, dtype):
        inputs, selection, options = super().case(name, dtype)
        lengths = (selection.q_len, selection.kv_len)
        kinds = ({"prefix": 3, "window": 9}, {"window": 11}, {"prefix": 20}, {"prefix": 2, "window": 5, "two_sided": True})
        chosen = {} if name == "nothing kept" else kinds[len(name) % len(kinds)]
        return inputs, Selection((Ranges(*lengths, **chosen),)), options

    test_is_deterministic_to_the_bit = test_inputs_may_be_strided = test_keeps_the_dtypes = None
    test_the_future_influences_nothing = test_dropped_pairs_get_exactly_zero_gradient = None
    test_keys_that_nobody_keeps_change_nothing = test_errs_no_more_than_plain_code_in_half_precision = None

    @pytest.mark.parametrize("name", ["causal", "packed, both ways", "window", "everything at once", "nothing kept", "bias"])
    def test_equals_the_oracle(self, name):
        self.compare(*self.case(name, torch.float32))


def compare(shape, selection, dtype=torch.float32, **options):
    BackendContract.backend, before = "triton", BackendContract.backend
    try:
        BackendContract().compare(gaussian(7, shape, dtype), selection, options)
    finally:
        BackendContract.backend = before


@pytest.mark.parametrize("dims", [(16, 16), (40, 24), (72, 128), (256, 130)])
def test_any_head_dim(dims):
    shape = Shape(1, 2, 1, 20, 40, *dims)
    compare(shape, random_blocks(1, shape, causal=True, kv_block=16), causal=True)


@pytest.mark.parametrize("blocks", [(3, 16), (16, 16), (24, 48), (64, 64), (128, 128), (200, 32)])
def test_any_blocks(blocks):
    q_block, kv_block = blocks
    shape = Shape(1, 2, 1, 70, 150, 16, 16)
    compare(shape, random_blocks(2, shape, causal=True, q_block=q_block, kv_block=kv_block, density=0.5), causal=True)


# the same examples every time: how rounding falls in one of many draws is no reason to fail
@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    st.integers(1, 40), st.integers(1, 90), st.integers(1, 3), st.sampled_from((1, 2, "group")), st.booleans(),
    st.integers(5, 40), st.sampled_from((None, 9)), st.booleans(),
)  # fmt: skip
def test_any_lengths_groups_and_grids(q_len, kv_len, group, heads, causal, q_block, window, per_query):
    shape = Shape(1, 2 * group, 2, q_len, kv_len, 8, 8)
    heads = 2 * group if heads == "group" else heads
    selection = random_blocks(kv_len, shape, heads=heads, q_block=q_block, kv_block=16, causal=causal, per_query=per_query)
    compare(shape, selection, causal=causal, **({} if window is None else {"window": window}))


@pytest.mark.parametrize("size", [(2, 4, 21, 1), (1, 1, 21, 37), (2, 1, 21, 37), (1, 4, 1, 37), (1, 1, 1, 1), (2, 4, 1, 1)])
def test_a_bias_of_any_broadcast_shape_has_its_gradient(size):
    shape = Shape(2, 4, 2, 21, 37, 8, 8)
    compare(shape, random_blocks(1, shape, kv_block=16, causal=True), causal=True, bias=draw(3, *size))


def test_a_bias_of_minus_infinity_hides():
    shape = Shape(1, 2, 2, 20, 40, 8, 8)
    q, k, v = gaussian(1, shape)
    bias = draw(3, 1, 2, 20, 40).float().masked_fill(draw(4, 1, 2, 20, 40) > 0.5, -torch.inf)
    selection = random_blocks(1, shape, kv_block=16)
    seen = spread_heads(selection.to_dense(q), 2) & (bias > -torch.inf)
    out, lse = attend(q, k, v, selection, bias=bias, backend="triton")
    exact = plain_attention(q.double(), k.double(), v.double(), seen, bias=bias.clamp(min=-1e6).double())
    assert_close(out, exact[0], dtype=torch.float32)
    assert_close(lse, exact[1], dtype=torch.float32)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_no_number_reaches_exactly_those_that_see_it(poison):
    shape = Shape(1, 2, 1, 40, 40, 16, 16)
    q, k, v = gaussian(1, shape)
    v[:, :, 20, 3] = poison
    selection = random_blocks(1, shape, causal=True, kv_block=16)
    out, _ = attend(q, k, v, selection, causal=True, backend="triton")
    sees = (visible_keys(40, 40, causal=True) & spread_heads(selection.to_dense(q), 2))[..., 20]
    wanted = torch.full((), poison).expand(int(sees.expand(1, 2, 40).sum()))
    torch.testing.assert_close(out[sees.expand(1, 2, 40)][:, 3], wanted, rtol=0, atol=0, equal_nan=True)
    assert torch.isfinite(out[..., [c for c in range(16) if c != 3]]).all()
    assert torch.isfinite(out[~sees.expand(1, 2, 40)]).all()


def test_a_gradient_is_the_same_to_the_bit():
    shape = Shape(1, 4, 2, 40, 60, 16, 16)
    selection = random_blocks(1, shape, causal=True, kv_block=16)
    found = []
    for _ in range(2):
        leaves = [x.requires_grad_() for x in gaussian(1, shape)]
        out, lse = attend(*leaves, selection, causal=True, backend="triton")
        found.append(torch.autograd.grad(out.square().sum() + lse.sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def poisoned(monkeypatch):
    """Buffers start as NaN: what a kernel forgets to write shows."""
    empty = torch.empty

    def full(*size, **options):
        made = empty(*size, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", full)


def test_every_number_is_written(monkeypatch):
    shape = Shape(2, 6, 2, 37, 45, 24, 20)
    q, k, v = (x.requires_grad_() for x in gaussian(1, shape))
    selection = random_blocks(1, shape, causal=True, kv_block=16, density=0.3)
    poisoned(monkeypatch)
    out, lse = attend(q, k, v, selection, causal=True, backend="triton")
    assert not out.isnan().any()
    assert not lse.isnan().any()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_spare_room_behind_the_list_is_not_read():
    shape = Shape(1, 2, 2, 40, 64, 16, 16)
    q, k, v = gaussian(1, shape)
    part = random_blocks(1, shape, causal=True, kv_block=16).parts[0]
    spare = torch.cat([part.block_index, torch.full((9,), -7, dtype=torch.int32)])
    grid = {n: getattr(part, n) for n in ("batch", "heads", "q_len", "kv_len", "q_block", "kv_block", "lead")}
    wide = Selection((Blocks(part.row_ptr, spare, **grid),))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    found = []
    for selection in (Selection((part,)), wide):
        out, _ = attend(*leaves, selection, causal=True, backend="triton")
        found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


MALFORMED = [
    ([0, 1, 2], [0, 3]),  # a block behind the last
    ([0, 1, 2], [0, -1]),
    ([0, 2, 2], [1, 0]),  # not in order
    ([0, 2, 2], [1, 1]),
    ([0, 2, 1], [0, 1]),  # falling
    ([0, 1, 5], [0, 1]),  # more entries than there are
]


@pytest.mark.parametrize(("row_ptr", "block_index"), MALFORMED)
def test_a_malformed_list_is_refused_where_it_can_be_read(row_ptr, block_index):
    q, k = torch.randn(1, 1, 32, 16), torch.randn(1, 1, 48, 16)
    blocks = Blocks(torch.tensor(row_ptr), torch.tensor(block_index, dtype=torch.int32), 1, 1, 32, 48, q_block=16, kv_block=16)
    with pytest.raises(ValueError, match=r"`selection` must list the blocks of every tile in increasing order, each below 3"):
        attend(q, k, k, Selection((blocks,)), backend="triton")


@pytest.mark.parametrize(("row_ptr", "block_index"), MALFORMED)
def test_on_a_device_a_malformed_list_gives_nan_and_reads_nothing_beside_the_keys(row_ptr, block_index):
    from sieve_attn.attend.triton import forward
    from sieve_attn.types import Call

    q, k = torch.randn(1, 1, 32, 16), torch.randn(1, 1, 48, 16)
    blocks = Blocks(torch.tensor(row_ptr), torch.tensor(block_index, dtype=torch.int32), 1, 1, 32, 48, q_block=16, kv_block=16)
    for splits in (1, 3):
        out, lse = forward.attend(Call(q, k, k, scale=0.25), Selection((blocks,)), splits=splits)
        assert out.isnan().any()
        assert torch.equal(out.isnan().any(-1), lse.isnan())


@pytest.mark.parametrize("grid", [{"q_block": 0}, {"kv_block": 0}, {"lead": -1}, {"lead": 16}])
def test_a_malformed_grid_is_refused(grid):
    q = torch.randn(1, 1, 32, 16)
    given = {"q_block": 16, "kv_block": 16, "lead": 0} | grid
    blocks = Blocks(torch.tensor([0, 1, 2]), torch.tensor([0, 1], dtype=torch.int32), 1, 1, 32, 32, **given)
    with pytest.raises(ValueError, match="`selection` must"):
        attend(q, q, q, Selection((blocks,)), backend="triton")


def test_what_kernels_cannot_do_is_said_with_every_reason():
    def reasons(**given):
        plain = {"framework": "torch", "device": "cpu", "dtype": "float32", "head_dim": 64, "value_dim": 64}
        with pytest.raises(ValueError, match="`backend` cannot run this call") as caught:
            dispatch.choose("triton", dispatch.Request(**(plain | given)))
        return str(caught.value)

    assert "Triton kernels know head_dim 1 to 256, not 320" in reasons(head_dim=320)
    assert "Triton kernels know v_dim 1 to 256, not 288" in reasons(value_dim=288)
    assert "not float64" in reasons(dtype="float64")
    assert "interpreter computes bfloat16 wrongly" in reasons(dtype="bfloat16")
    assert "take PyTorch tensors, not numpy" in reasons(framework="numpy")
    assert "run on cuda, not on mps" in reasons(device="mps")
    both = reasons(far_field=True, kinds=("Offsets",))
    assert "no far field" in both
    assert "Triton kernels take one part of Blocks or Ranges or Tokens, not Offsets" in both
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(ValueError, match="one part of Blocks or Ranges or Tokens, not Offsets"):
        attend(q, q, q, Selection((Offsets(4, 4, (0, 1)),)), backend="triton")


def test_the_interpreter_serves_only_those_who_name_it():
    q = torch.randn(1, 1, 20, 16)
    _, report = attention(q, q, q, causal=True, return_report=True)
    assert report.backend != "triton"
    _, report = attention(q, q, q, causal=True, backend="triton", return_report=True)
    assert (report.backend, report.why_backend) == ("triton", "named by the caller")
    assert (report.certificate.dropped_mass == 0).all()
