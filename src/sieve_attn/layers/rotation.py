"""The orthogonal matrix that spreads outliers over all channels before weights are rounded to trits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Rotation(nn.Module):
    """``x -> x Q`` with a fixed orthogonal, symmetric or seeded ``Q`` [width, width]; no parameters, nothing in the state.

    For a power of two ``Q`` is Sylvester's Hadamard matrix over the root of the width, applied as two factors of about the root
    of the width (``H_ab = H_a (x) H_b``). Other widths use the orthogonal factor of a seeded Gaussian matrix.

    ``factors`` are no buffers: those that no state holds are left without values where a module is made on ``meta`` and then
    emptied or loaded. They are made on the CPU, follow the module, and stay where they are when it goes to ``meta``.
    """

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.fast = width & (width - 1) == 0
        bits = width.bit_length() - 1
        self.factors = (sylvester(1 << bits // 2), sylvester(1 << (bits - bits // 2))) if self.fast else (seeded(width),)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotation:
        super()._apply(fn, recurse)
        goal = fn(self.factors[0].new_empty(0))  # says device and dtype; of `to_empty` it would be all
        if not goal.is_meta:
            self.factors = tuple(f.to(goal.device, goal.dtype) for f in self.factors)
        return self

    def _beside(self, x: Tensor) -> tuple[Tensor, ...]:
        away = self.factors[0].device != x.device and not x.is_meta
        if away and type(x) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling():
            # what loads or shards a module may move parameters and buffers alone: follow them, once
            with torch.inference_mode(False):
                self.factors = tuple(f.to(x.device) for f in self.factors)
        return tuple(f.to(x.device, x.dtype) for f in self.factors)

    def forward(self, x: Tensor) -> Tensor:
        factors = self._beside(x)
        if not self.fast:
            return x @ factors[0]
        left, right = factors
        parts = x.reshape(*x.shape[:-1], left.shape[0], right.shape[0])
        return ((left @ parts) @ right).reshape(x.shape) * self.width**-0.5


def sylvester(size: int) -> Tensor:
    """``H_1 = 1``, ``H_2n = [[H_n, H_n], [H_n, -H_n]]``."""
    h = torch.ones(1, 1, device="cpu")  # whatever device is the default
    while h.shape[0] < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return h


def seeded(width: int) -> Tensor:
    """An orthogonal matrix that depends on the width alone: signs are fixed by a positive diagonal of the other factor."""
    source = torch.Generator("cpu").manual_seed(width)
    gaussian = torch.randn(width, width, dtype=torch.float64, generator=source, device="cpu")
    q, r = torch.linalg.qr(gaussian)
    return (q * torch.sign(r.diagonal())).float()
