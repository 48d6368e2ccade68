"""Outcomes as a table in a terminal, as CSV and as a document for JSON."""

from __future__ import annotations

import csv
import math
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from sieve_attn.bench.aether.cases import Options, Outcome
from sieve_attn.bench.rows import FAILED
from sieve_attn.bench.table import console as make_console

COLUMNS = {
    "variant": "variant", "requested_sparsity": "asked", "sparsity": "sparsity", "theoretical_speedup": "theoretical",
    "measured_speedup": "measured", "dense_ms": "dense ms", "sparse_ms": "sparse ms", "gate_ms": "gate ms", "cosine": "cosine",
    "relative_l2": "rel. L2", "dropped_mass": "dropped", "kl_sparse_dense": "KL(s||d)",
    "kl_dense_sparse_clamped": "KL(d||s) clamped", "precision": "precision", "recall": "recall",
}  # fmt: skip


def show(o: Options, outcomes: list[Outcome], laws: list[tuple[str, str]]) -> None:
    console = make_console()
    sizes = f"batch {o.batch_size}, {o.num_heads} heads, head_dim {o.head_dim}, {o.seq_len:,} keys, {o.dtype}, {o.data} keys"
    asked = f"threshold {o.threshold:g}, " if o.target_sparsity is None and not o.sparsity_sweep else ""
    title = f"AETHER's benchmark: one query a head; {sizes}, {asked}{o.block_size} keys a block"
    console.print(title, style="bold", highlight=False)
    table = Table(box=None, pad_edge=False)
    for place, head in enumerate(COLUMNS.values()):
        table.add_column(head, justify="left" if place == 0 else "right")
    for outcome in outcomes:
        if outcome.status == FAILED:
            table.add_row(outcome.variant, "-", "FAILED", style="red")
        else:
            table.add_row(*(_cell(name, getattr(outcome, name)) for name in COLUMNS))
    console.print(table)
    for outcome in outcomes:
        if outcome.note:
            console.print(f"  {outcome.variant}: {escape(outcome.note)}", style="dim", highlight=False)
    console.print(
        "  measured: dense over sparse time, choosing included; theoretical: 1 / (1 - sparsity). Precision and recall are of the "
        "blocks that hold 90 % of a query's mass.", style="dim", highlight=False,
    )  # fmt: skip
    for law, wrong in laws:
        told = f"  FAILED  {law}: {wrong}" if wrong else f"  holds   {law}"
        console.print(escape(told), style="red" if wrong else None, highlight=False)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name in ("requested_sparsity", "sparsity"):
        return f"{value:.1%}"
    if name.startswith("kl_") or name in ("relative_l2", "dropped_mass"):
        return f"{value:.3g}"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def document(o: Options, machine: dict[str, Any], outcomes: list[Outcome], laws: list[tuple[str, str]]) -> dict[str, Any]:
    """The run as plain values for JSON; infinities as text."""
    rows = [{n: str(v) if v in (math.inf, -math.inf) else v for n, v in asdict(x).items()} for x in outcomes]
    return {"machine": machine, "options": asdict(o), "rows": rows, "laws": [{"law": law, "wrong": wrong} for law, wrong in laws]}


def write_csv(path: Path, o: Options, outcomes: list[Outcome]) -> None:
    """One line an outcome, led by the sizes of the run."""
    sizes = {name: getattr(o, name) for name in ("batch_size", "num_heads", "head_dim", "seq_len", "block_size", "dtype", "data")}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*sizes, *(f.name for f in fields(Outcome))])
        writer.writeheader()
        writer.writerows(sizes | asdict(outcome) for outcome in outcomes)
