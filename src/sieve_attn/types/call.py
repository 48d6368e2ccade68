"""One attention call: its inputs, what each query may see, and how it is cut into chunks of rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from sieve_attn import arrays
from sieve_attn.types.rows import Rows
from sieve_attn.types.selection import Selection

Array = Any

CHUNK_BYTES = 1 << 25  # what one array of rows x keys may take


@dataclass(frozen=True)
class Call:
    """The arguments of an attention call, checked. Query ``i`` sits at absolute position ``kv_len - q_len + i``."""

    query: Array
    key: Array
    value: Array
    causal: bool = False
    scale: float = 1.0
    mask: Array | None = None
    key_mask: Array | None = None
    bias: Array | None = None
    softcap: float | None = None
    cu_seqlens: Array | None = None
    sink: Array | None = None
    window: int | None = None
    shared: dict = field(default_factory=dict, compare=False, repr=False)

    @property
    def q_len(self) -> int:
        return self.query.shape[2]

    @property
    def kv_len(self) -> int:
        return self.key.shape[2]

    @property
    def offset(self) -> int:
        """Absolute position of the first query."""
        return self.kv_len - self.q_len

    @property
    def present(self) -> Array | None:
        """[batch, kv_len] bool: the keys that are there for some query; None if all of them are."""
        return self.key_mask

    def lead(self, query_tile: int) -> int:
        """How far the first query lies inside its tile: tiles sit on absolute positions when causal."""
        return self.offset % query_tile if self.causal else 0

    def chunks(self, query_tile: int = 1) -> Iterator[tuple[int, int]]:
        """``(start, stop)`` of chunks of whole tiles, each small enough for arrays of rows x keys."""
        xp = arrays.namespace(self.query)
        row = self.query.shape[0] * self.query.shape[1] * self.kv_len * xp.itemsize(xp.compute_dtype(self.query))
        step = max(query_tile, CHUNK_BYTES // max(row, 1) // query_tile * query_tile)
        start = 0
        while start < self.q_len:
            stop = min(self.q_len, start + step - (self.lead(query_tile) if start == 0 else 0))
            yield start, stop
            start = stop

    def kv_stop(self, stop: int, multiple: int = 1) -> int:
        """How many leading keys queries before ``stop`` can see at most, in whole blocks of ``multiple``."""
        if not self.causal:
            return self.kv_len
        last = max(self.offset + stop, 1)
        return min(self.kv_len, -(-last // multiple) * multiple)

    def compute(self, name: str) -> Array:
        """``query``, ``key`` or ``value`` in the dtype that scores are computed in."""
        xp = arrays.namespace(self.query)
        if name not in self.shared:
            self.shared[name] = xp.cast(getattr(self, name), xp.compute_dtype(self.query))
        return self.shared[name]

    def kept(self, selection: Selection, start: int, stop: int, kv_stop: int | None = None) -> Array:
        """[batch | 1, q_heads | 1, stop - start, kv_stop] bool: what ``selection`` keeps, a group's choice for all its heads."""
        chosen = selection.rows(start, stop, self.query)[..., :kv_stop]
        heads = self.query.shape[1]
        if chosen.shape[1] in (1, heads):
            return chosen
        return arrays.namespace(chosen).repeat_each(chosen, heads // chosen.shape[1], 1)

    def sight(self, number: Array) -> tuple[Array, Array]:
        """``(first, last)``, each like ``number``: causality, window and packing leave these queries the keys first .. last - 1.

        ``first >= 0`` and ``first <= last <= kv_len``, or ``last`` is less than ``first`` where a query sees nothing.
        """
        position = number + self.offset
        xp = arrays.namespace(position)
        first, last = position * 0, position * 0 + self.kv_len
        if self.causal:
            last = xp.minimum(last, position + 1)
        if self.window is not None:
            first = xp.maximum(first, position - self.window + 1)
            last = last if self.causal else xp.minimum(last, position + self.window)
        if self.cu_seqlens is not None:
            xp = arrays.namespace(self.query)
            edges = xp.asarray(self.cu_seqlens, xp.int64, self.query)
            which = xp.searchsorted(edges, number)
            ends = xp.concat([edges[:1] * 0, edges, edges[:1] * 0 + self.kv_len], 0)
            first, last = xp.maximum(first, ends[which]), xp.minimum(last, ends[which + 1])
        return first, last

    def rows(self, start: int, stop: int, kv_stop: int | None = None) -> Rows:
        """Queries ``start..stop`` with what they see of the first ``kv_stop`` keys."""
        return self.rows_at(arrays.namespace(self.query).arange(start, stop, self.query), kv_stop)

    def rows_at(self, number: Array, kv_stop: int | None = None) -> Rows:
        """The queries with the indices ``number``, and what they see of the first ``kv_stop`` keys."""
        xp = arrays.namespace(self.query)
        kv_stop = self.kv_len if kv_stop is None else kv_stop
        position = number + self.offset
        key = xp.arange(0, kv_stop, self.query)[None, :]
        first, last = self.sight(number)
        allowed = (key >= first[:, None]) & (key < last[:, None])
        visible = allowed[None, None]
        if self.key_mask is not None:
            visible = visible & self.key_mask[:, None, None, :kv_stop]
        if self.mask is not None:
            visible = visible & self.mask[:, :, number][..., :kv_stop]
        bias = None
        if self.bias is not None:
            bias = self.bias if self.bias.shape[2] == 1 else self.bias[:, :, number]
            bias = bias if self.bias.shape[3] == 1 else bias[..., :kv_stop]
            bias = xp.broadcast_to(xp.cast(bias, xp.compute_dtype(self.query)), (*bias.shape[:2], number.shape[0], kv_stop))
            hidden = bias == -float("inf")
            visible, bias = visible & ~hidden, xp.where(hidden, 0.0, bias)
        query = self.compute("query")[:, :, number]
        return Rows(
            query, position, visible, allowed, self.scale, self.softcap, bias, self.sink,
            key=self.compute("key")[:, :, :kv_stop],
            shared=self.shared,
        )  # fmt: skip
