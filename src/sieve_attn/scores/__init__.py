"""Stage 2: query and geometry to scores. One file a family; the table below names every scorer."""

from __future__ import annotations

from sieve_attn.registry import Table
from sieve_attn.scores.base import Bound, Heuristic, Scorer
from sieve_attn.scores.block_bounds import Bennett, Box, Cosh, Euclidean, Tightest
from sieve_attn.scores.event_radar import EventRadar
from sieve_attn.scores.exact import Exact
from sieve_attn.scores.key_sketch import KeySketch
from sieve_attn.scores.random import Random
from sieve_attn.scores.sub_means import Mean, SubMeans

TABLE = Table(
    "sieve_attn.scores",
    {
        "bennett": "sieve_attn.scores.block_bounds:Bennett",
        "box": "sieve_attn.scores.block_bounds:Box",
        "cosh": "sieve_attn.scores.block_bounds:Cosh",
        "euclidean": "sieve_attn.scores.block_bounds:Euclidean",
        "event_radar": "sieve_attn.scores.event_radar:EventRadar",
        "exact": "sieve_attn.scores.exact:Exact",
        "key_sketch": "sieve_attn.scores.key_sketch:KeySketch",
        "mean": "sieve_attn.scores.sub_means:Mean",
        "random": "sieve_attn.scores.random:Random",
        "sub_means": "sieve_attn.scores.sub_means:SubMeans",
        "tightest": "sieve_attn.scores.block_bounds:Tightest",
    },
)

__all__ = [
    "TABLE", "Bennett", "Bound", "Box", "Cosh", "Euclidean", "EventRadar", "Exact", "Heuristic", "KeySketch", "Mean",
    "Random", "Scorer", "SubMeans", "Tightest",
]  # fmt: skip
