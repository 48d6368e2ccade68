"""The orthogonal matrix that spreads outliers over all channels before weights are rounded to trits."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Rotation(nn.Module):
    """``x -> x Q`` with a fixed orthogonal, symmetric or seeded ``Q`` [width, width]; no parameters, nothing in the state.

    For a power of two ``Q`` is Sylvester's Hadamard matrix over the root of the width, applied as two factors of about the root
    of the width (``H_ab = H_a (x) H_b``). Other widths use the orthogonal factor of a seeded Gaussian matrix.
    """

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.fast = width & (width - 1) == 0
        if self.fast:
            bits = width.bit_length() - 1
            self.register_buffer("left", sylvester(1 << bits // 2), persistent=False)
            self.register_buffer("right", sylvester(1 << (bits - bits // 2)), persistent=False)
        else:
            self.register_buffer("matrix", seeded(width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.fast:
            return x @ self.matrix.to(x.dtype)
        left, right = self.left.to(x.dtype), self.right.to(x.dtype)
        parts = x.reshape(*x.shape[:-1], left.shape[0], right.shape[0])
        return ((left @ parts) @ right).reshape(x.shape) * self.width**-0.5


def sylvester(size: int) -> Tensor:
    """``H_1 = 1``, ``H_2n = [[H_n, H_n], [H_n, -H_n]]``."""
    h = torch.ones(1, 1)
    while h.shape[0] < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return h


def seeded(width: int) -> Tensor:
    """An orthogonal matrix that depends on the width alone: signs are fixed by a positive diagonal of the other factor."""
    gaussian = torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(width))
    q, r = torch.linalg.qr(gaussian)
    return (q * torch.sign(r.diagonal())).float()
