"""Laws of the streaming cache layer: it holds what a plain one holds, and its geometry is that of its keys."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from streams import assert_recomputed_alike
from transformers.cache_utils import DynamicLayer

from sieve_attn import policies
from sieve_attn.transformers import StreamedLayer


def test_the_cache_holds_what_a_plain_one_holds_after_every_edit():
    plain, ours = DynamicLayer(), StreamedLayer(policies.TopBlocks(2))
    beams = torch.tensor([1, 1, 0, 2])
    edits = (
        lambda c: c.reorder_cache(torch.tensor([2, 0, 1])), lambda c: c.crop(-3), lambda c: c.batch_repeat_interleave(2),
        lambda c: c.batch_select_indices(beams), lambda c: c.offload(), lambda c: c.prefetch(),
        lambda c: setattr(c, "values", c.values.neg()), lambda c: c.reset(),
    )  # fmt: skip
    seen = []
    for edit in (*edits, None):
        for n in (40, 1, 1, 5, 1):
            batch = 3 if plain.get_seq_length() == 0 else plain.keys.shape[0]
            key, value = torch.randn(batch, 2, n, 8), torch.randn(batch, 2, n, 6)
            with torch.set_grad_enabled(n == 5):
                mine = ours.update(key, value)
            seen.append([(x, x.clone()) for x in mine])
            for a, b in zip(mine, plain.update(key, value), strict=True):
                assert torch.equal(a, b)
        for cache in (plain, ours) if edit else ():
            edit(cache)
    for before, then in (pair for pairs in seen for pair in pairs):
        assert torch.equal(before, then)


def test_a_decoding_step_moves_no_key():
    cache = StreamedLayer(policies.TopBlocks(2))
    with torch.no_grad():
        cache.update(torch.randn(1, 2, 1000, 8), torch.randn(1, 2, 1000, 8))
        places = {cache.update(torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8))[0].data_ptr() for _ in range(200)}
    assert len(places) == 1


def _put(layer, change):
    layer.keys, layer.values = change(layer.keys), change(layer.values)


FOREIGN = {
    "permuted": lambda layer: _put(layer, lambda x: x.flip(2)),
    "in place": lambda layer: layer.keys[:, :, :20].neg_(),
    "values in place": lambda layer: layer.values[:, :, :20].neg_(),
    "values": lambda layer: setattr(layer, "values", layer.values.neg()),
    "evicted, cropped": lambda layer: (_put(layer, lambda x: x[:, :, 20:]), layer.crop(-5)),
    "repeated, reordered": lambda layer: (_put(layer, lambda x: x[[0, 1, 0]]), layer.reorder_cache(torch.tensor([2, 1, 0]))),
}


@pytest.mark.parametrize("edit", FOREIGN)
@pytest.mark.parametrize("grad", [False, True])
def test_a_stream_starts_anew_where_others_changed_the_cache(edit, grad):
    layer = StreamedLayer(replace(policies.TopBlocks(1), far_field=True))  # which keeps the means of values too

    def grow(n):
        batch = layer.keys.shape[0] if layer.is_initialized else 2
        layer.geometry(*layer.update(torch.randn(batch, 2, n, 8), torch.randn(batch, 2, n, 6)), None)
        assert_recomputed_alike(layer)

    with torch.no_grad():
        grow(100)
        grow(1)
        FOREIGN[edit](layer)
    with torch.set_grad_enabled(grad):
        grow(1)
