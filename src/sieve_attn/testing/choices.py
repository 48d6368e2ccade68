"""Two selections of one call compared as sets: they may differ where estimates tie within rounding, and nowhere else."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from sieve_attn import pipeline
from sieve_attn.policies import Policy
from sieve_attn.selection import Mass, RelativeThreshold, RunningMaximum, Threshold
from sieve_attn.selection.base import RankSelector
from sieve_attn.selection.reference import Tiles, share_over_group
from sieve_attn.types import Blocks, Call, Geometry

NEAR = 2e-3  # in logits: what may tie


def tiles_of(found: tuple) -> Tensor:
    """[batch, heads, tiles, blocks] of what ``pipeline.select`` found."""
    return found[0].blocks.to_tiles()


def reference(call: Call, geometry: Geometry, policy: Policy) -> tuple:
    return pipeline.select(call, geometry, policy, backend="reference")


def assert_same_choice(got: tuple, call: Call, geometry: Geometry, policy: Policy) -> None:
    """``got``, as ``pipeline.select`` returns it, is the reference's choice but for ties."""
    wanted = reference(call, geometry, policy)
    mine, theirs = got[0].blocks, wanted[0].blocks
    for f in fields(Blocks):
        a, b = getattr(mine, f.name), getattr(theirs, f.name)
        assert (a.dtype if isinstance(a, Tensor) else a) == (b.dtype if isinstance(b, Tensor) else b), f.name
    assert torch.equal(got[1][1], wanted[1][1])  # visible keys
    assert got[1][0].shape == wanted[1][0].shape
    a, b = tiles_of(got), tiles_of(wanted)
    if torch.equal(a, b):
        assert torch.equal(got[1][0], wanted[1][0])
        assert got[2] == wanted[2]
    elif isinstance(policy.selector, RankSelector):
        _only_ties(call, geometry, policy, a, b)
    else:
        _between(call, geometry, policy, a)


def _only_ties(call: Call, geometry: Geometry, policy: Policy, a: Tensor, b: Tensor) -> None:
    """Where tiles differ, their blocks tie with the last one kept (or stand in for a query that thereby lost everything)."""
    heads = a.shape[1]
    rows, tiles = call.rows(0, call.q_len), Tiles(call.q_len, call.lead(policy.query_tile), policy.query_tile)
    estimate = policy.scorer.score(rows, geometry).estimate
    looked = torch.zeros(call.q_len, dtype=torch.bool)
    looked[tiles.looked_at(policy.query_stride, call.query)] = True
    lse = torch.logsumexp(estimate, -1, keepdim=True)
    shares = torch.where(looked[:, None], estimate - torch.where(lse.isfinite(), lse, 0.0), -math.inf)
    best = tiles.split(share_over_group(shares, heads, torch.amax), -math.inf).amax(3)
    seen = share_over_group(estimate > -math.inf, heads, torch.any)
    visible = tiles.split(seen, False).any(3)
    top = (estimate >= estimate.amax(-1, keepdim=True) - NEAR) & (estimate > -math.inf)
    top = tiles.split(share_over_group(top, heads, torch.any), False).any(3)  # what a query that lost everything gets
    for at in ((a != b).any(-1)).nonzero().tolist():
        at = tuple(at)
        last = best[at].masked_fill(~visible[at], -math.inf).sort(descending=True).values
        last = last[int(policy.selector.k(visible[at].sum())) - 1]
        tied = (best[at] - last).abs() <= NEAR if last.isfinite() else best[at] == last
        assert int(tied.sum()) > 1, at
        assert (tied | top[at])[a[at] != b[at]].all(), at


def _between(call: Call, geometry: Geometry, policy: Policy, a: Tensor) -> None:
    """The choice lies between those of a slightly stricter and a slightly laxer rule."""
    selector: Any = policy.selector
    strict, lax = {
        Threshold: lambda: (Threshold(selector.threshold + NEAR), Threshold(selector.threshold - NEAR)),
        RelativeThreshold: lambda: (
            RelativeThreshold(max(0.0, selector.margin - NEAR)),
            RelativeThreshold(selector.margin + NEAR),
        ),
        RunningMaximum: lambda: (
            replace(selector, margin=max(0.0, selector.margin - NEAR)),
            replace(selector, margin=selector.margin + NEAR),
        ),
        Mass: lambda: (Mass(max(0.0, selector.mass - NEAR)), Mass(min(1.0, selector.mass + NEAR))),
    }[type(selector)]()
    fewer, more = (tiles_of(reference(call, geometry, replace(policy, selector=s))) for s in (strict, lax))
    assert not (fewer & ~a).any()
    assert not (a & ~more).any()
