"""Stage 3 hands over: which keys each query attends to. The only bridge between choosing and attending."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from sieve_attn import arrays

Array = Any


@dataclass(frozen=True)
class Blocks:
    """Kept key blocks per query tile, in compressed rows (CSR) over ``batch x heads x tiles``.

    Query ``i`` belongs to tile ``(i + lead) // q_block``: ``lead`` puts the tile grid on absolute positions, so that a
    prefill in chunks has the tiles of one prefill. ``heads`` is 1, ``kv_heads`` or ``q_heads``; a group shares its entry.
    ``row_mask``, where given, says which queries of the tile keep the block (``per_query``); None means all. Entries from
    ``row_ptr[-1]`` on are room to spare and mean nothing: a device that does not wait for the host has them.
    """

    row_ptr: Array  # [batch * heads * tiles + 1] int64
    block_index: Array  # [entries, or more] int32, increasing within a tile
    batch: int
    heads: int
    q_len: int
    kv_len: int
    q_block: int
    kv_block: int
    lead: int = 0
    row_mask: Array | None = None  # [entries, q_block] bool

    @classmethod
    def from_tiles(
        cls, kept: Array, *, q_len: int, kv_len: int, q_block: int, kv_block: int, lead: int = 0, rows: Array | None = None
    ) -> Blocks:
        """From ``kept`` [batch, heads, tiles, blocks] bool and, for per-query choices, ``rows`` [batch, heads, q_len, blocks]."""
        xp = arrays.namespace(kept)
        batch, heads = kept.shape[:2]
        counts = xp.total(kept, -1, xp.int64).reshape(-1)
        row_ptr = xp.concat([xp.zeros((1,), xp.int64, kept), xp.cumsum(counts, 0)], 0)
        mask = None
        if rows is None:
            index = xp.true_columns(kept)
        else:
            b, h, t, block = xp.nonzero(kept)
            index = xp.cast(block, xp.int32)
            offset = xp.arange(0, q_block, kept)
            query = t[:, None] * q_block + offset[None, :] - lead
            inside = (query >= 0) & (query < q_len)
            query = xp.where(inside, query, 0)
            mask = rows[b[:, None], h[:, None], query, block[:, None]] & inside
        return cls(row_ptr, index, batch, heads, q_len, kv_len, q_block, kv_block, lead, mask)

    @property
    def tiles(self) -> int:
        return -(-(self.q_len + self.lead) // self.q_block)

    @property
    def blocks(self) -> int:
        return -(-self.kv_len // self.kv_block)

    @property
    def listed(self) -> Blocks:
        """The same blocks without room to spare, for which the host waits."""
        entries = int(self.row_ptr[-1]) if self.row_ptr.shape[0] else -1
        if not 0 <= entries < self.block_index.shape[0]:
            return self
        row_mask = None if self.row_mask is None else self.row_mask[:entries]
        return replace(self, block_index=self.block_index[:entries], row_mask=row_mask)

    @cached_property
    def _entry_row(self) -> Array:
        """[entries] the flat (batch, head, tile) of each entry, one too many for entries to spare."""
        xp = arrays.namespace(self.row_ptr)
        return xp.searchsorted(self.row_ptr[1:], xp.arange(0, self.block_index.shape[0], self.row_ptr))

    def to_tiles(self) -> Array:
        """[batch, heads, tiles, blocks] bool: the block is kept by at least one query of the tile."""
        xp = arrays.namespace(self.row_ptr)
        units = self.batch * self.heads * self.tiles
        block = xp.where(self._entry_row < units, xp.cast(self.block_index, xp.int64), 0)
        flat = xp.scatter_true((units + 1, self.blocks), (self._entry_row, block), self.row_ptr)[:units]
        return flat.reshape(self.batch, self.heads, self.tiles, self.blocks)

    def block_rows(self, start: int, stop: int) -> Array:
        """[batch, heads, stop - start, blocks] bool: the kept blocks of queries ``start..stop``."""
        xp = arrays.namespace(self.row_ptr)
        if self.row_mask is None:
            tile = (xp.arange(start, stop, self.row_ptr) + self.lead) // self.q_block
            return self._tiles[:, :, tile]
        row, block = self._entry_row, xp.cast(self.block_index, xp.int64)
        query = (row % self.tiles)[:, None] * self.q_block + xp.arange(0, self.q_block, row)[None, :] - self.lead
        entry, lane = xp.nonzero(self.row_mask & (query >= start) & (query < stop))
        index = (row[entry] // self.tiles, query[entry, lane] - start, block[entry])
        out = xp.scatter_true((self.batch * self.heads, stop - start, self.blocks), index, self.row_ptr)
        return out.reshape(self.batch, self.heads, stop - start, self.blocks)

    @cached_property
    def _tiles(self) -> Array:
        return self.to_tiles()

    def rows(self, start: int, stop: int, like: Array) -> Array:
        mine = self.beside(like)
        xp = arrays.namespace(mine.row_ptr)
        return xp.repeat_each(mine.block_rows(start, stop), self.kv_block, -1)[..., : self.kv_len]

    def beside(self, like: Array) -> Blocks:
        """The same blocks as arrays of the framework and on the device of ``like``: patterns know neither."""
        xp = arrays.namespace(like)
        if arrays.namespace(self.row_ptr) is xp:
            return self
        row_mask = None if self.row_mask is None else xp.asarray(self.row_mask, xp.boolean, like)
        index = xp.asarray(self.block_index, xp.int32, like)
        return replace(self, row_ptr=xp.asarray(self.row_ptr, xp.int64, like), block_index=index, row_mask=row_mask)

    def to_padded(self) -> tuple[Array, Array, int]:
        """``(counts [batch, heads, tiles], indices [batch, heads, tiles, max_blocks] filled with -1, max_blocks)``."""
        xp = arrays.namespace(self.row_ptr)
        shape = (self.batch, self.heads, self.tiles)
        counts = (self.row_ptr[1:] - self.row_ptr[:-1]).reshape(shape)
        most = int(counts.max()) if self.block_index.shape[0] else 0
        slot = xp.arange(0, most, self.row_ptr)[None, :] + self.row_ptr[:-1][:, None]
        inside = slot < self.row_ptr[1:][:, None]
        index = self.block_index[xp.where(inside, slot, 0)] if most else xp.zeros(slot.shape, xp.int32, self.row_ptr)
        return counts, xp.where(inside, index, -1).reshape(*shape, most), most

    def union(self, other: Blocks) -> Blocks:
        grid = ("batch", "heads", "q_len", "kv_len", "q_block", "kv_block", "lead")
        unlike = [f"{g} {getattr(self, g)} and {getattr(other, g)}" for g in grid if getattr(self, g) != getattr(other, g)]
        if unlike:
            raise ValueError(f"block selections combine on one grid only; got {', '.join(unlike)}; build both on one grid")
        rows = None
        if self.row_mask is not None or other.row_mask is not None:
            rows = self.block_rows(0, self.q_len) | other.block_rows(0, self.q_len)
        grid_of = {g: getattr(self, g) for g in grid[2:]}
        return Blocks.from_tiles(self._tiles | other._tiles, rows=rows, **grid_of)


@dataclass(frozen=True)
class Ranges:
    """The first ``prefix`` keys and a window of ``window`` keys that ends with the query's own position."""

    q_len: int
    kv_len: int
    prefix: int = 0
    window: int = 0
    two_sided: bool = False

    def rows(self, start: int, stop: int, like: Array) -> Array:
        xp = arrays.namespace(like)
        position = (xp.arange(start, stop, like) + (self.kv_len - self.q_len))[:, None]
        key = xp.arange(0, self.kv_len, like)[None, :]
        near = (key > position - self.window) & (key < position + (self.window if self.two_sided else 1))
        return ((key < self.prefix) | near)[None, None]

    def union(self, other: Ranges) -> Ranges:
        if (self.q_len, self.kv_len, self.two_sided) != (other.q_len, other.kv_len, other.two_sided):
            raise ValueError(
                f"ranges combine over one q_len, kv_len and two_sided only; got {self} and {other}; build both alike"
            )
        return replace(self, prefix=max(self.prefix, other.prefix), window=max(self.window, other.window))


@dataclass(frozen=True)
class Offsets:
    """Key ``position - s`` for every ``s`` in ``offsets``, where that key's index is at least ``first_key``."""

    q_len: int
    kv_len: int
    offsets: tuple[int, ...]
    first_key: int = 0

    def rows(self, start: int, stop: int, like: Array) -> Array:
        xp = arrays.namespace(like)
        position = (xp.arange(start, stop, like) + (self.kv_len - self.q_len))[:, None]
        key = position - xp.asarray(self.offsets, xp.int64, like)[None, :]
        row, which = xp.nonzero((key >= self.first_key) & (key < self.kv_len))
        return xp.scatter_true((stop - start, self.kv_len), (row, key[row, which]), like)[None, None]

    def union(self, other: Offsets) -> Offsets:
        if (self.q_len, self.kv_len, self.first_key) != (other.q_len, other.kv_len, other.first_key):
            raise ValueError(
                f"offsets combine over one q_len, kv_len and first_key only; got {self} and {other}; build both alike"
            )
        return replace(self, offsets=tuple(sorted({*self.offsets, *other.offsets})))


@dataclass(frozen=True)
class Tokens:
    """Single keys per query: ``index`` [batch, heads, q_len, k], -1 where a query keeps fewer."""

    index: Array
    kv_len: int

    @property
    def q_len(self) -> int:
        return self.index.shape[2]

    def rows(self, start: int, stop: int, like: Array) -> Array:
        xp = arrays.namespace(self.index)
        part = self.index[:, :, start:stop]
        b, h, n, k = xp.nonzero(part >= 0)
        shape = (*part.shape[:3], self.kv_len)
        return xp.scatter_true(shape, (b, h, n, xp.cast(part[b, h, n, k], xp.int64)), self.index)


@dataclass(frozen=True)
class Selection:
    """The union of ``parts``, which never overlap. ``to_dense`` is its meaning; causality and masks are applied on top."""

    parts: tuple[Blocks | Ranges | Offsets | Tokens, ...]

    @property
    def q_len(self) -> int:
        return self.parts[0].q_len

    @property
    def kv_len(self) -> int:
        return self.parts[0].kv_len

    @property
    def kinds(self) -> tuple[str, ...]:
        """What the parts are."""
        return tuple(type(part).__name__ for part in self.parts)

    @property
    def blocks(self) -> Blocks | None:
        """The block part, where there is one."""
        return next((part for part in self.parts if isinstance(part, Blocks)), None)

    def rows(self, start: int, stop: int, like: Array) -> Array:
        """[batch | 1, heads | 1, stop - start, kv_len] bool: the keys that queries ``start..stop`` keep."""
        kept = self.parts[0].rows(start, stop, like)
        for part in self.parts[1:]:
            kept = kept | part.rows(start, stop, like)
        return kept

    def beside(self, like: Array) -> Selection:
        """The same selection with blocks as arrays of the framework of ``like``."""
        return Selection(tuple(part.beside(like) if isinstance(part, Blocks) else part for part in self.parts))

    def to_dense(self, like: Array) -> Array:
        """[batch | 1, heads | 1, q_len, kv_len] bool; for tests and pictures, never on the way to an output."""
        return self.rows(0, self.q_len, like)

    def __or__(self, other: Selection) -> Selection:
        mine, theirs = _overlapping(self.parts), _overlapping(other.parts)
        for part in theirs:
            same = next((i for i, p in enumerate(mine) if type(p) is type(part) and not isinstance(p, Tokens)), None)
            if same is None:
                mine.append(part)
            else:
                mine[same] = mine[same].union(part)
        return Selection(_disjoint(mine))


def _overlapping(parts: tuple) -> list:
    """Offsets that gave way to a prefix beside them, as they were: the prefix keeps those keys anyway."""
    prefix = max((p.prefix for p in parts if isinstance(p, Ranges)), default=0)
    return [replace(p, first_key=0) if isinstance(p, Offsets) and p.first_key <= prefix else p for p in parts]


def _disjoint(parts: list) -> tuple:
    """Offsets give way to the ranges beside them; other kinds side by side cannot be told apart and raise."""
    if len(parts) == 1:
        return tuple(parts)
    kinds = {type(p): p for p in parts}
    if set(kinds) != {Ranges, Offsets} or kinds[Ranges].two_sided:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(
            f"selections combine only if both are Blocks, or are made of one-sided Ranges and Offsets; got {names}; "
            "for blocks plus a window use the policy's `keep=`"
        )
    ranges, offsets = kinds[Ranges], kinds[Offsets]
    if (ranges.q_len, ranges.kv_len) != (offsets.q_len, offsets.kv_len):
        raise ValueError(
            f"selections combine over the same lengths only; got q_len {ranges.q_len} and {offsets.q_len}, "
            f"kv_len {ranges.kv_len} and {offsets.kv_len}; build both for one call"
        )
    beyond = tuple(s for s in offsets.offsets if s >= ranges.window or s < 0)
    return (ranges, replace(offsets, offsets=beyond, first_key=max(offsets.first_key, ranges.prefix)))
