"""What a call did, as a pytree: it leaves ``jit`` with the output."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from sieve_attn.jax.selection import PaddedBlocks, static


@partial(jax.tree_util.register_dataclass)
@dataclass(frozen=True)
class Report:
    """``kept`` and ``visible`` count keys [batch, heads, tiles], once a (tile, block) pair, overflow included; where no blocks
    were chosen, (query, key) pairs [batch, q_heads, 1] in fp32. ``dense_tiles`` and ``overflow`` [batch, heads, tiles] mark tiles
    that turned dense: the first because the policy may, the second because they wanted more than ``max_blocks`` blocks; None
    where there is no such choice, and from the reference, which has room for every block and does not tell which turned.
    """

    kept: jax.Array
    visible: jax.Array
    dense_tiles: jax.Array | None
    overflow: jax.Array | None
    selection: PaddedBlocks | None
    policy: str = static()
    backend: str = static()  # which code attends: native, gather, pallas or reference
    why_backend: str = static()
    selected_by: str = static()  # which code chose the blocks: native or stages; empty if none had to

    @property
    def density(self) -> jax.Array:
        """Kept over visible (tile, block) pairs, weighted by keys; 1 where nothing was chosen or is visible."""
        seen = self.visible.sum(dtype=jnp.float32)
        return jnp.where(seen > 0, self.kept.sum(dtype=jnp.float32) / jnp.maximum(seen, 1.0), 1.0)

    @property
    def density_per_head(self) -> jax.Array:
        """[batch, heads] densities."""
        seen = self.visible.sum(-1, dtype=jnp.float32)
        return jnp.where(seen > 0, self.kept.sum(-1, dtype=jnp.float32) / jnp.maximum(seen, 1.0), 1.0)
