"""C++ kernels for scores and selection of a prefill, fused: one tile of queries at a time, nothing of size queries x keys.

The result is the reference's (``pipeline.select``), but where estimates tie within rounding: exponentials of estimates err by
at most 1.1e-4. Equal blocks have equal estimates to the last bit, so ties go to the smaller index here too. With AMX or VNNI,
rounded queries meet the sketch in integer dot products; elsewhere, and for 8 bits, the same integers are multiplied in fp32,
which is exact up to 512 channels. ``Certified`` is proved as in the reference, with what these exponentials and products may err
counted outward; integer products settle what weighs little, at the cost of at most an eighth of the error.
"""

from __future__ import annotations

from typing import Any

from sieve_attn import arrays, native
from sieve_attn.scores import Euclidean, KeySketch, Mean
from sieve_attn.selection.certified import Certified
from sieve_attn.selection.kernels import declined, ends
from sieve_attn.selection.mass import Mass
from sieve_attn.selection.threshold import RelativeThreshold, Threshold
from sieve_attn.selection.top_k import TargetSparsity, TopK
from sieve_attn.types import Blocks, Call, Geometry, Selection

Array = Any

DTYPES = ("float32", "float16", "bfloat16")
LARGEST_DIM = 512
COMPUTED = "keys whose logit was computed in order to choose"
SCORERS = {KeySketch: 0, Mean: 1, Euclidean: 2}
SELECTORS = {TopK: 0, TargetSparsity: 1, Threshold: 2, RelativeThreshold: 3, Mass: 4, Certified: 5}


def why_not(call: Call, geometry: Geometry, policy: Any, per_query: bool) -> tuple[str, ...]:
    """Every reason why the kernels cannot choose for this call; empty if they can."""
    reasons = [*native.missing(), *native.unreadable(call.query)]
    device = str(getattr(call.query, "device", "cpu")).partition(":")[0]
    if device != "cpu":
        reasons.append(f"kernels run on cpu, not on {device}")
    for name in ("query", "key"):
        dtype = str(getattr(call, name).dtype).rpartition(".")[2]
        if dtype not in DTYPES:
            reasons.append(f"kernels know {', '.join(DTYPES)}, not a {name} of {dtype}")
    if str(geometry.mean.dtype).rpartition(".")[2] != "float32":
        reasons.append("kernels read a geometry of float32")
    if call.query.shape[3] > LARGEST_DIM:
        reasons.append(f"kernels take at most {LARGEST_DIM} channels, not {call.query.shape[3]}")
    reasons += declined(call, policy, per_query, SCORERS, SELECTORS)
    if type(policy.selector) is Certified:
        if type(policy.scorer) is not KeySketch:
            reasons.append(f"kernels prove with KeySketch, not with {type(policy.scorer).__name__}")
        elif policy.scorer.bits < geometry.sketch.bits:
            reasons.append(f"kernels prove with all {geometry.sketch.bits} bits of a sketch, not with {policy.scorer.bits}")
    return tuple(reasons)


def select(call: Call, geometry: Geometry, policy: Any) -> tuple[Selection, tuple[Array, Array], Array]:
    """``(selection, (kept, visible) key counts [batch, heads, tiles], tiles that turned dense)``; see ``pipeline.select``."""
    xp = arrays.namespace(call.query)
    scorer, selector = policy.scorer, policy.selector
    batch, q_heads = call.query.shape[:2]
    heads = call.key.shape[1] if policy.share_group else q_heads
    sinks, window = ends(policy.keep)
    alive: list[Array] = []

    def held(x: Array | None, dtype: Any = None) -> Any:
        """A view of [batch, kv_heads, ...] with everything behind the heads in one row."""
        if x is None:
            return None
        x = xp.detach(x if dtype is None else xp.cast(x, dtype))
        alive.append(x)
        return native.view(x)

    def flat(x: Array | None, lead: int = 2) -> Any:
        return None if x is None else held(x.reshape(*x.shape[:lead], -1))

    by_keys, proves = isinstance(scorer, KeySketch), type(selector) is Certified
    sketch = geometry.sketch if by_keys else None
    level = {
        Threshold: lambda: selector.threshold,
        RelativeThreshold: lambda: selector.margin,
        TargetSparsity: lambda: selector.sparsity,
        Mass: lambda: selector.mass,
        Certified: lambda: selector.error,
        TopK: lambda: 0.0,
    }[type(selector)]()
    found = native.module().select(
        held(call.query), held(call.key), key_mask=held(call.key_mask),
        edges=None if call.cu_seqlens is None else held(xp.contiguous(call.cu_seqlens), xp.int64),
        causal=bool(call.causal), window=call.window, scale=float(call.scale), softcap=call.softcap,
        scoring=SCORERS[type(scorer)], bits=min(scorer.bits, sketch.bits) if by_keys else 0,
        sketch_bits=sketch.bits if by_keys else 0, round_queries=by_keys and scorer.query_bits is not None,
        planes=flat(sketch.planes, 3) if by_keys else None, key_scale=flat(sketch.scale) if by_keys else None,
        channel_scale=flat(sketch.channel_scale) if by_keys else None, mean=None if by_keys else flat(geometry.mean),
        radius=flat(geometry.radius) if type(scorer) is Euclidean else None, count=flat(geometry.count),
        finite=flat(geometry.finite), error=flat(sketch.error) if proves else None,
        metric_error=flat(sketch.metric_error) if proves else None, spectral=flat(sketch.spectral) if proves else None,
        metric_spectral=flat(sketch.metric_spectral) if proves else None, key_norm=flat(geometry.key_norm) if proves else None,
        sink=held(xp.contiguous(call.sink), xp.float32) if proves and call.sink is not None else None,
        rule=SELECTORS[type(selector)], level=float(level),
        blocks=selector.blocks if type(selector) is TopK else 0, block_size=policy.block_size, query_tile=policy.query_tile,
        stride=policy.query_stride, heads=heads, sinks=sinks, near=window,
        dense_above=policy.dense_above if selector.may_turn_dense else 1.0, threads=native.threads(call.query),
    )  # fmt: skip
    shape = (batch, heads, found.tiles)
    row_ptr = xp.empty((batch * heads * found.tiles + 1,), xp.int64, call.query)
    index = xp.empty((found.entries,), xp.int32, call.query)
    kept, visible, computed = (xp.empty(shape, xp.int64, call.query) for _ in range(3))
    dense = xp.empty(shape, xp.boolean, call.query)
    found.read(*(native.view(x.reshape(-1)) for x in (row_ptr, index, kept, visible, dense, computed)))
    call.shared[COMPUTED] = computed
    blocks = Blocks(
        row_ptr, index, batch, heads, call.q_len, call.kv_len, policy.query_tile, policy.block_size, call.lead(policy.query_tile)
    )
    return Selection((blocks,)), (kept, visible), dense
