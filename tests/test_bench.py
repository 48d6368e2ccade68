"""``sieve bench``: what is wrong gets no ratio, what is measured is what was asked, and figures are what they are named."""

import json
import math
from dataclasses import replace

import pytest
import torch
from command_line import sieve

from sieve_attn import attend, attention, functional, policies
from sieve_attn.bench import attending, driver, gating, inputs, peers, results, table, timing, truth
from sieve_attn.bench.cases import Case, cases
from sieve_attn.bench.machine import facts
from sieve_attn.bench.rows import FAILED, OK, UNAVAILABLE, Row, Target
from sieve_attn.bench.settings import GROUPS, Settings
from sieve_attn.bench.top_k import check_top_k, naive
from sieve_attn.testing import oracle
from sieve_attn.types import Selection

ROW = Row("prefill", "random blocks 1", "float32", 128, 128, 64, 16, 1, dense_ms=2.0, sparse_ms=1.0, ratio=2.0, ratio_sdpa=2.0)
SMALL = Settings(("prefill",), n=128, dtypes=("float32",), head_dims=(32,), threads=(1,), repeats=1, peers=("sdpa",))
TINY = ["--n", 128, "--keys", 256, "--repeats", 1, "--threads", 1, "--dtype", "float32", "--head-dim", 32, "--peers", "sdpa"]


def case(group="prefill", **changes):
    plain = Case(group, "a case", "float32", 128, 128, 32, 16, density=0.5, heads=2, kv_heads=2)
    return replace(plain, **changes)


@pytest.fixture(autouse=True)
def fast_clock(monkeypatch):
    """No gigabyte is read for the bandwidth, and short calls are not repeated."""
    monkeypatch.setattr(gating, "bandwidth", lambda *where: (10.0, "not measured in tests"))
    monkeypatch.setattr(timing.interleave, "__defaults__", (timing.interleave.__defaults__[0], 0.0))


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    """One small run of every group, as JSON."""
    path = tmp_path_factory.mktemp("bench") / "bench.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gating, "bandwidth", lambda *where: (10.0, "not measured in tests"))
        patch.setattr(timing.interleave, "__defaults__", (timing.interleave.__defaults__[0], 0.0))
        told = sieve("bench", *TINY, "--json", path)
    assert told.exit_code == 0, told.output
    return json.loads(path.read_text())


def test_a_run_holds_machine_settings_and_every_field_of_every_row(document):
    assert {"cpu", "cpu_flags", "torch", "commit", "date", "command", "peak_mb_is"} <= set(document["machine"])
    assert document["settings"]["n"] == 128
    assert {row["group"] for row in document["rows"]} == set(GROUPS)
    wanted = {"group", "case", "dtype", "N", "M", "D", "block", "density", "ideal", "ratio", "ratio_sdpa", "ratio_flex",
              "dense_ms", "sparse_ms", "peak_mb", "threads", "backend", "target", "met", "note"}  # fmt: skip
    for row in document["rows"]:
        assert wanted <= set(row)
        assert row["status"] in (OK, UNAVAILABLE)
        if row["status"] == OK:
            assert row["ratio"] == pytest.approx(row["dense_ms"] / row["sparse_ms"])
            assert row["sparse_ms"] > 0
            assert row["ratio_flex"] is None


def test_rows_say_how_long_choosing_and_attending_took(document):
    for row in document["rows"]:
        if row["group"] == "gate":
            assert 0 < row["gate_ms"] + row["attend_ms"] <= 1.2 * row["sparse_ms"]
            assert row["gate_percent"] == pytest.approx(100 * row["gate_ms"] / row["dense_ms"])
        if row["group"] == "decode":
            assert row["floor_ms"] == pytest.approx(row["bytes_mb"] / 10.0)
            assert row["bandwidth_share"] == pytest.approx(row["floor_ms"] / row["sparse_ms"])
            assert row["ideal"] == pytest.approx(row["dense_ms"] / row["floor_ms"])


def test_decode_counts_the_bytes_of_the_cache_and_of_the_scan(document):
    bytes_of = {row["case"]: row["bytes_mb"] * 1e6 for row in document["rows"] if row["group"] == "decode"}
    density = {row["case"]: row["density"] for row in document["rows"] if row["group"] == "decode"}
    whole = 2 * 8 * 256 * 32 * 4
    assert bytes_of["dense"] == whole
    assert bytes_of["given selection"] == pytest.approx(density["given selection"] * whole)
    for bits in (2, 4):
        scan = 8 * 256 * (bits * 32 // 8 + 2) + 8 * 32 * 4
        assert bytes_of[f"{bits}-bit sketch"] == pytest.approx(density[f"{bits}-bit sketch"] * whole + scan)
    assert bytes_of["centroids"] == pytest.approx(density["centroids"] * whole + 8 * 4 * 32 * 4)


@pytest.mark.parametrize("group", ["prefill", "decode", "gate"])
def test_a_wrong_output_is_failed_carries_no_ratio_and_exits_1(group, monkeypatch, tmp_path):
    def spoil(result):
        output, *rest = result
        return output + 0.1, *rest

    for module in (attending, gating):
        monkeypatch.setattr(module, "attend", lambda *a, **k: spoil(attend(*a, **k)))
    monkeypatch.setattr(gating, "attention", lambda *a, **k: spoil(attention(*a, **k)))
    told = sieve("bench", group, *TINY, "--json", tmp_path / "bad.json")
    assert told.exit_code == 1
    assert "FAILED" in told.stdout
    assert "the output errs by" in told.stdout
    for row in json.loads((tmp_path / "bad.json").read_text())["rows"]:
        assert row["status"] == FAILED
        assert row["ratio"] is row["sparse_ms"] is row["dense_ms"] is None


def test_a_wrong_gradient_is_failed(monkeypatch):
    honest = torch.autograd.grad
    row = driver.measure(case("backward"), SMALL)
    assert row.status == OK
    assert row.ratio > 0

    def spoil(output, inputs, above, **options):
        query, key, value = honest(output, inputs, above, **options)
        # the truth needs no graph that is kept
        return query, key * (1.01 if options else 1.0), value

    monkeypatch.setattr(attending.torch.autograd, "grad", spoil)
    row = driver.measure(case("backward"), SMALL)
    assert row.status == FAILED
    assert "the gradient of key errs by" in row.notes[0]


def test_a_call_that_raises_is_failed_and_the_run_goes_on(monkeypatch):
    def stop(*arguments, **options):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(attending, "attend", stop)
    rows = list(driver.run(SMALL))
    assert len(rows) == 6
    assert {row.status for row in rows} == {FAILED}
    assert rows[0].notes == ("RuntimeError: no such instruction",)


def test_a_peer_that_is_wrong_or_cannot_run_is_left_out_and_says_why(monkeypatch):
    settings = replace(SMALL, peers=("sdpa", "flex"))
    monkeypatch.setattr(peers, "flex", lambda *a: peers.Peer(lambda: torch.zeros(1), lambda result: "the output errs"))
    row = driver.measure(case(), settings)
    assert (row.status, row.ratio_flex, row.ratio) == (OK, None, row.ratio_sdpa)
    assert "flex: the output errs" in row.notes

    def stop():
        raise NotImplementedError("no compiler\nsecond line")

    monkeypatch.setattr(peers, "flex", lambda *a: peers.Peer(stop))
    assert "flex: NotImplementedError: no compiler" in driver.measure(case(), settings).notes


def test_the_ratio_is_over_the_fastest_peer(monkeypatch):
    monkeypatch.setattr(timing, "interleave", lambda *a, **o: {"ours": [1.0], "sdpa": [3.0], "flex": [2.0]})
    monkeypatch.setattr(peers, "flex", lambda *a: peers.Peer(lambda: None))
    row = driver.measure(case(), replace(SMALL, peers=("sdpa", "flex")))
    assert (row.ratio, row.ratio_sdpa, row.ratio_flex, row.dense_ms, row.sparse_ms) == (2.0, 3.0, 2.0, 3e3, 1e3)


@pytest.mark.parametrize(("block", "density"), [(16, 0.3), (64, 0.5), (48, 0.065), (16, 1.0)])
@pytest.mark.parametrize("q_len", [1000, 300])
def test_random_blocks_have_the_density_they_are_said_to_have_and_keep_the_diagonal(block, density, q_len):
    selection = inputs.random_blocks(3, density, heads=4, q_len=q_len, kv_len=1000, block=block)
    tile = (torch.arange(q_len) + selection.blocks.lead) // 64
    seen = torch.arange(1000) <= torch.arange(1000 - q_len, 1000)[:, None]
    kept = selection.to_dense(torch.empty(0))[0] & seen
    ends = torch.stack(
        [torch.stack([(x[:, tile == t]).any(1) for t in tile.unique()], 1) for x in (kept, seen.expand(4, -1, -1))]
    )
    found = inputs.density_of(selection, causal=True)
    assert found == pytest.approx((ends[0].sum() / ends[1].sum()).item())
    assert found == pytest.approx(density, abs=0.05) or (density < 0.2 and found >= density)
    assert kept.diagonal(1000 - q_len, 1, 2).all()
    assert (found == 1.0) == (density == 1.0)


def test_density_is_that_of_a_report():
    q, k, v = inputs.inputs(case(q_len=500, kv_len=500, heads=4), 0)
    for causal in (True, False):
        _, report = attention(q, k, v, policies.TopBlocks(3), causal=causal, return_report=True)
        assert inputs.density_of(report.selection, causal) == pytest.approx(report.density)


def test_the_truth_is_the_oracle_at_sampled_queries():
    q, k, v = inputs.inputs(case(q_len=90, kv_len=150, heads=4, kv_heads=2), 1)
    selection = inputs.random_blocks(1, 0.4, heads=2, q_len=90, kv_len=150, block=16)
    kept = selection.to_dense(q).repeat_interleave(2, 1)
    allowed = oracle.visible_keys(90, 150, causal=True) & kept
    output, lse = oracle.plain_attention(q.double(), k.double(), v.double(), allowed)
    wrong, dropped = truth.check_attention(output.float(), lse.float(), q, k, v, selection, causal=True)
    rows = truth.sampled(90, 150)
    logits = oracle.plain_logits(q.double(), k.double(), oracle.visible_keys(90, 150, causal=True))
    assert wrong == ""
    assert dropped == pytest.approx(oracle.dropped_mass(logits, kept)[:, :, rows].max().item())
    row = int(rows[-1])
    for spoilt, said in ((output.index_fill(2, torch.tensor([row]), 9.0), "the output errs"),
                         (output.index_fill(2, torch.tensor([row]), math.nan), "the output is not finite")):  # fmt: skip
        assert said in truth.check_attention(spoilt.float(), lse.float(), q, k, v, selection, causal=True)[0]
    assert "lse errs" in truth.check_attention(output.float(), lse.float() + 0.01, q, k, v, selection, causal=True)[0]


def test_sampled_queries_cover_the_ends_and_are_few_where_keys_are_many():
    rows = truth.sampled(8192, 8192)
    assert {0, 63, 64, 8191} <= set(rows.tolist())
    assert len(rows) <= truth.ROWS
    assert len(truth.sampled(1 << 20, 1 << 20)) <= 4


def test_the_check_of_a_choice_asks_for_the_blocks_of_the_reference():
    q, k, v = inputs.inputs(case(q_len=300, kv_len=300), 0)
    policy = policies.TopBlocks(4, sinks=0, window=0)
    _, report = attention(q, k, v, policy, causal=True, return_report=True)
    same = replace(report, backend="another")
    assert gating.check_choice(same, policy, q, k, v) == ""
    tiles = report.selection.blocks.to_tiles()
    other = type(report.selection.blocks).from_tiles(tiles.roll(1, 3), q_len=300, kv_len=300, q_block=64, kv_block=16)
    assert "the choice shares" in gating.check_choice(replace(same, selection=Selection((other,))), policy, q, k, v)


def test_a_policy_that_proves_is_held_to_its_promise():
    assert gating.check_promise(policies.Certified(0.05), 0.05) == ""
    assert "0.0600 of a softmax is dropped, at most 0.05" in gating.check_promise(policies.Certified(0.05), 0.06)
    assert gating.check_promise(policies.TopBlocks(1), 0.99) == gating.check_promise(None, 0.0) == ""


def test_block_masks_for_flex_are_the_selection():
    for q_len, block, causal in ((250, 16, True), (250, 64, True), (1, 16, False)):
        heads = 2
        selection = inputs.random_blocks(
            5, 0.4, heads=heads, q_len=q_len, kv_len=250, block=block, q_block=64 if q_len > 1 else 1, causal=causal
        )
        mask = peers.block_mask(selection, 4, causal)
        assert torch.equal(mask.to_dense().bool(), selection.blocks.to_tiles().repeat_interleave(2, 1))
        assert (64 if q_len > 1 else 1, block) == mask.BLOCK_SIZE


def test_the_peak_is_that_of_what_was_allocated_even_if_it_was_freed():
    result, growth, resident = timing.peak_growth(lambda: torch.ones(24_000_000).sum())
    if growth is None:
        pytest.skip("this system does not let a process reset its peak")
    assert result == 24_000_000
    assert growth == pytest.approx(96, abs=12)
    assert resident > 96
    assert timing.peak_growth(lambda: None)[1] == pytest.approx(0, abs=4)


def test_calls_take_turns_and_each_comes_first():
    order = []
    calls = {name: (lambda name=name: order.append(name) or name) for name in "abc"}
    found = timing.interleave(calls, 3, lambda name, result: {"part": 7.0} if result == "b" else {})
    assert order == list("aabbccbbccaaccaabb")  # each clocked call after one of its own that is not
    assert [len(samples) for samples in found.values()] == [3, 3, 3, 3]
    assert timing.median_ms(found["part"]) == 7000.0
    assert timing.median_ms(None) is None


def test_short_calls_are_repeated_until_a_median_has_time_behind_it():
    found = timing.interleave({"short": lambda: None}, 2, least_seconds=1.0)
    assert len(found["short"]) == timing.MOST_SAMPLES


def test_turns_go_on_while_they_do_not_agree_about_a_target():
    row = replace(
        ROW, targets=(Target("ratio_sdpa", 1.5), Target("bandwidth_share", 0.7), Target("gate_percent", 10.0, most=True))
    )
    plain, over, under = {"ours": [1.0] * 4}, [1.6, 1.6, 1.6, 1.4], [1.4, 1.4, 1.6, 1.4]
    assert driver.agreed(row, plain | {"sdpa": over}) is driver.agreed(row, plain | {"sdpa": under}) is True
    assert driver.agreed(row, plain | {"sdpa": [1.6, 1.6, 1.4, 1.4]}) is False
    assert driver.agreed(row, plain | {"sdpa": over, "gate": [0.1, 0.2, 0.1, 0.2]}) is False
    assert driver.agreed(replace(row, floor_ms=0.7), {"ours": [0.9e-3, 1.1e-3]}) is False
    assert driver.agreed(ROW, {"ours": [1.0, 9.0]}) is True

    def turns(settled):
        return len(timing.interleave({"one": lambda: None}, 2, least_seconds=0.0, settled=settled)["one"])

    assert turns(lambda found: len(found["one"]) >= 5) == 5
    assert turns(lambda found: False) == 2 * timing.PATIENCE
    assert turns(lambda found: True) == 2


def test_turns_that_do_not_agree_end_with_the_time(monkeypatch):
    monkeypatch.setattr(timing, "MOST_SECONDS", 0.0)
    found = timing.interleave({"one": lambda: None}, 3, least_seconds=0.0, settled=lambda found: False)
    assert len(found["one"]) == 3


def test_bandwidth_is_bytes_over_time():
    speed, how = timing.read_bandwidth(1 << 24, repeats=2)
    assert 0.1 < speed < 2000
    assert "over 17 MB" in how


def test_threads_are_set_for_a_row_and_put_back():
    before = torch.get_num_threads()
    with timing.threads(2):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == before


def test_targets_are_met_missed_or_not_measured():
    assert Target("ratio_sdpa", 2.0).met(ROW) is True
    assert Target("ratio_sdpa", 2.1).met(ROW) is False
    assert Target("ratio_flex", 2.0).met(ROW) is None
    assert Target("sparse_ms", 1.0, most=True).met(ROW) is True
    assert Target("ratio_sdpa", 0.1).met(replace(ROW, status=FAILED)) is False
    slow = replace(ROW, ratio_sdpa=0.9, sparse_ms=2.04)
    assert Target("ratio_sdpa", 0.95, or_ms=0.05).met(slow) is True
    assert Target("ratio_sdpa", 0.95, or_ms=0.03).met(slow) is False
    row = replace(ROW, targets=(Target("ratio_sdpa", 1.0), Target("ratio_flex", 2.0)))
    assert row.met is True
    assert replace(row, ratio_flex=1.0).met is False
    assert ROW.met is None


def test_figures_stand_only_beside_the_sizes_they_were_stated_for():
    full = cases(Settings(threads=(1, 2)))
    prefill = [c for c in full if c.group == "prefill"]
    assert len(prefill) == 2 * 2 * 2 * 3 * 2
    bounds = {(c.dtype, c.dim, c.block, c.density): c.targets[0].bound for c in prefill if c.threads == 1}
    assert bounds["bfloat16", 64, 64, 0.21] == 6.5
    assert bounds["bfloat16", 64, 16, 0.21] == pytest.approx(5.2)
    assert {str(t) for c in prefill if c.threads == 2 for t in c.targets} == {"scaling >= 0.9"}
    assert all(not c.targets for c in cases(Settings(("prefill", "backward", "decode"), n=1024, keys=4096)))
    lengths = {c.q_len for c in cases(Settings(("gate",), n=1024))}
    assert lengths == {256, 512, 1024}
    assert 1 << 20 in {c.q_len for c in cases(Settings(("gate",), long=True))}
    assert len({(c.group, c.name, c.dtype, c.q_len, c.kv_len, c.dim, c.block, c.threads) for c in full}) == len(full)
    for policy in {c.policy for c in cases(Settings(long=True)) if c.policy}:
        policies.parse(policy)


def test_scaling_is_held_against_sdpa():
    two = replace(ROW, threads=2, ratio_sdpa=1.7)
    assert driver.scaled(two, ROW).scaling == pytest.approx(0.85)
    assert driver.scaled(two, None).scaling is None
    assert driver.scaled(ROW, ROW).scaling is None


def test_peaked_keys_need_a_tenth_and_clustered_keys_are_sparser_than_uniform_ones():
    one = case(q_len=1, kv_len=4096, dim=64, heads=8, kv_heads=2, dtype="bfloat16", keys="peaked")
    query, key, _ = inputs.inputs(one, 0)
    share = float(gating.needed(query, key, 0.95).split()[3].rstrip("%"))
    assert 8.0 < share < 14.0
    held = {}
    for name in ("uniform", "clustered", "typical"):
        shape = case(q_len=2048, kv_len=2048, dim=64, heads=1, kv_heads=1, keys=name)
        query, key, _ = inputs.inputs(shape, 0)
        weight = torch.softmax(query[0, 0, -300:] @ key[0, 0].T / 8, -1).unflatten(-1, (-1, 16)).sum(-1)
        held[name] = weight.sort(-1, descending=True).values[:, :12].sum(-1).mean().item()
    assert held["uniform"] < 0.4
    assert held["clustered"] > 0.8
    assert held["typical"] > 0.9


def test_top_k_runs_where_it_exists_is_checked_and_says_so_where_it_does_not(monkeypatch):
    one = case("topk", block=1, heads=1, kv_heads=1)
    monkeypatch.delattr(functional, "top_k_attention", raising=False)
    row = driver.measure(one, SMALL)
    assert row.status == UNAVAILABLE
    assert "top_k_attention is not part of this installation" in row.notes[0]

    def works(q, k, v, top_k, causal):
        assert (top_k, causal) == (8, True)
        return naive(q, k, v)

    monkeypatch.setattr(functional, "top_k_attention", works, raising=False)
    row = driver.measure(one, SMALL)
    assert row.status == OK
    assert row.ratio == pytest.approx(row.dense_ms / row.sparse_ms)
    monkeypatch.setattr(functional, "top_k_attention", lambda q, k, v, n, causal: naive(q, k, v).roll(1, 2), raising=False)
    assert driver.measure(one, SMALL).status == FAILED


def test_top_k_passes_over_ties():
    q, k, v = (torch.ones(1, 1, 64, 4) for _ in range(3))
    assert check_top_k(v, q, k, v) == ""


def test_tables_show_losses_misses_and_failures():
    targets = (Target("ratio_sdpa", 5.5), Target("ratio_flex", 2.0))
    rows = [
        replace(ROW, ratio_sdpa=0.34, ratio=0.34, density=0.21, ideal=4.76, targets=targets),
        replace(ROW, case="another", status=FAILED, notes=("the output errs",)),
    ]  # fmt: skip
    text = table.markdown(facts(), rows)
    assert "| 0.34 |" in text
    assert "5.5 **missed**" in text
    assert "**FAILED**" in text
    assert "1. the output errs" in text
    assert "2 rows, 1 FAILED; targets met by 0 of 1" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1


def test_markdown_and_listing(tmp_path):
    path = tmp_path / "tables.md"
    told = sieve("bench", "prefill", *TINY, "--markdown", path)
    assert told.exit_code == 0
    assert path.read_text().count("| random blocks") == 6
    assert "random blocks 0.21" in told.stdout
    assert sieve("bench", "topk", *TINY, "--markdown", "-").stdout.count("| k = 8 |") == 1
    listed = sieve("bench", "--list").stdout
    assert "ratio_sdpa >= 16, ratio_flex >= 2" in listed
    assert "1M typical" not in listed
    assert "1M typical" in sieve("bench", "--list", "--long").stdout


def test_a_title_names_what_all_rows_share_and_nothing_where_they_share_nothing():
    machine = {"cpu": "any", "torch": "2", "date": "today", "commit": "0", "command": "sieve bench"}
    other = replace(ROW, dtype="bfloat16", n=64, m=64, head_dim=128, block=64, threads=2)
    assert "**prefill: attend over given blocks, causal**\n" in table.markdown(machine, [ROW, other])
    assert "**prefill: attend over given blocks, causal** (dtype float32, N 128," in table.markdown(machine, [ROW])


def test_a_ratio_that_fell_is_a_regression(tmp_path):
    path = tmp_path / "old.json"
    results.write_json(path, results.document(SMALL, {}, [ROW]))
    before = results.read_ratios(path)
    assert results.regressions([replace(ROW, ratio=1.81)], before) == []
    assert len(results.regressions([replace(ROW, ratio=1.79)], before)) == 1
    assert "now FAILED" in results.regressions([replace(ROW, status=FAILED, ratio=None)], before)[0]
    assert results.regressions([replace(ROW, threads=2, ratio=0.1)], before) == []


def test_compare_exits_1_where_a_ratio_fell(tmp_path):
    path = tmp_path / "old.json"
    fast = replace(ROW, head_dim=32, ratio=1e6)
    results.write_json(path, results.document(SMALL, {}, [fast, replace(fast, case="no such case")]))
    told = sieve("bench", "prefill", *TINY, "--compare", path)
    assert told.exit_code == 1
    assert told.stderr.count("regression: prefill, random blocks 1, float32") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "`group` must be of prefill, backward, decode, gate, topk, ternary, index; got 'nothing'"),
        (["prefill", "aether"], "`group` must be of prefill, backward, decode, gate, topk, ternary, index; got 'aether'"),
        (["prefill", "--n", 3], "`n` must be an integer of at least 64; got 3"),
        (["prefill", "--threads", 0], "`threads` must be an integer of at least 1; got 0"),
        (["prefill", "--repeats", 0], "`repeats` must be an integer of at least 1; got 0"),
        (["prefill", "--dtype", "int8"], "`dtype` must be of float32, bfloat16, float16; got 'int8'"),
        (["prefill", "--peers", "sdpa,xformers"], "`peers` must be of sdpa, flex; got 'xformers'"),
        (["prefill", "--backend", "abacus"], "`backend` must be 'auto' or one of"),
        (["prefill", "--json", "/no/such/folder/x.json"], "`json` must be a file in a folder that exists"),
        (["prefill", "--compare", "/no/such/file"], "`compare` must be a file that `sieve bench --json` wrote"),
        (["aether", "--batch-size", 0], "`batch_size` must be an integer of at least 1; got 0"),
        (["aether", "--target-sparsity", 2], "`target_sparsity` must lie in [0, 1]; got 2.0"),
        (["aether", "--dtype", "int8"], "`dtype` must be of float32, fp32"),
        (["aether", "--data", "real"], "`data` must be of gaussian, clustered; got 'real'"),
    ],
)
def test_user_errors_are_one_line_and_exit_code_2(arguments, said):
    told = sieve("bench", *arguments)
    assert told.exit_code == 2
    assert told.stderr.startswith(f"sieve: {said}")
    assert told.stdout == ""


@pytest.mark.long
def test_compiled_flex_attention_runs_on_the_same_blocks():
    one = case(density=0.5, dtype="bfloat16")
    row = driver.measure(one, replace(SMALL, peers=("sdpa", "flex")))
    assert row.status == OK
    assert row.ratio_flex is not None, row.notes
    assert row.ratio == pytest.approx(min(row.ratio_sdpa, row.ratio_flex))
