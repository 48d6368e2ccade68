"""Choosing and attending in one step: one kernel reads the geometry, decides and attends.

It walks as :class:`~sieve_attn.selection.RunningMaximum` says and hands over the exact blocks that it read, so that the
certificate covers what it passed by. A program holds all rows of a tile that choose together: for decoding and short tiles.
"""

from __future__ import annotations

from typing import Any

from sieve_attn import arrays
from sieve_attn import triton as door
from sieve_attn.scores import Euclidean
from sieve_attn.selection import RunningMaximum
from sieve_attn.selection.kernels import declined
from sieve_attn.types import Call, Geometry, Selection

Array = Any

LARGEST_DIM = 256
MOST_STEP_BLOCKS = 128  # that are decided on at once


def most_rows(itemsize: int, width: int) -> int:
    """How many rows a program may hold where the larger head dim is ``width``: their output lies in registers."""
    if itemsize > 2:
        return 32 if width <= 64 else 16
    return 64 if width <= 64 else 32


def tile_rows(call: Call, policy: Any) -> tuple[int, int]:
    """``(queries, query heads)`` that choose together."""
    heads = call.query.shape[1] // call.key.shape[1] if policy.share_group else 1
    return min(policy.query_tile, call.q_len), int(heads)


def why_not(call: Call, geometry: Geometry, policy: Any, per_query: bool, *, named: bool = False) -> tuple[str, ...]:
    """Every reason why one kernel cannot do both for this call; empty if it can. ``named``: the interpreter may serve."""
    reasons: list[str] = []
    for name in ("query", "key", "value"):
        x = getattr(call, name)
        where, dtype = str(getattr(x, "device", "cpu")).partition(":")[0], str(x.dtype).rpartition(".")[2]
        reasons += [why for why in door.unsuitable(arrays.namespace(x).name, where, dtype, named=named) if why not in reasons]
    if str(geometry.mean.dtype).rpartition(".")[2] != "float32":
        reasons.append("kernels read a geometry of float32")
    reasons += declined(call, policy, per_query, {Euclidean: 0}, {RunningMaximum: 0})
    if policy.far_field:
        reasons.append("kernels have no far field")
    dims = max(call.query.shape[3], call.value.shape[3])
    if dims > LARGEST_DIM:
        reasons.append(f"kernels take at most {LARGEST_DIM} channels, not {dims}")
    queries, heads = tile_rows(call, policy)
    most = most_rows(arrays.namespace(call.query).itemsize(call.query.dtype), dims)
    if _power_of_two(queries) * _power_of_two(heads) > most:
        rows = f"{queries} queries of {heads} heads"
        reasons.append(f"one program holds at most {most} rows, not {rows}; take a smaller query_tile")
    if isinstance(policy.selector, RunningMaximum) and policy.selector.step_blocks(policy.block_size) > MOST_STEP_BLOCKS:
        reasons.append(f"kernels decide on at most {MOST_STEP_BLOCKS} blocks a step; take a smaller step")
    return tuple(reasons)


def attend(call: Call, geometry: Geometry, policy: Any, *, marked: bool = True) -> tuple[Array, Array, Any]:
    """``(output, lse, chosen)``; ``chosen()`` lists what :func:`select` returns, where blocks were ``marked``."""
    from sieve_attn.attend.triton import stream

    return stream.attend(call, geometry, policy, marked)


def select(call: Call, geometry: Geometry, policy: Any) -> tuple[Selection, tuple[Array, Array], Array]:
    """``(selection, (kept, visible) key counts [batch, heads, tiles], tiles that turned dense)``; see ``pipeline.select``."""
    return attend(call, geometry, policy)[2]()


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
