"""What a call did, as a pytree: it leaves ``jit`` with the output."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import jax
import jax.numpy as jnp

from sieve_attn import pipeline
from sieve_attn.jax.certificate import Evidence, certify
from sieve_attn.jax.selection import STATIC, PaddedBlocks
from sieve_attn.policies import Policy
from sieve_attn.types import Certificate, Fallback


@partial(jax.tree_util.register_dataclass)
@dataclass(frozen=True)
class Report:
    """``kept`` and ``visible`` count keys [batch, heads, tiles], once a (tile, block) pair, overflow included; where no blocks
    were chosen, (query, key) pairs [batch, q_heads, 1] in fp32. ``dense_tiles`` and ``overflow`` [batch, heads, tiles] mark tiles
    that turned dense: the first because the policy may, the second because they wanted more than ``max_blocks`` blocks; None
    where there is no such choice, and from the reference, which has room for every block and does not tell which turned.

    ``certificate`` is made when it is read, inside of ``jit`` as part of the program, and costs nothing otherwise. Until then the
    report holds on to the arrays of the call, so a report that leaves ``jit`` (or is stacked by ``scan``) takes them along:
    ``without_arrays()`` computes the certificate and lets go, ``without_arrays(certify=False)`` just lets go.
    """

    kept: jax.Array
    visible: jax.Array
    dense_tiles: jax.Array | None
    overflow: jax.Array | None
    selection: PaddedBlocks | None
    chosen_by: Policy = field(metadata=STATIC)
    backend: str = field(metadata=STATIC)  # which code attends: native, gather, pallas or reference
    why_backend: str = field(metadata=STATIC)
    selected_by: str = field(metadata=STATIC)  # which code chose the blocks: native or stages; empty if none had to
    short: Fallback | None = field(default=None, metadata=STATIC)  # why nothing was chosen at all
    evidence: Evidence | None = None
    known: Certificate | None = None

    @property
    def policy(self) -> str:
        return repr(self.chosen_by)

    @property
    def bound(self) -> str:
        """The bound that certifies."""
        return repr(self.chosen_by.certifier)

    @property
    def requested_sparsity(self) -> float | None:
        return None if self.chosen_by.selector is None else self.chosen_by.selector.requested_sparsity

    @property
    def density(self) -> jax.Array:
        """Kept over visible (tile, block) pairs, weighted by keys; 1 where nothing was chosen or is visible."""
        seen = self.visible.sum(dtype=jnp.float32)
        return jnp.where(seen > 0, self.kept.sum(dtype=jnp.float32) / jnp.maximum(seen, 1.0), 1.0)

    @property
    def achieved_sparsity(self) -> jax.Array:
        return 1.0 - self.density

    @property
    def density_per_head(self) -> jax.Array:
        """[batch, heads] densities."""
        seen = self.visible.sum(-1, dtype=jnp.float32)
        return jnp.where(seen > 0, self.kept.sum(-1, dtype=jnp.float32) / jnp.maximum(seen, 1.0), 1.0)

    @property
    def fallbacks(self) -> tuple[Fallback, ...]:
        """Where the policy turned dense on its own; outside of ``jit``, where counts are known."""
        if self.short is not None:
            return (self.short,)
        if self.dense_tiles is None:
            return ()
        return pipeline.fallbacks(self.chosen_by, self.kept, self.visible, self.dense_tiles)

    @cached_property
    def certificate(self) -> Certificate:
        """Upper bounds on the dropped softmax mass and on the output error, [batch, q_heads, q_len]; the bound is ``bound``."""
        if self.known is not None:
            return self.known
        if self.evidence is None:
            raise ValueError(
                "`report.certificate` needs the call's arrays; this report let go of them; read the certificate before "
                "`without_arrays(certify=False)`"
            )
        return certify(self.evidence)

    def without_arrays(self, *, certify: bool = True) -> Report:
        """A copy that no longer holds on to the arrays of the call."""
        known = self.certificate if certify else self.known
        return replace(self, evidence=None, known=known)
