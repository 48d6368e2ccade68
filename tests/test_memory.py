"""Never an array of queries x keys: long inputs stay small on the reference."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sieve_attn import geometry, native
from sieve_attn.geometry import Stream
from sieve_attn.layers.growing import GrowingArrays
from sieve_attn.policies import TopBlocks

PROGRAM = """
import resource, sys, torch
import sieve_attn as sa
from sieve_attn import policies
length, heads = int(sys.argv[1]), int(sys.argv[2])
torch.manual_seed(0)
q, k, v = (torch.randn(1, heads, length, 64) for _ in range(3))
sa.attention(q[:, :, :64], k[:, :, :64], v[:, :, :64], policies.TopBlocks(8), causal=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out, report = sa.attention(q, k, v, policies.TopBlocks(8), causal=True, return_report=True)
assert torch.isfinite(out).all() and report.density < 0.5
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)
"""


def growth(length, heads):
    """Growth of the peak resident size in GiB, measured in a process of its own."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(length), str(heads)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_3072_tokens_need_less_than_the_dense_logits_and_their_copies():
    # one dense array of logits is 0.28, and plain attention holds four of them
    assert growth(3072, 8) < 0.7


@pytest.mark.long
def test_16000_tokens_need_less_than_two_gigabytes():
    assert growth(16_000, 8) < 2.0


def asks_for_large_pages(x):
    """Whether the memory in the middle of ``x`` is marked for pages of 2 MB."""
    middle, inside = x.data_ptr() + x.untyped_storage().nbytes() // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if not name.endswith(":"):
            start, _, stop = name.partition("-")
            inside = int(start, 16) <= middle < int(stop, 16)
        elif inside and name == "VmFlags:":
            return "hg" in rest.split()
    raise AssertionError("the system does not know this memory")


@pytest.mark.skipif(bool(native.missing()), reason="pure-Python installation")
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no large pages on this system")
def test_caches_and_their_geometry_lie_on_large_pages():
    key, statistics = torch.randn(1, 4, 140_000, 64), TopBlocks(8).statistics
    assert not asks_for_large_pages(key)  # what others allocate stays as they made it
    for held in GrowingArrays.empty(1, 4, (64, 64), key.device, key.dtype).append((key, key)).arrays:
        assert torch.equal(held, key)
        assert asks_for_large_pages(held)
    assert asks_for_large_pages(geometry.build(key, 16, statistics).sketch.planes)
    stream = Stream(16, statistics)
    for length in (139_000, 140_000):
        grown = stream.update(key[:, :, :length])
    assert asks_for_large_pages(grown.sketch.planes)
    assert asks_for_large_pages(grown.mean)
