"""Does a selection find the one place that matters? Whole-answer recall of a model under a policy, paired with dense.

Mass and L2 do not answer this: a policy can win both and lose every needle (``docs/math.md``).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from sieve_attn.checks import error
from sieve_attn.evaluation.probe import attending_with, dense
from sieve_attn.evaluation.tasks import Example
from sieve_attn.pipeline import attention
from sieve_attn.policies import Policy


@dataclass(frozen=True)
class Recall:
    """``right`` of ``asked`` answers whole under one policy, at this mean density of the attention calls it served."""

    name: str
    right: int
    asked: int
    density: float

    @property
    def share(self) -> float:
        return self.right / self.asked


class _Sparse:
    """Attends under a policy and remembers how dense that was."""

    def __init__(self, policy: Policy):
        self.policy = policy
        self.kept = self.visible = 0.0

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        out, report = attention(query, key, value, self.policy, causal=True, scale=scale, return_report=True)
        self.kept += float(report.kept.sum())
        self.visible += float(report.visible.sum())
        return out


@torch.no_grad()
def recall(
    model: Any, tokenizer: Any, examples: Sequence[Example], policies: dict[str, Policy], phase: str = "decode"
) -> list[Recall]:
    """Answers that come out whole (every byte the model's first choice, the bytes before it given), dense and by policy.

    ``phase="decode"``: the prompt is read densely, then every step of the answer attends by the policy, one query a tile.
    ``phase="prefill"``: the prompt is read by the policy too, tile by tile, as ``generate`` does; the density is the prompt's.
    Returns dense first, then each policy.
    """
    if phase not in ("decode", "prefill"):
        raise error("phase", "must be 'decode' or 'prefill'", repr(phase), "see the docstring")
    prompts = {name: _Sparse(p) if phase == "prefill" else dense for name, p in policies.items()}
    steps = {name: _Sparse(replace(p, query_tile=1, query_stride=1)) for name, p in policies.items()}
    right = dict.fromkeys(["dense", *policies], 0)
    for example in examples:
        tokens = _ids(tokenizer, example.prompt + example.answer)
        answer = len(_ids(tokenizer, example.answer)[0])
        for name in right:
            right[name] += _answers(model, tokens, answer, prompts.get(name, dense), steps.get(name, dense), phase)
    counted = prompts if phase == "prefill" else steps
    results = [Recall("dense", right["dense"], len(examples), 1.0)]
    return results + [Recall(n, right[n], len(examples), c.kept / max(c.visible, 1.0)) for n, c in counted.items()]


def _ids(tokenizer: Any, text: str) -> Tensor:
    return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])


_PROMPTS: dict[int, tuple[Tensor, DynamicCache]] = {}


def _answers(model: Any, tokens: Tensor, answer: int, read: Any, step: Any, phase: str) -> bool:
    """Whether the model's first choice is right at every byte of the answer."""
    # a dense prompt ends before its last byte, so that this byte's step is the policy's as well
    start = tokens.shape[1] - answer - (phase == "decode")
    if phase == "decode":
        cache, first = copy.deepcopy(_read_prompt(model, tokens[:, :start])), tokens[0, :0]
    else:
        cache = DynamicCache()
        with attending_with(model, read):
            first = model(tokens[:, :start], past_key_values=cache, logits_to_keep=1).logits[0].argmax(-1)
    with attending_with(model, step):
        rest = model(tokens[:, start:-1], past_key_values=cache).logits[0].argmax(-1)
    return bool((torch.cat([first, rest]) == tokens[0, -answer:]).all())


def _read_prompt(model: Any, prompt: Tensor) -> DynamicCache:
    """The cache of the prompt read densely; the last one is kept, for the next policy on the same example."""
    known = _PROMPTS.get(id(model))
    if known is not None and torch.equal(known[0], prompt):
        return known[1]
    cache = DynamicCache()
    with attending_with(model, dense):
        model(prompt, past_key_values=cache, logits_to_keep=1)
    _PROMPTS.clear()
    _PROMPTS[id(model)] = (prompt, cache)
    return cache
