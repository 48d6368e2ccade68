"""Stage 1: keys to summaries. ``build`` once, or keep it up to date with ``append``, ``crop``, ``reorder`` or ``Stream``."""

from sieve_attn.geometry.build import build
from sieve_attn.geometry.edit import append, crop, reorder
from sieve_attn.geometry.sketch import decode
from sieve_attn.geometry.stream import Stream
from sieve_attn.types import Geometry, Sketch, Statistics

__all__ = ["Geometry", "Sketch", "Statistics", "Stream", "append", "build", "crop", "decode", "reorder"]
