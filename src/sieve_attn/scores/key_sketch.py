"""Logits against the low-bit copy of the keys: the default scorer. It ranks like the keys themselves and it proves."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from sieve_attn import arrays
from sieve_attn.bounds import UNIT, logit_margin, round_down, round_up, sketch_lower, sketch_upper, soft_cap
from sieve_attn.checks import error
from sieve_attn.geometry.sketch import CALIBRATION, decode
from sieve_attn.scores.base import Bound, exact_block_mass, grouped, named, per_query_head, query_norm, remember, split_blocks
from sieve_attn.types import Geometry, Rows, Statistics

Array = Any


def decoded_keys(rows: Rows, geometry: Geometry, bits: int) -> Array:
    """The sketched keys of this chunk, [batch, kv_heads, kv_len, dim]; each key is decoded once a call."""
    xp = arrays.namespace(rows.query)
    sketch, dtype = geometry.sketch, rows.query.dtype
    # the channel scale stands for the sketch: it is the one array that every front of a geometry shares
    name = ("decoded", id(sketch.channel_scale), bits)
    _, known = rows.shared.get(name, (None, None))
    done = 0 if known is None else known.shape[2]
    if done < geometry.kv_len:
        rest = replace(sketch, planes=sketch.planes[:, :, :, done:], scale=sketch.scale[:, :, done:])
        fresh = decode(rest, bits, dtype)
        known = fresh if known is None else xp.concat([known, fresh], 2)
        rows.shared[name] = (sketch.channel_scale, known)
    return known[:, :, : geometry.kv_len]


def _before_calibration(rows: Rows, geometry: Geometry) -> Array:
    """[batch, q_heads, rows] bool: queries that come before a key that the channel scale was measured on.

    For them the sketch would look ahead; the few keys that they see are read themselves.
    """
    xp = arrays.namespace(rows.query)
    known = xp.cumsum(geometry.count, -1)
    end = (xp.total(known < CALIBRATION, -1, xp.int64) + 1) * geometry.block_size
    unknown = known[..., -1] < CALIBRATION
    last = xp.minimum(end, rows.structural.shape[-1]) - 1
    sees_last = xp.permute(rows.structural[:, last], (1, 2, 0))
    early = unknown[..., None] | ((rows.position < end[..., None]) & ~sees_last)
    return per_query_head(early, rows)


@dataclass(frozen=True)
class KeySketch(Bound):
    """``log sum_{j in block} exp(s^_j)``, ``s^_j`` the logit of the key as ``bits`` bits a channel remember it.

    4 bits rank like the keys themselves, 2 bits are the cheap form, 8 bits prove. ``query_bits=8`` also rounds the query, so
    that kernels can use integer dot products; its error enters the bracket.

    Bracket of a key: ``|s_j - s^_j| <= E_j = scale * min(||q|| ||e_j||, ||q a|| ||e_j / a||)`` with ``a`` the channel scale;
    of a block: the smaller of ``sum e^{s^_j + E_j}`` and the spectral bound of ``docs/math.md``.
    """

    bits: int = 4
    query_bits: int | None = None
    by_key = True

    def __post_init__(self):
        if isinstance(self.bits, bool) or self.bits not in range(1, 9):
            raise error("bits", "must be an integer in 1..8", repr(self.bits), "try 4 to rank or 8 to prove")
        if self.query_bits not in (None, 8):
            raise error("query_bits", "must be None or 8", repr(self.query_bits), "leave it out for an exact query")

    @property
    def statistics(self) -> Statistics:
        return Statistics(sketch_bits=self.bits)

    @property
    def proof_statistics(self) -> Statistics:
        return Statistics(sketch_bits=self.bits, spectral=True)

    @property
    def prover(self) -> Bound:
        return KeySketch(self.bits)  # a proof need not pay for the rounding of queries

    def _query(self, rows: Rows, geometry: Geometry) -> tuple[Array, Array | None]:
        """The query as scored, and ``||(q - q^) a||`` where it was rounded."""
        if self.query_bits is None:
            return rows.query, None
        xp = arrays.namespace(rows.query)
        channel = per_query_head(geometry.sketch.channel_scale, rows)[:, :, None, :]
        stretched = rows.query * channel
        step = xp.maximum(xp.amax(abs(stretched), -1), 1e-30)[..., None] / 127.0
        rounded = xp.floor(stretched / step + 0.5) * step
        return rounded / channel, xp.norm(stretched - rounded)[..., None] * (1.0 + 2.0**-12)

    def _logits(self, rows: Rows, geometry: Geometry) -> Array:
        """Sketched scaled logits before cap, bias and mask: [batch, q_heads, rows, kv_len]."""
        bits = min(self.bits, geometry.sketch.bits)
        query, _ = self._query(rows, geometry)
        return remember(
            rows.memo,
            named(rows.memo, f"sketched {bits} {self.query_bits}", geometry),
            lambda: grouped(query, decoded_keys(rows, geometry, bits)) * rows.scale,
        )

    def estimate(self, rows: Rows, geometry: Geometry) -> Array:
        xp = arrays.namespace(rows.query)
        logits = soft_cap(xp, self._logits(rows, geometry), rows.softcap)
        logits = xp.where(rows.visible, logits if rows.bias is None else logits + rows.bias, -math.inf)
        estimate = xp.logsumexp(split_blocks(logits, geometry.block_size, -math.inf), -1)
        early = _before_calibration(rows, geometry)
        if xp.known_empty(early):
            return estimate
        return xp.where(early[..., None], exact_block_mass(rows, geometry.block_size), estimate)

    def _errors(self, rows: Rows, geometry: Geometry) -> tuple[Array, Array | None]:
        """``E_j`` [batch, q_heads, rows, kv_len] and the spectral ``T`` [batch, q_heads, rows, blocks], in logit units.

        ``T`` is None where the sketch was built without its spectral numbers.
        """
        xp = arrays.namespace(rows.query)
        sketch, dtype = geometry.sketch, rows.query.dtype
        stretched = xp.norm(rows.query * per_query_head(sketch.channel_scale, rows)[:, :, None, :])[..., None] * (1.0 + 2.0**-16)
        plain = query_norm(rows)

        def tighter(by_norm, by_metric):
            """The smaller of ``||q|| x`` and ``||q a|| y``."""
            a, b = (per_query_head(xp.cast(x, dtype), rows)[:, :, None, :] for x in (by_norm, by_metric))
            return rows.scale * xp.minimum(plain * a, stretched * b)

        key_error = tighter(sketch.error, sketch.metric_error)
        spectral = None
        if sketch.spectral is not None:
            spectral = tighter(xp.sqrt(sketch.spectral), xp.sqrt(sketch.metric_spectral))
        _, rounded = self._query(rows, geometry)
        if rounded is not None:
            metric = xp.norm(decoded_keys(rows, geometry, sketch.bits) / sketch.channel_scale[:, :, None, :]) * (1.0 + 2.0**-12)
            extra = rows.scale * rounded * per_query_head(metric, rows)[:, :, None, :]
            key_error = key_error + extra
            if spectral is not None:
                spectral = spectral + xp.sqrt((split_blocks(extra, geometry.block_size, 0.0) ** 2).sum(-1))
        return key_error, spectral

    def _margin(self, rows: Rows, geometry: Geometry) -> Array:
        """Rounding of the sketched logits: ``k^`` can be longer than ``k`` by its error, and its value is rounded twice."""
        xp = arrays.namespace(rows.query)
        size = geometry.block_size
        worst = xp.amax(split_blocks(xp.cast(geometry.sketch.error, rows.query.dtype), size, 0.0), -1)
        length = per_query_head(geometry.key_norm + worst, rows)[:, :, None, :]
        return logit_margin(rows.scale, query_norm(rows), length, rows.query.shape[-1] + size + 16) + (size + 16) * UNIT

    def brackets(self, rows: Rows, geometry: Geometry) -> tuple[Array, Array]:
        xp = arrays.namespace(rows.query)
        if self.bits < geometry.sketch.bits:
            return KeySketch(geometry.sketch.bits, self.query_bits).brackets(rows, geometry)
        cap, size = rows.softcap, geometry.block_size
        logits = self._logits(rows, geometry)
        key_error, spectral = self._errors(rows, geometry)

        def weights(x):
            x = x if rows.bias is None else x + rows.bias
            return split_blocks(xp.where(rows.visible, x, -math.inf), size, -math.inf)

        if cap is None:
            w, e = weights(logits), split_blocks(key_error, size, 0.0)
            known = spectral is not None
            upper = sketch_upper(xp, w, e, spectral, use_spectral=known)
            lower = sketch_lower(xp, w, e, spectral, use_spectral=known)
        else:
            upper = xp.logsumexp(weights(soft_cap(xp, logits + key_error, cap)), -1)
            lower = xp.logsumexp(weights(soft_cap(xp, logits - key_error, cap)), -1)
        margin = self._margin(rows, geometry)
        return round_up(xp, upper, margin), round_down(xp, lower, margin)

    def key_upper(self, rows: Rows, geometry: Geometry) -> Array:
        """At least the logit of every visible key, -inf for the others: [batch, q_heads, rows, kv_len]."""
        xp = arrays.namespace(rows.query)
        own = self if self.bits >= geometry.sketch.bits else KeySketch(geometry.sketch.bits, self.query_bits)
        highest = soft_cap(xp, own._logits(rows, geometry) + own._errors(rows, geometry)[0], rows.softcap)
        highest = highest if rows.bias is None else highest + rows.bias
        margin = xp.repeat_each(own._margin(rows, geometry), geometry.block_size, -1)[..., : geometry.kv_len]
        return xp.where(rows.visible, round_up(xp, highest, margin), -math.inf)
