"""What kernels are given of packed codes, once: of the right matrix, as long as it is there, and forgotten with it."""

import gc

import pytest
import torch

from sieve_attn.layers import TernaryLinear, packing, ternary_op
from sieve_attn.layers.ternary_op import ternary_linear


@pytest.mark.parametrize(
    ("codes", "alpha", "got"),
    [
        (torch.zeros(1, 1, 16, dtype=torch.int32), torch.ones(1), r"got torch.int32 of shape \(1, 1, 16\)"),
        (torch.zeros(1, 1, 32), torch.ones(1), r"got torch.float32 of shape \(1, 1, 32\)"),
        (packing.pack(torch.zeros(8, 12)), torch.ones(3), r"with fp32 alpha \[1\] or \[8\]"),
        (packing.pack(torch.zeros(8, 12)).expand(1, 1, 32), torch.ones(1).double(), "with fp32 alpha"),
    ],
)
def test_codes_of_another_matrix_are_refused(codes, alpha, got):
    with pytest.raises(ValueError, match=f"`codes` must be contiguous int32 of shape .*{got}"):
        ternary_linear(torch.zeros(1, 12), codes, alpha, 8)


def test_kernels_read_no_token_of_another_width():
    layer = TernaryLinear(20, 8).pack()
    layer(torch.zeros(1, 20))
    with pytest.raises(ValueError, match="as many channels as the matrix has columns"):
        ternary_linear(torch.zeros(1, 2000), layer.codes, layer.alpha, 8)


def test_codes_and_scales_put_elsewhere_are_seen():
    """Kernels are given addresses once: what lies there must still be what the module holds."""
    first, second, x = TernaryLinear(20, 8).pack(), TernaryLinear(20, 8).pack(), torch.randn(1, 20)
    first(x)
    first.codes.data = second.codes.clone()
    first.alpha.data = second.alpha.clone()
    assert torch.equal(first(x), second(x))
    first.alpha = torch.full((8,), 3.0)
    assert torch.equal(first(x), ternary_linear(x, second.codes, torch.full((8,), 3.0), 8))


def test_what_kernels_were_given_is_forgotten_with_the_codes():
    layer = TernaryLinear(20, 8).pack()
    layer(torch.zeros(1, 20))
    key = id(layer.codes)
    assert key in ternary_op._MATRICES
    del layer
    gc.collect()
    assert key not in ternary_op._MATRICES
