"""A block selection of fixed shape, and the report of a call: pytrees, so that both leave ``jit``."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from sieve_attn.checks import error
from sieve_attn.types import Blocks, Selection


def static(**options):
    return field(metadata={"static": True}, **options)


@partial(jax.tree_util.register_dataclass)
@dataclass(frozen=True)
class PaddedBlocks:
    """Kept key blocks of every query tile, in ``max_blocks`` places a tile.

    ``counts`` [batch | 1, heads, tiles] int32 says how many blocks a tile keeps; ``indices`` [batch | 1, heads, tiles,
    max_blocks] int32 are their numbers, increasing, then -1. ``heads`` is 1, kv_heads or q_heads; a group shares its entry.
    A tile whose count exceeds ``max_blocks`` overflows: it attends to every block that it sees, never to fewer than it chose.
    Query ``i`` belongs to tile ``(i + lead) // q_block``; block ``b`` holds keys ``b * kv_block ...``.
    """

    counts: jax.Array
    indices: jax.Array
    q_len: int = static()
    kv_len: int = static()
    q_block: int = static()
    kv_block: int = static()
    lead: int = static(default=0)

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
    def from_tiles(cls, kept: jax.Array, max_blocks: int, **grid: int) -> PaddedBlocks:
        """From ``kept`` [batch | 1, heads, tiles, blocks] bool; ``grid``: q_len, kv_len, q_block, kv_block, lead."""
        counts = kept.sum(-1, dtype=jnp.int32)
        # kept blocks first, in order of index
        order = jnp.argsort(~kept, axis=-1, stable=True)[..., :max_blocks].astype(jnp.int32)
        return cls(counts, jnp.where(jnp.arange(order.shape[-1]) < counts[..., None], order, -1), **grid)

    @classmethod
    def from_selection(cls, selection: Selection) -> PaddedBlocks:
        """A selection of blocks that was made outside of ``jit``; its fullest tile sets ``max_blocks``."""
        part = selection.parts[0]
        if len(selection.parts) != 1 or not isinstance(part, Blocks) or part.row_mask is not None:
            raise error("selection", "must be one part of Blocks chosen for whole tiles", ", ".join(selection.kinds),
                        "select without per_query, or pass a PaddedBlocks")  # fmt: skip
        counts, indices, most = part.to_padded()
        shape = (part.batch, part.heads, part.tiles, max(most, 1))
        indices = np.asarray(indices, np.int32) if most else np.full(shape, -1, np.int32)
        grid = {name: getattr(part, name) for name in ("q_len", "kv_len", "q_block", "kv_block", "lead")}
        return cls(jnp.asarray(np.asarray(counts, np.int32)), jnp.asarray(indices), **grid)

    def to_tiles(self) -> jax.Array:
        """[batch | 1, heads, tiles, blocks] bool; every block of a tile that overflows."""
        slots = jnp.arange(self.max_blocks) < self.counts[..., None]
        place = jnp.where(slots, self.indices, self.blocks)
        flat = place.reshape(-1, place.shape[-1])
        row = jnp.arange(flat.shape[0])[:, None]
        kept = jnp.zeros((flat.shape[0], self.blocks + 1), bool).at[row, flat].set(True)[:, : self.blocks]
        return kept.reshape(*place.shape[:-1], self.blocks) | self.overflow[..., None]

    def to_dense(self) -> jax.Array:
        """[batch | 1, heads, q_len, kv_len] bool; for tests and pictures. Causality and masks are applied on top."""
        rows = jnp.repeat(self.to_tiles(), self.q_block, 2)[:, :, self.lead : self.lead + self.q_len]
        return jnp.repeat(rows, self.kv_block, 3)[..., : self.kv_len]
