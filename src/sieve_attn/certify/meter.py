"""Sampling where bounds are loose: statistical limits on the dropped mass, for a selection fixed before the draw.

Draws come from counter-based generators, so a seed means the same draws everywhere. A t interval would be dishonest here
(nominal 95 % covered 70-91 %); the limits below are Chernoff's, which need only that draws lie in [0, 1].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sieve_attn import arrays
from sieve_attn.attend.far_field import front
from sieve_attn.bounds import kl_upper_limit
from sieve_attn.checks import error, positive_int, share
from sieve_attn.scores.base import exact_logits, per_query_head, visible_count
from sieve_attn.scores.key_sketch import KeySketch
from sieve_attn.types import Call, Certificate, Geometry, Selection

Array = Any


def _level(alpha: float) -> None:
    share("alpha", alpha, "0.05 gives 95 % confidence", open_right=True)
    if alpha == 0:
        raise error("alpha", "must lie strictly between 0 and 1", repr(alpha), "no sample is certain: try 0.05")


def _uniform(seed: int, stream: int, shape: tuple[int, ...]):
    """Uniform numbers in [0, 1) that depend on (seed, stream) alone."""
    import numpy as np

    return np.random.Generator(np.random.Philox(key=[seed, stream])).random(shape)


def _uniform_rows(seed: int, start: int, stop: int, shape: tuple[int, int], samples: int):
    """[batch, heads, stop - start, samples]: a stream a query, so that chunking never changes a draw."""
    import numpy as np

    return np.stack([_uniform(seed, query, (*shape, samples)) for query in range(start, stop)], 2)


def key_meter(
    call: Call, selection: Selection, geometry: Geometry, lse: Array, *, samples: int = 256, alpha: float = 0.05, seed: int = 0
) -> Certificate:
    """An upper limit on every query's dropped mass that holds with probability ``1 - alpha`` for that query.

    With ``b_j`` the sketch's upper bound of ``e^{s_j}`` and ``P = sum_D b_j`` over dropped keys: draw one key in each of
    ``samples`` strata of equal mass, ``Y = e^{s_j} / b_j`` in [0, 1], ``Z_D = P E[Y]``. Only the drawn keys are read.
    """
    xp = arrays.namespace(call.query)
    positive_int("samples", samples, "try 256")
    if xp.zeros((1,), xp.float64, call.query).dtype != xp.float64:
        raise error("key_meter", "must sum in float64, which jax_enable_x64 allows", "arrays of JAX while it is off",
                    "set jax_enable_x64, or convert the call to NumPy")  # fmt: skip
    _level(alpha)
    scorer = KeySketch(bits=geometry.sketch.bits)
    out = []
    with xp.no_grad():
        for start, stop in call.chunks():
            seen = call.kv_stop(stop, geometry.block_size)
            rows, part = call.rows(start, stop, seen), front(geometry, seen)
            kept = call.kept(selection, start, stop, seen)
            log_b = xp.cast(xp.where(kept, -math.inf, scorer.key_upper(rows, part)), xp.float64)
            top = xp.amax(log_b, -1)[..., None]
            top = xp.where(xp.isfinite(top), top, 0.0)
            ladder = xp.cumsum(xp.exp(log_b - top), -1)
            mass = ladder[..., -1:]
            stratum = xp.asarray(_uniform_rows(seed, start, stop, mass.shape[:2], samples), xp.float64, mass)
            stratum = (stratum + xp.cast(xp.arange(0, samples, mass), xp.float64)) / samples * mass
            drawn = xp.minimum(xp.searchsorted(ladder, stratum), log_b.shape[-1] - 1)
            truth = xp.cast(xp.take_along(exact_logits(rows), drawn, -1), xp.float64)
            bound = xp.take_along(log_b, drawn, -1)
            y = xp.where(xp.isfinite(bound), xp.minimum(xp.exp(truth - bound), 1.0), 1.0)
            limit = kl_upper_limit(xp, y.sum(-1) / samples, samples, alpha)
            log_zd = xp.log(limit * mass[..., 0]) + top[..., 0]
            delta = 1.0 / (1.0 + xp.exp(xp.cast(lse[:, :, start:stop], xp.float64) - log_zd))
            broken = (visible_count(rows, part.block_size) > 0) & ~per_query_head(part.finite, rows)[:, :, None, :]
            delta = xp.where(mass[..., 0] == 0, 0.0, xp.where(xp.isnan(delta), 1.0, delta))
            delta = xp.where(xp.any_(broken, -1), 1.0, delta)
            out.append(xp.cast(delta, xp.float32))
    return Certificate(xp.concat(out, 2), f"key meter, {samples} draws a query", None, "statistical", 1.0 - alpha)


@dataclass(frozen=True)
class RowAudit:
    """The exact dropped mass of rows drawn in advance, and what it says of all rows at ``confidence``."""

    rows: tuple[tuple[int, int, int], ...]  # (batch, head, query)
    dropped_mass: tuple[float, ...]
    confidence: float

    @property
    def mean_limit(self) -> float:
        """An upper limit for the mean dropped mass over all rows."""
        import numpy as np

        from sieve_attn.arrays import numpy_ops

        mean = np.asarray(min(1.0, sum(self.dropped_mass) / len(self.dropped_mass)))
        return float(kl_upper_limit(numpy_ops, mean, len(self.rows), 1.0 - self.confidence))

    @property
    def worst(self) -> float:
        return max(self.dropped_mass)

    @property
    def share_below_worst(self) -> float:
        """At least this share of all rows has a dropped mass of at most ``worst``: ``alpha^(1/R)``."""
        return (1.0 - self.confidence) ** (1.0 / len(self.rows))


def row_audit(call: Call, selection: Selection, *, rows: int = 64, alpha: float = 0.05, seed: int = 0) -> RowAudit:
    """Compute the dropped mass exactly on ``rows`` queries drawn uniformly, with replacement, before looking at anything."""
    xp = arrays.namespace(call.query)
    positive_int("rows", rows, "try 64")
    _level(alpha)
    batch, heads, q_len, _ = call.query.shape
    flat = (_uniform(seed, 0, (rows,)) * (batch * heads * q_len)).astype("int64")
    picked = [(int(f) // (heads * q_len), int(f) // q_len % heads, int(f) % q_len) for f in flat]
    found = []
    with xp.no_grad():
        for b, h, i in picked:
            chunk = call.rows(i, i + 1)
            kept = call.kept(selection, i, i + 1)
            kept = kept[b % kept.shape[0], h % kept.shape[1], 0]
            logits = exact_logits(chunk)[b, h, 0]
            every = xp.logsumexp(logits, -1)
            if call.sink is not None:
                every = xp.logaddexp(every, xp.cast(call.sink[h], every.dtype))
            lost = float(xp.logsumexp(xp.where(kept, -math.inf, logits), -1))
            found.append(0.0 if lost == -math.inf else min(1.0, math.exp(lost - float(every))))
    return RowAudit(tuple(picked), tuple(found), 1.0 - alpha)
