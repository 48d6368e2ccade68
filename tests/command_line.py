"""Runs `sieve` in this process."""

from typer.testing import CliRunner

from sieve_attn.cli import app


def sieve(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
