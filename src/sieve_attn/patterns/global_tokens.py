"""Tokens that every query reads."""

from __future__ import annotations

from dataclasses import dataclass

from sieve_attn.patterns.sinks import Sinks


@dataclass(frozen=True)
class GlobalTokens(Sinks):
    """Keys ``0 .. tokens - 1``, under the name that number-theoretic attention and BigBird have for them."""
