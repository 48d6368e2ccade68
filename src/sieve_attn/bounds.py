"""Every bound, bracket and rounding rule as a pure formula over an explicit array namespace ``xp``.

Proofs are in ``docs/math.md``. Notation there and here: a block has ``n`` keys with mean ``mu``, ``c = scale * q.mu``,
``x_j = s_j - c`` has mean zero over the block and at most ``R`` in absolute value, variance at most ``sigma^2``. All
masses are logarithms. Upper formulas may only err upwards, lower ones only downwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

Array = Any

UNIT = 2.0**-24  # rounding unit of an fp32 sum; backends with a coarser one pass their own
SMALLEST = 2.0**-126  # smallest normal fp32 number: a certificate of something dropped is never reported as zero


@dataclass(frozen=True)
class Rounding:
    """How a backend's own sums round: every backend states it, and certificates of its output allow for it."""

    unit: float = UNIT  # 2^-22 for sums on tensor cores
    rounded_probabilities: bool = False  # probabilities are rounded to bf16 before they are summed
    exponential: float = 0.0  # relative error of exp itself, where it is more than a few units


FP32 = Rounding()


def soft_cap(xp: Any, x: Array, cap: float | None) -> Array:
    """``cap * tanh(x / cap)``, or ``x`` where there is no cap."""
    return x if cap is None else cap * xp.tanh(x / cap)


def log_cosh(xp: Any, x: Array) -> Array:
    """``log cosh x`` for ``x >= 0`` without overflow."""
    return x + xp.log1p(xp.exp(-2.0 * x)) - math.log(2.0)


def bennett_log_mgf(xp: Any, reach: Array, variance: Array, count: Array) -> Array:
    """``log f(R, sigma^2)``: the largest ``log mean e^x`` over zero-mean ``x <= R`` of variance at most ``sigma^2``.

    ``p e^R + (1 - p) e^(-sigma^2 / R)`` with ``p = sigma^2 / (R^2 + sigma^2)`` (two points reach it). The mean of ``count``
    numbers also forces ``sigma <= R`` (ball) and ``R <= sigma sqrt(count - 1)``. Monotone in both, so over-estimates are safe.
    """
    sigma = xp.minimum(xp.sqrt(variance), reach)
    reach = xp.minimum(reach, sigma * xp.sqrt(xp.maximum(count - 1.0, 0.0)) * (1.0 + 8 * UNIT))
    live = (reach > 0) & (sigma > 0)
    r, s = xp.where(live, reach, 1.0), xp.where(live, sigma, 1.0)
    ratio = (s / r) ** 2
    p = ratio / (1.0 + ratio)
    log_mgf = r + xp.log(p + (1.0 - p) * xp.exp(-(r + s * (s / r))))
    return xp.where(live, xp.maximum(log_mgf, 0.0), 0.0)


def capped_upper_shift(cap: float) -> float:
    """What a concave-convex cap may add to ``log n + cap(c + log f)``; valid for caps of at least 5."""
    return 0.7 / cap**2


def capped_lower_shift(xp: Any, sigma: Array, cap: float) -> Array:
    """What a cap of at least 5 may take from ``log n + cap(c)``, given an upper estimate of the standard deviation."""
    return xp.minimum(sigma, 0.385 * sigma**2 / cap)


def largest_eigenvalue(xp: Any, rows: Array) -> Array:
    """At least ``||E||_2^2`` of ``rows`` [..., n, d]: ``tr(G^8)^(1/8)`` of the Gram matrix, rounded outward.

    A power mean of the eigenvalues is above the largest, by a factor of at most ``n^(1/8)``. Power iteration would be below.
    """
    n, d = int(rows.shape[-2]), int(rows.shape[-1])
    size = xp.amax(xp.norm(rows), -1)
    safe = xp.where(xp.isfinite(size) & (size > 0), size, 1.0)
    unit_rows = rows / safe[..., None, None]
    flipped = xp.transpose_last(unit_rows)
    gram = unit_rows @ flipped if n <= d else flipped @ unit_rows
    trace = xp.maximum((unit_rows**2).sum(-1).sum(-1), SMALLEST)
    gram = gram / trace[..., None, None]
    fourth = gram @ gram
    fourth = fourth @ fourth
    top = trace * (fourth**2).sum(-1).sum(-1) ** 0.125
    order = min(n, d)
    # squares of tiny rows underflow: what is not zero is at least the smallest normal number
    bound = xp.maximum(top * safe * safe * (1.0 + 4 * order * (n + d + 8) * UNIT), SMALLEST)
    return xp.where(size > 0, bound, 0.0)


def sketch_upper(xp: Any, weight_log: Array, key_error: Array, spectral: Array, *, use_spectral: bool = True) -> Array:
    """Log of the largest ``sum_j e^{s_j}`` over keys of one block, from sketched logits; keys on the last axis.

    ``weight_log`` = sketched logit (-inf for keys that are not there), ``key_error`` = E_j with ``|s_j - s^_j| <= E_j``,
    ``spectral`` = ``T`` with ``||(s - s^)||_2 <= T``: the smaller of ``sum w e^E`` and the second-order spectral bound
    ``W + min(T ||w||, sum w E) + phi(E) min(w_max T^2, sum w E^2)``, ``phi(E) = (e^E - 1 - E) / E^2``.
    """
    plain = xp.logsumexp(weight_log + key_error, -1)
    if not use_spectral:
        return plain
    top = xp.amax(weight_log, -1)
    shift = xp.where(xp.isfinite(top), top, 0.0)
    w = xp.exp(weight_log - shift[..., None])
    w_error = xp.where(w > 0, w * key_error, 0.0)
    # of every key that is there: a weight too small for a float may belong to a key that is nearly unknown
    largest = xp.amax(xp.where(weight_log == -math.inf, 0.0, key_error), -1)
    first = xp.minimum(spectral * xp.sqrt((w * w).sum(-1)), w_error.sum(-1))
    second = xp.minimum(xp.amax(w, -1) * spectral * spectral, xp.where(w > 0, w_error * key_error, 0.0).sum(-1))
    # phi is increasing, so where E is large enough to overflow the plain bound is the one that counts
    e = xp.minimum(largest, 60.0)
    phi = xp.where(e > 1e-2, (xp.expm1(e) - e) / xp.maximum(e * e, 1e-30), 0.5 + e / 6.0 + e * e / 12.0)
    bound = xp.log(w.sum(-1) + first + phi * second) + shift
    usable = xp.isfinite(bound) & (largest < 60.0)
    return xp.where(usable, xp.minimum(bound, plain), plain)


def sketch_lower(xp: Any, weight_log: Array, key_error: Array, spectral: Array, *, use_spectral: bool = True) -> Array:
    """Log of the smallest ``sum_j e^{s_j}``: the larger of ``sum w e^-E`` and, by Jensen, ``W exp(-T ||w||_2 / W)``."""
    plain = xp.logsumexp(weight_log - key_error, -1)
    if not use_spectral:
        return plain
    top = xp.amax(weight_log, -1)
    shift = xp.where(xp.isfinite(top), top, 0.0)
    w = xp.exp(weight_log - shift[..., None])
    mass = xp.maximum(w.sum(-1), SMALLEST)
    jensen = xp.log(mass) - spectral * xp.sqrt((w * w).sum(-1)) / mass * (1.0 + 64 * UNIT) + shift
    return xp.maximum(plain, xp.where(top == -math.inf, -math.inf, jensen))


def logit_margin(scale: float, query_norm: Array, key_norm: Array, terms: Array | int, unit: float = UNIT) -> Array:
    """``eta``: how far ``terms`` rounded operations can move a scaled logit from its exact value."""
    return terms * unit * scale * query_norm * key_norm


def round_up(xp: Any, log_mass: Array, margin: Array, unit: float = UNIT) -> Array:
    """An upper log mass made safe against the rounding of its own computation."""
    size = xp.where(xp.isfinite(log_mass), abs(log_mass), 0.0)
    return log_mass + margin + 8 * unit * (1.0 + size)


def round_down(xp: Any, log_mass: Array, margin: Array, unit: float = UNIT) -> Array:
    size = xp.where(xp.isfinite(log_mass), abs(log_mass), 0.0)
    return log_mass - margin - 8 * unit * (1.0 + size)


def kept_mass(xp: Any, lse: Array, *, margin: Array, additions: int, tiles: int = 1, rounding: Rounding = FP32) -> Array:
    """``log K``: at most the true log mass of the kept keys, from the ``lse`` that a kernel returned.

    ``additions`` is the longest chain of additions in its row sum, ``margin`` the logit margin of the kept keys,
    ``rounding`` what the kernel's backend states of its sums.
    """
    size = xp.where(xp.isfinite(lse), abs(lse), 0.0)
    loss = (additions + 4 * tiles + 16) * rounding.unit + (2.0**-8 if rounding.rounded_probabilities else 0.0)
    loss = loss + rounding.exponential
    return lse - margin - 4 * rounding.unit * size - loss


def dropped_mass(xp: Any, log_kept: Array, log_dropped: Array, unit: float = UNIT) -> Array:
    """``delta <= P / (P + K)`` from ``log K`` (low) and ``log P`` (high), rounded outward; NaN or infinities give 1.

    Nothing dropped (``log P = -inf``) is exactly 0; otherwise never below the smallest normal number.
    """
    nothing = (log_dropped < 0) & ~xp.isfinite(log_dropped) & ~xp.isnan(log_dropped)
    unknown = xp.isnan(log_kept) | (log_kept == math.inf) | xp.isnan(log_dropped)
    # what is decided already stays out of a difference of infinities
    ratio = xp.exp(xp.where(unknown, 0.0, log_kept) - xp.where(nothing | unknown, 0.0, log_dropped))
    delta = xp.minimum(xp.maximum((1.0 + 8 * unit) / (1.0 + ratio), SMALLEST), 1.0)
    return xp.where(nothing, 0.0, xp.where(unknown, 1.0, delta))


def bernoulli_kl(xp: Any, mean: Array, p: Array) -> Array:
    """``KL(Bernoulli(mean) || Bernoulli(p))`` for ``0 <= mean <= p < 1``."""
    tiny = 1e-300
    left = xp.where(mean > 0, mean * (xp.log(xp.maximum(mean, tiny)) - xp.log(xp.maximum(p, tiny))), 0.0)
    right = xp.where(mean < 1, (1 - mean) * (xp.log1p(-xp.minimum(mean, 1 - 1e-16)) - xp.log1p(-p)), 0.0)
    return left + right


def kl_upper_limit(xp: Any, mean: Array, samples: int, alpha: float) -> Array:
    """The ``p >= mean`` with ``samples * KL(mean || p) = log(1 / alpha)``: an honest upper limit for means in [0, 1].

    Holds for independent draws that need not share a distribution; fp64 arrays in, fp64 arrays out.
    """
    target = math.log(1.0 / alpha) / samples
    low, high = mean, xp.maximum(mean * 0.0 + 1.0, mean)
    for _ in range(60):
        middle = xp.minimum(0.5 * (low + high), 1.0 - 1e-16)
        enough = bernoulli_kl(xp, mean, middle) >= target
        low, high = xp.where(enough, low, middle), xp.where(enough, middle, high)
    return xp.minimum(high, 1.0)
