"""What `torch.compile` and the transforms of `torch.func` make of the entry points."""

import subprocess
import sys

import pytest
import torch

from sieve_attn import AetherAttention, attention
from sieve_attn.functional import offset_attention, top_k_attention
from sieve_attn.layers import (
    LocalPath,
    PrimeSelfAttention,
    SparseCausalAttention,
    StatePath,
    TernaryLinear,
    TilelliBlock,
    pack_ternary,
)
from sieve_attn.patterns import GlobalTokens, Primes, RandomBlocks, Window
from sieve_attn.policies import Policy, TopBlocks, Windowed
from sieve_attn.scores import KeySketch
from sieve_attn.selection import TopK
from sieve_attn.testing import Shape, assert_close
from sieve_attn.testing.contracts import draw
from sieve_attn.testing.strategies import gaussian

TOP, NEAR = TopBlocks(2, sinks=0, window=0), Windowed(2, 8)
FAR = Policy(KeySketch(4), TopK(1), far_field=True)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def results(function, inputs):
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves, materialize_grads=True)]


TRAINED = {
    "dense": lambda q, k, v: attention(q, k, v, causal=True),
    "blocks": lambda q, k, v: attention(q, k, v, TOP, causal=True),
    "per query": lambda q, k, v: attention(q, k, v, TOP, causal=True, per_query=True),
    "far field": lambda q, k, v: attention(q, k, v, FAR, causal=True),
    "pattern": lambda q, k, v: attention(q, k, v, NEAR, causal=True),
    "top-k": lambda q, k, v: top_k_attention(q, k, v, 5, causal=True),
    "pattern of blocks": lambda q, k, v: offset_attention(q, k, v, RandomBlocks(1, 16, window=1)),
    "counted twice": lambda q, k, v: offset_attention(q[:, :, -30:], k[:, :, -30:], v[:, :, -30:], TWICE, upstream_compat=True),
}
FROM_NUMPY = ("pattern of blocks", "counted twice")  # the compiler settles some numbers at the first length
TWICE = Primes() | Window(4) | GlobalTokens(2)


@pytest.mark.parametrize("name", TRAINED)
def test_few_graphs_train_on_every_length(name):
    run = TRAINED[name]
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in range(33, 73, 4):
        inputs = gaussian(length, Shape(1, 2, 1, length - 7, length, 8, 6), torch.float32)
        for a, b in zip(results(compiled, inputs), results(run, inputs), strict=True):
            assert torch.equal(a, b)
    assert graphs() <= (3 if name in FROM_NUMPY else 1)


MASK = draw(9, 1, 2, 300, 300) > -1
MAPPED = {  # over the first axis of x [4, 2, 2, 300, 8], y [4, 1, 2, 1, 300] and z [4, 2]
    "blocks": lambda x, y, z: attention(x, x, x, TOP, causal=True),
    "per query": lambda x, y, z: attention(x, x, x, TOP, causal=True, per_query=True),
    "bias and masks": lambda x, y, z: attention(x, x, x, TOP, bias=y, mask=MASK, key_mask=x[:, 0, :, 0] > -1),
    "sink": lambda x, y, z: attention(x, x, x, TOP, causal=True, sink=z),
    "packed": lambda x, y, z: attention(x[:1], x[:1], x[:1], TOP, causal=True, cu_seqlens=[0, 30, 300]),
    "top-k": lambda x, y, z: top_k_attention(x, x, x, 5, causal=True, sink=z),
    "offsets": lambda x, y, z: offset_attention(x, x, x, TWICE),
    "counted twice": lambda x, y, z: offset_attention(x, x, x, TWICE, upstream_compat=True),
    "pattern of blocks": lambda x, y, z: offset_attention(x, x, x, RandomBlocks(1, 16, window=1)),
}


@pytest.mark.parametrize("name", MAPPED)
def test_vmap_equals_a_loop(name, capfd):
    run = MAPPED[name]
    inputs = [x.float() for x in (draw(1, 4, 2, 2, 300, 8), draw(2, 4, 1, 2, 1, 300), draw(3, 4, 2))]
    expected = results(lambda *x: torch.stack([run(*one) for one in zip(*x, strict=True)]), inputs)
    last = [x.movedim(0, -1) for x in inputs]
    for a, b in zip(results(torch.func.vmap(run), inputs), expected, strict=True):
        assert_close(a, b, dtype=torch.float32)
    assert_close(torch.func.vmap(run, -1)(*last), expected[0], dtype=torch.float32)
    assert "performance drop" not in capfd.readouterr().err


def test_vmap_nests_and_compiles():
    x = draw(1, 2, 3, 1, 2, 300, 8).float()
    run = torch.func.vmap(lambda x: attention(x, x, x, TOP, causal=True))
    assert torch.equal(torch.func.vmap(run)(x), torch.stack([run(part) for part in x]))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x[0]), run(x[0]))


def test_pulls_are_mapped():
    x = draw(1, 1, 2, 40, 8).float().requires_grad_()
    out = attention(x, x, x, TOP, causal=True)
    many = draw(2, 3, *out.shape).float()

    def pull(grad):
        return torch.autograd.grad(out, x, grad, retain_graph=True)[0]

    assert_close(torch.func.vmap(pull)(many), torch.stack([pull(grad) for grad in many]), dtype=torch.float32)


# the compiler makes symbols of floats that it does not see written
SHARE = 0.3
FLOATS = {
    "layer": AetherAttention(SHARE, 16, scale=SHARE),
    "scale and cap": lambda q, k, v: attention(q, k, v, scale=SHARE, softcap=SHARE),
}
INSIDE = """
import torch
from sieve_attn import attention
from sieve_attn.policies import *
SHARE, BLOCKS = 0.3, 2
x = torch.randn(1, 2, 70, 8)
for make in (lambda: Adaptive(0.9), lambda: Certified(SHARE), lambda: Aether(-SHARE, 8 * BLOCKS)):
    torch._dynamo.reset()
    run = lambda x: attention(x, x, x, make(), causal=True)
    assert torch.equal(torch.compile(run, fullgraph=True, dynamic=True, backend="eager")(x), run(x))
"""


@pytest.mark.parametrize("name", FLOATS)
def test_floats_may_be_symbols(name):
    x, run = draw(1, 1, 2, 70, 8).float(), FLOATS[name]
    assert torch.equal(torch.compile(run, fullgraph=True, dynamic=True, backend="eager")(x, x, x), run(x, x, x))


def test_policies_made_inside_may_hold_symbols():
    # in a process of its own: the compiler cannot see through the type checker of this one
    done = subprocess.run([sys.executable, "-c", INSIDE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "make", [PrimeSelfAttention, pytest.param(SparseCausalAttention, marks=pytest.mark.long), LocalPath, StatePath, TilelliBlock]
)
def test_steps_compile(make):
    layer, x = make(32), draw(1, 2, 30, 32).float()
    run = layer.step if make is PrimeSelfAttention else layer.forward_incremental
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        cache = layer.empty_cache(2)
        for n in range(30):
            before = cache
            y, cache = compiled(x[:, n : n + 1], before)
            assert torch.equal(y, run(x[:, n : n + 1], before)[0])
        assert graphs() <= 6


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_caches_of_inference_mode_are_stepped_by_the_compiler(mode):
    layer, x = SparseCausalAttention(32), draw(1, 2, 30, 32).float()
    with torch.inference_mode():
        cache = layer.forward_incremental(x[:, 20:21], layer.warmup_cache(x[:, :20]))[1]
    with mode():
        y, _ = torch.compile(layer.forward_incremental, fullgraph=True, backend="aot_eager")(x[:, 21:22], cache)
        assert_close(y, layer(x[:, :22])[:, -1:], dtype=torch.float32)


@pytest.mark.parametrize("name", ["return_attention", "return_report"])
def test_what_offsets_report_stays_outside(name):
    x, given = draw(1, 1, 2, 40, 8).float(), {name: True}
    run = lambda x: offset_attention(x, x, x, TWICE, **given)[0]  # noqa: E731
    with pytest.raises(Exception, match=f"`{name}` cannot be used inside torch.compile"):
        torch.compile(run, fullgraph=True, backend="eager")(x)


class Called(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x, x, x)


@pytest.mark.parametrize("name", ["dense", "blocks", "pattern", "top-k", "pattern of blocks", "offsets", "block of layers"])
def test_exported_lengths_stay_open(name):
    runs = {**TRAINED, "offsets": lambda q, k, v: offset_attention(q, k, v, TWICE)}
    model = TilelliBlock(8) if name == "block of layers" else Called(runs[name])
    shape = (2,) if name == "block of layers" else (2, 1)
    with torch.no_grad():
        length = {len(shape): torch.export.Dim("length", min=2, max=512)}
        exported = torch.export.export(model, (draw(1, *shape, 33, 8).float(),), dynamic_shapes=(length,)).module()
        for n in (4, 70, 300):
            x = draw(n, *shape, n, 8).float()
            assert torch.equal(exported(x), model(x))


DIFFERENTIATED = {"dense": TRAINED["dense"], "blocks": TRAINED["blocks"], "top-k": TRAINED["top-k"],
                  "offsets": lambda q, k, v: offset_attention(q, k, v, TWICE)}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_derivatives_of_other_kinds_are_refused_in_our_words(name):
    x = draw(1, 1, 2, 40, 8).float()
    run = lambda x: DIFFERENTIATED[name](x, x, x).square().sum()  # noqa: E731
    for way in (torch.func.grad(run), torch.func.jacrev(run), torch.func.grad(lambda x: torch.func.vmap(run)(x[None]).sum())):
        with pytest.raises(ValueError, match=r"must not be differentiated by torch\.func; .* use torch\.autograd\.grad"):
            way(x)
    torch.func.grad(lambda y: y.sum() + run(x))(x)  # what is not differentiated is no matter
    x.requires_grad_()
    first = torch.autograd.grad(run(x), x, create_graph=True)[0]
    with pytest.raises(ValueError, match="`create_graph` must not lead to second derivatives"):
        first.sum().backward()


@pytest.mark.parametrize("layer", [StatePath(8), pack_ternary(TernaryLinear(8, 8))], ids=lambda layer: type(layer).__name__)
def test_derivatives_of_layers_are_refused_so_too(layer):
    with pytest.raises(ValueError, match=r"must not be differentiated by torch\.func"):
        torch.func.grad(lambda x: layer(x).sum())(draw(1, 1, 9, 8).float())
