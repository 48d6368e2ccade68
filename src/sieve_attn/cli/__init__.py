"""The command line: ``sieve generate``, ``compare``, ``inspect``, ``doctor``, ``bench``; each loads what it needs when run."""

from __future__ import annotations

from typing import Annotated

import typer

from sieve_attn.cli import bench, compare, doctor, generate

app = typer.Typer(
    help="Sparse attention that says how much it skipped.", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False,
)  # fmt: skip


def _say_version(wanted: bool) -> None:
    if wanted:
        from sieve_attn import __version__

        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def about(
    version: Annotated[bool, typer.Option("--version", help="Print it and stop.", callback=_say_version, is_eager=True)] = False,
) -> None:
    """Sparse attention that says how much it skipped."""


app.command("generate")(generate.generate)
app.command("compare")(compare.compare)
app.command("inspect")(compare.inspect)
app.add_typer(bench.bench, name="bench")
app.command("doctor")(doctor.doctor)


def main() -> None:
    """The entry point of ``sieve``."""
    try:
        app()
    except ModuleNotFoundError as missing:
        if missing.name not in ("torch", "transformers", "safetensors"):
            raise
        typer.echo(
            f"this command needs {missing.name}, which is not installed; install it with `pip install 'sieve-attn[hf]'`", err=True
        )
        raise SystemExit(2) from None
