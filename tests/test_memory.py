"""Never an array of queries x keys: long inputs stay small on the reference."""

import subprocess
import sys

import pytest

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
