"""``sieve generate``: continue a text with dense or sparse attention."""

from __future__ import annotations

import json as json_module
from typing import Annotated, Any

import typer

from sieve_attn.cli import options as o


def generate(
    prompt: o.Prompt = None, prompt_file: o.PromptFile = None, model: o.Model = "embedded", max_tokens: o.MaxTokens = 50,
    policy: o.PolicyText = None, max_error: o.MaxError = None, block_size: o.BlockSize = None, threshold: o.Threshold = None,
    local_window: o.LocalWindow = None, target_sparsity: o.TargetSparsity = None,
    compare_baseline: Annotated[bool, typer.Option("--compare-baseline", help="Generate with dense attention as well.")] = False,
    temperature: Annotated[float, typer.Option("--temperature", help="0 takes the most likely token.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Sample from the smallest set of tokens with this mass.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="Stop before this text; may be repeated.")] = None,
    seed: o.Seed = 0, json: o.Json = False, dtype: o.Dtype = None, threads: o.Threads = None, backend: o.Backend = "auto",
) -> None:  # fmt: skip
    """Continue a text. Without a policy attention is dense."""
    with o.user_errors():
        text, _ = o.read_prompt(prompt, prompt_file)
        config = o.read_policy(
            policy,
            max_error,
            block_size=block_size,
            threshold=threshold,
            local_window=local_window,
            target_sparsity=target_sparsity,
        )
        o.set_threads(threads)
        with o.progress_bar(not json) as tell:
            from sieve_attn.llm import LLM

            how = {"temperature": temperature, "top_p": top_p, "seed": seed, "stop": stop}
            tell("loading", 0.0)
            llm = LLM(model, config, dtype=dtype, backend=backend)
            tell("loading", 1.0)
            tell("generating", 0.0)
            output = llm.generate(text, max_tokens, **how)
            baseline = _dense(llm, text, max_tokens, how) if compare_baseline else None
            tell("generating", 1.0)
    if json:
        found = output.to_dict() | ({} if baseline is None else {"baseline": baseline.to_dict()})
        typer.echo(json_module.dumps(found))
        return
    typer.echo(output.text)
    typer.echo(_clock("dense" if config is None else "sparse", output), err=True)
    if output.report is not None:
        typer.echo(str(output.report), err=True)
    if baseline is not None:
        same = "the same text" if baseline.text == output.text else f"another text:\n{baseline.text}"
        typer.echo(f"{_clock('dense', baseline)}; {same}", err=True)


def _dense(llm: Any, text: str, max_tokens: int, how: dict) -> Any:
    """The same call with dense attention."""
    from sieve_attn.llm import LLM
    from sieve_attn.transformers import desparsify

    return LLM(desparsify(llm.model), tokenizer=llm.tokenizer).generate(text, max_tokens, **how)


def _clock(name: str, output: Any) -> str:
    timings = output.timings
    return (f"{name}: prefill {timings.prefill_seconds:.2f} s, {timings.tokens_per_second:.1f} tokens/s, "
            f"{len(output.tokens)} tokens, finished by {output.finish_reason}")  # fmt: skip
