"""The benchmark on a GPU, as far as it can be held without one: cases, targets, errors, clocks and where results go."""

from types import SimpleNamespace

import pytest
import torch

from sieve_attn import policies
from sieve_attn.bench import driver, peers, results, table, timing
from sieve_attn.bench.cases import Case, cases
from sieve_attn.bench.prepared import Prepared, moved
from sieve_attn.bench.settings import ON_CUDA, Settings
from sieve_attn.types import Blocks, Selection


@pytest.fixture
def gpu(monkeypatch):
    """Settings are made as if there were a GPU; nothing runs on it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_without_a_gpu_nothing_is_claimed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"`device` must be a device of this machine, which has no CUDA GPU; got 'cuda'"):
        Settings(device="cuda")
    with pytest.raises(ValueError, match=r"`device` must be of cpu, cuda; got 'tpu'"):
        Settings(device="tpu")


def test_a_gpu_has_groups_and_threads_of_its_own(gpu):
    assert Settings(device="cuda").groups == ON_CUDA
    assert Settings(device="cuda").threads == (1,)
    with pytest.raises(ValueError, match=r"`group` must be of prefill, .*; got 'ternary'; the others run on the CPU"):
        Settings(("ternary",), device="cuda")
    with pytest.raises(ValueError, match=r"`threads` must be left out on a GPU; got 2"):
        Settings(threads=(2,), device="cuda")


def test_the_goals_stand_beside_the_sizes_they_were_stated_for(gpu):
    full = cases(Settings(device="cuda", long=True))
    held = {(c.group, c.name, c.dim, c.block): {t.field: t.bound for t in c.targets} for c in full if c.targets}
    assert held["prefill", "random blocks 1", 128, 64] == {"ratio": 0.75}
    assert held["prefill", "random blocks 0.1", 128, 64] == {"ratio": pytest.approx(8.0), "ratio_flex": 1.5}
    assert held["backward", "random blocks 0.1", 128, 64] == {"ratio": pytest.approx(6.0), "ratio_flex": 1.5}
    assert held["gate", "share: 4-bit sketch", 128, 16] == {"gate_percent": 10.0}
    assert [held["gate", n, 128, 16]["ratio"] for n in ("4K uniform", "32K clustered", "128K typical")] == [1.0, 4.0, 7.0]
    assert held["decode", "4-bit sketch", 128, 16] == {"ratio_sdpa": 4.0, "bandwidth_share": 0.7}
    assert held["decode", "centroids", 128, 64] == {"ratio_sdpa": 8.0, "bandwidth_share": 0.7}
    assert 1 << 20 in {c.q_len for c in full}
    assert not any(c.targets for c in cases(Settings(device="cuda", n=1024, keys=4096)))
    for policy in {c.policy for c in full if c.policy}:
        policies.parse(policy)


def test_the_clock_is_the_devices(monkeypatch):
    told = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            told.append("record")

        def synchronize(self):
            told.append("wait")

        def elapsed_time(self, other):
            return 2.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: told.append("idle"))
    result, seconds = timing.on_cuda(lambda: told.append("call") or 7)
    assert (result, seconds) == (7, 0.0025)
    assert told == ["idle", "record", "call", "record", "wait"]
    found = timing.interleave({"a": lambda: 1}, 3, least_seconds=0.0, clock=lambda call: (call(), 0.5))
    assert found == {"a": [0.5] * 3}


def test_the_fastest_named_kernel_is_the_dense_peer(monkeypatch):
    """Every fused kernel is timed; a group of choices that is timed apart is no peer."""
    seconds = {"ours": 1.0, "sdpa flash": 4.0, "sdpa cudnn": 3.0, "flex": 5.0, "gate": 0.3}
    monkeypatch.setattr(timing, "interleave", lambda calls, *a, **o: {name: [seconds[name]] * 3 for name in calls})
    made = {name: lambda: peers.Peer(lambda: None) for name in ("sdpa flash", "sdpa cudnn", "flex")}
    prepared = Prepared(lambda: None, lambda result: ("", {}), made, beside={"gate": lambda: None})
    case = Case("gate", "x", "bfloat16", 8, 8, 8, 8)
    row = driver.clocked(driver.Row("gate", "x", "bfloat16", 8, 8, 8, 8, 1), prepared, Settings())
    assert (row.ratio, row.ratio_sdpa, row.ratio_flex) == (3.0, 3.0, 5.0)
    assert (row.dense_ms, row.gate_ms, row.gate_percent) == (3000.0, 300.0, 10.0)
    assert any("flash 4000.000 ms, cudnn 3000.000 ms" in note for note in row.notes)
    assert case.group == row.group


def test_what_is_checked_is_on_the_host():
    index = torch.tensor([0, 9, 9], dtype=torch.int32)
    blocks = Blocks(torch.tensor([0, 1]), index, 1, 1, 4, 4, 4, 4)
    found = moved((torch.ones(2), Selection((blocks,)), None), "cpu")
    assert torch.equal(found[0], torch.ones(2))
    assert found[1].blocks.block_index.tolist() == [0]  # room to spare stays behind
    assert found[2] is None


def test_results_go_beside_the_others_under_the_name_of_the_card(monkeypatch, tmp_path):
    machine = {"gpu": "NVIDIA H200", "date": "2030-01-02T03:04", "driver": "1.2", "cuda": "13", "triton": "3", "cpu": "x",
               "torch": "2", "commit": "abc"}  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert results.place(machine) is None
    (tmp_path / "pyproject.toml").write_text("")
    assert results.place(machine).as_posix() == "bench/results/nvidia-h200-2030-01-02.json"
    assert table.machine_line(machine).startswith("NVIDIA H200, driver 1.2, CUDA 13, Triton 3, torch 2")


def test_a_gpu_says_what_it_is(monkeypatch):
    from sieve_attn.bench import machine

    card = SimpleNamespace(name="NVIDIA H200", total_memory=150e9, major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(machine, "driver", lambda: "999.1")
    told = machine.gpu()
    assert (told["gpu"], told["compute_capability"], told["driver"]) == ("NVIDIA H200", "9.0", "999.1")
