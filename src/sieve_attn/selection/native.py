"""C++ kernels for scores and selection of a prefill, fused: one tile of queries at a time, nothing of size queries x keys.

The result is the reference's (``pipeline.select``), but where estimates tie within rounding: exponentials of estimates err by
at most 1.1e-4. Equal blocks have equal estimates to the last bit, so ties go to the smaller index here too. On machines with
AMX, rounded queries meet the sketch in integer tiles; elsewhere, and for 8 bits, the same integers are multiplied in fp32,
which is exact up to 512 channels.
"""

from __future__ import annotations

from typing import Any

from sieve_attn import arrays, native
from sieve_attn.patterns import Pattern, Sinks, Window
from sieve_attn.patterns.base import members
from sieve_attn.scores import Euclidean, KeySketch, Mean
from sieve_attn.selection.mass import Mass
from sieve_attn.selection.threshold import RelativeThreshold, Threshold
from sieve_attn.selection.top_k import TargetSparsity, TopK
from sieve_attn.types import Blocks, Call, Geometry, Selection

Array = Any

DTYPES = ("float32", "float16", "bfloat16")
LEAST_QUERIES = 16
LARGEST_DIM = 512
SCORERS = {KeySketch: 0, Mean: 1, Euclidean: 2}
SELECTORS = {TopK: 0, TargetSparsity: 1, Threshold: 2, RelativeThreshold: 3, Mass: 4}


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
    if call.q_len < LEAST_QUERIES:
        reasons.append(f"the prefill gate takes at least {LEAST_QUERIES} queries, not {call.q_len}")
    if call.query.shape[3] > LARGEST_DIM:
        reasons.append(f"kernels take at most {LARGEST_DIM} channels, not {call.query.shape[3]}")
    if not (call.scale > 0):
        reasons.append("kernels score with a positive scale only")
    if call.mask is not None:
        reasons.append("kernels choose without a mask of queries by keys")
    if call.bias is not None:
        reasons.append("kernels choose without a bias")
    if per_query:
        reasons.append("kernels choose for tiles, not for every query")
    if type(policy.scorer) not in SCORERS:
        reasons.append(f"kernels score by {_names(SCORERS)}, not by {type(policy.scorer).__name__}")
    if type(policy.selector) not in SELECTORS:
        reasons.append(f"kernels select by {_names(SELECTORS)}, not by {type(policy.selector).__name__}")
    if _ends(policy.keep) is None:
        reasons.append(f"kernels force Sinks and Window, not {policy.keep!r}")
    return tuple(reasons)


def _names(table: dict) -> str:
    return ", ".join(kind.__name__ for kind in table)


def _ends(keep: Pattern | None) -> tuple[int, int] | None:
    """``(sinks, window)`` in tokens, or None for a pattern of another kind."""
    sinks = window = 0
    for part in () if keep is None else members(keep):
        if type(part) is Sinks:
            sinks = max(sinks, part.tokens)
        elif type(part) is Window:
            window = max(window, part.tokens)
        else:
            return None
    return sinks, window


def select(call: Call, geometry: Geometry, policy: Any) -> tuple[Selection, tuple[Array, Array], Array]:
    """``(selection, (kept, visible) key counts [batch, heads, tiles], tiles that turned dense)``; see ``pipeline.select``."""
    xp = arrays.namespace(call.query)
    scorer, selector = policy.scorer, policy.selector
    batch, q_heads = call.query.shape[:2]
    heads = call.key.shape[1] if policy.share_group else q_heads
    sinks, window = _ends(policy.keep)
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

    by_keys = isinstance(scorer, KeySketch)
    sketch = geometry.sketch if by_keys else None
    level = {
        Threshold: lambda: selector.threshold,
        RelativeThreshold: lambda: selector.margin,
        TargetSparsity: lambda: selector.sparsity,
        Mass: lambda: selector.mass,
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
        finite=flat(geometry.finite), rule=SELECTORS[type(selector)], level=float(level),
        blocks=selector.blocks if type(selector) is TopK else 0, block_size=policy.block_size, query_tile=policy.query_tile,
        stride=policy.query_stride, heads=heads, sinks=sinks, near=window,
        dense_above=policy.dense_above if selector.may_turn_dense else 1.0, threads=native.threads(call.query),
    )  # fmt: skip
    shape = (batch, heads, found.tiles)
    row_ptr = xp.empty((batch * heads * found.tiles + 1,), xp.int64, call.query)
    index = xp.empty((found.entries,), xp.int32, call.query)
    kept, visible = (xp.empty(shape, xp.int64, call.query) for _ in range(2))
    dense = xp.empty(shape, xp.boolean, call.query)
    found.read(*(native.view(x.reshape(-1)) for x in (row_ptr, index, kept, visible, dense)))
    blocks = Blocks(
        row_ptr, index, batch, heads, call.q_len, call.kv_len, policy.query_tile, policy.block_size, call.lead(policy.query_tile)
    )
    return Selection((blocks,)), (kept, visible), dense
