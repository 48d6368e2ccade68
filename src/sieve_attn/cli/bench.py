"""``sieve bench``: correctness first, then time against the fastest dense kernels; ``sieve bench aether``: the published one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from sieve_attn.cli import options as o

RUN, SWEEP = "run", "--sparsity-sweep"
ALL_GROUPS = "prefill, backward, decode, gate, topk, ternary, index; all by default."


class _Bench(TyperGroup):
    """``sieve bench`` takes groups; ``sieve bench aether`` is a command with flags of its own."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if args[:1] == ["aether"] else [RUN, *args])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return "" if name == RUN else name, command, rest


class _Published(TyperCommand):
    """``--sparsity-sweep 0.5 0.7 0.9``: one flag, many numbers."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        spread, words = [], list(args)
        while words:
            word = words.pop(0)
            if word.replace("_", "-") != SWEEP or not words or words[0].startswith("--"):
                spread.append(word)
                continue
            while words and not words[0].startswith("--"):
                spread += [part for number in words.pop(0).split(",") if number for part in (SWEEP, number)]
        return super().parse_args(ctx, spread)


bench = typer.Typer(cls=_Bench, add_completion=False, help="Correctness first, then time against the fastest dense kernels.")
Seed = Annotated[int, typer.Option("--seed", help="The same seed draws the same arrays and selections.")]
JsonPath = Annotated[Path | None, typer.Option("--json", help="Write machine, settings and rows to this file.")]


@bench.command(RUN)
def run(
    groups: Annotated[list[str] | None, typer.Argument(help=ALL_GROUPS)] = None,
    json: JsonPath = None,
    markdown: Annotated[str | None, typer.Option("--markdown", help="Write Markdown tables here; '-' prints them.")] = None,
    threads: Annotated[list[int] | None, typer.Option("--threads", help="May be repeated; 1 and 2 by default.")] = None,
    n: Annotated[int | None, typer.Option("--n", help="Queries and keys (8,192; topk 4,096); gate stops at this length.")] = None,
    keys: Annotated[int | None, typer.Option("--keys", help="Keys in the cache of decode (131,072).")] = None,
    dtype: Annotated[list[str] | None, typer.Option("--dtype", help="float32, bfloat16 or float16; may be repeated.")] = None,
    head_dim: Annotated[list[int] | None, typer.Option("--head-dim", help="May be repeated.")] = None,
    repeats: Annotated[int | None, typer.Option("--repeats", help="Samples a median has at least (7).")] = None,
    peers: Annotated[str, typer.Option("--peers", help="sdpa, flex or both.")] = "sdpa,flex",
    quick: Annotated[bool, typer.Option("--quick", help="1,024 tokens, 8,192 keys, 3 repeats, one thread.")] = False,
    long: Annotated[bool, typer.Option("--long", help="Also 128K and 1M tokens, and top-k at 64K.")] = False,
    listing: Annotated[bool, typer.Option("--list", help="Print what would run, and stop.")] = False,
    framework: Annotated[str, typer.Option("--framework", help="torch, or jax: its jitted calls, 4K to 16K.")] = "torch",
    compare: Annotated[Path | None, typer.Option("--compare", help="An earlier --json; ratios 10 % below it are exit 1.")] = None,
    seed: Seed = 0, backend: o.Backend = "auto",
    device: Annotated[str, typer.Option("--device", help="cpu, or cuda with cases and targets of its own.")] = "cpu",
) -> None:  # fmt: skip
    """Ratios over PyTorch's attention and compiled FlexAttention in the same run. A row that is wrong is FAILED, and exit 1.

    AETHER's published benchmark has flags of its own: sieve bench aether --help.
    """
    from sieve_attn.bench.settings import GROUPS, Settings

    with o.user_errors():
        settings = Settings(
            _given(groups) or GROUPS, n, keys, _given(dtype), _given(head_dim), _given(threads), repeats,
            tuple(name.strip() for name in peers.split(",") if name.strip()), backend, seed, quick, long, framework, device,
        )  # fmt: skip
        if listing:
            return _list(settings)
        o.check_target("json", json)
        o.check_target("markdown", None if markdown in (None, "-") else Path(markdown))
        from sieve_attn.bench import results, table
        from sieve_attn.bench.driver import run as measure

        before = {} if compare is None else results.read_ratios(compare)
        machine = _machine()
        if device == "cuda":
            from sieve_attn.bench.machine import gpu

            machine |= gpu()
            json = results.place(machine) if json is None else json
        rows: list[Any] = []
        with o.progress_bar(True) as tell:
            for row in measure(settings, tell):
                rows.append(row)
                if json is not None:
                    # written after every row: an interrupted run keeps what it has
                    results.write_json(json, results.document(settings, machine, rows))
    if markdown == "-":
        typer.echo(table.markdown(machine, rows), nl=False)
    else:
        console = table.console()
        console.print(table.machine_line(machine), style="dim", highlight=False)
        for part in table.by_group(rows):
            table.print_group(console, part)
        console.print(table.summary(rows), highlight=False)
    if markdown not in (None, "-"):
        Path(markdown).write_text(table.markdown(machine, rows), encoding="utf-8")
    slower = results.regressions(rows, before)
    for line in slower:
        typer.echo(f"regression: {line}", err=True)
    if slower or any(row.status == "failed" for row in rows):
        raise typer.Exit(1)


@bench.command("aether", cls=_Published, context_settings={"token_normalize_func": lambda name: name.replace("_", "-")})
def aether(
    batch_size: Annotated[int, typer.Option("--batch-size")] = 4,
    num_heads: Annotated[int, typer.Option("--num-heads")] = 32,
    head_dim: Annotated[int, typer.Option("--head-dim")] = 128,
    seq_len: Annotated[int, typer.Option("--seq-len", help="Keys in the cache.")] = 4096,
    block_size: Annotated[int, typer.Option("--block-size", help="Keys in a block.")] = 64,
    num_warmup: Annotated[int, typer.Option("--num-warmup")] = 3,
    num_iterations: Annotated[int, typer.Option("--num-iterations", help="Samples a median.")] = 20,
    dtype: Annotated[str, typer.Option("--dtype", help="bfloat16, float16 or float32.")] = "bfloat16",
    threshold: Annotated[float, typer.Option("--threshold", help="Keep a block above this score.")] = 0.15,
    target_sparsity: Annotated[float | None, typer.Option("--target-sparsity", help="Drop this share of blocks instead.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Hold every variant against plain recomputations.")] = False,
    all_variants: Annotated[bool, typer.Option("--all-variants", help="basic, variance, tight, full, causal, ours.")] = False,
    sparsity_sweep: Annotated[list[float] | None, typer.Option(SWEEP, help="Several target sparsities: 0.5 0.7 0.9.")] = None,
    export_csv: Annotated[Path | None, typer.Option("--export-csv", help="Write the table to this file.")] = None,
    json: JsonPath = None,
    data: Annotated[str, typer.Option("--data", help="gaussian keys as published, or clustered ones.")] = "gaussian",
    seed: Seed = 0, backend: o.Backend = "auto", threads: o.Threads = None,
) -> None:  # fmt: skip
    """The published benchmark: one query per (batch, head) against a cache; time, sparsity and quality apart."""
    with o.user_errors():
        o.check_target("json", json)
        o.check_target("export-csv", export_csv)
        o.set_threads(threads)
        from sieve_attn.bench.aether import show
        from sieve_attn.bench.aether.cases import Options
        from sieve_attn.bench.aether.run import run as measure
        from sieve_attn.bench.results import write_json

        asked = Options(
            batch_size, num_heads, head_dim, seq_len, block_size, num_warmup, num_iterations, dtype, threshold, target_sparsity,
            all_variants, verify, tuple(sparsity_sweep or ()), data, backend, seed,
        )  # fmt: skip
        with o.progress_bar(True) as tell:
            outcomes = list(measure(asked, tell))
        laws = []
        if verify:
            from sieve_attn.bench.aether.verify import verify as hold

            laws = list(hold(asked))
        if json is not None:
            write_json(json, show.document(asked, _machine(), outcomes, laws))
        if export_csv is not None:
            show.write_csv(export_csv, asked, outcomes)
    show.show(asked, outcomes, laws)
    if any(outcome.status == "failed" for outcome in outcomes) or any(wrong for _, wrong in laws):
        raise typer.Exit(1)


def _given(values: list | None) -> tuple | None:
    return tuple(dict.fromkeys(values)) if values else None


def _machine() -> dict[str, Any]:
    from sieve_attn.bench.machine import facts
    from sieve_attn.cli.doctor import cpu_features

    return facts() | {"cpu_flags": cpu_features()}


def _list(settings: Any) -> None:
    from sieve_attn.bench.cases import cases

    for case in cases(settings):
        held = ", ".join(map(str, case.targets)) or "no target"
        typer.echo(f"{case.group:<9} {case.name:<26} {case.dtype:<9} N {case.q_len:<8} M {case.kv_len:<8} D {case.dim:<4} "
                   f"block {case.block:<3} threads {case.threads:<2} {held}")  # fmt: skip
