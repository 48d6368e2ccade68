"""A block selection of fixed shape: a pytree, so that it leaves ``jit``."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from sieve_attn.checks import error
from sieve_attn.types import Blocks, Selection

STATIC = {"static": True}


@partial(jax.tree_util.register_dataclass)
@dataclass(frozen=True)
class PaddedBlocks:
    """Kept key blocks of every query tile, in ``max_blocks`` places a tile.

    ``counts`` [batch | 1, heads, tiles] int32 says how many blocks a tile keeps; ``indices`` [batch | 1, heads, tiles,
    max_blocks] int32 are their numbers, increasing, then -1. ``heads`` is 1, kv_heads or q_heads; a group shares its entry.
    A tile whose count exceeds ``max_blocks`` overflows: it attends to every block that it sees, never to fewer than it chose.
    Query ``i`` belongs to tile ``(i + lead) // q_block``; block ``b`` holds keys ``b * kv_block ...``. ``rows`` [batch | 1,
    heads, tiles, max_blocks, q_block] bool says which queries of the tile keep the block (``per_query``); None means all of them.
    """

    counts: jax.Array
    indices: jax.Array
    q_len: int = field(metadata=STATIC)
    kv_len: int = field(metadata=STATIC)
    q_block: int = field(metadata=STATIC)
    kv_block: int = field(metadata=STATIC)
    lead: int = field(default=0, metadata=STATIC)
    rows: jax.Array | None = None

    @property
    def max_blocks(self) -> int:
        return self.indices.shape[-1]

    @property
    def tiles(self) -> int:
        return -(-(self.q_len + self.lead) // self.q_block)

    @property
    def blocks(self) -> int:
        return -(-self.kv_len // self.kv_block)

    @property
    def overflow(self) -> jax.Array:
        """[batch | 1, heads, tiles] bool: the tile wanted more than ``max_blocks`` blocks and attends to all of them."""
        return self.counts > self.max_blocks

    @classmethod
    def from_tiles(cls, kept: jax.Array, max_blocks: int, *, rows: jax.Array | None = None, **grid: int) -> PaddedBlocks:
        """From ``kept`` [batch | 1, heads, tiles, blocks] bool and, for choices of single queries, ``rows`` [batch | 1, heads,
        tiles, q_block, blocks] bool; ``grid``: q_len, kv_len, q_block, kv_block, lead."""
        counts, indices, lanes = padded(kept, max_blocks, rows)
        return cls(counts, indices, rows=lanes, **grid)

    @classmethod
    def from_selection(cls, selection: Selection) -> PaddedBlocks:
        """A selection of blocks that was made outside of ``jit``; its fullest tile sets ``max_blocks``."""
        part = selection.parts[0]
        if len(selection.parts) != 1 or not isinstance(part, Blocks):
            raise error("selection", "must be one part of Blocks", ", ".join(selection.kinds),
                        "give other kinds to sieve_attn.jax.attend as a Selection")  # fmt: skip
        counts, indices, most = part.to_padded()
        shape = (part.batch, part.heads, part.tiles, max(most, 1))
        indices = np.asarray(indices, np.int32) if most else np.full(shape, -1, np.int32)
        rows = None
        if part.row_mask is not None:
            rows = np.zeros((*shape, part.q_block), bool)
            rows[indices >= 0] = np.asarray(part.listed.row_mask)
        grid = {name: getattr(part, name) for name in ("q_len", "kv_len", "q_block", "kv_block", "lead")}
        rows = None if rows is None else jnp.asarray(rows)
        return cls(jnp.asarray(np.asarray(counts, np.int32)), jnp.asarray(indices), rows=rows, **grid)

    def to_tiles(self) -> jax.Array:
        """[batch | 1, heads, tiles, blocks] bool: kept by some query of the tile; every block of a tile that overflows."""
        slots = jnp.arange(self.max_blocks) < self.counts[..., None]
        return self._scattered(self.indices, slots) | self.overflow[..., None]

    def to_rows(self, number: jax.Array, tiles: jax.Array | None = None) -> jax.Array:
        """[batch | 1, heads, n, blocks] bool: the blocks that the queries ``number`` [n] keep; ``tiles`` is ``to_tiles()``."""
        place = jnp.clip(number, 0, self.q_len - 1) + self.lead
        tile = place // self.q_block
        if self.rows is None:
            return (self.to_tiles() if tiles is None else tiles)[:, :, tile]
        counts, indices = self.counts[:, :, tile], self.indices[:, :, tile]
        slots = jnp.arange(self.max_blocks) < counts[..., None]
        slots = slots & self.rows[:, :, tile, :, place % self.q_block].transpose(1, 2, 0, 3)
        return self._scattered(indices, slots) | (counts > self.max_blocks)[..., None]

    def to_dense(self) -> jax.Array:
        """[batch | 1, heads, q_len, kv_len] bool; for tests and pictures. Causality and masks are applied on top."""
        return jnp.repeat(self.to_rows(jnp.arange(self.q_len)), self.kv_block, 3)[..., : self.kv_len]

    def _scattered(self, indices: jax.Array, slots: jax.Array) -> jax.Array:
        place = jnp.where(slots, indices, self.blocks)
        flat = place.reshape(-1, place.shape[-1])
        row = jnp.arange(flat.shape[0])[:, None]
        kept = jnp.zeros((flat.shape[0], self.blocks + 1), bool).at[row, flat].set(True)[:, : self.blocks]
        return kept.reshape(*place.shape[:-1], self.blocks)


def padded(kept: jax.Array, max_blocks: int, rows: jax.Array | None = None) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """``(counts, indices, rows)`` of a :class:`PaddedBlocks` from ``kept`` [..., blocks] and ``rows`` [..., q_block, blocks]."""
    counts = kept.sum(-1, dtype=jnp.int32)
    # kept blocks first, in order of index
    order = jnp.argsort(~kept, axis=-1, stable=True)[..., :max_blocks].astype(jnp.int32)
    listed = jnp.arange(order.shape[-1]) < counts[..., None]
    if rows is not None:
        rows = jnp.swapaxes(jnp.take_along_axis(rows, order[..., None, :], -1), -1, -2) & listed[..., None]
    return counts, jnp.where(listed, order, -1), rows
