"""What a Selection means: rows are slices of the whole, `|` is set union, and what cannot be combined raises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sieve_attn.testing import Shape
from sieve_attn.testing.strategies import random_blocks, seeds
from sieve_attn.types import Blocks, Offsets, Ranges, Selection, Tokens

LAWS = settings(max_examples=40, deadline=None, derandomize=True)
LIKE = torch.zeros(1)
lengths = st.tuples(st.integers(1, 30), st.integers(1, 30))
ranges = st.builds(lambda p, w: (p, w), st.integers(0, 12), st.integers(0, 12))


@LAWS
@given(lengths, seeds(), st.booleans(), st.booleans(), st.sampled_from([1, 3, 8]), st.sampled_from([1, 4, 7]))
def test_rows_of_blocks_are_slices_of_the_whole(length, seed, per_query, causal, q_block, kv_block):
    shape = Shape(2, 2, 2, *length, 4, 4)
    selection = random_blocks(seed, shape, q_block=q_block, kv_block=kv_block, per_query=per_query, causal=causal)
    dense = selection.to_dense(LIKE)
    assert dense.shape == (2, 2, *length)
    for start, stop in ((0, 1), (length[0] // 2, length[0]), (length[0] - 1, length[0])):
        assert torch.equal(selection.rows(start, stop, LIKE), dense[:, :, start:stop])
    part = selection.blocks
    lead = (length[1] - length[0]) % q_block if causal else 0
    for i in range(length[0]):
        tile = part.to_tiles()[:, :, (i + lead) // q_block]
        whole = tile.repeat_interleave(kv_block, -1)[..., : length[1]]
        assert torch.equal(dense[:, :, i], whole) if not per_query else not (dense[:, :, i] & ~whole).any()


@LAWS
@given(lengths, seeds())
def test_the_padded_form_holds_the_same_blocks(length, seed):
    part = random_blocks(seed, Shape(2, 2, 2, *length, 4, 4), q_block=4, kv_block=3).blocks
    counts, index, most = part.to_padded()
    tiles = part.to_tiles()
    assert most == int(counts.max(initial=0)) if not isinstance(counts, torch.Tensor) else most == int(counts.max())
    for place in torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)).tolist():
        row = index[tuple(place)]
        n = int(counts[tuple(place)])
        assert row[:n].tolist() == tiles[tuple(place)].nonzero()[:, 0].tolist()
        assert (row[n:] == -1).all()


@LAWS
@given(lengths, seeds(), st.booleans(), st.booleans())
def test_blocks_unite(length, seed, first, second):
    shape = Shape(1, 2, 2, *length, 4, 4)
    a, b = random_blocks(seed, shape, per_query=first), random_blocks(seed + 1, shape, per_query=second)
    assert torch.equal((a | b).to_dense(LIKE), a.to_dense(LIKE) | b.to_dense(LIKE))
    assert len((a | b).parts) == 1


@LAWS
@given(lengths, ranges, ranges, st.booleans())
def test_ranges_unite(length, a, b, two_sided):
    a, b = (Selection((Ranges(*length, prefix=p, window=w, two_sided=two_sided),)) for p, w in (a, b))
    assert torch.equal((a | b).to_dense(LIKE), a.to_dense(LIKE) | b.to_dense(LIKE))


offset_sets = st.lists(st.integers(-6, 20), min_size=1, max_size=6).map(lambda s: tuple(sorted(set(s))))


@LAWS
@given(lengths, ranges, offset_sets, offset_sets)
def test_offsets_and_ranges_unite_without_overlap(length, a, s, t):
    near = Selection((Ranges(*length, prefix=a[0], window=a[1]),))
    first, second = (Selection((Offsets(*length, offsets),)) for offsets in (s, t))
    assert torch.equal((first | second).to_dense(LIKE), first.to_dense(LIKE) | second.to_dense(LIKE))
    for both in (near | first, first | near):
        assert torch.equal(both.to_dense(LIKE), near.to_dense(LIKE) | first.to_dense(LIKE))
        dense = [part.rows(0, length[0], LIKE).long() for part in both.parts]
        assert (sum(dense) <= 1).all()
    three = near | first | second
    assert torch.equal(three.to_dense(LIKE), near.to_dense(LIKE) | first.to_dense(LIKE) | second.to_dense(LIKE))


def test_offsets_are_their_definition():
    dense = Selection((Offsets(4, 7, (0, 2, 5), first_key=1),)).to_dense(LIKE)[0, 0]
    wanted = torch.tensor([[i + 3 - j in (0, 2, 5) and j >= 1 for j in range(7)] for i in range(4)])
    assert torch.equal(dense, wanted)


def test_tokens_are_sets():
    index = torch.tensor([[[[0, 4, 4], [-1, -1, -1], [2, -1, 0]]]])
    dense = Selection((Tokens(index, 5),)).to_dense(LIKE)[0, 0]
    assert dense.nonzero().tolist() == [[0, 0], [0, 4], [2, 0], [2, 2]]


def a_blocks(**changes):
    kept = torch.ones(1, 1, 2, 3, dtype=torch.bool)
    return Selection((Blocks.from_tiles(kept, **({"q_len": 8, "kv_len": 12, "q_block": 4, "kv_block": 4} | changes)),))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (a_blocks(), a_blocks(kv_block=5, kv_len=12), "one grid only.*kv_block 4 and 5"),
        (a_blocks(), a_blocks(lead=1, q_len=7), "q_len 8 and 7.*lead 0 and 1"),
        (a_blocks(), Selection((Ranges(8, 12, prefix=2),)), "Blocks, Ranges.*keep="),
        (Selection((Ranges(8, 12, prefix=2),)), Selection((Ranges(8, 13, prefix=2),)), "one q_len, kv_len"),
        (Selection((Ranges(8, 12, prefix=2),)), Selection((Offsets(8, 13, (1,)),)), "kv_len 12 and 13"),
        (Selection((Offsets(8, 12, (1,)),)), Selection((Offsets(8, 12, (1,), first_key=2),)), "first_key"),
        (
            Selection((Ranges(8, 12, window=2, two_sided=True),)),
            Selection((Offsets(8, 12, (1,)),)),
            "one-sided Ranges and Offsets",
        ),
        (Selection((Tokens(torch.zeros(1, 1, 8, 1, dtype=torch.int64), 12),)),) * 2 + ("Tokens",),
    ],
)
def test_what_cannot_be_combined_raises(a, b, message):
    with pytest.raises(ValueError, match=message):
        a | b
