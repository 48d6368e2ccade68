"""Every statistic of a block against a loop over its keys, and every edit against recomputation."""

from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sieve_attn import geometry as g
from sieve_attn import native
from sieve_attn.geometry.sketch import pack, quantise, unpack
from sieve_attn.scores import KeySketch
from sieve_attn.testing import GENERATORS, Shape
from sieve_attn.testing.contracts import coins
from sieve_attn.testing.strategies import edits, gaussian, generators, seeds
from sieve_attn.types import Sketch, Statistics

LAWS = settings(max_examples=25, deadline=None, derandomize=True)
ALL = Statistics(radius=True, box=True, variance=True, direction=True, value=True, sub_means=4, sketch_bits=4, spectral=True)
OF_KERNELS = Statistics(radius=True, box=True, sketch_bits=4, spectral=True)


def blocks_of(k, v, mask, b, h, size):
    for start in range(0, k.shape[2], size):
        inside = mask[b, start : start + size]
        yield k[b, h, start : start + size][inside].double(), v[b, h, start : start + size][inside].double(), inside


@LAWS
@given(generators(), seeds(), st.integers(1, 70), st.sampled_from([4, 16, 64]), st.booleans())
def test_every_statistic_equals_a_loop(name, seed, length, size, masked):
    shape = Shape(2, 2, 2, 1, length, 8, 5)
    _, k, v = GENERATORS[name](seed, shape)
    mask = coins(seed, 0.6, 2, length) if masked else torch.ones(2, length, dtype=torch.bool)
    found = g.build(k, size, ALL, value=v, key_mask=mask)
    assert found.blocks == -(-length // size)
    for b in range(2):
        for h in range(2):
            for n, (keys, values, inside) in enumerate(blocks_of(k, v, mask, b, h, size)):
                at = (b, h, n)
                assert found.finite[at]
                assert int(found.count[at]) == len(keys)
                if not len(keys):
                    assert not found.mean[at].any()
                    continue
                scale = float(keys.norm(dim=1).max()) + 1e-30
                mean = keys.mean(0)
                near = {"rtol": 1e-5, "atol": 1e-5 * scale}
                assert torch.allclose(found.mean[at].double(), mean, **near)
                assert keys.norm(dim=1).max() <= found.key_norm[at] <= scale * (1 + 1e-5)
                away = (keys - found.mean[at].double()).norm(dim=1).max()
                assert away <= found.radius[at] <= away * (1 + 1e-4) + 1e-5 * scale
                assert torch.equal(found.low[at].double(), keys.amin(0))
                assert torch.equal(found.high[at].double(), keys.amax(0))
                centred = keys - mean
                top = torch.linalg.eigvalsh(centred.T @ centred / len(keys))[-1]
                assert top * (1 - 1e-5) - 1e-10 * scale**2 <= found.variance[at] <= top * 1.4 + 1e-6 * scale**2
                assert torch.allclose(
                    found.channel_variance[at].double(), centred.square().mean(0), rtol=1e-3, atol=1e-5 * scale**2
                )
                middle = values.mean(0)
                assert torch.allclose(found.value_mean[at].double(), middle, rtol=1e-5, atol=1e-5)
                assert (values - found.value_mean[at].double()).norm(dim=1).max() <= found.value_radius[at]
                for part in range(-(-size // 4)):
                    where = torch.arange(len(inside))[inside] // 4 == part
                    assert int(found.sub_counts[at][part]) == int(where.sum())
                    if where.any():
                        assert torch.allclose(found.sub_means[at][part].double(), keys[where].mean(0), **near)


def test_directions_equal_a_loop():
    _, k, v = gaussian(3, Shape(1, 2, 2, 1, 29, 8, 5))
    found = g.build(k, 8, ALL, value=v)
    for h in range(2):
        for n, (keys, _, _) in enumerate(blocks_of(k, v, torch.ones(1, 29, dtype=torch.bool), 0, h, 8)):
            unit = keys / keys.norm(dim=1, keepdim=True)
            centre = unit.mean(0) / unit.mean(0).norm()
            apart = (unit - centre).norm(dim=1)
            at = (0, h, n)
            assert torch.allclose(found.direction_mean[at].double(), centre, atol=1e-5)
            assert float(found.direction_radius[at]) == pytest.approx(float(apart.max()), rel=1e-5)
            assert float(found.direction_variance[at]) == pytest.approx(float(apart.square().mean()), rel=1e-5)
            assert float(found.concentration[at]) == pytest.approx(float((unit @ centre).mean().clamp(0.1, 1)), rel=1e-5)


@LAWS
@given(generators(), seeds(), st.integers(1, 90), st.integers(1, 8), st.sampled_from([torch.float32, torch.bfloat16]))
def test_decoding_errs_by_no_more_than_the_stored_error(name, seed, length, bits, dtype):
    _, k, _ = GENERATORS[name](seed, Shape(1, 2, 2, 1, length, 8, 5), dtype)
    sketch = g.build(k, 16, Statistics(sketch_bits=bits, spectral=True)).sketch
    apart = k.double() - g.decode(sketch).double()
    assert (apart.norm(dim=-1) <= sketch.error.double()).all()
    metric = apart / sketch.channel_scale.double()[:, :, None]
    assert (metric.norm(dim=-1) <= sketch.metric_error.double()).all()
    for e, bound in ((apart, sketch.spectral), (metric, sketch.metric_spectral)):
        rows = torch.nn.functional.pad(e, (0, 0, 0, -length % 16)).unflatten(2, (-1, 16))
        assert (torch.linalg.matrix_norm(rows, 2) ** 2 <= bound.double()).all()


def test_more_bits_err_less():
    _, k, _ = gaussian(1, Shape(1, 2, 2, 1, 200, 32, 5))
    errors = [float(g.build(k, 16, Statistics(sketch_bits=bits)).sketch.error.float().mean()) for bits in range(1, 9)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01 * float(k.norm(dim=-1).mean())


@LAWS
@given(seeds(), st.integers(1, 19), st.integers(1, 8))
def test_planes_pack_and_nest(seed, dim, bits):
    codes = torch.randint(2**bits, (2, 3, dim), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    planes = pack(codes, bits)
    assert planes.shape == (bits, 2, 3, -(-dim // 8))
    assert torch.equal(unpack(planes, dim), codes)
    for few in range(1, bits + 1):
        assert torch.equal(unpack(planes[:few], dim), codes >> (bits - few))


def test_leading_planes_are_a_coarser_copy():
    _, k, _ = gaussian(1, Shape(1, 1, 1, 1, 100, 16, 5))
    sketch = g.build(k, 16, Statistics(sketch_bits=8)).sketch
    errors = [float((g.decode(sketch, bits) - k).norm()) for bits in range(1, 9)]
    assert errors == sorted(errors, reverse=True)
    step = sketch.scale.float()[..., None] * sketch.channel_scale[:, :, None]
    for bits in range(1, 8):
        assert ((g.decode(sketch, bits) - g.decode(sketch)).abs() <= step * 2.0 ** (8 - bits) / 2 * (1 + 1e-5)).all()


def test_codes_lie_on_symmetric_half_integer_levels():
    scale = torch.ones(1, 1, 4)
    codes, step = quantise(torch.tensor([[[[1.0, -1.0, 0.3, -0.3]]]]), scale, 2)
    levels = (codes.float() - 1.5) * step.float()[..., None]
    assert torch.equal(levels, -levels[..., [1, 0, 3, 2]])


def assert_same(got, wanted, k):
    """Bitwise, but for what a different summation order may touch in the last place."""
    assert (got.kv_len, got.block_size, got.statistics) == (wanted.kv_len, wanted.block_size, wanted.statistics)

    def compare(name, a, b):
        assert a.shape == b.shape, name
        assert a.dtype == b.dtype, name
        if a.is_floating_point():
            assert torch.allclose(
                a.double(), b.double(), rtol=1e-3 if "spectral" in name or name == "variance" else 2e-5, atol=1e-5
            ), name
        else:
            assert torch.equal(a, b), name

    for f in fields(wanted):
        a, b = getattr(got, f.name), getattr(wanted, f.name)
        if isinstance(b, torch.Tensor):
            compare(f.name, a, b)
    for f in fields(Sketch):
        if f.name != "bits":
            compare("sketch " + f.name, getattr(got.sketch, f.name), getattr(wanted.sketch, f.name))


def follow(name, seed, steps, size, masked, poisoned, change):
    """Play ``steps`` on a cache of keys and hand every state of it to ``change``."""
    _, k, v = GENERATORS[name](seed, Shape(3, 2, 2, 1, 600, 8, 5))
    if poisoned:
        k[0, 1, 7] = torch.nan
        k[2, 0, 70, 1] = torch.inf
    mask = coins(seed, 0.7, 3, 600) if masked else torch.ones(3, 600, dtype=torch.bool)
    mask[:, 3] = True
    length = used = 20 + seed % 100
    now = [k[:, :, :length], v[:, :, :length], mask[:, :length]]
    change("start", None, *now)
    for what, n in steps:
        if what == "append":
            new = slice(used, used + n)
            used += n
            now = [
                torch.cat([x, y[:, :, new] if y.ndim == 4 else y[:, new]], 2 if y.ndim == 4 else 1)
                for x, y in zip(now, (k, v, mask), strict=True)
            ]
            change("append", n, *now)
        elif what == "crop":
            keep = max(1, now[0].shape[2] * n // 1000)
            before = now[0]
            now = [now[0][:, :, :keep], now[1][:, :, :keep], now[2][:, :keep]]
            change("crop", (keep, before), *now)
        else:
            index = torch.randint(3, (3,), generator=torch.Generator().manual_seed(n))
            now = [x[index] for x in now]
            change("reorder", index, *now)


@LAWS
@given(generators(), seeds(), edits(), st.sampled_from([4, 16, 24]), st.booleans(), st.booleans())
def test_edits_equal_recomputation(name, seed, steps, size, masked, poisoned):
    state = {}

    def change(what, detail, key, value, mask):
        if what == "start":
            state["g"] = g.build(key, size, ALL, value=value, key_mask=mask)
        elif what == "append":
            state["g"] = g.append(state["g"], key, value=value, key_mask=mask)
        elif what == "crop":
            state["g"] = g.crop(state["g"], detail[0], key, value=value, key_mask=mask)
        else:
            state["g"] = g.reorder(state["g"], detail)
        assert_same(state["g"], g.build(key, size, ALL, value=value, key_mask=mask), key)

    follow(name, seed, steps, size, masked, poisoned, change)


@LAWS
@given(generators(), seeds(), edits(), st.sampled_from([4, 16, 24]), st.booleans(), st.sampled_from([ALL, OF_KERNELS]))
def test_a_stream_equals_recomputation(name, seed, steps, size, masked, asked):
    stream = g.Stream(size, asked)

    def change(what, detail, key, value, mask):
        if what == "reorder":
            stream.reorder(detail)
        else:
            stream.update(key, value=value, key_mask=mask)
        assert_same(stream.geometry, g.build(key, size, asked, value=value, key_mask=mask), key)

    follow(name, seed, steps, size, masked, False, change)
    stream.reset()
    assert stream.geometry is None


def test_appending_reads_new_keys_alone():
    _, k, _ = gaussian(1, Shape(1, 2, 2, 1, 400, 8, 5))
    stream = g.Stream(16, Statistics(radius=True, sketch_bits=4))
    stream.update(k[:, :, :320])
    poisoned = k.clone()
    poisoned[:, :, :320] = torch.nan  # sealed blocks are not read again
    found = stream.update(poisoned)
    anew = g.build(k, 16, Statistics(radius=True, sketch_bits=4))
    assert torch.equal(found.sketch.planes, anew.sketch.planes)
    assert found.finite.all()


@pytest.mark.skipif(native.level() is None, reason="no kernels")
def test_a_stream_of_what_kernels_know_grows_in_place(monkeypatch):
    _, k, _ = gaussian(1, Shape(2, 2, 2, 1, 400, 24, 5))
    stream = g.Stream(16, OF_KERNELS)
    stream.update(k[:, :, :100])
    monkeypatch.setattr(g.stream, "tail", None)
    for n in (101, 102, 112, 113, 180, 90, 91, 400):  # the first to 112 fill a block, 90 cuts others off
        stream.update(k[:, :, :n])
        assert_same(stream.geometry, g.build(k[:, :, :n], 16, OF_KERNELS), k)


def test_kernels_refuse_buffers_without_room():
    _, k, _ = gaussian(1, Shape(1, 1, 1, 1, 96, 8, 5))
    buffers = g.build(k[:, :, :80], 16, OF_KERNELS)
    with pytest.raises(ValueError, match="`room_keys` must hold the keys from `first_block` on"):
        g.native.extend(buffers, k[:, :, 64:], 4)


def test_calibration_counts_non_finite_keys_before_and_after_an_append():
    _, k, v = gaussian(1, Shape(1, 1, 1, 1, 128, 8, 5))
    k[0, 0, 7], k[0, 0, 64] = torch.nan, 100.0
    grown = g.append(g.build(k[:, :, :64], 16, ALL, value=v[:, :, :64]), k, value=v)
    assert_same(grown, g.build(k, 16, ALL, value=v), k)


def test_non_finite_keys_mark_their_block_and_enter_nothing():
    _, k, v = gaussian(1, Shape(1, 2, 2, 1, 64, 8, 5))
    clean = g.build(k, 16, ALL, value=v)
    k[0, 1, 20, 3], k[0, 0, 40] = torch.nan, torch.inf
    found = g.build(k, 16, ALL, value=v)
    assert found.finite.tolist() == [[[True, True, False, True], [True, False, True, True]]]
    for f in fields(found):
        x = getattr(found, f.name)
        if isinstance(x, torch.Tensor):
            assert torch.isfinite(x.double()).all(), f.name
    assert torch.equal(found.mean[:, :, 0], clean.mean[:, :, 0])


def test_masked_keys_enter_nothing():
    _, k, v = gaussian(1, Shape(1, 2, 2, 1, 50, 8, 5))
    mask = coins(1, 0.5, 1, 50)
    other_k, other_v = (torch.where(mask[:, None, :, None], x, torch.nan) for x in (k, v))
    assert_same(g.build(other_k, 16, ALL, value=other_v, key_mask=mask), g.build(k, 16, ALL, value=v, key_mask=mask), k)


def test_half_precision_keys_have_fp32_statistics():
    _, k, v = gaussian(1, Shape(1, 2, 2, 1, 50, 8, 5), torch.bfloat16)
    found = g.build(k, 16, ALL, value=v)
    assert {x.dtype for x in (found.mean, found.radius, found.variance, found.sketch.spectral, found.sketch.channel_scale)} == {
        torch.float32
    }


def test_a_sketch_of_more_bits_serves_for_fewer():
    _, k, _ = gaussian(1, Shape(1, 2, 2, 1, 50, 8, 5))
    assert g.build(k, 16, KeySketch(8).statistics).has(KeySketch(4).statistics)
    assert not g.build(k, 16, KeySketch(2).statistics).has(KeySketch(4).statistics)
