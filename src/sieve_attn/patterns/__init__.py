"""Stage 3a: positions to selection. One file a pattern; as a policy's ``keep`` they are OR-ed into whatever is chosen."""

from __future__ import annotations

from sieve_attn.patterns.base import Pattern, Union
from sieve_attn.patterns.sinks import Sinks
from sieve_attn.patterns.window import Window
from sieve_attn.registry import Table

TABLE = Table("sieve_attn.patterns", {"sinks": "sieve_attn.patterns.sinks:Sinks", "window": "sieve_attn.patterns.window:Window"})

__all__ = ["TABLE", "Pattern", "Sinks", "Union", "Window"]
