"""``sieve bench aether``: AETHER's published flags and variants, quality beside times, and a check that finds what is wrong."""

import csv
import json
import math

import pytest
from command_line import sieve

from sieve_attn import attend
from sieve_attn.bench.aether import run as aether_run
from sieve_attn.bench.aether import verify as aether_verify
from sieve_attn.bench.aether.cases import Cache, Options

AETHER = ["--batch-size", 1, "--num-heads", 2, "--head-dim", 16, "--seq-len", 300, "--block-size", 32, "--num-iterations", 1,
          "--num-warmup", 0, "--dtype", "fp32"]  # fmt: skip


def test_aether_takes_dashes_and_underscores_and_writes_csv(tmp_path):
    path = tmp_path / "out.csv"
    under = [a.replace("-", "_").replace("__", "--", 1) if isinstance(a, str) and a.startswith("--") else a for a in AETHER]
    assert "--num_heads" in under
    told = sieve("bench", "aether", *under, "--export_csv", path, "--all_variants", "--sparsity_sweep", 0.5, 0.9)
    assert told.exit_code == 0, told.output
    rows = list(csv.DictReader(path.read_text().splitlines()))
    names = ["basic", "variance", "tight", "full", "causal", "ours"]
    assert [(row["variant"], float(row["requested_sparsity"])) for row in rows] == [(n, s) for s in (0.5, 0.9) for n in names]
    for row in rows:
        assert row["seq_len"] == "300"
        sparsity = float(row["sparsity"])
        assert float(row["theoretical_speedup"]) == pytest.approx(1 / (1 - sparsity))
        assert float(row["measured_speedup"]) == pytest.approx(float(row["dense_ms"]) / float(row["sparse_ms"]))
        assert 0 <= float(row["dropped_mass"]) <= 1
        assert float(row["kl_sparse_dense"]) >= -math.log1p(-float(row["dropped_mass"])) - 1e-9
        assert -1 <= float(row["cosine"]) <= 1


def test_aether_keeps_what_the_threshold_keeps_and_ours_as_much(tmp_path):
    path = tmp_path / "out.json"
    flags = [*AETHER, "--threshold", 1.2, "--data", "clustered", "--verify", "--json", path]
    told = sieve("bench", "aether", *flags)
    assert told.exit_code == 0, told.output
    found = json.loads(path.read_text())
    basic, ours = found["rows"]
    assert basic["threshold"] == 1.2
    assert 0 < basic["sparsity"] < 1
    assert ours["requested_sparsity"] == basic["sparsity"]
    assert found["laws"]
    assert all(law["wrong"] == "" for law in found["laws"])


def test_aether_verify_finds_a_wrong_gate_and_a_wrong_output(monkeypatch):
    o = Options(1, 2, 16, 300, 32, 0, 1, "float32", target_sparsity=0.5, all_variants=True, verify=True)
    cache = Cache.make(o)
    assert all(wrong == "" for _, wrong in aether_verify.verify(o, cache))
    honest = aether_verify.run_aether_sparse

    def other_blocks(*arguments, **options):
        mask, scores = honest(*arguments, **options)
        return mask.roll(1, -1), scores

    with monkeypatch.context() as patch:
        patch.setattr(aether_verify, "run_aether_sparse", other_blocks)
        broken = {law for law, wrong in aether_verify.verify(o, cache) if wrong}
    assert "basic, target sparsity 0.5: the mask equals a plain recomputation" in broken
    monkeypatch.setattr(aether_verify, "attend", lambda *a, **k: (attend(*a, **k)[0] * 1.01, None))
    broken = {law for law, wrong in aether_verify.verify(o, cache) if wrong}
    assert "full: threshold=-inf equals dense attention" in broken


def test_an_aether_row_with_a_wrong_output_is_failed_and_exits_1(monkeypatch):
    monkeypatch.setattr(aether_run, "attend", lambda *a, **k: tuple(2 * x for x in attend(*a, **k)))
    told = sieve("bench", "aether", *AETHER, "--target-sparsity", 0.5)
    assert told.exit_code == 1
    assert "FAILED" in told.stdout
    assert "the output errs by" in told.stdout
