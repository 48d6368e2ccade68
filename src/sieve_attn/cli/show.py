"""A comparison as tables in a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sieve_attn.evaluation.comparison import quantiles
from sieve_attn.evaluation.report import common_prefix, percent, seconds, tiny

WIDTH = 116  # where the output is no terminal


def show(found: Any) -> None:
    """Print ``found`` to stdout."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(
        f"[bold]{escape(found.model)}[/], {found.dtype}, {found.prompt_tokens:,} tokens of {escape(found.source)}, "
        f"{found.new_tokens} new tokens"
    )
    console.print(f"policy   {escape(found.policy)}", highlight=False)
    console.print(f"backend  {found.backend} ({escape(found.why_backend)})", highlight=False)
    console.print(", ".join(f"{k} {v}" for k, v in found.environment.items()), style="dim", highlight=False)
    for table in (_times(found), _layers(found), _agreement(found)):
        console.print()
        console.print(table)
    console.print()
    console.print(found.speed, highlight=False)
    for line in _remarks(found):
        console.print(line, highlight=False)
    for name, text in _texts(found):
        console.print(f"\n[bold]{name}[/]")
        console.print(text, highlight=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    return table


def _times(found: Any) -> Table:
    table = _table("Time", "", "dense", "sparse", "sparse / dense")
    for name, dense, sparse in (
        ("prefill", found.dense.prefill_seconds, found.sparse.prefill_seconds),
        ("decode step, median", found.dense.decode_seconds, found.sparse.decode_seconds),
    ):
        table.add_row(name, seconds(dense), seconds(sparse), f"{sparse / dense:.2f}" if dense else "-")
    table.add_row("gate, share of attention", "-", percent(found.gate_overhead), "")
    return table


def _layers(found: Any) -> Table:
    table = _table(
        "Layers (dropped mass and output error: median / 99 % / max)",
        "layer",
        "density",
        "decode",
        "gate",
        "certified",
        "true",
        "output error",
    )
    rows = [(str(x.layer), x.density, x.decode_density, x.gate_overhead, x.errors) for x in found.layers]
    for name, *shares, errors in [*rows, ("all", found.density, found.decode_density, found.gate_overhead, found.errors)]:
        measured = [quantiles(v) for v in (errors.certified, errors.dropped, errors.output)]
        table.add_row(name, *map(percent, shares), *(" / ".join(tiny(v) for v in q.values()) if q else "-" for q in measured))
    return table


def _agreement(found: Any) -> Table:
    table = _table("Next tokens", "positions", "same", "share", "mean KL (nats)", "max KL (nats)")
    for a in found.agreement:
        table.add_row(a.where, f"{a.agreed} of {a.positions}", percent(a.share), f"{a.kl_mean:.2e}", f"{a.kl_max:.2e}")
    return table


def _remarks(found: Any) -> list[str]:
    errors = found.errors
    lines = [
        f"Certified ({found.bound}) and true errors were measured at {found.sampled}: {errors.certified.size:,} "
        f"(layer, head, query) triples, {errors.violations} above their certificate. Output error is {found.error_unit}."
    ]
    if found.requested_sparsity is not None:
        lines.append(
            f"Requested sparsity {percent(found.requested_sparsity)}, achieved {percent(1 - found.density)} in the "
            f"prompt, {percent(1 - found.decode_density)} in decode steps."
        )
    lines += [f"Turned dense on its own: {reason} ({count:,} times)." for reason, count in found.fallbacks.items()]
    return [escape(line) for line in lines]


def _texts(found: Any) -> list[tuple[str, Text]]:
    dense, sparse = found.dense.text, found.sparse.text
    if dense == sparse:
        return [("Both wrote", Text(dense))]
    same = common_prefix(dense, sparse)
    both = (("Dense wrote", dense), ("Sparse wrote", sparse))
    return [(name, Text.assemble(text[:same], (text[same:], "reverse"))) for name, text in both]
