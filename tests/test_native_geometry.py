"""Kernel geometry on every instruction set against the reference: equal where rounding allows, and always a bound."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sieve_attn import geometry as g
from sieve_attn import native
from sieve_attn.bounds import UNIT
from sieve_attn.geometry import native as kernels
from sieve_attn.geometry import reference
from sieve_attn.testing import GENERATORS, Shape
from sieve_attn.testing.contracts import coins
from sieve_attn.testing.strategies import gaussian, generators, seeds
from sieve_attn.types import Statistics

pytestmark = pytest.mark.skipif(bool(native.missing()), reason="pure-Python installation")

LAWS = settings(max_examples=40, deadline=None, derandomize=True)
KNOWN = Statistics(radius=True, box=True, sketch_bits=4, spectral=True)
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
SIZES = st.sampled_from([1, 4, 16, 24, 64, 128])
DIMS = st.sampled_from([1, 8, 17, 33, 64, 80, 128])
LEVELS = native.module().levels() if not native.missing() else []


@pytest.fixture(params=LEVELS, autouse=True)
def level(request):
    native.module().force_level(request.param)
    yield request.param
    native.module().force_level("")


def statistics(bits):
    return Statistics(radius=True, box=True, sketch_bits=bits, spectral=bits > 0)


def broken(k, seed):
    """Some keys with NaN or infinities."""
    k = k.clone()
    k[..., :1][coins(seed, 0.05, *k.shape[:3])[..., None]] = torch.nan
    k[..., -1:][coins(seed + 1, 0.05, *k.shape[:3])[..., None]] = torch.inf
    return k


@LAWS
@given(generators(), seeds(), st.integers(1, 150), SIZES, DIMS, st.integers(0, 8), DTYPES, st.booleans(), st.booleans())
def test_kernels_equal_the_reference(name, seed, length, size, dim, bits, dtype, masked, poisoned):
    _, k, _ = GENERATORS[name](seed, Shape(2, 2, 2, 1, length, dim, 5), dtype)
    k = broken(k, seed) if poisoned else k
    mask = coins(seed, 0.6, 2, length) if masked else None
    asked = statistics(bits)
    assert kernels.why_not(k, asked) == ()
    got = kernels.build(k, size, asked, key_mask=mask)
    scale = got.sketch.channel_scale if bits else None
    wanted = reference.build(k, size, asked, key_mask=mask, channel_scale=scale)
    assert (got.kv_len, got.block_size, got.statistics) == (wanted.kv_len, wanted.block_size, wanted.statistics)
    for name in ("count", "finite", "low", "high"):
        assert torch.equal(getattr(got, name), getattr(wanted, name)), name
    for f in fields(wanted):
        a, b = getattr(got, f.name), getattr(wanted, f.name)
        assert (a is None) == (b is None), f.name
        if isinstance(b, torch.Tensor):
            assert (a.dtype, a.shape) == (b.dtype, b.shape), f.name
    size_of = wanted.key_norm[..., None].double() + 1e-37
    assert ((got.mean.double() - wanted.mean.double()).abs() <= 2e-6 * size_of).all()
    for name in ("key_norm", "radius"):
        a, b = getattr(got, name).double(), getattr(wanted, name).double()
        assert torch.equal(a.isfinite(), b.isfinite())
        there = b.isfinite()
        assert ((a - b).abs()[there] <= 4e-6 * size_of[..., 0][there]).all(), name
    if not bits:
        assert got.sketch is None
        return
    same = (got.sketch.scale == wanted.sketch.scale) & (got.sketch.planes == wanted.sketch.planes).all(0).all(-1)
    for b, h, j in (~same).nonzero().tolist():
        _equally_good(k[b, h, j].float(), got.sketch, wanted.sketch, (b, h, j))
    for name in ("error", "metric_error"):
        a, b = getattr(got.sketch, name)[same].double(), getattr(wanted.sketch, name)[same].double()
        there = b.isfinite() & a.isfinite()
        assert ((a - b).abs()[there] <= b[there] * 2.0**-10 + 2.0**-24).all(), name
    anew = reference.build(k, size, asked, key_mask=mask).sketch.channel_scale
    assert torch.allclose(scale, anew, rtol=1e-6, atol=0)


def _equally_good(key, got, wanted, at):
    """Two clips may lose equally much within rounding; then, and only then, codes differ."""
    white = key.double() / got.channel_scale[at[0], at[1]].double()
    losses = []
    for sketch in (got, wanted):
        metric = g.decode(sketch).double()[at] / sketch.channel_scale[at[0], at[1]].double()
        losses.append(float((metric - white).square().sum()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4), at


@LAWS
@given(generators(), seeds(), st.integers(1, 90), SIZES, DIMS, st.integers(1, 8), DTYPES)
def test_errors_are_bounds_in_fp64(name, seed, length, size, dim, bits, dtype):
    _, k, _ = GENERATORS[name](seed, Shape(1, 2, 2, 1, length, dim, 5), dtype)
    found = kernels.build(k, size, statistics(bits))
    sketch = found.sketch
    apart = k.double() - g.decode(sketch).double()
    metric = apart / sketch.channel_scale.double()[:, :, None]
    assert (apart.norm(dim=-1) <= sketch.error.double()).all()
    assert (metric.norm(dim=-1) <= sketch.metric_error.double()).all()
    for e, bound in ((apart, sketch.spectral), (metric, sketch.metric_spectral)):
        rows = torch.nn.functional.pad(e, (0, 0, 0, -length % size)).unflatten(2, (-1, size))
        assert (torch.linalg.matrix_norm(rows, 2) ** 2 <= bound.double()).all()
    rows = torch.nn.functional.pad(k.double(), (0, 0, 0, -length % size)).unflatten(2, (-1, size))
    real = torch.nn.functional.pad(torch.ones(length, dtype=torch.bool), (0, -length % size)).unflatten(0, (-1, size))
    assert (rows.norm(dim=-1).amax(-1) <= found.key_norm.double()).all()
    away = torch.where(real, (rows - found.mean.double()[:, :, :, None]).norm(dim=-1), 0.0).amax(-1)
    assert (away <= found.radius.double()).all()
    assert (found.radius.double() <= away * (1 + 2 * (dim + 16) * UNIT) + 1e-40).all()


def test_spectral_bounds_are_as_tight_as_the_reference():
    _, k, _ = gaussian(1, Shape(1, 2, 2, 1, 300, 64, 5))
    for size in (8, 16, 128):
        got = kernels.build(k, size, KNOWN).sketch
        wanted = reference.build(k, size, KNOWN, channel_scale=got.channel_scale).sketch
        for name in ("spectral", "metric_spectral"):
            assert torch.allclose(getattr(got, name), getattr(wanted, name), rtol=1e-4)


def test_strides_and_numpy():
    _, k, _ = gaussian(1, Shape(2, 2, 2, 1, 50, 24, 5))
    wanted = kernels.build(k, 16, KNOWN)
    every = torch.empty(2, 50, 2, 48)
    every[..., ::2] = k.transpose(1, 2)
    other = kernels.build(every[..., ::2].transpose(1, 2), 16, KNOWN)
    arrays = kernels.build(k.numpy(), 16, KNOWN)
    assert isinstance(arrays.sketch.planes, np.ndarray)
    for f in fields(wanted):
        x = getattr(wanted, f.name)
        if isinstance(x, torch.Tensor):
            assert torch.equal(getattr(other, f.name), x), f.name
            assert np.array_equal(getattr(arrays, f.name), x.numpy()), f.name
    for f in fields(wanted.sketch):
        x = getattr(wanted.sketch, f.name)
        if isinstance(x, torch.Tensor):
            assert torch.equal(getattr(other.sketch, f.name), x), f.name
            assert np.array_equal(getattr(arrays.sketch, f.name), x.numpy()), f.name


def copied(k):
    """The same keys, whose channels do not lie side by side."""
    return k.mT.contiguous().mT


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("spread", [0.0, 3.0, 11.0, 16.0])
def test_keys_read_where_they_lie_give_the_bits_of_their_copies(dim, spread):
    """One pass over whole blocks, and quotients by products and corrections, round as the steps of a block in parts do."""
    source = torch.Generator().manual_seed(int(spread) + dim)
    k = torch.randn(2, 2, 1500, dim, generator=source) * torch.randn(2, 2, 1500, 1, generator=source).exp()
    k = k * 10.0 ** (spread * (2.0 * torch.rand(dim, generator=source) - 1.0))
    k[0, 0, 40:60] = 0.0
    k[0, 1, 100:120, ::3] = 1e-30
    k[1, 0, 200] = torch.inf
    k[1, 1, 300:310] *= 1e12
    for keys in (k, k.bfloat16()):
        for size in (16, 24):
            mine, theirs = (kernels.build(x, size, statistics(4)) for x in (keys, copied(keys)))
            assert torch.equal(mine.sketch.channel_scale, theirs.sketch.channel_scale)
            for part, other in ((mine, theirs), (mine.sketch, theirs.sketch)):
                for f in fields(part):
                    if isinstance(getattr(part, f.name), torch.Tensor):
                        assert torch.equal(getattr(part, f.name), getattr(other, f.name)), (f.name, size, keys.dtype)


def test_quotients_of_whole_blocks_are_those_of_division():
    """A unit in the last place of the largest quotient of a key moves its scale once in some thousand keys."""
    source = torch.Generator().manual_seed(5)
    k = torch.randn(1, 4, 60_000, 64, generator=source) * torch.rand(64, generator=source)
    mine, theirs = (kernels.build(x, 16, Statistics(sketch_bits=1)).sketch for x in (k, copied(k)))
    for name in ("scale", "planes", "error", "metric_error"):
        assert torch.equal(getattr(mine, name), getattr(theirs, name)), name


def test_thread_counts_change_no_bit():
    _, k, _ = gaussian(1, Shape(1, 3, 3, 1, 5000, 64, 5))
    one = kernels.build(k, 16, KNOWN)
    torch.set_num_threads(3)
    try:
        three = kernels.build(k, 16, KNOWN)
    finally:
        torch.set_num_threads(1)
    for name in ("mean", "key_norm", "radius", "low", "high"):
        assert torch.equal(getattr(one, name), getattr(three, name))
    for name in ("planes", "scale", "error", "metric_error", "spectral", "metric_spectral", "channel_scale"):
        assert torch.equal(getattr(one.sketch, name), getattr(three.sketch, name))


def test_build_takes_kernels_where_they_know_everything(monkeypatch):
    ran = []
    for where, which in ((kernels, "kernels"), (reference, "reference")):
        real = where.build
        monkeypatch.setattr(where, "build", lambda *a, real=real, which=which, **k: ran.append(which) or real(*a, **k))
    k = torch.randn(1, 1, 40, 8)
    g.build(k, 16, KNOWN)
    g.build(k, 16, KNOWN, backend="reference")
    g.build(k.double(), 16, KNOWN)
    for other in (Statistics(variance=True), Statistics(direction=True), Statistics(sub_means=4), Statistics(value=True)):
        g.build(k, 16, other, value=k)
        assert kernels.why_not(k, other) != ()
    assert ran == ["kernels"] + ["reference"] * 6


def test_the_spectral_numbers_are_there_only_when_asked_for():
    k = torch.randn(1, 1, 100, 8)
    for backend in ("auto", "reference"):
        cheap = g.build(k, 16, Statistics(sketch_bits=4), backend=backend)
        assert cheap.sketch.spectral is None
        assert cheap.sketch.metric_spectral is None
        assert not cheap.has(Statistics(sketch_bits=4, spectral=True))
        whole = g.build(k, 16, Statistics(sketch_bits=4, spectral=True), backend=backend)
        assert whole.has(Statistics(sketch_bits=4))
        longer = torch.cat([k, torch.randn(1, 1, 30, 8)], 2)
        for start in (cheap, whole):
            grown = g.append(start, longer)
            assert (grown.sketch.spectral is None) == (start.sketch.spectral is None)
            assert g.reorder(grown, torch.tensor([0, 0])).count.shape[0] == 2
