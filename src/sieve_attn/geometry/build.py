"""Which code summarises keys: kernels of the device or in C++ where they know what is asked for, else the reference."""

from __future__ import annotations

from typing import Any

from sieve_attn.checks import error, positive_int
from sieve_attn.geometry import native, reference
from sieve_attn.geometry import triton as device
from sieve_attn.types import Geometry, Statistics

Array = Any


def build(
    key: Array,
    block_size: int = 16,
    statistics: Statistics | None = None,
    *,
    value: Array | None = None,
    key_mask: Array | None = None,
    channel_scale: Array | None = None,
    backend: str = "auto",
) -> Geometry:
    """Summarise ``key`` [batch, kv_heads, kv_len, dim] in blocks of ``block_size`` keys.

    ``statistics`` says what to keep beside count, mean and largest norm; ``value`` is needed for value statistics.
    ``key_mask`` [batch, kv_len] leaves keys out. Non-finite keys mark their block ``finite=False`` and enter nothing.
    ``channel_scale`` fixes the sketch's channel scale (when a sequence goes on); by default the first keys set it.
    ``backend``: ``"reference"`` runs no kernel; the others take kernels where kernels know all that is asked for.
    """
    asked = statistics or Statistics()
    block_size = positive_int("block_size", block_size, "try 16 or 64")
    if len(key.shape) != 4 or 0 in tuple(key.shape)[1:]:
        raise error(
            "key", "must be a non-empty [batch, kv_heads, kv_len, dim] array", f"shape {tuple(key.shape)}", "add the missing axes"
        )
    if asked.value and value is None:
        raise error("value", "must be given when value statistics are asked for", "None", "pass the values beside the keys")
    if asked.sketch_bits not in range(9):
        raise error("sketch_bits", "must lie in 1..8, or 0 for no sketch", asked.sketch_bits, "try 4 to rank or 8 to prove")
    chosen = _chosen(key, block_size, asked, value if asked.value else None, backend)
    return chosen.build(key, block_size, asked, value=value, key_mask=key_mask, channel_scale=channel_scale)


def _chosen(key: Array, block_size: int, asked: Statistics, value: Array | None, backend: str) -> Any:
    """The module that summarises ``key``; only where Triton is named does its interpreter serve."""
    if backend == "reference":
        return reference
    # on a CPU Triton runs only if it is named
    elsewhere = not str(getattr(key, "device", "cpu")).startswith("cpu")
    may = backend == "triton" or (backend == "auto" and elsewhere)
    if may and not device.why_not(key, block_size, value, named=backend == "triton"):
        return device
    return reference if native.why_not(key, asked) else native
