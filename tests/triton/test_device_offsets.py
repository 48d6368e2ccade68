"""Diagonals and the wheel on the device against the oracle: the same keys, output, lse and gradients."""

import pytest
import torch

from sieve_attn.attend import offsets as stage
from sieve_attn.attend import reference
from sieve_attn.attend.triton import diagonals, wheel
from sieve_attn.patterns import OffsetPattern, Primes, Sinks, Squares, Window
from sieve_attn.testing import Shape
from sieve_attn.testing.contracts import draw
from sieve_attn.testing.strategies import gaussian

PATTERNS = {
    "primes": Primes() | Window(4) | Sinks(2),
    "squares": Squares(),
    "squares and first": Squares() | Sinks(5),
    "window": Window(9),
    "prefix alone": Sinks(3),
    "far": OffsetPattern((5, 40, 1000)) | Sinks(50),
}
SHAPES = (
    Shape(1, 2, 1, 30, 30, 24, 20),
    Shape(2, 1, 1, 7, 40, 16, 33),
    Shape(1, 2, 2, 1, 33, 8, 8),
    Shape(1, 1, 1, 30, 12, 8, 8),
)


@pytest.mark.parametrize(
    ("name", "shape"),
    [*(("primes", shape) for shape in SHAPES), ("squares", SHAPES[1]), ("window", SHAPES[0]), ("prefix alone", SHAPES[3]),
     ("far", SHAPES[2])],
    ids=str,
)  # fmt: skip
def test_diagonals_equal_the_oracle(name, shape):
    q, k, v = gaussian(3, shape)
    found = stage.reach(PATTERNS[name], shape.kv_len)
    offsets = torch.from_numpy(found.offsets.copy())
    out, lse = diagonals.attend(q, k, v, offsets, found.prefix, 0.3)
    call, selection = stage._as_call(q, k, v, offsets, found.prefix, 0.3)
    wanted, total = reference.attend(call, selection)
    assert torch.allclose(out, wanted, rtol=1e-4, atol=1e-5)
    assert torch.allclose(lse, total, rtol=1e-5, atol=1e-5)
    pull, more = draw(5, *out.shape).float(), draw(6, *lse.shape).float()
    grads = diagonals.backward(q, k, v, offsets, found.prefix, 0.3, pull, more, out, lse)
    theirs = reference.backward(call, selection, pull, more)
    for mine, n in zip(grads, ("query", "key", "value"), strict=True):
        assert torch.allclose(mine, theirs[n], rtol=1e-4, atol=2e-5), n
    again = diagonals.backward(q, k, v, offsets, found.prefix, 0.3, pull, more, out, lse)
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))


WHEELS = {
    "grouped": ("primes", (2, 2, 1, 40, 40, 12, 20), stage.Plan("wheel", 2, (1,))),
    "some queries": ("primes", (1, 1, 1, 21, 130, 8, 8), stage.Plan("wheel", 3, (1, 2))),
    "squares behind a prefix": ("squares and first", (1, 1, 1, 90, 90, 8, 8), stage.Plan("wheel", 4, (0, 1))),
    "every residue": ("window", (1, 1, 1, 66, 66, 8, 8), stage.Plan("wheel", 3, (0, 1, 2))),
    "before the first key": ("primes", (1, 1, 1, 30, 12, 8, 8), stage.Plan("wheel", 2, (1,))),
    "none tiled": ("primes", (1, 1, 1, 8, 8, 8, 8), stage.Plan("wheel", 2, ())),
}


@pytest.mark.parametrize("name", WHEELS)
def test_the_wheel_equals_the_oracle(name):
    pattern, size, plan = WHEELS[name]
    q, k, v = gaussian(3, Shape(*size))
    found = stage.reach(PATTERNS[pattern], size[4])
    given = (torch.from_numpy(found.offsets.copy()), found.prefix, 0.3)
    out, lse = wheel.attend(q, k, v, *given, plan)
    call, selection = stage._as_call(q, k, v, *given)
    wanted, total = reference.attend(call, selection)
    assert torch.allclose(out, wanted, rtol=1e-4, atol=1e-5)
    assert torch.allclose(lse, total, rtol=1e-5, atol=1e-5)
    pull, more = draw(5, *out.shape).float(), draw(6, *lse.shape).float()
    grads = wheel.backward(q, k, v, *given, pull, more, out, lse, plan)
    theirs = reference.backward(call, selection, pull, more)
    for mine, n in zip(grads, ("query", "key", "value"), strict=True):
        assert torch.allclose(mine, theirs[n], rtol=1e-4, atol=2e-5), n


@pytest.mark.parametrize(
    "plan", [stage.Plan("wheel", 30, (1, 7, 11, 13)), stage.Plan("wheel", 240, (1, 4, 49))], ids=lambda p: p.title
)
@pytest.mark.parametrize("lengths", [(700, 700), (90, 700), (45, 31)])
def test_tiles_and_diagonals_part_the_pairs(plan, lengths):
    """Every pair of the pattern is read once: by a listed tile where its residue is tiled, else by diagonals."""
    pattern = (Primes() if plan.modulus == 30 else Squares()) | Window(4) | Sinks(3)
    q_len, kv_len = lengths
    found = stage.reach(pattern, kv_len)
    s = wheel.spokes(torch.from_numpy(found.offsets.copy()), found.prefix, q_len, kv_len, plan)
    read = s.mask()[0, 0] & s.shown
    read &= s.blocks.to_tiles()[0, 0].repeat_interleave(s.blocks.q_block, 0).repeat_interleave(s.blocks.kv_block, 1)
    tiles = torch.zeros(q_len, kv_len, dtype=torch.bool)
    tiles[s.lost :] = read[s.at][:, s.place]
    rest = stage.selection_of(stage.Reach(found.prefix, s.rest.numpy()), q_len, kv_len).to_dense(tiles)[0, 0]
    rest &= torch.ones_like(rest).tril(kv_len - q_len)
    assert not (tiles & rest).any()
    assert torch.equal(tiles | rest, torch.from_numpy(pattern.to_dense(q_len, kv_len)))
    assert tiles.any() or kv_len < 40


def test_the_wheel_computes_tiles_with_offsets_alone():
    """Of the pairs of groups only those whose residues are tiled, and of those only what lies before the query."""
    found = stage.reach(Primes(), 8192)
    made = wheel.spokes(torch.from_numpy(found.offsets.copy()), 0, 8192, 8192, stage.Plan("wheel", 30, (1, 7, 11, 13)))
    pairs = made.blocks.block_index.shape[0] * 64 * 64
    # a triangle for every residue and group, and tiles that are cut
    assert pairs < 1.1 * 4 * 30 * (8192 / 30 + 64) ** 2 / 2
    assert set((made.rest % 30).tolist()).isdisjoint({1, 7, 11, 13})


def test_the_wheel_in_half_precision_and_over_strides():
    q, k, v = gaussian(3, Shape(1, 2, 1, 60, 60, 24, 24), torch.float16)
    found = stage.reach(PATTERNS["primes"], 60)
    given = (torch.from_numpy(found.offsets.copy()), found.prefix, 0.3, stage.Plan("wheel", 2, (1,)))
    out, _ = wheel.attend(q, k, v, *given)
    exact, _ = reference.attend(*stage._as_call(q.double(), k.double(), v.double(), *given[:3]))
    assert out.dtype == torch.float16
    assert ((out.double() - exact).abs().max() <= 2e-3 * exact.abs().max()).all()
    turned = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    assert torch.equal(wheel.attend(*turned, *given)[0], out)


def test_the_wheel_hides_what_is_not_a_number():
    q, k, v = gaussian(3, Shape(1, 1, 1, 40, 40, 8, 8))
    v[0, 0, 10] = torch.nan
    out, _ = wheel.attend(q, k, v, torch.tensor([0, 1, 4, 7]), 0, 0.3, stage.Plan("wheel", 3, (1,)))
    assert (~out.isfinite()).any(-1).nonzero()[:, 2].tolist() == [10, 11, 14, 17]


def test_half_precision_and_strides():
    q, k, v = gaussian(3, Shape(1, 2, 1, 45, 45, 24, 24), torch.float16)
    found = stage.reach(PATTERNS["primes"], 45)
    offsets = torch.from_numpy(found.offsets.copy())
    out, _ = diagonals.attend(q, k, v, offsets, found.prefix, 0.3)
    exact, _ = reference.attend(*stage._as_call(q.double(), k.double(), v.double(), offsets, found.prefix, 0.3))
    assert ((out.double() - exact).abs().max() <= 2e-3 * exact.abs().max()).all()
    turned = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    assert torch.equal(diagonals.attend(*turned, offsets, found.prefix, 0.3)[0], out)


def test_what_is_not_a_number_reaches_those_who_attend_to_it_alone():
    q, k, v = gaussian(3, Shape(1, 1, 1, 40, 40, 8, 8))
    v[0, 0, 10] = torch.nan
    out, _ = diagonals.attend(q, k, v, torch.tensor([0, 3]), 0, 0.3)
    assert (~out.isfinite()).any(-1).nonzero()[:, 2].tolist() == [10, 13]


def test_the_interpreter_never_serves_unasked():
    q, _, v = gaussian(3, SHAPES[0])
    assert not stage.on_device(q, v)
