"""Scores and selection on the device, for prefill and for decoding: no step waits for the host.

Units (query tiles of a choosing head) are scored a bounded chunk at a time, so that nothing of size queries x keys exists; one
program a unit then ranks its blocks, and a last one lists them. The lists have room for every visible block, of which the first
``row_ptr[-1]`` entries count: how many there are is known on the device alone. A selection equals the reference's
(``pipeline.select``), but where estimates tie within rounding.
"""

from __future__ import annotations

from typing import Any

from sieve_attn import arrays
from sieve_attn import triton as door
from sieve_attn.scores import Euclidean, KeySketch, Mean
from sieve_attn.selection.kernels import declined
from sieve_attn.selection.mass import Mass
from sieve_attn.selection.threshold import RelativeThreshold, Threshold
from sieve_attn.selection.top_k import TargetSparsity, TopK
from sieve_attn.types import Call, Geometry, Selection

Array = Any

LARGEST_DIM = 512
LARGEST_BLOCK = 256
LARGEST_TILE = 256
SCORERS = {KeySketch: 0, Mean: 1, Euclidean: 2}
RULES = {TopK: 0, TargetSparsity: 1, Threshold: 2, RelativeThreshold: 3, Mass: 4}


def why_not(call: Call, geometry: Geometry, policy: Any, per_query: bool, *, named: bool = False) -> tuple[str, ...]:
    """Every reason why the kernels cannot choose for this call; empty if they can. ``named``: the interpreter may serve."""
    reasons: list[str] = []
    for name in ("query", "key"):
        x = getattr(call, name)
        where, dtype = str(getattr(x, "device", "cpu")).partition(":")[0], str(x.dtype).rpartition(".")[2]
        reasons += [why for why in door.unsuitable(arrays.namespace(x).name, where, dtype, named=named) if why not in reasons]
    if str(geometry.mean.dtype).rpartition(".")[2] != "float32":
        reasons.append("kernels read a geometry of float32")
    limits = (("channels", call.query.shape[3], LARGEST_DIM), ("keys a block", policy.block_size, LARGEST_BLOCK),
              ("queries a tile", policy.query_tile, LARGEST_TILE))  # fmt: skip
    reasons += [f"kernels take at most {most} {what}, not {found}" for what, found, most in limits if found > most]
    reasons += declined(call, policy, per_query, SCORERS, RULES)
    return tuple(reasons)


def select(call: Call, geometry: Geometry, policy: Any) -> tuple[Selection, tuple[Array, Array], Array]:
    """``(selection, (kept, visible) key counts [batch, heads, tiles], tiles that turned dense)``; see ``pipeline.select``."""
    from sieve_attn.selection.triton.launch import select

    return select(call, geometry, policy)
