"""Stage 5 hands over: what was left out, and what a call did."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from sieve_attn import arrays

Array = Any


@dataclass(frozen=True)
class Certificate:
    """Upper bounds on what was left out, per query. ``proved`` or, from a meter, ``statistical`` at ``1 - alpha``."""

    dropped_mass: Array  # [batch, q_heads, q_len]: at least the softmax mass of the dropped keys
    bound: str
    output_error: Array | None = None  # [batch, q_heads, q_len]: at least ||dense output - sparse output||
    kind: str = "proved"
    confidence: float | None = None

    def quantile(self, share: float) -> float:
        """The ``share``-quantile of the certified dropped mass over all queries."""
        values = arrays.namespace(self.dropped_mass).to_numpy(self.dropped_mass).ravel()
        ordered = sorted(float(v) for v in values)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


@dataclass(frozen=True)
class Fallback:
    """Where a policy turned dense on its own: the reason and how many (batch, head, tile) choices it touched."""

    reason: str
    count: int


@dataclass(frozen=True)
class Report:
    """What a call did. Everything is computed when it is first read."""

    policy: str
    backend: str
    why_backend: str
    bound: str
    kept: Array  # [batch, heads, tiles] kept keys, counted once a (tile, block) pair
    visible: Array  # [batch, heads, tiles] visible keys, likewise
    selected_by: str = ""  # which code chose the blocks: triton, native or reference; empty if none had to
    requested_sparsity: float | None = None
    fall_back: Callable[[], tuple[Fallback, ...]] = tuple
    seconds: Mapping[str, float] = field(default_factory=dict)
    geometry_from: str = "keys"
    selection: Any = None
    certify: Callable[[], Certificate] | None = None
    computed: Array | None = None  # [batch, heads, tiles] visible keys whose logit was computed in order to choose

    @cached_property
    def fallbacks(self) -> tuple[Fallback, ...]:
        """Where the policy turned dense on its own."""
        return self.fall_back()

    @cached_property
    def density(self) -> float:
        """Kept over visible (tile, block) pairs, weighted by keys; 1.0 when nothing is visible."""
        seen = float(self.visible.sum())
        return float(self.kept.sum()) / seen if seen else 1.0

    @cached_property
    def density_per_head(self) -> Array:
        """[batch, heads] densities."""
        return density_per_head(self.kept, self.visible)

    @property
    def achieved_sparsity(self) -> float:
        return 1.0 - self.density

    @cached_property
    def certificate(self) -> Certificate:
        """The certificate of this selection, computed on first use."""
        if self.certify is None:
            raise ValueError("`report.certificate` needs the call's queries and keys; this report was made without them")
        return self.certify()

    def without_arrays(self) -> Report:
        """A copy that no longer holds on to the call's queries and keys (the certificate is computed first)."""
        known = self.certificate if self.certify is not None else None
        return replace(self, certify=(lambda: known) if known is not None else None, selection=None)


def density_per_head(kept: Array, visible: Array) -> Array:
    """[..., heads] kept over visible keys [..., heads, tiles], summed over tiles; 1.0 where nothing is visible."""
    xp = arrays.namespace(kept)
    seen = xp.cast(visible.sum(-1), xp.float64)
    return xp.where(seen > 0, xp.cast(kept.sum(-1), xp.float64) / xp.maximum(seen, 1.0), 1.0)
