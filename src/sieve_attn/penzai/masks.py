"""What a layer kept, block by block, where somebody asked to see it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from penzai import pz

from sieve_attn.jax import manifold
from sieve_attn.patterns import Pattern
from sieve_attn.penzai.named import Layout
from sieve_attn.policies import Policy

HIDDEN, PRUNED, KEPT = 0, 1, 2


@pz.pytree_dataclass
class ManifoldMask(pz.Struct):
    """The blocks that one call of a layer kept.

    Attributes:
      kept: Booleans over batch axes, head axes, ``q_block`` and ``kv_block``.
      keys: How many keys of the block some query of the tile sees: zero where causality or a mask hides all of it.
    """

    kept: pz.nx.NamedArrayBase
    keys: pz.nx.NamedArrayBase

    def states(self) -> pz.nx.NamedArray:
        """0 where no query of the tile sees the block, 1 where the block was pruned, 2 where it was kept."""
        return pz.nx.nmap(lambda kept, keys: jnp.where(keys > 0, PRUNED + kept, HIDDEN).astype(jnp.int8))(self.kept, self.keys)

    def density(self) -> pz.nx.NamedArray:
        """The share of visible keys that were kept, one for each batch row and head."""

        def share(kept, keys):
            return (kept * keys).sum() / jnp.maximum(keys.sum(), 1)

        ends = ("q_block", "kv_block")
        return pz.nx.nmap(share)(self.kept.untag(*ends), self.keys.untag(*ends))

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        from sieve_attn.penzai.view import tree_node

        return tree_node(self, path) or super().__treescope_repr__(path, subtree_renderer)


def observe(q: jax.Array, k: jax.Array, policy: Policy, layout: Layout, **arguments: Any) -> ManifoldMask:
    """The choice of ``policy`` for these arrays, with names. Where a pattern alone decides, a block counts as kept if a tile
    reads any key of it."""
    hiding = {n: arguments.get(n) for n in ("causal", "window", "key_mask", "mask", "kv_length")}
    keys = visible_keys(q.shape[2], k.shape[2], policy, None, **hiding)
    heads = k.shape[1] if policy.share_group else q.shape[1]
    if heads not in (1, keys.shape[1]) and keys.shape[1] > 1:
        keys = keys.reshape(keys.shape[0], heads, -1, *keys.shape[2:]).max(2)
    shape = (q.shape[0], heads, *keys.shape[2:])
    if k.shape[2] < policy.min_seq_length:
        kept = keys > 0
    elif policy.chooses_blocks:
        kept = manifold(q, k, policy, **arguments)
    else:
        kept = visible_keys(q.shape[2], k.shape[2], policy, policy.keep, **hiding) > 0
    keys = jnp.broadcast_to(keys, shape)
    ends = ("q_block", "kv_block")
    return ManifoldMask(layout.name_heads(kept & (keys > 0), *ends), layout.name_heads(keys, *ends))


def visible_keys(
    q_len: int,
    kv_len: int,
    policy: Policy,
    pattern: Pattern | None,
    *,
    causal: bool | None,
    window: int | None,
    key_mask: jax.Array | None,
    mask: jax.Array | None,
    kv_length: jax.Array | None = None,
) -> jax.Array:
    """[batch | 1, heads | 1, tiles, blocks] the most keys of each block that one query of the tile sees (of those that
    ``pattern`` keeps, where one is given), a tile at a time: nothing of size q_len x kv_len exists."""
    offset = kv_len - q_len
    lead = offset % policy.query_tile if causal else 0
    if kv_length is not None:
        # one query, at the last of the keys that are there
        causal, offset, lead = True, kv_length - q_len, 0
    tiles, blocks = -(-(q_len + lead) // policy.query_tile), -(-kv_len // policy.block_size)
    key = jnp.arange(kv_len)[None, :]

    def of_tile(tile):
        row = tile * policy.query_tile - lead + jnp.arange(policy.query_tile)
        position = row[:, None] + offset
        seen = jnp.broadcast_to(((row >= 0) & (row < q_len))[:, None], (policy.query_tile, kv_len))
        if causal:
            seen &= key <= position
        if window is not None:
            seen &= (key > position - window) & (key < position + window)
        if pattern is not None:
            seen &= pattern.keeps(position, key)
        seen = seen[None, None]
        if key_mask is not None:
            seen = seen & key_mask[:, None, None, :]
        if mask is not None:
            seen = seen & mask[:, :, jnp.clip(row, 0, q_len - 1)]
        seen = jnp.pad(seen, ((0, 0), (0, 0), (0, 0), (0, blocks * policy.block_size - kv_len)))
        return seen.reshape(*seen.shape[:3], blocks, -1).sum(-1).max(2).astype(jnp.int32)

    return jnp.moveaxis(jax.lax.map(of_tile, jnp.arange(tiles)), 0, 2)
