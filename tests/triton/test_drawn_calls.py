"""Whole calls drawn at random through the interpreter against plain fp64 attention. `make soak` draws some hundreds."""

import pytest
import torch
from drawn_calls import Drawn, check_pytorch

DTYPES, LENGTHS = (torch.float32, torch.float32, torch.float16), (1, 2, 16, 31, 65, 100)


def check_call(seed):
    assert check_pytorch(Drawn(seed, DTYPES, LENGTHS), "triton").backend == "triton"


@pytest.mark.parametrize("part", range(2))
def test_a_call_is_plain_attention_over_what_its_report_says(part):
    for seed in range(part * 4, part * 4 + 4):
        check_call(seed)


@pytest.mark.long
@pytest.mark.parametrize("part", range(10))
def test_a_call_is_plain_attention_at_length(part):
    for seed in range(1000 + part * 40, 1040 + part * 40):
        check_call(seed)
