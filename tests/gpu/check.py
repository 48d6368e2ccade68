"""`make gpu-check`: the tests of this folder on a CUDA device, and a record of where they ran in `bench/results/`.

Without a device it says so and claims nothing.
"""

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "bench" / "results"


class Outcomes:
    """Counts what pytest reports."""

    def __init__(self):
        self.passed, self.skipped, self.failed = 0, [], []

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.append(report.nodeid)
        elif report.skipped:
            self.skipped.append(report.nodeid)
        elif report.when == "call":
            self.passed += 1


def driver() -> str:
    asked = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    return asked.stdout.splitlines()[0].strip() if asked.returncode == 0 and asked.stdout else "unknown"


def main() -> int:
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was checked on a GPU, and nothing is claimed")
        return 0
    outcomes = Outcomes()
    # nearly all of the time goes into compiling, which workers share; what is timed runs by itself afterwards
    status = 0
    for which in (["-m", "not alone", "-n", str(min(8, os.cpu_count() or 1))], ["-m", "alone"]):
        found = int(pytest.main([str(HERE), "-q", *which, *sys.argv[1:]], plugins=[outcomes]))
        # a choice of tests by the caller may leave one of the two empty
        status = status or (0 if found == pytest.ExitCode.NO_TESTS_COLLECTED else found)
    name = torch.cuda.get_device_name()
    record = {
        "gpu": name, "capability": torch.cuda.get_device_capability(), "driver": driver(), "cuda": torch.version.cuda,
        "versions": {package: version(package) for package in ("sieve-attn", "torch", "triton")},
        "python": platform.python_version(), "date": datetime.now(UTC).isoformat(timespec="seconds"), "passed": outcomes.passed,
        "failed": outcomes.failed, "skipped": outcomes.skipped,
    }  # fmt: skip
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"gpu-check-{name.lower().replace(' ', '-')}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{outcomes.passed} passed, {len(outcomes.failed)} failed on {name}; written to {path}")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
