"""Whole calls of the JAX front-end drawn at random against plain fp64 attention. `make soak` draws some hundreds."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from drawn_calls import Drawn, spread_heads
from jax_inputs import torch_of

import sieve_attn.jax as sj

BACKENDS = ("native", "gather", "pallas")
LENGTHS = (1, 2, 16, 33, 65, 90, 130)


def given(x):
    if isinstance(x, torch.Tensor):
        wide = x.detach().float() if x.dtype == torch.bfloat16 else x.detach()
        return jnp.asarray(wide.numpy(), jnp.bfloat16 if x.dtype == torch.bfloat16 else None)
    return x


def pairs_kept(call, report):
    """[.., q_len, kv_len], from the blocks of a report, or from positions where these alone decide."""
    seen = call.truth.seen
    if report.selection is not None:
        blocks = torch.from_numpy(np.array(report.selection.to_dense()))
        return (spread_heads(blocks, seen.shape[1]) & seen).expand_as(seen)
    if call.policy.keep is None or call.policy.chooses_blocks:
        return seen
    row = np.arange(seen.shape[2])[:, None] + seen.shape[3] - seen.shape[2]
    return seen & torch.from_numpy(np.array(call.policy.keep.keeps(row, np.arange(seen.shape[3])[None])))


def check_call(seed):
    call, draw = Drawn(seed, lengths=LENGTHS), random.Random(~seed)
    backend, room = draw.choice(BACKENDS), draw.choice((None, None, 1, 3))
    call.where += (backend, room)
    options = {name: given(x) for name, x in call.options.items()}
    options |= {"per_query": call.per_query, "backend": backend, "max_blocks": room}
    arrays = tuple(given(x) for x in call.inputs)
    try:
        out, lse, report = sj.attention(*arrays, call.policy, return_lse=True, return_report=True, **options)
    except ValueError as why:
        if "cannot run this call: the Pallas kernel" not in str(why):
            raise
        options["backend"] = "native"
        out, lse, report = sj.attention(*arrays, call.policy, return_lse=True, return_report=True, **options)
    out, lse, dropped = torch_of(out.astype(jnp.float32), lse, report.certificate.dropped_mass)
    call.check(out, lse, pairs_kept(call, report), dropped)
    if call.grad:
        upstream = call.upstream()
        by_output, by_lse = map(given, upstream)

        def loss(*inputs):
            out, lse = sj.attention(*inputs, call.policy, return_lse=True, **options)
            return (out * by_output).sum() + (jnp.where(jnp.isfinite(lse), lse, 0.0) * by_lse).sum()

        call.check_gradients(torch_of(*jax.grad(loss, (0, 1, 2))(*arrays)), *upstream)


@pytest.mark.parametrize("seed", range(2))
def test_a_call_is_plain_attention_over_what_its_report_says(seed):
    check_call(seed)


@pytest.mark.long
@pytest.mark.parametrize("part", range(10))
def test_a_call_is_plain_attention_at_length(part):
    for seed in range(1000 + part * 40, 1040 + part * 40):
        check_call(seed)
    jax.clear_caches()
