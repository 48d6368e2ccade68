"""Ternary weights as bits: two a weight in the order that kernels read, or five to a byte in base 3.

Two bits: ``codes [row blocks, column groups, 32]`` int32, in memory bytes ``[.., .., 4, 32]`` of four columns each. Byte
``[r, g, b, i]`` holds columns ``16 g + 4 j + b`` of row ``32 r + i`` as trit + 1, at bits ``2 j``. Rows and columns beyond the
matrix hold zeros.
Base 3: ``codes [ceil(rows * columns / 5)]`` uint8 over the matrix row by row, ``sum_n (trit_n + 1) 3^n``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sieve_attn import checks

FORMS = ("2-bit", "base-3")
POWERS = (1, 3, 9, 27, 81)
ROWS, COLUMNS = 32, 16  # of a block and a group


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
    codes = torch.nn.functional.pad(codes, (0, -columns % COLUMNS, 0, -rows % ROWS), value=1)
    blocks, groups = codes.shape[0] // ROWS, codes.shape[1] // COLUMNS
    part = codes.reshape(blocks, ROWS, groups, 4, 4).permute(0, 2, 4, 1, 3)  # [blocks, groups, b, rows, j]
    bytes_ = (part << _shifts(trits.device)).sum(-1).to(torch.uint8)
    return bytes_.reshape(blocks, groups, 4 * ROWS).view(torch.int32)


def unpack(codes: Tensor, rows: int, columns: int) -> Tensor:
    """The trits [rows, columns] int8 behind ``codes``; the dtype says which form they have. Exact."""
    if codes.dtype == torch.uint8:
        digits = codes.to(torch.int16)[:, None] // torch.tensor(POWERS, dtype=torch.int16, device=codes.device) % 3
        return (digits.flatten()[: rows * columns].reshape(rows, columns) - 1).to(torch.int8)
    blocks, groups, _ = codes.shape
    part = codes.contiguous().view(torch.uint8).reshape(blocks, groups, 4, ROWS, 1) >> _shifts(codes.device) & 3
    trits = part.permute(0, 3, 1, 4, 2).reshape(blocks * ROWS, groups * COLUMNS).to(torch.int8) - 1
    return trits[:rows, :columns].contiguous()


def _shifts(device: torch.device) -> Tensor:
    return torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=device)


def describe(rows: int, columns: int, form: str) -> tuple[tuple[int, ...], int, torch.dtype]:
    """``(shape, the code of zeros, dtype)`` of a packed matrix."""
    _check_form(form)
    if form == "2-bit":
        return (-(-rows // ROWS), -(-columns // COLUMNS), ROWS), 0x55555555, torch.int32
    return (-(-rows * columns // 5),), sum(POWERS), torch.uint8
