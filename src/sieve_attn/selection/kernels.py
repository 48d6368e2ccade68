"""What the kernels that choose for tiles of queries share, on the CPU and on a GPU: the calls they decline, forced tokens."""

from __future__ import annotations

from typing import Any

from sieve_attn.patterns import Pattern, Sinks, Window
from sieve_attn.patterns.base import members
from sieve_attn.types import Call


def declined(call: Call, policy: Any, per_query: bool, scorers: dict, selectors: dict) -> list[str]:
    """Why kernels that know ``scorers`` and ``selectors`` cannot choose for this call, whatever the device."""
    reasons = []
    if not (call.scale > 0):
        reasons.append("kernels score with a positive scale only")
    if call.mask is not None:
        reasons.append("kernels choose without a mask of queries by keys")
    if call.bias is not None:
        reasons.append("kernels choose without a bias")
    if per_query:
        reasons.append("kernels choose for tiles, not for every query")
    if type(policy.scorer) not in scorers:
        reasons.append(f"kernels score by {_names(scorers)}, not by {type(policy.scorer).__name__}")
    if type(policy.selector) not in selectors:
        reasons.append(f"kernels select by {_names(selectors)}, not by {type(policy.selector).__name__}")
    if ends(policy.keep) is None:
        reasons.append(f"kernels force Sinks and Window, not {policy.keep!r}")
    return reasons


def _names(table: dict) -> str:
    return ", ".join(kind.__name__ for kind in table)


def ends(keep: Pattern | None) -> tuple[int, int] | None:
    """``(sinks, window)`` in tokens, or None for a pattern of another kind."""
    sinks = window = 0
    for part in () if keep is None else members(keep):
        if type(part) is Sinks:
            sinks = max(sinks, part.tokens)
        elif type(part) is Window:
            window = max(window, part.tokens)
        else:
            return None
    return sinks, window
