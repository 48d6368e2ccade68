"""Tolerances from data: against the fp64 oracle a kernel may err at most twice as much as plain code in its dtype."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

Array = Any

FLOOR = 8  # rounding units of the dtype, relative to the largest entry, that nobody is asked to beat


def float64(x: Array) -> np.ndarray:
    """Any array as a NumPy fp64 array."""
    if isinstance(x, torch.Tensor):
        return x.detach().cpu().to(torch.float64).numpy()
    return np.asarray(x, dtype=np.float64)


def allowed_error(exact: Array, plain: Array | None, dtype: torch.dtype, terms: float = 0.0) -> float:
    """Twice the error of ``plain`` (code without tricks in ``dtype``) plus a floor of a few rounding units.

    ``terms``: the root of the summed squares of what ``exact`` is a sum of. Where it cancels, the terms round, not the sum, and
    ``plain`` may have been lucky.
    """
    exact = float64(exact)
    finite = np.isfinite(exact)
    size = max(np.abs(exact[finite]).max(initial=0.0), terms)
    floor = FLOOR * torch.finfo(dtype).eps * (1.0 + size)
    if plain is None:
        return float(floor)
    apart = np.abs(float64(plain)[finite] - exact[finite])
    return float(2.0 * apart[np.isfinite(apart)].max(initial=0.0) + floor)


def assert_close(
    got: Array, exact: Array, *, plain: Array | None = None, dtype: torch.dtype = torch.float64, what: str = "result",
    terms: float = 0.0,
) -> None:  # fmt: skip
    """``got`` is finite where ``exact`` is, equals it elsewhere (-inf and NaN included) and errs by no more than is allowed."""
    got, exact = float64(got), float64(exact)
    if got.shape != exact.shape:
        raise AssertionError(f"{what}: shape {got.shape} is not {exact.shape}")
    finite = np.isfinite(exact)
    if not np.array_equal(got[~finite], exact[~finite], equal_nan=True) or not np.isfinite(got[finite]).all():
        raise AssertionError(f"{what}: NaN or infinities are not where the oracle has them")
    limit = allowed_error(exact, plain, dtype, terms)
    worst = np.abs(got[finite] - exact[finite]).max(initial=0.0)
    if worst > limit:
        raise AssertionError(f"{what}: errs by {worst:.3e}, allowed are {limit:.3e}")
