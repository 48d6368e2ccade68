"""Whole calls drawn at random through the interpreter against plain fp64 attention. `make soak` draws some hundreds."""

import pytest
import torch
from drawn_calls import Drawn

from sieve_attn import attention

DTYPES, LENGTHS = (torch.float32, torch.float32, torch.float16), (1, 2, 16, 31, 65, 100)


def check_call(seed):
    call = Drawn(seed, DTYPES, LENGTHS)
    options = call.options | {"per_query": call.per_query, "backend": "triton"}
    out, lse, report = attention(*call.inputs, call.policy, return_lse=True, return_report=True, **options)
    assert report.backend == "triton"
    call.check(out, lse, call.truth.kept(report), report.certificate.dropped_mass)
    if call.grad:
        by_output, by_lse = call.upstream()
        loss = (out * by_output).sum() + (torch.where(torch.isfinite(lse), lse, 0.0) * by_lse).sum()
        call.check_gradients(torch.autograd.grad(loss, call.inputs), by_output, by_lse)


@pytest.mark.parametrize("part", range(2))
def test_a_call_is_plain_attention_over_what_its_report_says(part):
    for seed in range(part * 4, part * 4 + 4):
        check_call(seed)


@pytest.mark.long
@pytest.mark.parametrize("part", range(10))
def test_a_call_is_plain_attention_at_length(part):
    for seed in range(1000 + part * 40, 1040 + part * 40):
        check_call(seed)
