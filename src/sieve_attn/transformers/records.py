"""What ``capture`` collects: one :class:`Record` an attention call, with proofs and truths that cost work."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sieve_attn import pipeline
from sieve_attn.certify import true_dropped_mass
from sieve_attn.types import Call, Certificate, Report

_OPTIONS = ("causal", "scale", "mask", "key_mask", "bias", "softcap", "cu_seqlens", "sink", "window")


@dataclass(frozen=True, eq=False)
class Record:
    """One attention call of one layer."""

    layer: int
    phase: str  # "prefill" or "decode"
    q_len: int
    kv_len: int
    report: Report
    certificate: Certificate | None = None
    true_dropped_mass: Tensor | None = None  # [batch, q_heads, q_len]
    output_error: Tensor | None = None  # [batch, q_heads, q_len] ||dense output - sparse output||, the rounding of both included
    output_norm: Tensor | None = None  # [batch, q_heads, q_len] ||dense output||


@dataclass(eq=False)
class Capture:
    """An open ``capture``: what to collect, and what was collected."""

    certificates: bool
    truth: bool
    keep_selection: bool
    records: list[Record] = field(default_factory=list)

    def take(self, layer: int, phase: str, report: Report, call: Call, output: Tensor, backend: str) -> Record:
        """Collect one call; nothing collected holds on to its queries and keys."""
        certificate = report.certificate if self.certificates else None
        lost = true_dropped_mass(call, report.selection) if self.truth else None
        error, norm = _output_error(call, output, backend) if self.truth else (None, None)
        kept = replace(
            report,
            certify=None if certificate is None else lambda: certificate,
            selection=report.selection if self.keep_selection else None,
        )
        record = Record(layer, phase, call.q_len, call.kv_len, kept, certificate, lost, error, norm)
        self.records.append(record)
        return record


@torch.no_grad()
def _output_error(call: Call, output: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    options = {name: getattr(call, name) for name in _OPTIONS}
    dense = pipeline.attention(call.query, call.key, call.value, backend=backend, **options)
    return torch.linalg.vector_norm(dense.float() - output.float(), dim=-1), torch.linalg.vector_norm(dense.float(), dim=-1)
