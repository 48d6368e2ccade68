"""A certificate of 1 is sound too: on clustered keys, proofs cost few blocks more than the oracle needs."""

import torch

from sieve_attn import attention
from sieve_attn.policies import Policy
from sieve_attn.scores import KeySketch
from sieve_attn.selection import Certified as CertifiedSelector
from sieve_attn.testing import Shape, oracle
from sieve_attn.testing.contracts import spread_heads
from sieve_attn.testing.strategies import clustered, random_blocks

ERROR, BLOCK = 0.1, 16
SHAPE = Shape(1, 8, 4, 128, 1024, 64, 16)


def block_mass(q, k, causal=True):
    logits = oracle.plain_logits(q.double(), k.double(), oracle.visible_keys(q.shape[2], k.shape[2], causal=causal))
    return torch.logsumexp(logits.unflatten(-1, (-1, BLOCK)), -1)


def test_certified_keeps_little_more_than_the_oracle_needs(capsys):
    q, k, v = clustered(1, SHAPE)
    mass = block_mass(q, k)
    shares = torch.softmax(mass, -1).sort(-1, descending=True).values
    needed = ((shares.cumsum(-1) - shares) < 1 - ERROR).sum(-1)  # the smallest prefix that holds 90 %
    ratios = {}
    for bits in (8, 4):
        policy = Policy(KeySketch(bits), CertifiedSelector(ERROR), share_group=False)
        _, report = attention(q, k, v, policy, causal=True, per_query=True, return_report=True)
        kept = report.selection.blocks.block_rows(0, SHAPE.q_len).sum(-1)
        ratios[bits] = float(kept.sum()) / float(needed.sum())
    density = float(needed.sum()) / float((mass > -torch.inf).sum())
    with capsys.disabled():
        print(
            f"\nclustered keys, error {ERROR}: oracle density {density:.3f}, "
            f"kept/needed 8 bits {ratios[8]:.3f}, 4 bits {ratios[4]:.3f}"
        )
    assert ratios[8] <= 1.3


def test_the_certificate_is_near_the_truth(capsys):
    q, k, v = clustered(2, SHAPE)
    exact = Policy(KeySketch(8), CertifiedSelector(ERROR), share_group=False)
    half = random_blocks(3, SHAPE, q_block=64, kv_block=BLOCK, density=0.5)
    for name, policy, extra in (
        ("certified", exact, {"per_query": True}), ("random half", Policy(bound=KeySketch(8)), {"selection": half}),
    ):  # fmt: skip
        _, report = attention(q, k, v, policy, causal=True, return_report=True, **extra)
        kept = spread_heads(report.selection.to_dense(q), SHAPE.q_heads)
        logits = oracle.plain_logits(q.double(), k.double(), oracle.visible_keys(SHAPE.q_len, SHAPE.kv_len, causal=True))
        delta = oracle.dropped_mass(logits, kept)
        large = delta > 1e-4
        ratio = float((report.certificate.dropped_mass.double() / delta)[large].median())
        with capsys.disabled():
            print(f"\nclustered keys, {name}: median certified/true dropped mass {ratio:.3f} over {int(large.sum())} queries")
        assert large.any()
        assert ratio <= 3
