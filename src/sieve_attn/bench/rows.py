"""One measured row, and the figures that it is held to."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

OK, FAILED, UNAVAILABLE = "ok", "failed", "unavailable"


@dataclass(frozen=True)
class Target:
    """``field`` of a row must be at least ``bound``, with ``most`` at most. ``or_ms``: or so near to the dense time."""

    field: str
    bound: float
    most: bool = False
    or_ms: float | None = None

    def met(self, row: Row) -> bool | None:
        """None where the row has no such figure; a failed row meets nothing."""
        if row.status == FAILED:
            return False
        value = getattr(row, self.field)
        if value is None:
            return None
        if self.or_ms is not None and row.sparse_ms - row.dense_ms <= self.or_ms:
            return True
        return value <= self.bound if self.most else value >= self.bound

    def __str__(self) -> str:
        text = f"{self.field} {'<=' if self.most else '>='} {self.bound:g}"
        return text if self.or_ms is None else f"{text} or within {self.or_ms:g} ms"


@dataclass(frozen=True)
class Row:
    """What was measured for one case. Times are medians of ``samples`` in ms, sizes MB (10^6 bytes); None: not measured.

    ``density``: kept over visible keys, counted by (query tile, key block). ``ideal``: the ``ratio`` at which choosing costs
    nothing and every kept key costs what a dense one does, ``1 / density``; for ``decode`` the ratio at the byte floor.
    ``ratio_naive``: over the naive form, which for ``jax`` is ``jax.nn.dot_product_attention``; ``ratio_front``: the PyTorch
    front-end's time over ours, where another front-end is measured.
    ``dense_ms``: the dense peer (SDPA; for ``topk`` the naive form). ``flex_ms``: FlexAttention on the very same selection.
    ``ratio``: fastest peer over ``sparse_ms``. ``peak_mb``: growth of resident memory in the first call, output included;
    ``resident_mb``: the process at that moment. ``gate_ms`` and ``attend_ms``: the parts of ``sparse_ms`` that chose and that
    attended. ``dropped_mass``: the largest at the queries that were checked. ``floor_ms``: ``bytes_mb`` at the read bandwidth
    of the run, ``bandwidth_share`` of which was reached. ``scaling``: ``ratio_sdpa`` over that of one thread. ``spread``:
    interquartile range of our samples over their median.
    """

    group: str
    case: str
    dtype: str
    n: int
    m: int
    head_dim: int
    block: int
    threads: int
    density: float | None = None
    ideal: float | None = None
    ratio: float | None = None
    ratio_sdpa: float | None = None
    ratio_flex: float | None = None
    ratio_naive: float | None = None
    ratio_front: float | None = None
    dense_ms: float | None = None
    sparse_ms: float | None = None
    flex_ms: float | None = None
    gate_ms: float | None = None
    attend_ms: float | None = None
    gate_percent: float | None = None
    dropped_mass: float | None = None
    bytes_mb: float | None = None
    floor_ms: float | None = None
    bandwidth_share: float | None = None
    scaling: float | None = None
    peak_mb: float | None = None
    resident_mb: float | None = None
    samples: int = 0
    spread: float | None = None
    backend: str | None = None
    status: str = OK
    notes: tuple[str, ...] = ()
    targets: tuple[Target, ...] = ()

    @property
    def met(self) -> bool | None:
        """Whether every target with a figure is met; None without any."""
        judged = [met for met in (target.met(self) for target in self.targets) if met is not None]
        return all(judged) if judged else None

    @property
    def identity(self) -> tuple:
        """What makes rows of two runs comparable."""
        return (self.group, self.case, self.dtype, self.n, self.m, self.head_dim, self.block, self.threads)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; lengths go by the names of the literature, N, M and D."""
        names = {"n": "N", "m": "M", "head_dim": "D"}
        plain = {names.get(f.name, f.name): getattr(self, f.name) for f in fields(self) if f.name not in ("notes", "targets")}
        held = [
            {"field": t.field, "bound": t.bound, "is": "most" if t.most else "least", "met": t.met(self)} for t in self.targets
        ]
        told = {"note": "; ".join(self.notes), "target": self.targets[0].bound if self.targets else None}
        return plain | told | {"met": self.met, "targets": held}
