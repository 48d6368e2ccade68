"""The published configuration of AETHER's sparse attention, with its fields checked."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sieve_attn import checks, policies
from sieve_attn.policies import Policy
from sieve_attn.scores.event_radar import check_recency


@dataclass(frozen=True)
class AetherSparseAttentionConfig:
    """AETHER's Event Radar for a language model: which blocks of ``block_size`` keys each tile of queries keeps.

    A block is kept iff ``scale * (q.mu^ + ||q|| r (1 + sqrt(var)) conc) + log(recency_decay) * age > threshold`` for some
    query of the tile (``var`` and ``conc`` with their flags, ``age`` in blocks), or, with ``target_sparsity``, if it is among
    the ``max(1, round(visible * (1 - target_sparsity)))`` best. The first ``sink_blocks`` and the last ``local_window`` blocks
    are always kept. Below ``min_seq_length`` keys attention is dense, and the report says so. ``block_size`` need not divide
    the sequence length. With ``is_causal=False`` neither window nor recency applies.

    ``policy``, a :class:`~sieve_attn.policies.Policy` or its text, replaces the gate: of the other fields only
    ``min_seq_length`` then counts. The gate is a heuristic; for a promise about what is dropped use
    ``policy="certified(error=0.02)"``.

    Raises ValueError (TypeError for a ``policy`` of another type) naming the field. Source: AETHER's TensorRT-LLM form.
    """

    block_size: int = 64
    threshold: float = 0.05
    local_window: int = 8
    use_variance: bool = True
    use_concentration: bool = True
    min_seq_length: int = 128
    target_sparsity: float | None = None
    recency_decay: float = 0.95
    is_causal: bool = True
    sink_blocks: int = 1
    recency: str = "additive"
    policy: Policy | str | None = None

    def __post_init__(self):
        checks.positive_int("block_size", self.block_size, "try 16 or 64")
        checks.threshold("threshold", self.threshold)
        checks.positive_int("local_window", self.local_window, "in blocks; use 0 for none", least=0)
        checks.positive_int("min_seq_length", self.min_seq_length, "use 0 for no minimum", least=0)
        checks.positive_int("sink_blocks", self.sink_blocks, "use 0 for none", least=0)
        for name in ("use_variance", "use_concentration", "is_causal"):
            if not isinstance(getattr(self, name), bool):
                raise checks.error(name, "must be True or False", repr(getattr(self, name)), "pass a bool", TypeError)
        if self.target_sparsity is not None:
            checks.share("target_sparsity", self.target_sparsity, "0.8 drops 80 % of the blocks")
        check_recency(self.recency, self.recency_decay)
        if isinstance(self.policy, str):
            object.__setattr__(self, "policy", policies.parse(self.policy))
        elif self.policy is not None:
            checks.policy_like(self.policy, Policy)

    def to_policy(self) -> Policy:
        """The policy that these fields describe."""
        if self.policy is not None:
            return replace(self.policy, min_seq_length=max(self.policy.min_seq_length, self.min_seq_length))
        return policies.EventRadar(
            self.threshold, self.block_size, use_variance=self.use_variance, use_concentration=self.use_concentration,
            target_sparsity=self.target_sparsity, local_window=self.local_window if self.is_causal else 0,
            sink_blocks=self.sink_blocks, recency_decay=self.recency_decay if self.is_causal else 1.0,
            recency=self.recency if self.is_causal else "additive", min_seq_length=self.min_seq_length,
        )  # fmt: skip
