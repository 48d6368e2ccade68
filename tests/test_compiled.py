"""What `torch.compile` and the transforms of `torch.func` make of the entry points."""

import pytest
import torch

from sieve_attn import attention
from sieve_attn.functional import offset_attention, top_k_attention
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
}


@pytest.mark.parametrize("name", TRAINED)
def test_one_graph_trains_on_every_length(name):
    run = TRAINED[name]
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in range(33, 73, 4):
        inputs = gaussian(length, Shape(1, 2, 1, length - 7, length, 8, 6), torch.float32)
        for a, b in zip(results(compiled, inputs), results(run, inputs), strict=True):
            assert torch.equal(a, b)
    assert graphs() == 1


MASK = draw(9, 1, 2, 300, 300) > -1
TWICE = Primes() | Window(4) | GlobalTokens(2)
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
