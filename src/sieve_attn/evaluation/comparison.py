"""What a comparison of dense and sparse attention on one prompt found: plain values, ready for JSON and for the page."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

POINTS = 128  # of a curve


@dataclass(frozen=True)
class Side:
    """One of the two runs: its clock and its text."""

    prefill_seconds: float
    step_seconds: list[float]
    text: str
    tokens: list[int]

    @property
    def decode_seconds(self) -> float:
        """Median seconds of one decode step (0.0 if none was run)."""
        return statistics.median(self.step_seconds) if self.step_seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {"prefill_seconds": self.prefill_seconds, "decode_seconds_median": self.decode_seconds,
                "decode_steps": len(self.step_seconds), "text": self.text, "tokens": self.tokens}  # fmt: skip


@dataclass(frozen=True)
class Errors:
    """Per (head, query) of the sampled queries, flat and in one order: certified and true dropped mass, output errors."""

    certified: np.ndarray
    dropped: np.ndarray
    output: np.ndarray

    @property
    def violations(self) -> int:
        """Queries whose true dropped mass exceeds its certificate by more than fp32 can tell: there must be none."""
        return int((self.dropped > self.certified * (1 + 1e-4) + 1e-6).sum())

    def to_dict(self) -> dict[str, Any]:
        return {"certified_dropped_mass": quantiles(self.certified), "true_dropped_mass": quantiles(self.dropped),
                "output_error": quantiles(self.output), "queries": int(self.certified.size),
                "violations": self.violations}  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """One layer of the sparse run. Densities and seconds are of the whole prefill, ``decode_density`` of all decode steps."""

    layer: int
    density: float
    decode_density: float
    head_density: list[float]
    gate_seconds: float
    attend_seconds: float
    errors: Errors
    density_by_position: list[float]
    maps: np.ndarray = field(repr=False)  # [heads, tiles, blocks] uint8: 0..254 kept share of a cell, 255 not visible

    @property
    def gate_overhead(self) -> float:
        """The share of the layer's attention time that went into choosing."""
        whole = self.gate_seconds + self.attend_seconds
        return self.gate_seconds / whole if whole else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {
            "layer": self.layer, "density": self.density, "decode_density": self.decode_density,
            "head_density": self.head_density, "gate_seconds": self.gate_seconds, "attend_seconds": self.attend_seconds,
            "gate_overhead": self.gate_overhead, **self.errors.to_dict(),
        }  # fmt: skip


@dataclass(frozen=True)
class Agreement:
    """Most likely next tokens and their distributions, sparse against dense, over one set of positions."""

    where: str
    positions: int
    agreed: int
    kl_mean: float  # KL(dense || sparse) of the next-token distribution, nats
    kl_max: float

    @property
    def share(self) -> float:
        return self.agreed / self.positions if self.positions else 1.0

    def to_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"share": self.share}


@dataclass(frozen=True)
class Comparison:
    """Dense against sparse on one prompt. ``sampled`` says on which queries certificates and true errors were measured."""

    model: str
    source: str
    policy: str
    backend: str
    why_backend: str
    bound: str
    prompt: str
    prompt_tokens: int
    new_tokens: int
    dtype: str
    sampled: str
    dense: Side
    sparse: Side
    layers: list[Layer]
    head_kind: str  # what a row of a layer's maps is: "KV head" where a group chooses together
    agreement: list[Agreement]
    fallbacks: dict[str, int]
    requested_sparsity: float | None
    environment: dict[str, str]
    error_unit: str = "a share of the dense output's norm"

    @property
    def density(self) -> float:
        """Mean over the layers, whole prefill."""
        return float(np.mean([x.density for x in self.layers])) if self.layers else 1.0

    @property
    def decode_density(self) -> float:
        return float(np.mean([x.decode_density for x in self.layers])) if self.layers else 1.0

    @property
    def gate_overhead(self) -> float:
        gate, attend = (sum(getattr(x, f) for x in self.layers) for f in ("gate_seconds", "attend_seconds"))
        return gate / (gate + attend) if gate + attend else 0.0

    @property
    def errors(self) -> Errors:
        """All layers together."""
        names = [f.name for f in fields(Errors)]
        return Errors(*(np.concatenate([getattr(x.errors, n) for x in self.layers] or [np.zeros(0)]) for n in names))

    @property
    def speed(self) -> str:
        """What was measured about time, in one sentence."""
        ratios = [("prefill", self.sparse.prefill_seconds, self.dense.prefill_seconds)]
        if self.dense.decode_seconds and self.sparse.decode_seconds:
            ratios.append(("a decode step", self.sparse.decode_seconds, self.dense.decode_seconds))
        words = [f"{name} took {sparse / dense:.2f}x the time of dense" for name, sparse, dense in ratios]
        slow = all(sparse > dense for _, sparse, dense in ratios)
        said = f"On the {self.backend} backend {' and '.join(words)}."
        if slow and self.backend == "reference":
            said += " The reference is the oracle that kernels are tested against: it shows what is kept, not speed."
        return said

    def to_dict(self) -> dict[str, Any]:
        """Every figure without pictures."""
        return {
            **{n: getattr(self, n) for n in ("model", "source", "policy", "backend", "why_backend", "bound", "prompt_tokens",
                                             "new_tokens", "dtype", "sampled", "fallbacks", "requested_sparsity", "environment")},
            "achieved_sparsity": 1.0 - self.density, "density": self.density, "decode_density": self.decode_density,
            "gate_overhead": self.gate_overhead, "speed": self.speed, "dense": self.dense.to_dict(),
            "sparse": self.sparse.to_dict(), **self.errors.to_dict(), "agreement": [a.to_dict() for a in self.agreement],
            "layers": [x.to_dict() for x in self.layers],
        }  # fmt: skip


def quantiles(values: np.ndarray) -> dict[str, float] | None:
    """Median, 99 % quantile and maximum; None where nothing was measured."""
    if not values.size:
        return None
    return {"p50": float(np.quantile(values, 0.5)), "p99": float(np.quantile(values, 0.99)), "max": float(values.max())}


def thin(values: np.ndarray, points: int = POINTS) -> list[float]:
    """At most ``points`` means of neighbours."""
    groups = np.array_split(values, min(points, len(values))) if len(values) else []
    return [float(g.mean()) for g in groups]
