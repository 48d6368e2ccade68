"""A cache layer's stream held against the geometry built anew."""

from __future__ import annotations

from dataclasses import fields

import torch

from sieve_attn import geometry


def assert_recomputed_alike(layer, mask=None):
    """The stream of a cache layer equals, field by field, the geometry built from its keys."""
    held = layer.stream.geometry
    mask = None if mask is None or bool(mask.all()) else mask.bool()
    anew = geometry.build(layer.keys, held.block_size, held.statistics, value=layer.values, key_mask=mask)
    for part, other in ((held, anew), (held.sketch, anew.sketch)):
        for f in () if other is None else fields(other):
            mine, theirs = getattr(part, f.name), getattr(other, f.name)
            if f.name.endswith("spectral") or f.name == "variance":
                # how a matrix product rounds depends on how many blocks it runs over
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
            elif isinstance(theirs, torch.Tensor):
                assert torch.equal(mine, theirs), f.name
            elif f.name != "sketch":
                assert mine == theirs, f.name
