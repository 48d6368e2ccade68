"""The soundness law of the certificate over a million (query, selection) pairs: `make soak`."""

import pytest
from test_certificate import soundness

from sieve_attn.testing import Shape


@pytest.mark.long
@pytest.mark.parametrize(
    ("pairs", "shape"),
    [
        (600_000, Shape(4, 8, 2, 192, 320, 64, 16)),
        (300_000, Shape(8, 8, 8, 128, 257, 32, 16)),
        (100_000, Shape(2, 4, 1, 256, 1000, 128, 16)),
    ],
)
def test_a_million_pairs_without_a_violation(pairs, shape):
    assert soundness(pairs, shape) >= pairs
