"""What ``LLM.generate`` returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Timings:
    """Seconds of one batch of a ``generate`` call. Prompts that run together share these figures."""

    prefill_seconds: float
    decode_seconds: float
    decode_steps: int

    @property
    def tokens_per_second(self) -> float:
        """Decode steps over decode time: new tokens a second for each prompt (0.0 if nothing was decoded)."""
        return self.decode_steps / self.decode_seconds if self.decode_seconds > 0 else 0.0

    def to_dict(self) -> dict[str, float]:
        return {"prefill_seconds": self.prefill_seconds, "decode_seconds": self.decode_seconds,
                "decode_steps": self.decode_steps, "tokens_per_second": self.tokens_per_second}  # fmt: skip


@dataclass(frozen=True)
class Output:
    """One completion. ``str(output)`` is its text.

    ``tokens`` are the generated ids, those of a stop string and of the end of the text included; ``text`` is cut before them.
    ``finish_reason`` is "stop" (a stop string), "eos" (the model ended the text) or "length" (``max_tokens``, or the model's
    context is full). ``report`` is the sparse model's :class:`~sieve_attn.transformers.ModelReport`, or None with dense
    attention.
    """

    prompt: str
    text: str
    tokens: list[int]
    finish_reason: str
    timings: Timings
    report: Any = field(default=None, repr=False)

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "prompt": self.prompt, "text": self.text, "tokens": self.tokens, "finish_reason": self.finish_reason,
            "timings": self.timings.to_dict(), "report": None if self.report is None else self.report.to_dict(),
        }  # fmt: skip
