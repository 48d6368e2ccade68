"""Rows as tables: in a terminal and as Markdown. Losses are printed like gains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sieve_attn.bench.rows import FAILED, UNAVAILABLE, Row

WIDTH = 160  # where the output is no terminal

TITLES = {
    "prefill": "prefill: attend over given blocks, causal",
    "backward": "backward: gradients alone, over given blocks, causal",
    "decode": "decode: one step of 32 query heads on 8 KV heads, scan and choice included",
    "gate": "gate: whole causal calls, choosing included",
    "topk": "topk: exact top-k attention, causal, against the naive form",
    "ternary": "ternary: packed weights, cached steps and the recurrence, against dense forms",
    "index": "index: number-theoretic attention, causal, against dense attention",
    "jax": "jax: whole jitted causal calls, choosing included, against dense attention of PyTorch and of JAX",
}
COMMON = ("dtype", "n", "m", "head_dim", "block", "threads", "backend")
FIGURES = {
    "prefill": ("density", "ideal", "ratio_sdpa", "ratio_flex", "dense_ms", "flex_ms", "sparse_ms", "scaling", "peak_mb"),
    "backward": ("density", "ideal", "ratio", "dense_ms", "sparse_ms", "scaling", "peak_mb"),
    "gate": ("density", "dropped_mass", "gate_ms", "attend_ms", "gate_percent", "dense_ms", "sparse_ms", "ideal", "ratio",
             "peak_mb"),
    "decode": ("density", "dropped_mass", "bytes_mb", "floor_ms", "bandwidth_share", "dense_ms", "flex_ms", "gate_ms",
               "sparse_ms", "ideal", "ratio_sdpa", "ratio_flex", "scaling", "peak_mb"),
    "topk": ("density", "ideal", "ratio", "dense_ms", "sparse_ms", "peak_mb"),
    "ternary": ("ratio", "dense_ms", "sparse_ms", "peak_mb"),
    "index": ("density", "ideal", "ratio_sdpa", "ratio", "dense_ms", "sparse_ms", "peak_mb"),
    "jax": ("density", "ideal", "ratio_sdpa", "ratio_naive", "ratio_front", "dense_ms", "sparse_ms", "peak_mb"),
}  # fmt: skip
HEADS = {
    "n": "N", "m": "M", "head_dim": "D", "ratio_sdpa": "x SDPA", "ratio_flex": "x Flex",
    "ratio_naive": "x naive", "ratio_front": "x PyTorch's ours", "dense_ms": "dense ms",
    "flex_ms": "Flex ms", "sparse_ms": "ours ms", "gate_ms": "gate ms", "attend_ms": "attend ms", "peak_mb": "peak MB",
    "dropped_mass": "dropped", "gate_percent": "gate / dense", "bytes_mb": "MB read", "floor_ms": "floor ms",
    "bandwidth_share": "floor / ours",
}  # fmt: skip
SHORT = {
    "ratio_flex": "Flex",
    "ratio_front": "PyTorch's ours",
    "bandwidth_share": "bandwidth",
    "resident_mb": "resident MB",
    "peak_mb": "MB",
    "scaling": "scaling",
}

VERDICTS = {True: "met", False: "missed", None: "not measured"}


def figure(name: str, value: Any) -> str:
    """One value as a cell."""
    if value is None:
        return "-"
    if name in ("density", "bandwidth_share"):
        return f"{value:.1%}"
    if name == "gate_percent":
        return f"{value:.1f} %"
    if name in ("peak_mb", "resident_mb", "bytes_mb"):
        return f"{value:,.0f}" if abs(value) >= 10 else f"{value:.1f}"
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def verdict(row: Row) -> str:
    """``5.5 met``: the first target; others where they are missed."""
    told = []
    for place, target in enumerate(row.targets):
        met = target.met(row)
        if place == 0 or met is False:
            words = (SHORT.get(target.field), "<=" if target.most else None, f"{target.bound:g}", VERDICTS[met])
            told.append(" ".join(word for word in words if word))
    return ", ".join(told)


def machine_line(machine: dict[str, Any]) -> str:
    flags = " ".join(machine.get("cpu_flags", ()))
    model = machine["cpu"] + (f" ({flags})" if flags else "")
    if "gpu" in machine:
        model = f"{machine['gpu']}, driver {machine['driver']}, CUDA {machine['cuda']}, Triton {machine['triton']}"
    return f"{model}, torch {machine['torch']}, {machine['date'][:10]}, commit {machine['commit']}"


def grid(rows: Sequence[Row]) -> tuple[tuple[str, str], list[str], list[list[str]], list[str]]:
    """``((title, what all rows share), heads, cells, notes)`` of one group; columns that say one thing go into the title."""
    group = rows[0].group
    common = [name for name in COMMON if name != "m" or any(row.m != row.n for row in rows)]
    shared = {name: {getattr(row, name) for row in rows} for name in common}
    same = [name for name, values in shared.items() if len(values) == 1 and None not in values]
    shares = ", ".join(f"{HEADS.get(name, name)} {figure(name, getattr(rows[0], name))}" for name in same)
    title = TITLES[group], f" ({shares})" if shares else ""
    keys = [name for name in common if name not in same]
    figures = [name for name in FIGURES[group] if any(getattr(row, name) is not None for row in rows)]
    notes: list[str] = []
    cells = []
    for row in rows:
        cell = [row.case, *(figure(name, getattr(row, name)) for name in keys)]
        if row.status in (FAILED, UNAVAILABLE):
            cell += [row.status.upper() if row.status == FAILED else row.status, *["-"] * (len(figures) - 1)][: len(figures) or 1]
        else:
            cell += [figure(name, getattr(row, name)) for name in figures]
        for note in row.notes:
            if note not in notes:
                notes.append(note)
        cells.append([*cell, verdict(row), " ".join(str(notes.index(note) + 1) for note in row.notes)])
    heads = ["case", *(HEADS.get(name, name) for name in keys), *((HEADS.get(f, f) for f in figures) if figures else ["status"])]
    return title, [*heads, "target", "note"], cells, notes


def print_group(console: Console, rows: Sequence[Row]) -> None:
    (title, shares), heads, cells, notes = grid(rows)
    console.print(title + escape(shares), style="bold", highlight=False)
    table = Table(box=None, pad_edge=False)
    for place, head in enumerate(heads):
        table.add_column(head, justify="left" if place == 0 else "right", no_wrap=place == 0)
    for row, cell in zip(rows, cells, strict=True):
        style = "red" if row.status == FAILED else "dim" if row.status == UNAVAILABLE else None
        colour = {True: "green", False: "red", None: None}[row.met]
        shown = [escape(text) for text in cell]
        shown[-2] = f"[{colour}]{shown[-2]}[/]" if colour else shown[-2]
        table.add_row(*shown, style=style)
    console.print(table)
    for number, note in enumerate(notes, 1):
        console.print(f"  {number}: {escape(note)}", style="dim", highlight=False)
    console.print()


def by_group(rows: Sequence[Row]) -> list[list[Row]]:
    return [[row for row in rows if row.group == group] for group in dict.fromkeys(row.group for row in rows)]


def summary(rows: Sequence[Row]) -> str:
    judged = [row.met for row in rows if row.met is not None]
    failed = sum(row.status == FAILED for row in rows)
    return f"{len(rows)} rows, {failed} FAILED; targets met by {sum(judged)} of {len(judged)} rows that have one"


def console(make: Callable[..., Console] = Console) -> Console:
    found = make()
    return found if found.is_terminal else make(width=WIDTH)


def markdown(machine: dict[str, Any], rows: Sequence[Row]) -> str:
    """Tables for a README, under one line about the machine."""
    lines = [f"{machine_line(machine)}: `{machine['command']}`. {summary(rows)}.", ""]
    for part in by_group(rows):
        (title, shares), heads, cells, notes = grid(part)
        lines += [f"**{title}**{shares}", "", _line(heads), _line(["---", *["---:"] * (len(heads) - 1)])]
        lines += [
            _line([text.replace("missed", "**missed**").replace("FAILED", "**FAILED**") for text in cell]) for cell in cells
        ]
        lines += ["", *(f"{number}. {note.replace('|', '/')}" for number, note in enumerate(notes, 1)), ""]
    return "\n".join(lines).rstrip() + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(text.replace('|', '/') for text in cells)} |"
