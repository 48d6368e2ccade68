"""Counters that cost nothing while a model runs, and the report that is read from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from sieve_attn.types import Certificate, Fallback, Report
from sieve_attn.types.report import density_per_head

QUANTILES = {"p50": 0.5, "p99": 0.99, "max": 1.0}


BEFORE_ADDING = 64  # calls whose counts wait to be added up together: what a step of decoding would pay for that is not nothing


@dataclass
class Counted:
    """What one call kept, not yet added to the rest. It holds on to counts alone."""

    phase: str
    queries: int
    kept: Tensor  # [batch, heads, tiles]
    visible: Tensor
    fall_back: Callable[[], tuple[Fallback, ...]]


@dataclass
class Counters:
    """What one layer did since it was made sparse. Densities stay on the device until someone asks."""

    heads: int = 0
    calls: Counter = field(default_factory=Counter)
    queries: Counter = field(default_factory=Counter)
    density: dict[str, Tensor] = field(default_factory=dict)  # phase -> [heads], summed over queries
    seconds: Counter = field(default_factory=Counter)
    fallbacks: Counter = field(default_factory=Counter)
    geometry: Counter = field(default_factory=Counter)
    backends: set[str] = field(default_factory=set)
    requested_sparsity: float | None = None
    certified: list[Tensor] = field(default_factory=list)
    waiting: list[Counted] = field(default_factory=list)

    def add(self, phase: str, query: Tensor, seconds: dict[str, float], geometry: str | None, report: Report | None) -> None:
        """Count one call; no ``report`` means that every visible key was attended to, by whatever backend that takes."""
        batch, self.heads, q_len, _ = query.shape
        self.calls[phase] += 1
        self.queries[phase] += batch * q_len
        for stage, spent in seconds.items():
            self.seconds[stage] += spent
        if geometry is not None:
            self.geometry[geometry] += 1
        if report is None:
            share = torch.ones(self.heads, dtype=torch.float64, device=query.device)
            self.density[phase] = self.density.get(phase, 0.0) + share * (batch * q_len)
            return
        self.backends.add(f"{report.backend} ({report.why_backend})")
        self.requested_sparsity = report.requested_sparsity
        self.waiting.append(Counted(phase, batch * q_len, report.kept, report.visible, report.fall_back))
        if len(self.waiting) >= BEFORE_ADDING:
            self.add_up()

    def add_up(self) -> None:
        """Add what waits: calls of one shape together."""
        waiting, self.waiting = self.waiting, []
        alike: dict[tuple, list[Counted]] = {}
        for call in waiting:
            self.fallbacks.update({f.reason: f.count for f in call.fall_back()})
            alike.setdefault((call.phase, call.queries, call.kept.shape, call.kept.device), []).append(call)
        for (phase, queries, *_), calls in alike.items():
            kept, visible = (torch.stack([getattr(call, name) for call in calls]) for name in ("kept", "visible"))
            share = density_per_head(kept, visible).mean(1).sum(0)
            self.density[phase] = self.density.get(phase, 0.0) + _per_query_head(share, self.heads) * queries

    def certify(self, certificate: Certificate) -> None:
        self.certified.append(certificate.dropped_mass.flatten(2).transpose(0, 1).flatten(1).cpu())

    def read(self, layer: int, policy: str, note: str | None) -> LayerReport:
        self.add_up()
        total = sum(self.queries.values())
        per_head = [1.0] * self.heads
        if total:
            per_head = (sum(self.density.values()) / total).tolist()
        phases = {
            phase: {"calls": self.calls[phase], "density": float(self.density[phase].mean()) / self.queries[phase]}
            for phase in self.calls
        }
        density = sum(per_head) / len(per_head) if per_head else 1.0
        spent = sum(self.seconds.values())
        gate = self.seconds["geometry"] + self.seconds["selection"]
        return LayerReport(
            layer=layer, policy=policy, calls=sum(self.calls.values()), phases=phases, density=density, density_per_head=per_head,
            requested_sparsity=self.requested_sparsity, achieved_sparsity=1.0 - density,
            seconds=dict(self.seconds), gate_overhead=gate / spent if spent else 0.0,
            certified_dropped_mass=_quantiles(self.certified, None),
            certified_per_head=[_quantiles(self.certified, h) for h in range(self.heads)] if self.certified else None,
            fallbacks=[{"reason": reason, "count": count} for reason, count in self.fallbacks.items()],
            backend=", ".join(sorted(self.backends)) or None, geometry=dict(self.geometry), note=note,
        )  # fmt: skip


@dataclass(frozen=True)
class LayerReport:
    """What one layer did. Densities are kept over visible keys, averaged over queries; 1.0 is dense."""

    layer: int
    policy: str
    calls: int
    phases: dict[str, dict[str, float]]  # "prefill" and "decode": calls and density
    density: float
    density_per_head: list[float]  # query heads
    requested_sparsity: float | None  # of policies that ask for one
    achieved_sparsity: float
    seconds: dict[str, float]  # geometry, selection and attend, by the host's clock
    gate_overhead: float  # seconds of geometry and selection over all seconds of attention
    certified_dropped_mass: dict[str, float] | None  # p50, p99, max over queries and heads; None unless captured
    certified_per_head: list[dict[str, float]] | None
    fallbacks: list[dict[str, Any]]  # where it turned dense on its own: reason and count of (batch, head, tile) choices
    backend: str | None  # and why it was chosen
    geometry: dict[str, int]  # calls by where the geometry came from: "stream", or "recomputed: why"
    note: str | None = None


@dataclass(frozen=True)
class ModelReport:
    """What a sparse model did since ``sparsify`` (or since the counters were last reset). Prints as a table."""

    policy: str
    layers: tuple[LayerReport, ...]

    @property
    def density(self) -> float:
        """Mean over the layers that ran and choose."""
        ran = [layer.density for layer in self.layers if layer.calls and layer.note is None]
        return sum(ran) / len(ran) if ran else 1.0

    @property
    def gate_overhead(self) -> float:
        spent = sum(sum(layer.seconds.values()) for layer in self.layers)
        gate = sum(layer.seconds.get(stage, 0.0) for layer in self.layers for stage in ("geometry", "selection"))
        return gate / spent if spent else 0.0

    @property
    def certified_dropped_mass(self) -> float | None:
        """The largest certified dropped mass of any captured query; None if nothing was captured."""
        known = [layer.certified_dropped_mass["max"] for layer in self.layers if layer.certified_dropped_mass]
        return max(known) if known else None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dictionaries, ready for JSON."""
        return {
            "policy": self.policy, "density": self.density, "gate_overhead": self.gate_overhead,
            "certified_dropped_mass": self.certified_dropped_mass, "layers": [asdict(layer) for layer in self.layers],
        }  # fmt: skip

    def __str__(self) -> str:
        summary = f"density {self.density:.1%} over the layers that choose, gate {self.gate_overhead:.0%} of attention time"
        return "\n".join([self.policy, summary, _HEAD, *map(_line, self.layers), *_notes(self.layers)])


_HEAD = " layer  calls  prefill   decode  head min  head max   gate  certified p50 / p99 / max"


def _line(layer: LayerReport) -> str:
    prefill, decode = (f"{layer.phases[p]['density']:.1%}" if p in layer.phases else "-" for p in ("prefill", "decode"))
    low, high = (f"{f(layer.density_per_head):.1%}" if layer.calls else "-" for f in (min, max))
    mass = layer.certified_dropped_mass
    proof = " / ".join(f"{mass[q]:.2e}" for q in QUANTILES) if mass else "not captured"
    return f"{layer.layer:>5} {layer.calls:>6} {prefill:>8} {decode:>8} {low:>9} {high:>9} {layer.gate_overhead:>6.0%}  {proof}"


def _notes(layers: tuple[LayerReport, ...]) -> list[str]:
    """What several layers have in common is said once."""
    said: dict[str, list[int]] = {}
    for layer in layers:
        notes = [layer.note] if layer.note else []
        notes += [f"geometry {source}: {n} calls" for source, n in layer.geometry.items()]
        notes += [f"turned dense {f['count']} times: {f['reason']}" for f in layer.fallbacks]
        if layer.requested_sparsity is not None:
            notes.append(f"sparsity {layer.achieved_sparsity:.1%} achieved, {layer.requested_sparsity:.1%} requested")
        notes += [f"backend {layer.backend}"] if layer.backend else []
        for note in notes:
            said.setdefault(note, []).append(layer.layer)
    return [f"layer {', '.join(map(str, which))}: {note}" for note, which in said.items()]


def _per_query_head(share: Tensor, heads: int) -> Tensor:
    return share.repeat_interleave(heads // share.shape[0])


def _quantiles(certified: list[Tensor], head: int | None) -> dict[str, float] | None:
    if not certified:
        return None
    mass = torch.cat([c.flatten() if head is None else c[head] for c in certified]).sort().values
    return {name: float(mass[min(len(mass) - 1, int(share * len(mass)))]) for name, share in QUANTILES.items()}
