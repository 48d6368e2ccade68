"""Every backend that runs here does with a selection what the fp64 oracle does with it."""

import numpy as np
import pytest
import torch

from sieve_attn import attend, attention, dispatch, native
from sieve_attn.testing import BackendContract, assert_close
from sieve_attn.testing.contracts import BACKEND_CASES
from sieve_attn.types import Offsets, Ranges, Selection, Tokens

REQUEST = dispatch.Request("torch", "cpu", "float32", 64, 64)


class TestReference(BackendContract):
    backend = "reference"


@pytest.mark.skipif(bool(native.missing()), reason="pure-Python installation")
class TestNative(BackendContract):
    backend = "native"
    dtypes = (torch.float16, torch.bfloat16, torch.float32)

    @pytest.fixture(autouse=True, params=native.module().levels() if not native.missing() else [])
    def each_level(self, request):
        native.module().force_level(request.param)
        yield
        native.module().force_level("")


def tokens_of(selection, like):
    """The same kept keys as single ones, out of order and some of them twice."""
    dense = selection.to_dense(like)
    order = (
        torch.rand(dense.shape, generator=torch.Generator().manual_seed(3)).masked_fill(~dense, -1.0).argsort(-1, descending=True)
    )
    index = order.masked_fill(~dense.gather(-1, order), -1)
    return Selection((Tokens(torch.cat([index, index[..., :3]], -1), selection.kv_len),))


class TestNativeTokens(TestNative):
    def case(self, name, dtype):
        inputs, selection, options = super().case(name, dtype)
        return inputs, tokens_of(selection, inputs[0]), options


class TestNativeOffsets(TestNative):
    """Cases of offsets in place of the blocks, those of several heads or sequences included."""

    def case(self, name, dtype):
        inputs, selection, options = super().case(name, dtype)
        lengths = (selection.q_len, selection.kv_len)
        if name == "nothing kept":
            return inputs, Selection((Offsets(*lengths, ()),)), options
        offsets = Offsets(*lengths, (0, 2, 3, 5, 7, 11, 13) if options.get("causal") else (-4, 0, 1, 9, 30), first_key=2)
        alone = name in ("plain", "causal", "more queries than keys", "sink")
        return inputs, Selection((offsets,)) if alone else Selection((Ranges(*lengths, prefix=2, window=3), offsets)), options


def test_kernels_refuse_indices_behind_the_last_key():
    q = torch.randn(1, 1, 4, 8)
    index = torch.tensor([0, 3, 4]).expand(1, 1, 4, 3)
    with pytest.raises(ValueError, match="`selection` must hold key indices below 4; got 4; use -1"):
        attend(q, q, q, Selection((Tokens(index, 4),)), backend="native")


@pytest.mark.parametrize("name", BACKEND_CASES)
def test_numpy_and_torch_agree(name):
    (q, k, v), selection, options = BackendContract().case(name, torch.float64)
    out, lse = attend(q, k, v, selection, **options)
    part = selection.blocks
    fields = {n: x.numpy() if isinstance(x, torch.Tensor) else x for n, x in vars(part).items() if not n.startswith("_")}
    theirs = type(selection)((type(part)(**fields),))
    plain = {n: x.numpy() if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    out_, lse_ = attend(q.numpy(), k.numpy(), v.numpy(), theirs, **plain)
    assert isinstance(out_, np.ndarray)
    assert_close(out_, out, what=name)
    assert_close(lse_, lse, what=name)


def test_a_backend_that_is_missing_gives_its_reasons():
    for name in dispatch.ORDER:
        reasons = dispatch.why_not(name, REQUEST)
        if not reasons:
            continue
        with pytest.raises(ValueError, match=r"`backend` cannot run this call: .*") as caught:
            dispatch.choose(name, REQUEST)
        assert all(reason in str(caught.value) for reason in reasons)
        assert "backend='auto'" in str(caught.value)


def test_auto_says_what_it_chose_and_why():
    name, why = dispatch.choose("auto", REQUEST)
    assert name in dispatch.ORDER
    for passed in dispatch.ORDER[: dispatch.ORDER.index(name)]:
        assert passed in why
    q = torch.randn(1, 1, 4, 8)
    _, report = attention(q, q, q, return_report=True)
    assert report.backend in dispatch.ORDER
    assert report.why_backend


def test_a_named_backend_is_the_one_that_runs():
    q = torch.randn(1, 1, 4, 8)
    _, report = attention(q, q, q, backend="reference", return_report=True)
    assert (report.backend, report.why_backend) == ("reference", "named by the caller")
