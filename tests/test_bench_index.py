"""The ``index`` group of ``sieve bench``: its cases run, and full sizes carry the stated figures."""

import pytest

from sieve_attn.bench import driver, index, timing
from sieve_attn.bench.rows import OK
from sieve_attn.bench.settings import Settings

SMALL = Settings(("index",), n=256, threads=(1,), repeats=1, dtypes=("float32",), head_dims=(16,))


@pytest.mark.long  # test_bench runs the same cases, shorter
def test_every_case_is_right_and_measured(monkeypatch):
    monkeypatch.setattr(timing.interleave, "__defaults__", (timing.interleave.__defaults__[0], 0.0))
    rows = [driver.measure(case, SMALL) for case in index.cases(SMALL)]
    assert [(row.status, row.notes) for row in rows if row.status != OK] == []
    assert len(rows) == 21
    plans = {row.case: row.notes[-1] for row in rows if row.case in ("primes, diagonals", "primes, backward")}
    assert plans == {"primes, diagonals": "primes, diagonals: diagonals", "primes, backward": "primes, backward: diagonals"}


def test_full_sizes_carry_the_figures():
    held = {(c.name, c.dtype): c.targets[0].bound for c in index.cases(Settings()) if c.targets}
    forward = {key: bound for key, bound in held.items() if not key[0].endswith("backward")}
    assert forward == {
        ("primes, auto", "float32"): 3.5, ("primes, auto", "bfloat16"): 4.0,
        ("squares, auto", "float32"): 12.0, ("mian-chowla, auto", "float32"): 18.0,
    }  # fmt: skip
    backward = {bound for key, bound in held.items() if key[0].endswith("backward")}
    assert backward == {1 / 3}
    assert len(held) == 10
