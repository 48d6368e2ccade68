"""Attention to keys at fixed offsets and to the first keys: what a pattern asks for, which plan runs it, and the call itself.

Two plans compute the same pairs. *Diagonals*: every row goes over its own list of keys, exact pairs only. *Wheel*: positions are
grouped by their residue modulo 30 or 240, where the offsets of one residue form dense tiles between two groups; offsets whose
residue holds few of them go by diagonals. Forward and backward are planned apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from sieve_attn import arrays, native
from sieve_attn import triton as door
from sieve_attn.attend import reference
from sieve_attn.checks import error
from sieve_attn.patterns import OffsetSet, Pattern, Sinks, Window
from sieve_attn.patterns.base import Known, members
from sieve_attn.patterns.reach import Reach
from sieve_attn.types import Call, Offsets, Ranges, Selection

Array = Any

PLANS = ("auto", "diagonals", "wheel")
MODULI = (30, 240)
# nanoseconds a pair of one head of dimension 64 on one core: (diagonals, wheel), by `native.pace()` and whether it is bf16. Only
# their ratio counts; the wheel pays for the pairs of its tiles, kept or not. `amx` is a Xeon, `vnni` an EPYC of Zen 5 (bf16 is
# scaled from fp32), `-halved` one of Zen 4.
COSTS = {
    "amx": {"bfloat16": (3.9, 0.63), "": (3.9, 1.65)},
    "vnni": {"bfloat16": (4.0, 0.9), "": (4.0, 1.4)},
    "avx512": {"": (4.0, 1.4)},
    "vnni-halved": {"bfloat16": (4.7, 1.9), "": (4.7, 3.3)},
    "avx512-halved": {"": (4.7, 3.3)},
    "avx2": {"": (5.0, 4.0)},
    "portable": {"": (20.0, 14.0)},
    # a GPU, and all of it: diagonals read every pair's key and value from its second cache, tiles multiply on tensor cores
    # (fp32 on ordinary ones). From the data sheet of an H200, not measured.
    "cuda": {"": (0.06, 0.006), "float32": (0.12, 0.04)},
}
# those of Zen 4 and 5 are measured, so are the diagonals of the Xeon; the others are scaled from the forward costs
GRADIENT_COSTS = {
    "amx": {"": (9.4, 4.4)}, "vnni": {"": (9.2, 4.1)}, "avx512": {"": (9.2, 4.1)},
    "vnni-halved": {"": (10.5, 8.9)}, "avx512-halved": {"": (10.5, 8.9)},
    "avx2": {"": (13.0, 9.0)}, "portable": {"": (45.0, 32.0)}, "cuda": {"": (0.2, 0.02), "float32": (0.4, 0.14)},
}  # fmt: skip
LARGEST_DIM = 512  # of the device's diagonals
LARGEST_TILED_DIM = 256  # of its wheel
FEW = 2  # residues with fewer offsets never make tiles
LEAST_ROWS = 1024  # `auto` does not permute fewer queries


def reach(pattern: Pattern, kv_len: int) -> Reach | None:
    """The pattern as a prefix and offsets up to a power of two above ``kv_len``; None if it is made of other things."""
    return _reach(Known(pattern), 1 << max(kv_len - 1, 1).bit_length()) if made_of_offsets(pattern) else None


def made_of_offsets(pattern: Pattern) -> bool:
    """Whether first tokens, windows and offsets are all there is."""
    return all(isinstance(part, (Sinks, Window, OffsetSet)) for part in members(pattern))


@lru_cache(maxsize=64)
def _reach(known: Known, limit: int) -> Reach:
    found = known.pattern.reach(limit)
    offsets = found.offsets.view()  # cached, so that nobody may write to it
    offsets.flags.writeable = False
    return Reach(found.prefix, offsets)


@dataclass(frozen=True)
class Plan:
    """How a call is computed: ``diagonals``, or a ``wheel`` of ``modulus`` whose ``residues`` are tiled."""

    name: str
    modulus: int = 0
    residues: tuple[int, ...] = ()
    cost: float = 0.0  # estimated nanoseconds a head

    @property
    def title(self) -> str:
        return f"{self.name} {self.modulus}" if self.modulus else self.name


def choose_plan(plan: str, found: Reach, q_len: int, kv_len: int, dtype: str, pace: str, *, gradient: bool = False) -> Plan:
    """The plan to run, from the shapes, the offsets, the dtype and the pace of the kernels alone; of gradients if asked.

    ``auto`` takes the cheapest of :func:`weigh`; ``wheel`` by name tiles every residue that holds at least two offsets, of the
    modulus that is estimated to be cheapest.
    """
    if plan not in PLANS:
        raise error("plan", f"must be one of {', '.join(PLANS)}", repr(plan), "use 'auto'")
    diagonals, *wheels = weigh(found, q_len, kv_len, dtype, pace, gradient=gradient, forced=plan == "wheel")
    if plan == "diagonals" or (plan == "auto" and q_len < LEAST_ROWS):
        return diagonals
    wheels = [wheel for wheel in wheels if wheel.residues] or [diagonals]
    wheel = min(wheels, key=lambda w: w.cost)
    return wheel if plan == "wheel" or wheel.cost < diagonals.cost else diagonals


def weigh(
    found: Reach, q_len: int, kv_len: int, dtype: str, pace: str, *, gradient: bool = False, forced: bool = False
) -> list[Plan]:
    """Diagonals and a wheel of each modulus with what they are estimated to cost. A residue is tiled where its dense triangle
    costs less than its exact pairs, or, if ``forced``, always."""
    table = GRADIENT_COSTS if gradient else COSTS
    costs = table.get(pace, table["portable"])
    exact_cost, tile_cost = costs.get(dtype, costs[""])
    offsets = found.offsets[: np.searchsorted(found.offsets, kv_len)]
    per_offset = _pairs_of(offsets, q_len, kv_len)
    rows = min(q_len, kv_len)
    visible = rows * (kv_len - rows) + rows * (rows + 1) / 2
    plans = [Plan("diagonals", cost=exact_cost * float(per_offset.sum()))]
    for modulus in MODULI:
        group = offsets % modulus
        exact = exact_cost * np.bincount(group, per_offset, modulus)
        # tiles of 64 rows and panels of 16 keys reach a little beyond the triangle
        tiles = tile_cost * (visible / modulus + 40.0 * rows)
        counts = np.bincount(group, minlength=modulus)
        tiled = (counts >= FEW) & (forced | (exact > tiles))
        cost = float(np.where(tiled, tiles, exact).sum())
        plans.append(Plan("wheel", modulus, tuple(np.flatnonzero(tiled).tolist()), cost))
    return plans


def _pairs_of(offsets: np.ndarray, q_len: int, kv_len: int) -> np.ndarray:
    return np.maximum(kv_len - np.maximum(offsets, kv_len - min(q_len, kv_len)), 0)


def on_device(query: Array, value: Array) -> bool:
    """Whether Triton's kernels run the call. Their interpreter never serves here."""
    if max(query.shape[3], value.shape[3]) > LARGEST_DIM:
        return False
    device = str(getattr(query, "device", "cpu")).partition(":")[0]
    return not door.unsuitable(arrays.namespace(query).name, device, str(query.dtype).rpartition(".")[2])


def why_not(query: Array, value: Array) -> tuple[str, ...]:
    """Why the kernels cannot run a call; empty if they can."""
    reasons = list(native.missing())
    device = str(getattr(query, "device", "cpu")).partition(":")[0]
    if device != "cpu":
        reasons.append(f"kernels run on cpu, not on {device}")
    dtype = str(query.dtype).rpartition(".")[2]
    if dtype not in ("float32", "float16", "bfloat16"):
        reasons.append(f"kernels know float32, float16, bfloat16, not {dtype}")
    return tuple(reasons)


def forward(query: Array, key: Array, value: Array, offsets: Array, prefix: int, scale: float, plan: Plan) -> tuple[Array, Array]:
    """``(output in the query's dtype, lse)``; ``offsets`` int64 as :class:`Reach` has them. A plan with no kernels is ignored."""
    if on_device(query, value):
        from sieve_attn.attend.triton import diagonals, wheel

        if plan.name == "wheel":
            return wheel.attend(query, key, value, offsets, prefix, scale, plan)
        return diagonals.attend(query, key, value, offsets, prefix, scale)
    if why_not(query, value):
        return reference.attend(*_as_call(query, key, value, offsets, prefix, scale))
    xp = arrays.namespace(query)
    batch, heads, q_len, _ = query.shape
    output = xp.empty((batch, heads, q_len, value.shape[3]), query.dtype, query)
    lse = xp.empty((batch, heads, q_len), xp.float32, query)
    if not output.shape[0]:
        return output, lse
    plain = [native.view(x) for x in (query, key, value, offsets)] + [prefix, scale, native.threads(query)]
    results = [native.view(output), native.view(lse)]
    if plan.name == "wheel":
        residues = np.asarray(plan.residues, np.int64)
        native.module().attend_wheel(*plain, plan.modulus, native.view(residues), *results)
    else:
        native.module().attend_offsets(*plain, *results)
    return output, lse


def backward(
    query: Array, key: Array, value: Array, offsets: Array, prefix: int, scale: float, plan: Plan, grad_output: Array,
    grad_lse: Array, output: Array, lse: Array,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Gradients of query, key and value; the same to the bit on any number of threads."""
    if on_device(query, value):
        from sieve_attn.attend.triton import diagonals, wheel

        given = (query, key, value, offsets, prefix, scale, grad_output, grad_lse, output, lse)
        return wheel.backward(*given, plan) if plan.name == "wheel" else diagonals.backward(*given)
    if why_not(query, value):
        call, selection = _as_call(query, key, value, offsets, prefix, scale)
        made = reference.backward(call, selection, grad_output, grad_lse)
        return made["query"], made["key"], made["value"]
    xp = arrays.namespace(query)
    d_lse = xp.where(lse == -float("inf"), 0.0, xp.cast(grad_lse, xp.float32))
    shift = xp.contiguous(d_lse - (xp.cast(grad_output, xp.float32) * xp.cast(output, xp.float32)).sum(-1))
    lse = xp.contiguous(lse)
    grads = tuple(xp.empty(tuple(x.shape), x.dtype, query) for x in (query, key, value))
    views = [native.view(x) for x in (query, key, value, offsets)] + [prefix, scale, native.threads(query)]
    results = [native.view(x) for x in (grad_output, lse, shift, *grads)]
    if plan.name == "wheel":
        residues = np.asarray(plan.residues, np.int64)
        native.module().attend_wheel_backward(*views, plan.modulus, native.view(residues), *results)
    else:
        native.module().attend_offsets_backward(*views, *results)
    return grads


def selection_of(found: Reach, q_len: int, kv_len: int) -> Selection:
    """The same keys as a selection: a prefix and offsets that give way to it."""
    offsets = tuple(found.offsets[: np.searchsorted(found.offsets, kv_len)].tolist())
    parts = (Ranges(q_len, kv_len, prefix=found.prefix), Offsets(q_len, kv_len, offsets, first_key=found.prefix))
    return Selection(parts if found.prefix else parts[1:])


def _as_call(query: Array, key: Array, value: Array, offsets: Array, prefix: int, scale: float) -> tuple[Call, Selection]:
    plain = arrays.namespace(offsets).to_numpy(offsets)
    call = Call(query, key, value, causal=True, scale=scale)
    return call, selection_of(Reach(prefix, plain), call.q_len, call.kv_len)
