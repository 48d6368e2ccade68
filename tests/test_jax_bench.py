"""``sieve bench --framework jax``: its rows, and that a wrong output is no row."""

import jax_inputs  # noqa: F401  JAX compiles quickly
import pytest

from sieve_attn import jax as front
from sieve_attn.bench import table
from sieve_attn.bench.cases import cases
from sieve_attn.bench.driver import run
from sieve_attn.bench.settings import Settings


def settings(**options):
    return Settings(framework="jax", **({"n": 512, "dtypes": ("float32",), "threads": (1,), "repeats": 1} | options))


def test_the_rows_and_their_targets():
    wanted = cases(Settings(framework="jax", threads=(1,)))
    assert [case.q_len for case in wanted if case.name == "4-bit sketch"] == [4096, 8192, 16_384] * 2
    held = [case for case in wanted if case.targets]
    assert {(case.q_len, case.dtype) for case in held} == {(8192, "float32")}
    assert [str(target) for target in held[0].targets] == ["ratio >= 5", "ratio_front >= 0.9"]
    assert 100_000 in {case.kv_len for case in cases(Settings(framework="jax", long=True))}


def test_both_dense_attentions_and_the_pytorch_front_end_are_clocked():
    rows = list(run(settings()))
    assert [row.status for row in rows] == ["ok", "ok"], [row.notes for row in rows]
    for row in rows:
        assert row.backend == "native"
        assert 0 < row.density < 1
        assert row.ratio == min(row.ratio_sdpa, row.ratio_naive)
        assert row.ratio_front > 0
        assert "jax.nn.dot_product_attention on XLA's own threads" in row.notes[0]
        assert "ours on 1; compiled in" in row.notes[0]
    assert "x naive" in table.markdown({"cpu": "", "torch": "", "date": "", "commit": "", "command": ""}, rows)


@pytest.mark.long  # as test_bench asks of every group
def test_a_wrong_output_fails_its_row(monkeypatch):
    right = front.attention

    def wrong(*given, return_report=False, **options):
        found = right(*given, return_report=return_report, **options)
        return found if return_report else found * 1.01

    monkeypatch.setattr(front, "attention", wrong)
    rows = list(run(settings(n=256)))
    assert {row.status for row in rows} == {"failed"}
    assert "the output errs by" in rows[0].notes[0]
    assert rows[0].ratio is None


def test_groups_of_pytorch_and_unknown_frameworks_are_refused():
    with pytest.raises(ValueError, match=r"`group` must be left out with framework jax, which has one of its own; got prefill"):
        Settings(("prefill",), framework="jax")
    with pytest.raises(ValueError, match=r"`framework` must be of torch, jax; got 'tensorflow'"):
        Settings(framework="tensorflow")
