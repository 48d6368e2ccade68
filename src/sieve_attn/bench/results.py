"""A run as a document: JSON out, and compared with an earlier one."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sieve_attn.bench.rows import FAILED, Row
from sieve_attn.bench.settings import Settings
from sieve_attn.checks import error

SLACK = 0.9  # a ratio below this share of the earlier one is a regression


def document(settings: Settings, machine: dict[str, Any], rows: list[Row]) -> dict[str, Any]:
    return {"machine": machine, "settings": asdict(settings), "rows": [row.to_dict() for row in rows]}


def place(machine: dict[str, Any]) -> Path | None:
    """Where a run on a GPU is written without being told: ``bench/results`` of a checkout; None outside of one."""
    folder = Path("bench/results")
    if not Path("pyproject.toml").is_file():
        return None
    folder.mkdir(parents=True, exist_ok=True)
    words = f"{machine['gpu']} {machine['date'][:10]}".lower().replace("/", "-").split()
    return folder / f"{'-'.join(words)}.json"


def write_json(path: Path, found: dict[str, Any]) -> None:
    path.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_ratios(path: Path) -> dict[tuple, float]:
    """``ratio`` by identity from a document of an earlier run."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        names = ("group", "case", "dtype", "N", "M", "D", "block", "threads")
        return {tuple(row[name] for name in names): row["ratio"] for row in rows if row["ratio"] is not None}
    except (OSError, ValueError, KeyError, TypeError) as why:
        raise error(
            "compare", "must be a file that `sieve bench --json` wrote", f"{str(path)!r} ({why})", "write one first"
        ) from None


def regressions(rows: list[Row], before: dict[tuple, float]) -> list[str]:
    """One line a row whose ratio fell below 90 % of what it was, or that failed now."""
    lines = []
    for row in rows:
        was = before.get(row.identity)
        if was is None:
            continue
        name = f"{row.group}, {row.case}, {row.dtype}, N {row.n}, M {row.m}, D {row.head_dim}, {row.threads} threads"
        if row.status == FAILED:
            lines.append(f"{name}: ratio {was:.2f}, now FAILED")
        elif row.ratio is not None and row.ratio < SLACK * was:
            lines.append(f"{name}: ratio {was:.2f}, now {row.ratio:.2f}")
    return lines
