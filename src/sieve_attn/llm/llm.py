"""``LLM``: generate text with dense or sparse attention."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from sieve_attn import checks, dispatch
from sieve_attn.checks import error, positive_int
from sieve_attn.llm.config import AetherSparseAttentionConfig
from sieve_attn.llm.loading import context_length, decode, encode, eos_ids, load
from sieve_attn.llm.outputs import Output, Timings
from sieve_attn.llm.sampling import Sampler
from sieve_attn.policies import Policy


class LLM:
    """A causal language model that reads strings and writes strings, with sparse attention if asked.

    ``model`` is "embedded" (the byte-level model that ships with the package), a folder with a Hugging Face model, or a loaded
    one; nothing is ever downloaded. ``sparse_attention_config`` is an :class:`AetherSparseAttentionConfig`, a
    :class:`~sieve_attn.policies.Policy` or its text, or None for dense attention. A loaded model is changed in place
    (``sieve_attn.transformers.desparsify`` restores it). ``backend`` computes the sparse attention, as in
    :func:`sieve_attn.attention`; a dense model keeps its own.

    Raises OSError for an unreadable path, TypeError for arguments of another type, ValueError for values out of range.

        llm = LLM(sparse_attention_config=AetherSparseAttentionConfig(target_sparsity=0.8))
        print(llm.generate("import json\\n", max_tokens=50))
    """

    def __init__(
        self,
        model: Any = "embedded",
        sparse_attention_config: Any = None,
        *,
        tokenizer: Any = None,
        dtype: Any = None,
        backend: str = "auto",
    ):
        config = sparse_attention_config
        if not (config is None or isinstance(config, (AetherSparseAttentionConfig, Policy, str))):
            raise error(
                "sparse_attention_config",
                "must be an AetherSparseAttentionConfig, a Policy, its text, or None",
                type(config).__name__,
                "try AetherSparseAttentionConfig(target_sparsity=0.8)",
                TypeError,
            )
        dispatch.known(backend)
        self.config = config
        self.model, self.tokenizer = load(model, tokenizer, dtype)
        if config is not None:
            from sieve_attn.transformers import sparsify

            sparsify(self.model, config, backend=backend)

    @torch.inference_mode()
    def generate(
        self,
        prompts: str | Sequence[str],
        max_tokens: int = 50,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 0,
        stop: str | Sequence[str] | None = None,
    ) -> Output | list[Output]:
        """Continue one prompt (a string in, an :class:`Output` out) or several (a list in, a list out).

        Prompts of different lengths run as one left-padded batch, under sparse attention as one batch a length (padding would
        move a prompt's blocks). ``temperature=0`` takes the most likely token; above 0 tokens are drawn from ``softmax(logits
        / temperature)``, restricted to the smallest set of tokens with mass ``top_p``. Every prompt has a generator of its own
        from ``seed`` (one number, or one a prompt): the same seed gives the same tokens, whatever runs beside it, and torch's
        global generator is left alone. Text is cut before the first of the ``stop`` strings. Generation also ends where the
        model's context is full.

        Raises TypeError for prompts that are no strings, ValueError for empty prompts, prompts that fill the model's context
        and values out of range.
        """
        texts = _prompts(prompts)
        positive_int("max_tokens", max_tokens, "ask for at least one token")
        stops = _stops(stop)
        samplers = [Sampler(temperature, top_p, s) for s in _seeds(seed, len(texts))]
        rows = [encode(self.tokenizer, text) for text in texts]
        for text, row in zip(texts, rows, strict=True):
            if not row:
                raise error("prompts", "must hold at least one token each", repr(text), "pass some text")
        most = self._most(rows, max_tokens)

        ends, results = eos_ids(self.model), {}
        for batch in self._batches(rows):
            found = self._complete([rows[i] for i in batch], [samplers[i] for i in batch], [most[i] for i in batch], stops, ends)
            results |= dict(zip(batch, found, strict=True))
        report = self._report()
        outputs = []
        for i, text in enumerate(texts):
            ids, why, timings = results[i]
            outputs.append(Output(text, self._text(rows[i], ids, stops, ends), ids, why, timings, report))
        return outputs[0] if isinstance(prompts, str) else outputs

    def _batches(self, rows: list[list[int]]) -> list[list[int]]:
        """Which prompts run together. Padding would shift a prompt's blocks and take the place of its first tokens, so a
        sparse model reads prompts of one length at a time: what it keeps of one does not depend on the others."""
        if self.config is None:
            return [list(range(len(rows)))]
        by_length: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            by_length.setdefault(len(row), []).append(i)
        return list(by_length.values())

    def _complete(
        self, rows: list[list[int]], samplers: list[Sampler], most: list[int], stops: tuple[str, ...], ends: frozenset[int]
    ) -> list[tuple[list[int], str, Timings]]:
        """``(tokens, why they end, timings)`` of one batch."""
        run = _Run(self.model, rows, self._pad())
        clock = perf_counter()
        logits = run.prefill()
        prefill, clock = perf_counter() - clock, perf_counter()
        made: list[list[int]] = [[] for _ in rows]
        reason: list[str | None] = [None] * len(rows)
        steps = 0
        while True:
            for i, sampler in enumerate(samplers):
                if reason[i] is None:
                    made[i].append(sampler(logits[i]))
                    reason[i] = self._finished(rows[i], made[i], stops, ends, most[i])
            if all(reason):
                break
            logits = run.step([row[-1] for row in made])
            steps += 1
        timings = Timings(prefill, perf_counter() - clock, steps)
        return [(ids, str(why), timings) for ids, why in zip(made, reason, strict=True)]

    def _most(self, rows: list[list[int]], max_tokens: int) -> list[int]:
        """How many tokens each prompt may get: what was asked for, as far as the model's context goes."""
        limit, known = context_length(self.model), self.model.get_input_embeddings().num_embeddings
        largest, longest = max(map(max, rows)), max(map(len, rows))
        if largest >= known:
            rule = f"must have a tokenizer of at most {known:,} ids, as many as the model embeds"
            raise error("prompts", rule, f"id {largest:,}", "load the tokenizer that belongs to the model")
        if limit is not None and longest >= limit:
            rule = f"must be shorter than the model's context of {limit:,} tokens"
            raise error("prompts", rule, f"{longest:,} tokens", "shorten it, or take a model with a longer context")
        return [max_tokens if limit is None else min(max_tokens, limit - len(row)) for row in rows]

    def _finished(self, row: list[int], ids: list[int], stops: tuple[str, ...], ends: frozenset[int], most: int) -> str | None:
        if ids[-1] in ends:
            return "eos"
        if stops and any(s in decode(self.tokenizer, row, ids) for s in stops):
            return "stop"
        return "length" if len(ids) >= most else None

    def _text(self, row: list[int], ids: list[int], stops: tuple[str, ...], ends: frozenset[int]) -> str:
        text = decode(self.tokenizer, row, ids[:-1] if ids[-1] in ends else ids)
        return text[: min([text.index(s) for s in stops if s in text], default=len(text))]

    def _pad(self) -> int:
        pad = getattr(self.tokenizer, "pad_token_id", None)
        return 0 if pad is None else int(pad)

    def _report(self) -> Any:
        if self.config is None:
            return None
        from sieve_attn.transformers import report

        return report(self.model, reset=True)


class _Run:
    """A left-padded batch and its cache."""

    def __init__(self, model: Any, rows: list[list[int]], pad: int):
        longest = max(map(len, rows))
        device = next(model.parameters()).device
        self.model = model
        self.ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        self.mask = (torch.arange(longest, device=device)[None] >= longest - lengths[:, None]).long()
        self.padded = bool((lengths != longest).any())
        self.position = lengths - 1
        self.last = (context_length(model) or 2**31) - 1
        self.cache = None

    def prefill(self) -> Tensor:
        """[batch, vocabulary] logits after the prompts."""
        position = (self.mask.cumsum(-1) - 1).clamp(min=0)
        return self._forward(self.ids, position)

    def step(self, ids: list[int]) -> Tensor:
        """[batch, vocabulary] logits after one more token each."""
        # rows that are done go on in the batch, but not beyond the last position that the model knows
        self.position = (self.position + 1).clamp(max=self.last)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(ids), 1)], 1)
        return self._forward(torch.tensor(ids, device=self.mask.device)[:, None], self.position[:, None])

    def _forward(self, ids: Tensor, position: Tensor) -> Tensor:
        out = self.model(
            input_ids=ids,
            attention_mask=self.mask if self.padded else None,
            position_ids=position,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = out.past_key_values
        # the copy waits for the device: clocks around it are honest
        return out.logits[:, -1].float().cpu()


def _prompts(prompts: Any) -> list[str]:
    texts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(texts, (list, tuple)) or not all(isinstance(t, str) for t in texts):
        raise error(
            "prompts", "must be a string or a list of strings", type(prompts).__name__, "decode bytes and files first", TypeError
        )
    if not texts or not all(texts):
        raise error("prompts", "must hold at least one prompt and none that is empty", repr(prompts), "pass some text")
    return [checks.unicode_text("prompts", text) for text in texts]


def _stops(stop: Any) -> tuple[str, ...]:
    stops = () if stop is None else tuple(stop) if isinstance(stop, (list, tuple)) else (stop,)
    if not all(isinstance(s, str) and s for s in stops):
        raise error("stop", "must be a string or several, none empty", repr(stop), "leave it out for none")
    return stops


def _seeds(seed: Any, count: int) -> list[int]:
    seeds = list(seed) if isinstance(seed, (list, tuple, range)) else [seed] * count
    if len(seeds) != count:
        raise error("seed", f"must be one integer or {count}, one a prompt", repr(seed), "try seed=0")
    return [checks.seed("seed", s) for s in seeds]
