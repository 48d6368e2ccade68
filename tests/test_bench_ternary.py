"""The ``ternary`` group of ``sieve bench``: its cases run, and what is wrong gets no ratio."""

import pytest
import torch

from sieve_attn.bench import driver, ternary, timing
from sieve_attn.bench.rows import FAILED, OK
from sieve_attn.bench.settings import Settings
from sieve_attn.layers import PackedTernaryLinear

SMALL = Settings(("topk",), n=96, keys=300, threads=(1,), repeats=1)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(driver.BUILDERS, "ternary", ternary.prepare)
    monkeypatch.setattr(timing.interleave, "__defaults__", (timing.interleave.__defaults__[0], 0.0))


def test_every_case_is_right_and_measured():
    rows = [driver.measure(case, SMALL) for case in ternary.cases(SMALL)]
    assert [(row.status, row.notes) for row in rows if row.status != OK] == []
    assert all(row.ratio > 0 and row.dense_ms > 0 for row in rows)
    assert len(rows) == 14
    assert not any(row.targets for row in rows)


def test_full_sizes_carry_the_figures():
    full = list(ternary.cases(Settings()))
    held = {(c.name, c.dtype): c.targets[0].bound for c in full if c.targets}
    assert held == {
        ("packed product x 1", "float32"): 6.0, ("packed product x 1", "bfloat16"): 3.0, ("cached step", "float32"): 10.0,
    }  # fmt: skip
    assert {(c.q_len, c.kv_len, c.dim) for c in full if c.targets} == {(1, 4096, 4096), (1, 65_536, 32)}


@pytest.mark.parametrize("place", [0, 1, 12, 13])
def test_a_wrong_result_fails(place, monkeypatch):
    case = list(ternary.cases(SMALL))[place]
    made = ternary.prepare(case, SMALL)
    wrong, _ = made.check(made.call() + 1.0)
    assert wrong
    monkeypatch.setattr(PackedTernaryLinear, "forward", lambda self, x: torch.zeros(x.shape[0], self.out_features))
    if place < 2:
        assert driver.measure(case, SMALL).status == FAILED
