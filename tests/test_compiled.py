"""What `torch.compile` and the transforms of `torch.func` make of the entry points."""

import pytest
import torch

from sieve_attn import attention
from sieve_attn.functional import top_k_attention
from sieve_attn.policies import Policy, TopBlocks, Windowed
from sieve_attn.scores import KeySketch
from sieve_attn.selection import TopK
from sieve_attn.testing import Shape
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
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


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
