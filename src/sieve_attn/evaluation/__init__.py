"""How sparse attention compares with dense attention: metrics, retrieval tasks, comparisons on a prompt and their page."""

from sieve_attn.evaluation.metrics import (
    Metrics,
    block_mass,
    clamped_kl,
    cosine,
    dropped_mass,
    entropy,
    evaluate,
    important_blocks,
    kl_divergence,
    kl_of_dropping,
    kv_bytes_not_read,
    measured_speedup,
    next_token_agreement,
    precision_recall,
    relative_l2,
    theoretical_speedup,
    total_variation,
)

__all__ = [
    "Metrics", "block_mass", "clamped_kl", "cosine", "dropped_mass", "entropy", "evaluate", "important_blocks", "kl_divergence",
    "kl_of_dropping", "kv_bytes_not_read", "measured_speedup", "next_token_agreement", "precision_recall", "relative_l2",
    "theoretical_speedup", "total_variation",
]  # fmt: skip
