"""Ternary weights as bits: two a weight in the order that kernels read, or five to a byte in base 3.

Two bits: ``codes [row blocks, column groups, 16]`` int32. Word ``[r, g, i]`` holds the 16 columns ``16 g ..`` of row ``16 r + i``
as trit + 1; column ``4 i + b`` of the group sits at bit ``8 b + 2 i``. Rows and columns beyond the matrix hold zeros.
Base 3: ``codes [ceil(rows * columns / 5)]`` uint8 over the matrix row by row, ``sum_n (trit_n + 1) 3^n``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sieve_attn import checks

FORMS = ("2-bit", "base-3")
POWERS = (1, 3, 9, 27, 81)


def _shifts(device: torch.device) -> Tensor:
    column = torch.arange(16, device=device)
    return 8 * (column % 4) + 2 * (column // 4)


def _check_form(form: str) -> None:
    if form not in FORMS:
        raise checks.error(
            "form", f"must be one of {', '.join(map(repr, FORMS))}", repr(form), "'base-3' is smaller and unpacked to compute"
        )


def pack(trits: Tensor, form: str = "2-bit") -> Tensor:
    """``trits [rows, columns]`` with entries -1, 0 and 1 in the given form. Raises ValueError for other entries."""
    _check_form(form)
    if trits.dim() != 2 or bool(((trits != -1) & (trits != 0) & (trits != 1)).any()):
        raise checks.error(
            "trits",
            "must be a matrix of -1, 0 and 1",
            f"shape {tuple(trits.shape)}",
            "quantise the weights first: TernaryLinear.trits()",
        )
    codes = trits.to(torch.int64) + 1
    rows, columns = trits.shape
    if form == "base-3":
        flat = torch.nn.functional.pad(codes.flatten(), (0, -(rows * columns) % 5)).reshape(-1, 5)
        return (flat * torch.tensor(POWERS, device=trits.device)).sum(-1).to(torch.uint8)
    codes = torch.nn.functional.pad(codes, (0, -columns % 16, 0, -rows % 16), value=1)
    words = codes.reshape(codes.shape[0] // 16, 16, -1, 16) << _shifts(trits.device)
    words = words.sum(-1).transpose(1, 2)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).contiguous()


def unpack(codes: Tensor, rows: int, columns: int) -> Tensor:
    """The trits [rows, columns] int8 behind ``codes``; the dtype says which form they have. Exact."""
    if codes.dtype == torch.uint8:
        digits = codes.to(torch.int16)[:, None] // torch.tensor(POWERS, dtype=torch.int16, device=codes.device) % 3
        return (digits.flatten()[: rows * columns].reshape(rows, columns) - 1).to(torch.int8)
    codes = (codes.transpose(1, 2)[..., None] >> _shifts(codes.device).to(torch.int32)) & 3
    trits = codes.to(torch.int8).reshape(codes.shape[0] * 16, -1) - 1
    return trits[:rows, :columns].contiguous()


def describe(rows: int, columns: int, form: str) -> tuple[tuple[int, ...], int, torch.dtype]:
    """``(shape, the code of zeros, dtype)`` of a packed matrix."""
    _check_form(form)
    if form == "2-bit":
        return (-(-rows // 16), -(-columns // 16), 16), 0x55555555, torch.int32
    return (-(-rows * columns // 5),), sum(POWERS), torch.uint8
