"""Run one prompt with dense and with sparse attention and measure both."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sieve_attn.checks import error, positive_int
from sieve_attn.evaluation import maps, metrics
from sieve_attn.evaluation.comparison import Agreement, Comparison, Errors, Layer, Side, thin
from sieve_attn.llm.loading import context_length, decode, encode
from sieve_attn.policies import Policy, parse
from sieve_attn.scores import KeySketch

Progress = Callable[[str, float], None]  # stage, share of it that is done

SPANS = 4  # places of the prompt where certificates and true errors are measured
SPAN_QUERIES = 64
SAMPLED_STEPS = 4  # decode steps likewise
LAST_POSITIONS = 256  # of the prompt, where next tokens are compared


@torch.inference_mode()
def compare(
    model: Any,
    tokenizer: Any,
    prompt: str,
    policy: Any,
    *,
    max_tokens: int = 32,
    backend: str = "auto",
    name: str = "",
    source: str = "prompt",
    progress: Progress | None = None,
) -> Comparison:
    """Dense against sparse attention on ``prompt``: time, density, certified and true error, next tokens, texts.

    ``model`` is a Hugging Face causal language model with dense attention; it is dense again afterwards. ``policy`` is a Policy,
    its text, or a config with ``to_policy()``. Both sides decode greedily. Certificates and true errors cost a pass over every
    key, so they are measured on a sample: 64 queries at each of four places of the prompt and the first decode steps. Policies
    whose own bound has fewer than 8 bits are certified with 8-bit keys.

    Raises ValueError for prompts of fewer than two tokens, prompts beyond the model's context and what ``sparsify`` refuses.
    """
    from sieve_attn import transformers

    positive_int("max_tokens", max_tokens, "ask for at least one token")
    ids = torch.tensor([encode(tokenizer, prompt)], device=next(model.parameters()).device)
    if ids.shape[1] < 2:
        raise error("prompt", "must have at least 2 tokens", f"{ids.shape[1]}", "pass some text")
    limit = context_length(model)
    if limit is not None and ids.shape[1] + max_tokens > limit:
        rule = f"must leave room for {max_tokens} new tokens in the model's context of {limit:,}"
        raise error("prompt", rule, f"{ids.shape[1]:,} tokens", "shorten it, or take a model with a longer context")
    policy = _with_sharp_bound(policy)
    tell = progress or (lambda stage, done: None)
    last = min(LAST_POSITIONS, ids.shape[1])

    with _layers_told(model, tell, "dense prefill"):
        dense = _Run(model, ids, last)
    dense.decode(max_tokens, lambda done: tell("dense decode", done))

    transformers.sparsify(model, policy, backend=backend)
    try:
        with transformers.capture(model, certificates=False, truth=False, keep_selection=True) as prefilled, \
                _layers_told(model, tell, "sparse prefill"):  # fmt: skip
            sparse = _Run(model, ids, last)
        with transformers.capture(model, certificates=False, truth=False, keep_selection=False) as decoded:
            sparse.decode(max_tokens, lambda done: tell("sparse decode", done))
        forced, measured = _teacher_forced(sparse, dense, tell)
        spans = _spans(sparse)
        measured += _measure_spans(sparse, spans, tell)
    finally:
        transformers.desparsify(model)

    reports = [r.report for r in prefilled + decoded]
    first = next((r for r in reports if r.requested_sparsity is not None), reports[0] if reports else None)
    fallbacks: Counter = Counter()
    for fallback in (f for r in reports for f in r.fallbacks):
        fallbacks[fallback.reason] += fallback.count
    steps = min(SAMPLED_STEPS, len(dense.tokens) - 1)
    kv_heads = getattr(model.config.get_text_config(), "num_key_value_heads", None)
    layers = _layers(prefilled, decoded, measured, tell)
    return Comparison(
        model=name or type(model).__name__, source=source, policy=policy.text,
        backend=getattr(first, "backend", "none"), why_backend=getattr(first, "why_backend", "no layer was sparse"),
        bound=repr(policy.certifier), prompt=prompt, prompt_tokens=ids.shape[1], new_tokens=max_tokens,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."), sampled=_sampled(spans, steps),
        dense=dense.side(tokenizer), sparse=sparse.side(tokenizer), layers=layers,
        head_kind="KV head" if layers and len(layers[0].maps) == kv_heads else "head",
        agreement=[
            _agreement("the dense continuation, teacher-forced", dense.step_logits(), forced),
            _agreement(f"the last {last} prompt positions", dense.last, sparse.last),
        ],
        fallbacks=dict(fallbacks), requested_sparsity=getattr(first, "requested_sparsity", None), environment=environment(),
    )  # fmt: skip


class _Run:
    """One greedy run: prefill, clocked, then decode steps, each clocked."""

    def __init__(self, model: Any, ids: Tensor, last: int):
        self.model, self.ids, self.cache = model, ids, None
        clock = perf_counter()
        self.last = self.forward(ids, last)
        self.prefill_seconds = perf_counter() - clock
        self.step_seconds: list[float] = []
        self.logits = [self.last[-1]]
        self.tokens: list[int] = [int(self.last[-1].argmax())]

    def forward(self, ids: Tensor, keep: int = 1) -> Tensor:
        """[keep, vocabulary] fp32 logits of the last positions; the cache grows by ``ids``."""
        out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=keep)
        self.cache = out.past_key_values
        # the copy waits for the device: clocks around it are honest
        return out.logits[0].float().cpu()

    def step(self, token: int) -> Tensor:
        return self.forward(self.ids.new_tensor([[token]]))[0]

    def decode(self, count: int, tell: Callable[[float], None]) -> None:
        while len(self.tokens) < count:
            clock = perf_counter()
            logits = self.step(self.tokens[-1])
            self.step_seconds.append(perf_counter() - clock)
            self.logits.append(logits)
            self.tokens.append(int(logits.argmax()))
            tell(len(self.tokens) / count)

    def step_logits(self) -> Tensor:
        return torch.stack(self.logits)

    def side(self, tokenizer: Any) -> Side:
        text = decode(tokenizer, self.ids[0, -8:].tolist(), self.tokens)
        return Side(self.prefill_seconds, self.step_seconds, text, self.tokens)


def _with_sharp_bound(policy: Any) -> Policy:
    if isinstance(policy, str):
        policy = parse(policy)
    elif hasattr(policy, "to_policy"):
        policy = policy.to_policy()
    ranks_only = policy.bound is None and isinstance(policy.certifier, KeySketch) and policy.certifier.bits < 8
    return replace(policy, bound=KeySketch(bits=8)) if ranks_only else policy


def _teacher_forced(sparse: _Run, dense: _Run, tell: Progress) -> tuple[Tensor, list]:
    """Sparse logits along the dense continuation, and records of its first steps with certificates and truths."""
    from sieve_attn import transformers

    if not _crop(sparse, sparse.ids.shape[1]):
        return sparse.step_logits()[:1], []
    logits, measured = [sparse.last[-1]], []
    for i, token in enumerate(dense.tokens[:-1]):
        if i < SAMPLED_STEPS:
            with transformers.capture(sparse.model, certificates=True, truth=True, keep_selection=False) as records:
                logits.append(sparse.step(token))
            measured += records
        else:
            logits.append(sparse.step(token))
        tell("teacher-forced steps", (i + 1) / (len(dense.tokens) - 1))
    return torch.stack(logits), measured


def _spans(run: _Run) -> list[tuple[int, int]]:
    """Query ranges spread over the prompt, later ones first; none where the cache cannot go back."""
    length = run.ids.shape[1]
    if _cannot_crop(run.cache):
        return []
    stops = sorted({max(round(length * (i + 1) / SPANS / SPAN_QUERIES), 1) * SPAN_QUERIES for i in range(SPANS - 1)} | {length})
    return [(max(0, stop - SPAN_QUERIES), stop) for stop in reversed(stops) if stop <= length]


def _measure_spans(run: _Run, spans: list[tuple[int, int]], tell: Progress) -> list:
    """The queries of ``spans`` once more, each on the cache that it had, with certificates and truths."""
    from sieve_attn import transformers

    found = []
    for i, (start, stop) in enumerate(spans):
        _crop(run, start)
        with transformers.capture(run.model, certificates=True, truth=True, keep_selection=False) as records, \
                _layers_told(run.model, tell, "certificates and true errors", i / len(spans), 1 / len(spans)):  # fmt: skip
            run.forward(run.ids[:, start:stop])
        found += records
    return found


def _cannot_crop(cache: Any) -> bool:
    return not hasattr(cache, "crop") or any(getattr(layer, "is_sliding", False) for layer in getattr(cache, "layers", ()))


def _crop(run: _Run, length: int) -> bool:
    if _cannot_crop(run.cache):
        return False
    extra = run.cache.get_seq_length() - length
    if length == 0:
        run.cache = None
    elif extra:
        run.cache.crop(-extra)
    return True


def _sampled(spans: list[tuple[int, int]], steps: int) -> str:
    if not spans:
        return "no query: this cache cannot be cropped"
    prompt = "prompt positions " + ", ".join(f"{start:,}–{stop - 1:,}" for start, stop in reversed(spans))
    return f"{prompt} and the first {steps} decode steps" if steps else prompt


def _layers(prefilled: list, decoded: list, measured: list, tell: Progress) -> list[Layer]:
    names = sorted({r.layer for r in prefilled})
    cells = maps.side(sum(r.report.density_per_head.shape[1] for r in prefilled))
    made = []
    for i, layer in enumerate(names):
        own = [r.report for r in prefilled if r.layer == layer]
        steps = [r.report for r in decoded if r.layer == layer]
        sample = [r for r in measured if r.layer == layer and r.certificate is not None]
        kept, visible = (np.concatenate([_array(getattr(r, n)) for r in own], -1).astype(float) for n in ("kept", "visible"))
        seconds = Counter()
        for report in own:
            seconds.update(report.seconds)
        made.append(Layer(
            layer=layer, density=_share(kept.sum(), visible.sum()),
            decode_density=_share(sum(float(r.kept.sum()) for r in steps), sum(float(r.visible.sum()) for r in steps)),
            head_density=[_share(k, v) for k, v in zip(kept.sum((0, 2)), visible.sum((0, 2)), strict=True)],
            gate_seconds=seconds["geometry"] + seconds["selection"], attend_seconds=seconds["attend"],
            errors=Errors(*(_flat(sample, how) for how in _MEASURED)),
            density_by_position=thin(kept.sum((0, 1)) / np.maximum(visible.sum((0, 1)), 1)),
            maps=maps.kept_share(own[0].selection, own[0].kept, cells),
        ))  # fmt: skip
        tell("drawing", (i + 1) / len(names))
    return made


_MEASURED = (
    lambda r: r.certificate.dropped_mass,
    lambda r: r.true_dropped_mass,
    lambda r: r.output_error / r.output_norm.clamp(min=torch.finfo(torch.float32).tiny),
)


def _flat(records: list, how: Callable[[Any], Any]) -> np.ndarray:
    return np.concatenate([_array(how(r)).ravel() for r in records]) if records else np.zeros(0)


def _array(x: Any) -> np.ndarray:
    return x.detach().cpu().double().numpy()


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else 1.0


def _agreement(where: str, dense: Tensor, sparse: Tensor) -> Agreement:
    dense = dense[: len(sparse)]
    kl = metrics.kl_divergence(dense.double().softmax(-1), sparse.double().softmax(-1))
    agreed = int(metrics.next_token_agreement(dense, sparse).sum())
    return Agreement(where, len(sparse), agreed, float(kl.mean()), float(kl.max()))


def environment() -> dict[str, str]:
    """Machine, versions and date, for whoever reads the figures later."""
    import transformers

    from sieve_attn import __version__

    return {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} torch threads",
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        "sieve-attn": __version__, "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }  # fmt: skip


@contextmanager
def _layers_told(model: Any, tell: Progress, stage: str, base: float = 0.0, width: float = 1.0) -> Iterator[None]:
    """Progress by layer while one forward pass runs."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    lists = (m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count)
    layers = list(next(lists, []))
    tell(stage, base)
    hooks = [
        layer.register_forward_hook(lambda *_, i=i: tell(stage, base + width * (i + 1) / count)) for i, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        tell(stage, base + width)
