"""Grids that fit a card however many heads there are: only the first axis may count past 65,535."""

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from sieve_attn import policies
from sieve_attn.attend.triton import best_keys, diagonals, tokens
from sieve_attn.geometry.triton import launch as geometry
from sieve_attn.selection.triton import launch as gate
from sieve_attn.types import Call, Geometry, Selection, Sketch, Tokens

MANY = 70_000  # sequences


@pytest.fixture
def grids(monkeypatch):
    """Launches are recorded instead of made."""
    seen = []
    monkeypatch.setattr(
        InterpretedFunction, "__getitem__", lambda kernel, grid: lambda *_, **__: seen.append((kernel.fn.__name__, grid))
    )
    return seen


def call(length=2):
    return Call(*(torch.zeros(MANY, 1, length, 1) for _ in range(3)), causal=True, scale=1.0)


def best():
    best_keys.choose(call(), 1)


def lists():
    given = call()
    chosen = Selection((Tokens(torch.zeros(MANY, 1, 2, 1, dtype=torch.int32), 2),))
    output, lse = tokens.attend(given, chosen)
    tokens.backward(given, chosen, output, lse, output, lse)


def offsets():
    given = call()
    some = (given.query, given.key, given.value, torch.arange(2), 1, 1.0)
    output, lse = diagonals.attend(*some)
    diagonals.backward(*some, output, lse, output, lse)


def choosing():
    given = call(gate.FEW_QUERIES + 17)
    policy = policies.TopBlocks(1)
    made = geometry.summarise(given.key, policy.block_size, policy.statistics, None, None, None, (1.0,))
    sketch = Sketch(
        policy.statistics.sketch_bits, *(made.pop(name) for name in ("planes", "scale", "error", "metric_error", "channel_scale"))
    )
    gate.select(given, Geometry(policy.block_size, given.kv_len, policy.statistics, **made, sketch=sketch), policy)


@pytest.mark.parametrize(
    ("run", "kernels"),
    [
        (best, ["best_keys"]),
        (lists, ["forward", "gradients", "gradients_of_keys"]),
        (offsets, ["forward", "gradient_of_queries", "gradients_of_keys"]),
        (choosing, ["calibrate", "summarise", "expand", "score", "choose", "compact"]),
    ],
)
def test_more_heads_than_other_axes_hold(grids, run, kernels):
    run()
    assert set(kernels) <= {name for name, _ in grids}
    assert all(max(grid[1:], default=1) <= 65_535 for _, grid in grids), grids


def test_sequences_of_several_launches_choose_as_alone(monkeypatch):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 20, 8), torch.randn(3, 1, 20, 8), torch.randn(3, 1, 20, 8)
    hidden = {"key_mask": torch.rand(3, 20) < 0.8, "mask": torch.rand(3, 1, 20, 20) < 0.8}
    given = Call(q, k, v, causal=True, scale=1.0, **hidden)
    whole = best_keys.choose(given, 3)
    monkeypatch.setattr(best_keys, "MOST_LINES", 4)
    for got, expected in zip(best_keys.choose(given, 3), whole, strict=True):
        assert torch.equal(got, expected)
