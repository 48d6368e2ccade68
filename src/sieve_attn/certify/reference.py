"""Reference certificate: ``delta <= P / (P + K)``, P the summed upper bounds of what was dropped, K the mass that was kept."""

from __future__ import annotations

import math
from typing import Any

from jaxtyping import Float

from sieve_attn import arrays
from sieve_attn.attend.far_field import FarField, expand, front
from sieve_attn.bounds import FP32, UNIT, Rounding, dropped_mass, kept_mass, logit_margin
from sieve_attn.checks import error
from sieve_attn.scores.base import Bound, exact_logits, grouped, per_query_head, query_norm, split_blocks, visible_count
from sieve_attn.types import Call, Certificate, Geometry, Rows, Selection

Array = Any


def certify(
    call: Call,
    selection: Selection,
    geometry: Geometry,
    bound: Bound,
    lse: Float[Array, "batch q_heads q_len"],
    output: Float[Array, "batch q_heads q_len v_dim"] | None = None,
    far_field: FarField | None = None,
    rounding: Rounding = FP32,
) -> Certificate:
    """Bound the softmax mass that ``selection`` dropped, per query, whoever chose it.

    ``lse`` is what attending over the selection returned (without a far field), its sums rounded as ``rounding`` says.
    With ``output`` and value statistics in the geometry, ``||dense output - output||`` is bounded as well:
    ``delta * max over dropped B (||nu_B - o'|| + rho_B)``; the rounding of the output itself is not part of it.
    Raises TypeError for a scorer that is no Bound, ValueError where fp32 products are not fp32.
    """
    xp = arrays.namespace(call.query)
    if not isinstance(bound, Bound):
        rule = "must be a Bound: heuristics rank but prove nothing"
        raise error("bound", rule, repr(bound), "use KeySketch(bits=8)", TypeError)
    require_full_precision(xp, call.query)
    masses, errors = [], []
    with xp.no_grad():
        for start, stop in call.chunks():
            seen = call.kv_stop(stop, geometry.block_size)
            rows, part = call.rows(start, stop, seen), front(geometry, seen)
            kept = call.kept(selection, start, stop, seen)
            made = None if output is None else output[:, :, start:stop]
            delta, bad = certify_rows(rows, part, kept, lse[:, :, start:stop], made, bound, call, far_field, rounding)
            masses.append(delta)
            errors += [] if bad is None else [bad]
    output_error = xp.concat(errors, 2) if errors else None
    return Certificate(xp.concat(masses, 2), repr(bound), output_error)


def certify_rows(
    rows: Rows,
    part: Geometry,
    kept: Array,
    lse: Array,
    output: Array | None,
    bound: Bound,
    call: Call,
    far_field: FarField | None,
    rounding: Rounding,
    keys: Array | int | None = None,
) -> tuple[Array, Array | None]:
    """``(dropped mass, output error or None)`` [batch, q_heads, rows] of one chunk, whose sums ran over at most ``keys`` keys."""
    xp = arrays.namespace(rows.query)
    keys = rows.visible.shape[-1] if keys is None else keys
    log_k = _kept(xp, rows, part, lse, rounding, keys)
    delta, dropped, scores = _dropped(xp, rows, part, bound, kept, log_k, keys)
    unknown = _unknown(xp, rows, part)
    delta = xp.where(unknown, 1.0, delta)
    if output is None or part.value_mean is None:
        return xp.cast(delta, xp.float32), None
    made = xp.cast(output, rows.query.dtype)
    if far_field is None:
        bad = delta * _reach(xp, rows, part, dropped, made, call)
    else:
        bad = _far_error(xp, rows, part, kept, dropped, scores, made, log_k, call, far_field)
        bad = xp.where(unknown, math.inf, bad)
    # what is not a number is no bound: it would compare false with every error
    bad = xp.where(xp.isnan(bad), math.inf, bad * (1 + 64 * UNIT))
    return xp.cast(delta, xp.float32), xp.cast(xp.where(delta == 0, 0.0, bad), xp.float32)


def require_full_precision(xp: Any, query: Array) -> None:
    """The rounding margins hold for fp32 products: TF32 and bf16 shortcuts for fp32 matmuls are refused."""
    if xp.name == "torch":
        precision = xp.matmul_precision(query)
        if precision != "highest":
            raise error(
                "float32 matmul precision",
                "must be 'highest' for a certificate to hold",
                repr(precision),
                "call torch.set_float32_matmul_precision('highest')",
            )


def _dropped(xp, rows: Rows, geometry: Geometry, bound: Bound, kept: Array, log_k: Array, keys: Array | int):
    """``(delta, dropped blocks, scores)`` of one chunk."""
    size = geometry.block_size
    scores = bound.score(rows, geometry, brackets=True)
    left = xp.any_(split_blocks(rows.visible & ~kept, size, False), -1)
    dropped = xp.broadcast_to(left, scores.upper.shape)
    log_p = xp.logsumexp(xp.where(dropped, scores.upper, -math.inf), -1)
    log_p = log_p + (-(-keys // size) + 16) * UNIT
    return dropped_mass(xp, log_k, log_p), dropped, scores


def _unknown(xp, rows: Rows, geometry: Geometry) -> Array:
    """[batch, q_heads, rows] bool: the query, or a key of a block that it sees, is not finite."""
    seen = visible_count(rows, geometry.block_size) > 0
    broken = xp.any_(seen & ~per_query_head(geometry.finite, rows)[:, :, None, :], -1)
    return broken | ~xp.isfinite(query_norm(rows)[..., 0])


def _kept(xp, rows: Rows, geometry: Geometry, lse: Array, rounding: Rounding, keys: Array | int) -> Array:
    """``log K``: what the returned ``lse`` proves to have been kept."""
    seen = visible_count(rows, geometry.block_size) > 0
    norm = xp.amax(xp.where(seen, per_query_head(geometry.key_norm, rows)[:, :, None, :], 0.0), -1)
    margin = logit_margin(rows.scale, query_norm(rows)[..., 0], norm, rows.query.shape[-1] + 8, rounding.unit)
    return kept_mass(xp, xp.cast(lse, rows.query.dtype), margin=margin, additions=keys, rounding=rounding)


def _distance(xp, means: Array, made: Array, rows: Rows, exact_output: bool) -> Array:
    """At least ``||nu_B - o'||``, [batch, q_heads, rows, blocks], without an array of rows x blocks x v_dim."""
    square_mean = per_query_head((means**2).sum(-1), rows)[:, :, None, :]
    square_made = (made**2).sum(-1)[..., None]
    square = square_mean + square_made - 2.0 * grouped(made, means)
    slack = (means.shape[-1] + 16) * 4 * UNIT * (square_mean + square_made)
    rounding = 0.0 if exact_output else 2.0**-8 * xp.sqrt(square_made)
    return xp.sqrt(xp.maximum(square, 0.0) + slack) + rounding


def _reach(xp, rows: Rows, geometry: Geometry, dropped: Array, made: Array, call: Call) -> Array:
    """The largest ``||nu_B - o'|| + rho_B`` over the dropped blocks."""
    exact_output = xp.itemsize(call.query.dtype) >= 4
    far = _distance(xp, geometry.value_mean, made, rows, exact_output)
    far = far + per_query_head(geometry.value_radius, rows)[:, :, None, :]
    return xp.amax(xp.where(dropped, far, 0.0), -1)


def _far_error(xp, rows, geometry, kept, dropped, scores, made, log_k, call, far_field) -> Array:
    """``sum_B [max(U - m, m - L) d_B + U rho_B] / Z_low`` with ``d_B = ||nu_B - o''||`` and ``Z_low = K + sum L_B``, the latter
    over blocks of which nothing is kept; at most ``max(d_B + rho_B)`` over all blocks that the query sees."""
    # m as the output has it, clipped by the bound of the far field; U and L by the bound that certifies
    mass = expand(rows, kept, front(far_field.geometry, geometry.kv_len), far_field.bound, call).mass
    # L holds a block's kept keys as well, which K counts already
    whole = ~xp.any_(split_blocks(rows.visible & kept, geometry.block_size, False), -1)
    lower = xp.where(dropped & whole, scores.lower, -math.inf)
    log_z = xp.logaddexp(log_k, xp.logsumexp(lower, -1))[..., None]
    log_z = log_z - (lower.shape[-1] + 16 + 4 * xp.where(xp.isfinite(log_z), abs(log_z), 0.0)) * UNIT
    upper, expanded, lower = (xp.exp(x - log_z) for x in (xp.where(dropped, scores.upper, -math.inf), mass, lower))
    distance = _distance(xp, geometry.value_mean, made, rows, xp.itemsize(call.query.dtype) >= 4)
    radius = per_query_head(geometry.value_radius, rows)[:, :, None, :]
    each = xp.maximum(upper - expanded, expanded - lower) * distance + upper * radius
    total = xp.where(dropped, each, 0.0).sum(-1)
    # masses beyond a float (inf - inf, inf * 0) say nothing
    total = xp.where(xp.isnan(total) | (log_z[..., 0] == math.inf), math.inf, total)
    # whatever the masses are, the dense output is a mean of the values that the query sees, and of a sink's zero
    most = xp.amax(xp.where(visible_count(rows, geometry.block_size) > 0, distance + radius, 0.0), -1)
    return xp.minimum(total, most if rows.sink is None else xp.maximum(most, xp.norm(made) * (1.0 + 2.0**-7)))


def true_dropped_mass(call: Call, selection: Selection) -> Float[Array, "batch q_heads q_len"]:
    """[batch, q_heads, q_len] the dropped softmax mass itself, from every key: the truth that certificates must cover."""
    xp = arrays.namespace(call.query)
    out = []
    with xp.no_grad():
        for start, stop in call.chunks():
            rows = call.rows(start, stop)
            kept = call.kept(selection, start, stop)
            logits = exact_logits(rows)
            every = xp.logsumexp(logits, -1)
            if rows.sink is not None:
                every = xp.logaddexp(every, xp.cast(rows.sink, every.dtype)[None, :, None])
            lost = xp.logsumexp(xp.where(kept, -math.inf, logits), -1)
            out.append(xp.where(lost == -math.inf, 0.0, xp.exp(lost - every)))
    return xp.concat(out, 2)
