"""Geometry on the device against the reference: the same codes and scales to the bit, and errors that are bounds."""

import sys
from dataclasses import fields
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sieve_attn import geometry as g
from sieve_attn.geometry import native, reference
from sieve_attn.geometry import triton as device
from sieve_attn.testing import GENERATORS, Shape
from sieve_attn.testing.contracts import coins
from sieve_attn.testing.strategies import gaussian, generators, seeds
from sieve_attn.types import Statistics

LAWS = settings(max_examples=12, deadline=None, derandomize=True)
DTYPES = st.sampled_from([torch.float32, torch.float16])
SIZES = st.sampled_from([1, 16, 24, 64])
DIMS = st.sampled_from([1, 8, 33, 64])
WHOLE = Statistics(radius=True, box=True, value=True, sketch_bits=4, spectral=True)


def statistics(bits):
    return Statistics(radius=True, box=True, value=True, sketch_bits=bits, spectral=bits > 0)


def tensors(x):
    return {f.name: getattr(x, f.name) for f in fields(x) if isinstance(getattr(x, f.name), torch.Tensor)}


@LAWS
@given(generators(), seeds(), st.integers(1, 110), SIZES, DIMS, st.integers(0, 8), DTYPES, st.booleans(), st.booleans())
def test_the_device_equals_the_reference(name, seed, length, size, dim, bits, dtype, masked, poisoned):
    _, k, v = GENERATORS[name](seed, Shape(1, 2, 2, 1, length, dim, 5), dtype)
    mask = coins(seed, 0.6, 1, length) if masked else None
    if poisoned:
        k, v = k.clone(), v.clone()
        k[..., :1][coins(seed, 0.05, *k.shape[:3])[..., None]] = torch.nan
        v[..., -1:][coins(seed + 1, 0.05, *v.shape[:3])[..., None]] = torch.inf
    asked = statistics(bits)
    assert device.why_not(k, size, v, named=True) == ()
    got = device.build(k, size, asked, value=v, key_mask=mask)
    scale = got.sketch.channel_scale if bits else None
    wanted = reference.build(k, size, asked, value=v, key_mask=mask, channel_scale=scale)
    assert (got.kv_len, got.block_size, got.statistics) == (wanted.kv_len, wanted.block_size, wanted.statistics)
    for part, other in ((got, wanted), (got.sketch, wanted.sketch)) if bits else ((got, wanted),):
        assert {n: (x.dtype, x.shape) for n, x in tensors(part).items()} == {
            n: (x.dtype, x.shape) for n, x in tensors(other).items()
        }
    for name in ("count", "finite", "low", "high"):
        assert torch.equal(getattr(got, name), getattr(wanted, name)), name
    size_of = wanted.key_norm[..., None].double() + 1e-37
    assert ((got.mean.double() - wanted.mean.double()).abs() <= 2e-6 * size_of).all()
    assert torch.allclose(got.value_mean, wanted.value_mean, rtol=1e-5, atol=1e-30)
    for name in ("key_norm", "radius", "value_radius"):
        a, b = getattr(got, name).double(), getattr(wanted, name).double()
        assert torch.equal(a.isfinite(), b.isfinite()), name
        there = b.isfinite()
        reach = size_of[..., 0] if name != "value_radius" else torch.where(there, b, 0.0) + 1e-30
        assert ((a - b).abs()[there] <= 4e-6 * reach[there]).all(), name
    if not bits:
        return
    same = (got.sketch.scale == wanted.sketch.scale) & (got.sketch.planes == wanted.sketch.planes).all(0).all(-1)
    for at in (~same).nonzero().tolist():
        _equally_good(k[tuple(at)].float(), got.sketch, wanted.sketch, tuple(at))
    for name in ("error", "metric_error"):
        a, b = getattr(got.sketch, name)[same].double(), getattr(wanted.sketch, name)[same].double()
        there = b.isfinite() & a.isfinite()
        assert ((a - b).abs()[there] <= b[there] * 2.0**-10 + 2.0**-24).all(), name
    anew = reference.build(k, size, asked, value=v, key_mask=mask).sketch.channel_scale
    assert torch.allclose(scale, anew, rtol=1e-6, atol=0)


def _equally_good(key, got, wanted, at):
    """Two clips may lose equally much within rounding; then, and only then, codes differ."""
    white = key.double() / got.channel_scale[at[:2]].double()
    losses = []
    for sketch in (got, wanted):
        metric = g.decode(sketch).double()[at] / sketch.channel_scale[at[:2]].double()
        losses.append(float((metric - white).square().sum()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4), at


@LAWS
@given(generators(), seeds(), st.integers(1, 80), SIZES, DIMS, st.integers(1, 8), DTYPES)
def test_errors_are_bounds_in_fp64(name, seed, length, size, dim, bits, dtype):
    _, k, _ = GENERATORS[name](seed, Shape(1, 2, 2, 1, length, dim, 5), dtype)
    found = device.build(k, size, Statistics(radius=True, sketch_bits=bits, spectral=True))
    sketch = found.sketch
    apart = k.double() - g.decode(sketch).double()
    metric = apart / sketch.channel_scale.double()[:, :, None]
    assert (apart.norm(dim=-1) <= sketch.error.double()).all()
    assert (metric.norm(dim=-1) <= sketch.metric_error.double()).all()
    rows = torch.nn.functional.pad(apart, (0, 0, 0, -length % size)).unflatten(2, (-1, size))
    assert (torch.linalg.matrix_norm(rows, 2) ** 2 <= sketch.spectral.double()).all()
    rows = torch.nn.functional.pad(k.double(), (0, 0, 0, -length % size)).unflatten(2, (-1, size))
    real = torch.nn.functional.pad(torch.ones(length, dtype=torch.bool), (0, -length % size)).unflatten(0, (-1, size))
    assert (rows.norm(dim=-1).amax(-1) <= found.key_norm.double()).all()
    away = torch.where(real, (rows - found.mean.double()[:, :, :, None]).norm(dim=-1), 0.0).amax(-1)
    assert (away <= found.radius.double()).all()
    assert (found.radius.double() <= away * (1 + 2 * (dim + 16) * 2.0**-24) + 1e-40).all()


@pytest.mark.filterwarnings("ignore:overflow|invalid value:RuntimeWarning")  # NumPy's, who interprets the kernels
def test_huge_and_tiny_keys_keep_their_bounds():
    for scale in (1e-42, 1e-38, 1e-20, 1e30, 3e38):
        k = torch.randn(1, 1, 40, 16, generator=torch.Generator().manual_seed(1)).clamp(-1, 1) * scale
        found = device.build(k, 16, Statistics(sketch_bits=4))
        apart = (k.double() - g.decode(found.sketch).double()).norm(dim=-1)
        assert (apart <= found.sketch.error.double()).all(), scale
        whole = torch.nn.functional.pad(k.double().norm(dim=-1), (0, 8)).unflatten(-1, (-1, 16)).amax(-1)
        assert (whole <= found.key_norm.double()).all(), scale


def test_strides_do_not_matter():
    _, k, v = gaussian(1, Shape(2, 2, 2, 1, 50, 24, 5))
    wanted = device.build(k, 16, WHOLE, value=v)
    every = torch.empty(2, 50, 2, 48)
    every[..., ::2] = k.transpose(1, 2)
    other = device.build(every[..., ::2].transpose(1, 2), 16, WHOLE, value=v.mT.contiguous().mT)
    for part, same in ((wanted, other), (wanted.sketch, other.sketch)):
        for name, x in tensors(part).items():
            assert torch.equal(x, tensors(same)[name]), name


def test_appending_equals_building_anew_and_reads_new_keys_alone(monkeypatch):
    _, k, v = gaussian(1, Shape(1, 2, 2, 1, 130, 16, 5))
    whole = g.build(k, 16, WHOLE, value=v, backend="triton")
    lengths = []
    real = device.build
    monkeypatch.setattr(device, "build", lambda key, *a, **o: lengths.append(key.shape[2]) or real(key, *a, **o))
    monkeypatch.setattr(sys.modules["sieve_attn.geometry.edit"], "build", partial(g.build, backend="triton"))
    start = g.build(k[:, :, :100], 16, WHOLE, value=v[:, :, :100], backend="triton")
    grown = g.append(start, k, value=v)
    assert lengths == [100, 34]  # the open block and what came
    for part, same in ((whole, grown), (whole.sketch, grown.sketch)):
        for name, x in tensors(part).items():
            assert torch.equal(x, tensors(same)[name]), name


def test_rare_statistics_are_the_references():
    _, k, v = gaussian(1, Shape(1, 2, 2, 1, 70, 16, 5))
    asked = Statistics(variance=True, direction=True, sub_means=4, value=True)
    got, wanted = device.build(k, 16, asked, value=v), reference.build(k, 16, asked, value=v)
    assert tensors(got).keys() == tensors(wanted).keys()
    for name, x in tensors(wanted).items():
        assert torch.allclose(tensors(got)[name], x, rtol=1e-5, atol=1e-6), name


def test_only_a_named_backend_takes_the_interpreter(monkeypatch):
    ran = []
    for where, which in ((device, "triton"), (native, "native"), (reference, "reference")):
        real = where.build
        monkeypatch.setattr(where, "build", lambda *a, real=real, which=which, **o: ran.append(which) or real(*a, **o))
    k = torch.randn(1, 1, 40, 8)
    for backend in ("auto", "triton", "reference"):
        g.build(k, 16, backend=backend)
    assert ran == ["reference" if native.why_not(k, Statistics()) else "native", "triton", "reference"]


def test_what_kernels_cannot_do_is_said():
    k = torch.randn(1, 1, 40, 8)

    def said(*args):
        return "; ".join(device.why_not(*args, named=True))

    assert said(k, 16) == ""
    assert "not float64" in said(k.double(), 16)
    assert "not float64" in said(k, 16, k.double())
    assert "at most 512 channels, not keys of 600" in said(torch.zeros(1, 1, 2, 600), 16)
    assert "blocks of at most 256 keys, not of 300" in said(k, 300)
    assert "not numpy arrays" in said(k.numpy(), 16)
    assert "on cuda, not on cpu" in "; ".join(device.why_not(k, 16))
