"""The command line: ``sieve generate``, ``compare``, ``inspect`` and ``doctor``. Commands load what they need when they run."""

from __future__ import annotations

import typer

from sieve_attn.cli import compare, doctor, generate

app = typer.Typer(
    help="Sparse attention that says how much it skipped.", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False,
)  # fmt: skip
app.command("generate")(generate.generate)
app.command("compare")(compare.compare)
app.command("inspect")(compare.inspect)
app.command("doctor")(doctor.doctor)


def main() -> None:
    """The entry point of ``sieve``."""
    app()
