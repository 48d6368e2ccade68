"""Stage 3a: positions to selection. One file a pattern; as a policy's ``keep`` they are OR-ed into whatever is chosen."""

from __future__ import annotations

from sieve_attn.patterns.base import Pattern, Union
from sieve_attn.patterns.dilated import Dilated
from sieve_attn.patterns.fibonacci import Fibonacci
from sieve_attn.patterns.global_tokens import GlobalTokens
from sieve_attn.patterns.mian_chowla import MianChowla
from sieve_attn.patterns.offsets import OffsetPattern, OffsetSet
from sieve_attn.patterns.primes import Primes
from sieve_attn.patterns.random_blocks import RandomBlocks
from sieve_attn.patterns.sinks import Sinks
from sieve_attn.patterns.squares import Squares
from sieve_attn.patterns.window import Window
from sieve_attn.registry import Table

TABLE = Table(
    "sieve_attn.patterns",
    {
        "dilated": "sieve_attn.patterns.dilated:Dilated",
        "fibonacci": "sieve_attn.patterns.fibonacci:Fibonacci",
        "global_tokens": "sieve_attn.patterns.global_tokens:GlobalTokens",
        "mian_chowla": "sieve_attn.patterns.mian_chowla:MianChowla",
        "offset_pattern": "sieve_attn.patterns.offsets:OffsetPattern",
        "primes": "sieve_attn.patterns.primes:Primes",
        "random_blocks": "sieve_attn.patterns.random_blocks:RandomBlocks",
        "sinks": "sieve_attn.patterns.sinks:Sinks",
        "squares": "sieve_attn.patterns.squares:Squares",
        "window": "sieve_attn.patterns.window:Window",
    },
)

__all__ = [
    "TABLE", "Dilated", "Fibonacci", "GlobalTokens", "MianChowla", "OffsetPattern", "OffsetSet", "Pattern", "Primes",
    "RandomBlocks", "Sinks", "Squares", "Union", "Window",
]  # fmt: skip
