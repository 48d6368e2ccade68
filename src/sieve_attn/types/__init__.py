"""What the stages hand to each other. Axis names, used in every annotation and docstring:

``batch``; ``q_heads`` and ``kv_heads`` (``q_heads % kv_heads == 0``; a *group* is the query heads of one KV head);
``q_len`` queries and ``kv_len`` keys; ``dim`` and ``v_dim`` the head dimensions of keys and values; ``blocks =
ceil(kv_len / block_size)`` key blocks; ``tiles`` query tiles of ``query_tile`` positions; ``rows`` one chunk of queries.
A *scaled logit* is ``scale * (q . k)``. *Mass* is a sum of exponentials of logits, always kept as its logarithm.
"""

from __future__ import annotations

from sieve_attn.types.call import Call
from sieve_attn.types.geometry import Geometry, Sketch, Statistics
from sieve_attn.types.report import Certificate, Fallback, Report
from sieve_attn.types.rows import Rows, Scores
from sieve_attn.types.selection import Blocks, Offsets, Ranges, Selection, Tokens

__all__ = [
    "Blocks", "Call", "Certificate", "Fallback", "Geometry", "Offsets", "Ranges", "Report", "Rows", "Scores", "Selection",
    "Sketch", "Statistics", "Tokens",
]  # fmt: skip
