"""What the device stages launch compiles ahead of time, with no spills and within the shared memory of the card."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
SHORT = ("prefill", "decode", "top-k", "offsets")
REST = ("means", "mass", "ball", "exact queries", "top-k fp32", "summaries", "large blocks")


def compiled(architecture, cases):
    """In a process of its own, since here kernels are interpreted."""
    free = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("ahead.py")
    done = subprocess.run([sys.executable, str(script), str(architecture), *cases], env=free, capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("architecture", "cases"),
    [
        (90, SHORT),
        *(pytest.param(a, c, marks=pytest.mark.long) for a, c in ((80, SHORT + REST), (90, REST), (100, SHORT + REST))),
    ],
)
def test_kernels_fit_the_card(architecture, cases):
    found = compiled(architecture, cases)
    assert {row["case"] for row in found} == set(cases)
    for row in found:
        assert row["spilled"] == 0, row
        assert row["shared"] <= SHARED[architecture], row
        assert row["registers"] <= 255, row
