"""Forced patterns beside a scorer, in a form that can be traced: what follows from positions is tabulated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from sieve_attn.checks import error
from sieve_attn.patterns import Pattern, RandomBlocks, Sinks, Union, Window
from sieve_attn.patterns.base import members
from sieve_attn.patterns.offsets import OffsetSet

Array = Any


@dataclass(frozen=True, eq=False)
class Distances(Pattern):
    """Keys at tabulated distances before the query: ``table`` [kv_len] bool."""

    table: np.ndarray

    def keeps(self, position: Array, key: Array) -> Array:
        apart = position - key
        return jnp.asarray(self.table)[jnp.clip(apart, 0, len(self.table) - 1)] & (apart > 0)


@dataclass(frozen=True, eq=False)
class Grid(Pattern):
    """Whole blocks of keys for whole blocks of queries: ``table`` [blocks, blocks] bool, with blocks of ``size`` positions."""

    table: np.ndarray
    size: int

    def keeps(self, position: Array, key: Array) -> Array:
        last = len(self.table) - 1
        row, column = (jnp.clip(x // self.size, 0, last) for x in (position, key))
        return jnp.asarray(self.table)[row, column] & (position >= 0)


def check(pattern: Pattern | None) -> None:
    """Patterns of other people look at the values of positions as they please, which tracing may not allow."""
    for part in () if pattern is None else members(pattern):
        if not isinstance(part, (Sinks, Window, OffsetSet, RandomBlocks)):
            raise error("policy", "must force Sinks, Window, offsets and RandomBlocks only where JAX chooses blocks", repr(part),
                        "use the pattern alone, or backend='reference' outside of jit")  # fmt: skip


def traceable(pattern: Pattern | None, kv_len: int) -> Pattern | None:
    """``pattern`` for positions below ``kv_len``."""
    check(pattern)
    if pattern is None:
        return None
    return Union(tuple(_tabulated(part, kv_len) for part in members(pattern)))


def _tabulated(part: Pattern, kv_len: int) -> Pattern:
    if isinstance(part, OffsetSet):
        table = np.zeros(kv_len, bool)
        table[part.up_to(kv_len - 1)] = True
        return Distances(table)
    if isinstance(part, RandomBlocks):
        return Grid(part.selection(kv_len, kv_len).blocks.to_tiles()[0, 0], part.block_size)
    return part
