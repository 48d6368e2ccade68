"""What was made elsewhere and is given to a call: selections and geometries, held against its arrays."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax

from sieve_attn import checks
from sieve_attn.checks import error
from sieve_attn.jax.call import Call
from sieve_attn.jax.selection import PaddedBlocks
from sieve_attn.policies import Policy
from sieve_attn.types import Geometry, Selection


def to_selection(selection: Any, call: Call) -> PaddedBlocks | Selection:
    """A selection made elsewhere: blocks padded, ranges and offsets as they are, each for this call."""
    if not isinstance(selection, (PaddedBlocks, Selection)):
        raise error(
            "selection", "must be a PaddedBlocks or a Selection", type(selection).__name__, "make it with select", TypeError
        )
    if (selection.q_len, selection.kv_len) != (call.q_len, call.kv_len):
        checks.selection_fits(selection, call.query, call.key)
    if isinstance(selection, Selection):
        checks.selection_fits(selection, call.query, call.key)
        kinds = set(selection.kinds)
        if len(kinds) != len(selection.parts) or kinds not in ({"Blocks"}, {"Ranges"}, {"Offsets"}, {"Ranges", "Offsets"}):
            single = "use sieve_attn.jax.top_k_attention for single keys a query"
            join = "join parts of one kind by `|`; for blocks plus a window use the policy's `keep=`"
            raise error("selection", "must be made of Blocks, or of Ranges and Offsets, one of each", ", ".join(selection.kinds),
                        single if "Tokens" in kinds else join)  # fmt: skip
        return selection if selection.blocks is None else PaddedBlocks.from_selection(selection)
    for name in ("q_block", "kv_block"):
        checks.positive_int(f"selection.{name}", getattr(selection, name), "make it with select or PaddedBlocks.from_tiles")
    shape = tuple(selection.counts.shape)
    if len(shape) != 3 or tuple(selection.indices.shape[:-1]) != shape or shape[2] != selection.tiles or not selection.max_blocks:
        raise error("selection", f"must have counts [batch, heads, {selection.tiles}] and indices of that shape times max_blocks",
                    f"shapes {shape} and {tuple(selection.indices.shape)}",
                    "make it with select or PaddedBlocks.from_tiles")  # fmt: skip
    lanes = None if selection.rows is None else tuple(selection.rows.shape)
    if lanes not in (None, (*selection.indices.shape, selection.q_block)):
        raise error("selection", "must have rows of the shape of indices times q_block", f"shape {lanes}",
                    "make it with select or PaddedBlocks.from_tiles")  # fmt: skip
    batch, heads = shape[:2]
    if batch not in (1, call.query.shape[0]) or heads not in (1, call.key.shape[1], call.query.shape[1]):
        raise error("selection", f"must have batch 1 or {call.query.shape[0]} and heads 1, {call.key.shape[1]} or "
                    f"{call.query.shape[1]}", f"batch {batch}, heads {heads}", "select again for these inputs")  # fmt: skip
    return selection


def geometry_fits(geometry: Geometry, call: Call, policy: Policy) -> None:
    """Shapes and statistics; which keys a geometry was built from is not known while it is traced."""
    if not isinstance(geometry, Geometry):
        raise error("geometry", "must be a Geometry", type(geometry).__name__, "build it with sieve_attn.jax.geometry", TypeError)
    traced = any(isinstance(x, jax.core.Tracer) for x in (geometry.count, call.key, call.key_mask))
    if traced or call.kv_length is not None:
        known = call.key.shape[0] * call.key.shape[1] * call.kv_len
        held = replace(geometry, count=_full_count(geometry.count.shape, known))
        checks.geometry_fits(held, call.key, None, policy.block_size, policy.statistics)
    else:
        checks.geometry_fits(geometry, call.key, call.key_mask, policy.block_size, policy.statistics)


class _full_count:
    """Stands for counts that are being traced."""

    def __init__(self, shape: tuple[int, ...], total: int):
        self.shape, self.total = shape, total

    def sum(self) -> int:
        return self.total


def static_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise error(name, "must be True or False, known when the call is traced", repr(value), "name it in static_argnames")
