"""The gate of decoding in C++: the blocks that up to 16 queries a sequence keep, read from the geometry as it lies.

The sketch is scored from its bit planes with integer dot products. Proofs read as few planes as they need. A selection
equals the reference's up to ties within rounding; what ``Certified`` keeps may differ from the reference's and is proved alike.
"""

from __future__ import annotations

from typing import Any

from sieve_attn import arrays, native
from sieve_attn.attend.native import ROUNDING
from sieve_attn.geometry.sketch import CALIBRATION
from sieve_attn.patterns import Sinks, Window
from sieve_attn.patterns.base import members
from sieve_attn.scores import Euclidean, KeySketch, Mean
from sieve_attn.selection.certified import Certified
from sieve_attn.selection.mass import Mass
from sieve_attn.selection.threshold import RelativeThreshold, Threshold
from sieve_attn.selection.top_k import TargetSparsity, TopK
from sieve_attn.types import Blocks, Call, Geometry, Selection

Array = Any

QUERIES = 16
DTYPES = ("float32", "float16", "bfloat16")
SCORERS = {KeySketch: "sketch", Mean: "mean", Euclidean: "euclidean"}
RULES = {
    TopK: ("top_k", "blocks"),
    TargetSparsity: ("target_sparsity", "sparsity"),
    Threshold: ("threshold", "threshold"),
    RelativeThreshold: ("relative_threshold", "margin"),
    Mass: ("mass", "mass"),
    Certified: ("certified", "error"),
}
DIGITS = 3  # integers of 8 bits that stand for a channel of an exact query


def why_not(call: Call, geometry: Geometry, policy: Any, per_query: bool) -> tuple[str, ...]:
    """Every reason why this gate cannot choose for ``call``; empty if it can."""
    reasons = [*native.missing(), *native.unreadable(call.query)]
    device = str(getattr(call.query, "device", "cpu")).partition(":")[0]
    dtype = str(call.query.dtype).rpartition(".")[2]
    rule, scorer = type(policy.selector), type(policy.scorer)
    if device != "cpu" or dtype not in DTYPES:
        reasons.append(f"it knows {', '.join(DTYPES)} on cpu, not {dtype} on {device}")
    if call.q_len > QUERIES:
        reasons.append(f"it takes at most {QUERIES} queries, not {call.q_len}")
    if per_query:
        reasons.append("it chooses for tiles, not for single queries")
    if scorer not in SCORERS or rule not in RULES:
        reasons.append(f"it does not know {scorer.__name__} with {rule.__name__}")
    if rule is Certified and scorer is not KeySketch:
        reasons.append("it proves with KeySketch alone")
    for name in ("mask", "bias", "cu_seqlens"):
        if getattr(call, name) is not None:
            reasons.append(f"it has no {name}")
    if policy.block_size % 16:
        reasons.append(f"blocks must be made of 16 keys, not of {policy.block_size}")
    if policy.keep is not None and any(type(p) not in (Sinks, Window) for p in members(policy.keep)):
        reasons.append("it forces sinks and windows only")
    if str(geometry.mean.dtype).rpartition(".")[2] != "float32":
        reasons.append("it reads a geometry of float32")
    if call.query.shape[3] > 512:
        reasons.append("it takes at most 512 channels")
    if not reasons and scorer is KeySketch:
        reasons += _before_calibration(call, geometry)
    return tuple(reasons)


def _before_calibration(call: Call, geometry: Geometry) -> tuple[str, ...]:
    """Queries that come before the last key that fixed the channel scale read the keys themselves."""
    size = geometry.block_size
    end = -(-CALIBRATION // size) * size
    if call.key_mask is not None:
        xp = arrays.namespace(geometry.count)
        known = xp.cumsum(geometry.count, -1)
        if int(known[:, :, -1].min()) < CALIBRATION:
            end = call.kv_len + 1
        else:
            end = (int(xp.total(known < CALIBRATION, -1, xp.int64).max()) + 1) * size
    if call.offset >= end or (not call.causal and call.window is None and call.kv_len >= end):
        return ()
    return (f"queries before position {end} would see keys that calibrate the sketch",)


def select(call: Call, geometry: Geometry, policy: Any) -> tuple[Selection, tuple[Array, Array], Array]:
    """``(selection, (kept, visible) key counts [batch, heads, tiles], tiles that turned dense)``; see ``pipeline.select``."""
    xp = arrays.namespace(call.query)
    alive: list[Array] = []

    def held(x: Array) -> Any:
        alive.append(x)
        return native.view(x)

    rule, amount = RULES[type(policy.selector)]
    forced = () if policy.keep is None else members(policy.keep)
    sinks = max((p.tokens for p in forced if isinstance(p, Sinks)), default=0)
    near = max((p.tokens for p in forced if isinstance(p, Window)), default=0)
    query = call.query if _side_by_side(call.query) else xp.contiguous(call.query)
    heads = call.key.shape[1] if policy.share_group else call.query.shape[1]
    lead = call.lead(policy.query_tile)
    gate = native.module().Gate(
        held(query), scorer=SCORERS[type(policy.scorer)], rule=rule, amount=float(getattr(policy.selector, amount)),
        dense_above=float(policy.dense_above), count=held(geometry.count), finite=held(geometry.finite),
        key_norm=held(geometry.key_norm), mean=held(geometry.mean),
        radius=None if geometry.radius is None else held(geometry.radius),
        key_mask=None if call.key_mask is None else held(call.key_mask),
        sink=None if call.sink is None else held(xp.contiguous(xp.cast(call.sink, xp.float32))), causal=bool(call.causal),
        window=call.window, scale=float(call.scale), softcap=call.softcap, kv_len=geometry.kv_len,
        kv_block=policy.block_size, q_tile=policy.query_tile, lead=lead, query_stride=policy.query_stride,
        share_group=bool(policy.share_group), sinks=sinks, near=near, unit=ROUNDING.unit, exponential=ROUNDING.exponential,
        threads=native.threads(call.query),
    )  # fmt: skip
    if isinstance(policy.scorer, KeySketch):
        sketch, certified = geometry.sketch, rule == "certified"
        exact = policy.scorer.query_bits is None
        key = call.key if _side_by_side(call.key) or not certified else xp.contiguous(call.key)
        gate.set_sketch(
            key=held(key), bits=min(policy.scorer.bits, sketch.bits), sketch_bits=sketch.bits,
            digits=2 if certified else DIGITS if exact else 1, planes=held(sketch.planes[0]),
            plane_stride=_stride(sketch.planes, 0), scale=held(sketch.scale), channel_scale=held(sketch.channel_scale),
            error=held(sketch.error), metric_error=held(sketch.metric_error),
            spectral=None if sketch.spectral is None else held(sketch.spectral),
            metric_spectral=None if sketch.metric_spectral is None else held(sketch.metric_spectral),
        )  # fmt: skip
    chosen = native.module().choose(gate)
    tiles = -(-(call.q_len + lead) // policy.query_tile)
    units = (call.query.shape[0], heads, tiles)
    row_ptr = xp.empty((units[0] * units[1] * units[2] + 1,), xp.int64, call.query)
    index = xp.empty((chosen.entries,), xp.int32, call.query)
    kept, visible = (xp.empty(units, xp.int64, call.query) for _ in range(2))
    dense = xp.empty(units, xp.boolean, call.query)
    chosen.write(*(native.view(x.reshape(-1)) for x in (row_ptr, index, kept, visible, dense)))
    blocks = Blocks(row_ptr, index, units[0], heads, call.q_len, call.kv_len, policy.query_tile, policy.block_size, lead)
    return Selection((blocks,)), (kept, visible), dense


def _stride(x: Array, axis: int) -> int:
    return x.stride(axis) if hasattr(x, "data_ptr") else x.strides[axis] // x.dtype.itemsize


def _side_by_side(x: Array) -> bool:
    return _stride(x, 3) == 1
