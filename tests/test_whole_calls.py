"""Whole calls drawn at random against plain fp64 attention, all options and layouts together. `make soak` draws 20,000."""

import math
import random

import pytest
import torch
from drawn_calls import Drawn, Truth, a_bound, check_pytorch, some_inputs, some_options

from sieve_attn import geometry, pipeline


def check_brackets(seed):
    """One bound over one geometry of hostile keys: the true mass of every block lies inside of its bracket."""
    draw, source = random.Random(seed), torch.Generator().manual_seed(seed)
    q, k, v = some_inputs(draw, source)
    options, size, bound = some_options(draw, source, q, k), draw.choice((1, 2, 3, 8, 16, 16, 24, 64)), a_bound(draw)
    options.pop("sink", None)
    none = dict.fromkeys(("scale", "softcap", "mask", "key_mask", "bias", "cu_seqlens", "sink", "window"))
    call = pipeline._call(q, k, v, **none | {"dropout": 0.0} | options)
    masked = {"key_mask": options["key_mask"]} if "key_mask" in options else {}
    made = geometry.build(k, size, bound.proof_statistics, backend=draw.choice(("auto", "reference")), **masked)
    found = bound.score(call.rows(0, q.shape[2]), made, brackets=True)
    logits = Truth(q, k, v, options).logits()
    blocks = torch.nn.functional.pad(logits, (0, -logits.shape[-1] % size), value=-math.inf).unflatten(-1, (-1, size))
    mass = torch.logsumexp(blocks, -1)
    where = (seed, bound, size, sorted(options), q.dtype)
    assert (mass <= found.upper.double()).all(), where
    assert (found.lower.double() <= mass).all(), where


@pytest.mark.parametrize("part", range(4))
def test_a_call_is_plain_attention_over_what_its_report_says(part):
    for seed in range(part * 75, part * 75 + 75):
        check_pytorch(Drawn(seed))


def test_brackets_hold_the_mass_of_hostile_keys():
    for seed in range(300):
        check_brackets(seed)


@pytest.mark.long
@pytest.mark.parametrize("part", range(20))
def test_a_call_is_plain_attention_at_length(part):
    for seed in range(10_000 + part * 1000, 11_000 + part * 1000):
        check_pytorch(Drawn(seed))
        check_brackets(seed)
