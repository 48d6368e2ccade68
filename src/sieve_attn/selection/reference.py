"""Reference selection: scores of one chunk of queries to kept (tile, block) pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Int

from sieve_attn import arrays
from sieve_attn.patterns import Pattern
from sieve_attn.scores.base import split_blocks, visible_count
from sieve_attn.selection.base import Candidates, RankSelector, Selector
from sieve_attn.types import Geometry, Rows, Scores

Array = Any


@dataclass(frozen=True)
class Chosen:
    """What one chunk keeps. ``heads`` is kv_heads where a group shares its choice, else q_heads."""

    tiles: Bool[Array, "batch heads tiles blocks"]
    rows: Bool[Array, "batch heads rows blocks"] | None  # for per-query choices
    kept: Int[Array, "batch heads tiles"]  # keys
    visible: Int[Array, "batch heads tiles"]  # keys
    dense_tiles: Bool[Array, "batch heads tiles"]  # the policy turned dense here on its own


@dataclass(frozen=True)
class Tiles:
    """How the rows of a chunk fall into query tiles."""

    rows: int
    lead: int  # how far the first row lies inside its tile
    size: int

    def split(self, x: Array, fill: Any) -> Array:
        """[batch, heads, rows, n] to [batch, heads, tiles, size, n], ``fill`` where a tile has no row."""
        xp = arrays.namespace(x)
        if self.lead:
            x = xp.flip(xp.pad_end(xp.flip(x, 2), 2, self.lead, fill), 2)
        x = xp.pad_end(x, 2, -x.shape[2] % self.size, fill)
        return x.reshape(*x.shape[:2], -1, self.size, x.shape[-1])

    def looked_at(self, stride: int, like: Array) -> Array:
        """Indices of every ``stride``-th row of each tile, the last row of a tile always."""
        xp = arrays.namespace(like)
        lanes = [(number + self.lead) % self.size for number in range(self.rows)]
        looked = [n for n, lane in enumerate(lanes) if lane % stride == stride - 1 or lane == self.size - 1 or n == self.rows - 1]
        return xp.asarray(looked, xp.int64, like)

    def spread(self, x: Array) -> Array:
        """[batch, heads, tiles, n] to [batch, heads, rows, n]."""
        return arrays.namespace(x).repeat_each(x, self.size, 2)[:, :, self.lead : self.lead + self.rows]


def share_over_group(x: Array, heads: int, how: Any) -> Array:
    """[batch, q_heads, ...] to [batch, heads, ...], reducing the query heads of each group."""
    return x if x.shape[1] == heads else how(x.reshape(x.shape[0], heads, -1, *x.shape[2:]), 2)


def choose(
    scores: Scores,
    rows: Rows,
    geometry: Geometry,
    selector: Selector,
    keep: Pattern | None,
    *,
    tiles: Tiles,
    heads: int,
    per_query: bool,
    dense_above: float,
    rescore: Callable[[], Array],
) -> Chosen:
    """Apply ``selector`` and the forced pattern to one chunk of scores.

    Rows that were not scored hold -inf; ``rescore`` gives the estimates of all rows, for the rare query that lost everything.
    """
    xp = arrays.namespace(rows.query)
    batch, q_heads = rows.query.shape[:2]
    shape = (batch, q_heads, rows.query.shape[2], geometry.blocks)
    weight = xp.broadcast_to(visible_count(rows, geometry.block_size), shape)
    seen = weight > 0
    forced = seen & _forced(xp, rows, geometry, keep, tiles, per_query)
    candidates = Candidates(scores, seen, forced, weight, rows, geometry)
    unit = Tiles(tiles.rows, 0, 1) if per_query else tiles

    if isinstance(selector, RankSelector):
        chosen = _by_rank(xp, selector, candidates, unit, heads)
    else:
        chosen = _union(xp, share_over_group(selector.keep(candidates), heads, xp.any_), unit)

    chosen = chosen | _union(xp, share_over_group(forced, heads, xp.any_), unit)
    visible = _union(xp, share_over_group(seen, heads, xp.any_), unit)
    chosen = chosen & visible
    if not selector.keeps_some:
        chosen = chosen | _best_of_the_forgotten(xp, chosen, candidates, unit, heads, rescore)

    keys = _per_unit_keys(xp, weight, unit, heads)
    kept, every = (xp.where(chosen, keys, 0).sum(-1), keys.sum(-1))
    dense = xp.zeros(kept.shape, xp.boolean, kept)
    if selector.may_turn_dense and dense_above < 1.0:
        dense = kept > dense_above * every
        chosen = xp.where(dense[..., None], visible, chosen)
        kept = xp.where(dense, every, kept)
    if not per_query:
        return Chosen(chosen, None, kept, every, dense)
    by_tile = [tiles.split(x[..., None], 0)[..., 0].sum(-1) for x in (kept, every)]
    return Chosen(_union(xp, chosen, tiles), chosen, *by_tile, xp.any_(tiles.split(dense[..., None], False)[..., 0], -1))


def _union(xp, wanted: Array, unit: Tiles) -> Array:
    return xp.any_(unit.split(wanted, False), 3)


def _per_unit_keys(xp, weight: Array, unit: Tiles, heads: int) -> Array:
    """[batch, heads, units, blocks] keys of a block that some query of the unit sees."""
    return xp.amax(unit.split(share_over_group(weight, heads, xp.amax), 0), 3)


def _forced(xp, rows: Rows, geometry: Geometry, keep: Pattern | None, tiles: Tiles, per_query: bool) -> Array:
    """[batch, q_heads, rows, blocks]: blocks cut by causality, window or packing, non-finite ones, and the pattern's."""
    size = geometry.block_size
    real = split_blocks(xp.full((1, geometry.kv_len), True, xp.boolean, rows.query), size, False)
    allowed = split_blocks(rows.structural, size, False)
    some, every = xp.any_(allowed, -1), xp.all_(allowed | ~real, -1)
    if not per_query:
        # what one query of a tile sees whole and another does not is cut as well
        some_tile = tiles.spread(xp.any_(tiles.split(some[None, None], False), 3))[0, 0]
        every_tile = tiles.spread(xp.all_(tiles.split(every[None, None], True), 3))[0, 0]
        some, every = some_tile, every_tile
    cut = (some & ~every)[None, None]
    broken = ~xp.repeat_each(geometry.finite, rows.query.shape[1] // geometry.finite.shape[1], 1)[:, :, None, :]
    forced = cut | broken
    if keep is not None:
        key = xp.arange(0, geometry.kv_len, rows.query)[None, :]
        wanted = keep.keeps(rows.position[:, None], key) & rows.structural
        wanted = xp.any_(split_blocks(wanted, size, False), -1)[None, None]
        # the tile keeps what the pattern wants for any of its queries, so proofs of the others may count on it
        forced = forced | (wanted if per_query else tiles.spread(xp.any_(tiles.split(wanted, False), 3)))
    return forced


def _by_rank(xp, selector: RankSelector, candidates: Candidates, unit: Tiles, heads: int) -> Array:
    """The first ``k`` blocks of every unit by the largest share over its queries (and over the heads of a group)."""
    estimate = candidates.scores.estimate
    lse = xp.logsumexp(estimate, -1)[..., None]
    shares = estimate - xp.where(xp.isfinite(lse), lse, 0.0)
    best = xp.amax(unit.split(share_over_group(shares, heads, xp.amax), -math.inf), 3)
    visible = xp.any_(unit.split(share_over_group(candidates.visible, heads, xp.any_), False), 3)
    # blocks that only queries between the strides see rank last, before the invisible ones
    best = xp.where(visible, xp.maximum(best, -1e30), -math.inf)
    wanted = xp.tabulated(selector.k, xp.total(visible, -1, xp.int64), visible.shape[-1])
    _, order = xp.sort_descending(best, -1)
    rank = xp.inverse_permutation(order, -1)
    return (rank < wanted[..., None]) & visible


def _best_of_the_forgotten(
    xp, chosen: Array, candidates: Candidates, unit: Tiles, heads: int, rescore: Callable[[], Array]
) -> Array:
    """The arg-max block of every query that sees something and of which nothing was kept."""
    seen = candidates.visible
    per_row = xp.repeat_each(unit.spread(chosen), seen.shape[1] // heads, 1)
    forgotten = xp.any_(seen, -1) & ~xp.any_(per_row & seen, -1)
    if xp.known_empty(forgotten):
        return chosen
    best = xp.argmax(xp.where(seen, rescore(), -math.inf), -1)
    block = xp.arange(0, seen.shape[-1], seen)
    wanted = (best[..., None] == block) & forgotten[..., None]
    return _union(xp, share_over_group(wanted, heads, xp.any_), unit)
