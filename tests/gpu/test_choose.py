"""Geometry, gate, streaming and top-k on a CUDA device against the reference on the host."""

from dataclasses import fields, replace

import pytest
import torch

from sieve_attn import geometry as g
from sieve_attn import pipeline
from sieve_attn.attend import streaming
from sieve_attn.bench.prepared import moved
from sieve_attn.functional import top_k_attention
from sieve_attn.patterns import Sinks, Window
from sieve_attn.policies import Adaptive, Aether, Policy, TopBlocks
from sieve_attn.scores import Euclidean, KeySketch, Mean
from sieve_attn.selection import Mass, RelativeThreshold, RunningMaximum, TargetSparsity, TopK
from sieve_attn.testing import GENERATORS, Shape, assert_close, choices
from sieve_attn.testing.contracts import coins
from sieve_attn.testing.strategies import gaussian
from sieve_attn.types import Call, Statistics

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ENDS = Sinks(16) | Window(64)
POLICIES = (
    TopBlocks(9), Adaptive(0.9), Aether(1.0), Policy(Mean(), TargetSparsity(0.8), ENDS, block_size=64),
    Policy(KeySketch(8), RelativeThreshold(3.0), query_stride=4), Policy(KeySketch(2), TopK(4), block_size=24, query_tile=33),
    Policy(Mean(), Mass(0.7), share_group=False),
)  # fmt: skip
STREAMED = Policy(Euclidean(), RunningMaximum(1.0, step=128, run=512), ENDS, query_tile=16)
SIGHTS = {
    "causal": {"causal": True},
    "masked": {"key_mask": coins(3, 0.7, 1, 900)},
    "window": {"causal": True, "window": 200},
    "cap": {"softcap": 20.0},
}
SHAPES = {"prefill": Shape(1, 8, 2, 300, 900, 128, 64), "decoding": Shape(1, 8, 2, 1, 900, 128, 64)}


def on_device(call):
    return Call(**{n: moved(x, "cuda") for n, x in vars(call).items() if n != "shared"})


def check(call, policy, kernels):
    """``kernels`` choose on the device what the reference chooses on the host, but where estimates tie within rounding."""
    there = on_device(call)
    geometry = g.build(there.key, policy.block_size, policy.statistics, key_mask=there.key_mask)
    assert pipeline._kernels(there, geometry, policy, False, "triton")[1] is kernels
    found = moved(pipeline.select(there, geometry, policy, backend="triton")[:2], "cpu")
    here = g.build(call.key, policy.block_size, policy.statistics, key_mask=call.key_mask, backend="reference")
    wanted = choices.reference(call, here, policy)
    choices.assert_same_choice((*found, wanted[2]), call, here, policy)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_the_gate_chooses_what_the_reference_chooses(policy, sight, shape):
    from sieve_attn.selection import triton as gate

    q, k, v = gaussian(1, SHAPES[shape], torch.bfloat16)
    check(Call(q, k, v, scale=128**-0.5, **SIGHTS[sight]), policy, gate)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sight", SIGHTS)
def test_one_kernel_chooses_and_attends(sight, shape, dtype):
    policy = replace(STREAMED, query_tile=4) if dtype == torch.float32 else replace(STREAMED, query_tile=8)
    q, k, v = GENERATORS["clustered"](1, SHAPES[shape], dtype)
    call = Call(q, k, v, scale=128**-0.5, **SIGHTS[sight])
    check(call, policy, streaming)
    there = on_device(call)
    geometry = g.build(there.key, 16, policy.statistics, key_mask=there.key_mask)
    out, lse, chosen = streaming.attend(there, geometry, policy)
    selection = moved(chosen()[0], "cpu")
    reference = pipeline.dispatch.module("reference")
    exact = Call(q.double(), k.double(), v.double(), scale=128**-0.5, **SIGHTS[sight])
    (a, b), plain = reference.attend(exact, selection), reference.attend(call, selection)
    assert_close(out.cpu(), a, plain=plain[0], dtype=dtype)
    assert_close(lse.cpu(), b, dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [16, 24, 64])
def test_codes_and_scales_are_those_of_the_reference(dtype, size):
    _, k, v = gaussian(3, Shape(1, 2, 2, 1, 700, 128, 64), dtype)
    asked = Statistics(radius=True, box=True, value=True, sketch_bits=8)
    got = g.build(k.cuda(), size, asked, value=v.cuda())
    scale = got.sketch.channel_scale.cpu()
    wanted = g.build(k, size, asked, value=v, channel_scale=scale, backend="reference")
    same = (got.sketch.planes.cpu() == wanted.sketch.planes).all(0).all(-1) & (got.sketch.scale.cpu() == wanted.sketch.scale)
    assert same.float().mean() > 0.999  # two clips may lose equally much
    for name in ("mean", "low", "high", "key_norm", "radius", "value_mean", "value_radius"):
        torch.testing.assert_close(getattr(got, name).cpu(), getattr(wanted, name), rtol=1e-5, atol=1e-5)
    lost = (k.double() - g.decode(moved_sketch(got.sketch)).double()).norm(dim=-1)
    assert (got.sketch.error.cpu().double() >= lost).all()


def moved_sketch(sketch):
    return replace(sketch, **{f.name: moved(getattr(sketch, f.name), "cpu") for f in fields(sketch)})


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_best_keys(dtype):
    q, k, v = gaussian(5, Shape(1, 4, 2, 200, 333, 64, 64), dtype)
    out, report = top_k_attention(q.cuda(), k.cuda(), v.cuda(), 8, causal=True, backend="triton", return_report=True)
    exact = top_k_attention(q.double(), k.double(), v.double(), 8, causal=True, backend="reference")
    plain = top_k_attention(q, k, v, 8, causal=True, backend="reference")
    assert report.backend == "triton"
    assert_close(out.cpu(), exact, plain=plain, dtype=dtype)
