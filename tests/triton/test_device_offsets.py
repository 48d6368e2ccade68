"""Diagonals on the device against the oracle: the same keys, output, lse and gradients."""

import pytest
import torch

from sieve_attn.attend import offsets as stage
from sieve_attn.attend import reference
from sieve_attn.attend.triton import diagonals
from sieve_attn.patterns import OffsetPattern, Primes, Sinks, Squares, Window
from sieve_attn.testing import Shape
from sieve_attn.testing.contracts import draw
from sieve_attn.testing.strategies import gaussian

PATTERNS = {
    "primes": Primes() | Window(4) | Sinks(2),
    "squares": Squares(),
    "window": Window(9),
    "prefix alone": Sinks(3),
    "far": OffsetPattern((5, 40, 1000)) | Sinks(50),
}
SHAPES = (
    Shape(1, 4, 2, 45, 45, 24, 20),
    Shape(2, 2, 1, 7, 60, 16, 33),
    Shape(1, 2, 2, 1, 33, 8, 8),
    Shape(1, 1, 1, 30, 12, 8, 8),
)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
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


def test_half_precision_and_strides():
    q, k, v = gaussian(3, Shape(1, 4, 2, 45, 45, 24, 24), torch.float16)
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
