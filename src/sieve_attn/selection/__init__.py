"""Stage 3b: scores to selection. One file a rule; the table names every selector."""

from __future__ import annotations

from sieve_attn.registry import Table
from sieve_attn.selection.base import RankSelector, RowSelector, Selector
from sieve_attn.selection.certified import Certified
from sieve_attn.selection.mass import Mass
from sieve_attn.selection.running_maximum import RunningMaximum
from sieve_attn.selection.threshold import RelativeThreshold, Threshold
from sieve_attn.selection.top_k import TargetSparsity, TopK

TABLE = Table(
    "sieve_attn.selection",
    {
        "certified": "sieve_attn.selection.certified:Certified",
        "mass": "sieve_attn.selection.mass:Mass",
        "relative_threshold": "sieve_attn.selection.threshold:RelativeThreshold",
        "running_maximum": "sieve_attn.selection.running_maximum:RunningMaximum",
        "target_sparsity": "sieve_attn.selection.top_k:TargetSparsity",
        "threshold": "sieve_attn.selection.threshold:Threshold",
        "top_k": "sieve_attn.selection.top_k:TopK",
    },
)

__all__ = [
    "TABLE", "Certified", "Mass", "RankSelector", "RelativeThreshold", "RowSelector", "RunningMaximum", "Selector",
    "TargetSparsity", "Threshold", "TopK",
]  # fmt: skip
