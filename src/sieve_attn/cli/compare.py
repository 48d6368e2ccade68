"""``sieve compare`` and ``sieve inspect``: dense against sparse attention on one prompt."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer

from sieve_attn import checks
from sieve_attn.cli import options as o

Demo = Annotated[bool, typer.Option("--demo", help="The embedded model on 16,000 bytes of source that it was not trained on.")]
DEFAULT_POLICY = "top_blocks(k=64)"
ANY_POLICY = f"Without a policy: {DEFAULT_POLICY}."


def compare(
    prompt: o.Prompt = None, prompt_file: o.PromptFile = None, demo: Demo = False, model: o.Model = "embedded",
    max_tokens: o.MaxTokens = 32, policy: o.PolicyText = None, max_error: o.MaxError = None, block_size: o.BlockSize = None,
    threshold: o.Threshold = None, local_window: o.LocalWindow = None, target_sparsity: o.TargetSparsity = None,
    compare_baseline: Annotated[bool, typer.Option("--compare-baseline", hidden=True)] = True,
    seed: o.Seed = 0, json: o.Json = False, html: o.Html = None, dtype: o.Dtype = None, threads: o.Threads = None,
    backend: o.Backend = "auto",
) -> None:  # fmt: skip
    """Dense against sparse on one prompt: time, density, certified and true error, next tokens, both texts."""
    aether = {"block_size": block_size, "threshold": threshold, "local_window": local_window, "target_sparsity": target_sparsity}
    with o.user_errors():
        chosen = o.read_policy(policy, max_error, **aether)
        o.check_target("html", html)
        found = _run(prompt, prompt_file, demo, model, max_tokens, chosen, seed, not json, dtype, threads, backend)
        written = _write(found, html)
    if json:
        typer.echo(json_module.dumps(found.to_dict()))
        return
    from sieve_attn.cli.show import show

    show(found)
    if written:
        typer.echo(f"report page: {written}")


def inspect(
    prompt: o.Prompt = None, prompt_file: o.PromptFile = None, demo: Demo = False, model: o.Model = "embedded",
    max_tokens: o.MaxTokens = 32, policy: o.PolicyText = None, max_error: o.MaxError = None, block_size: o.BlockSize = None,
    threshold: o.Threshold = None, local_window: o.LocalWindow = None, target_sparsity: o.TargetSparsity = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path("sieve-report.html"),
    seed: o.Seed = 0, json: o.Json = False, dtype: o.Dtype = None, threads: o.Threads = None, backend: o.Backend = "auto",
) -> None:  # fmt: skip
    """Write the report page alone: kept and dropped blocks by layer and head, density and certificate curves."""
    aether = {"block_size": block_size, "threshold": threshold, "local_window": local_window, "target_sparsity": target_sparsity}
    with o.user_errors():
        chosen = o.read_policy(policy, max_error, **aether)
        o.check_target("output", output)
        found = _run(prompt, prompt_file, demo, model, max_tokens, chosen, seed, not json, dtype, threads, backend)
        written = _write(found, output)
    typer.echo(json_module.dumps({"page": str(written), "bytes": written.stat().st_size}) if json else f"report page: {written}")


compare.__doc__ = f"{compare.__doc__} {ANY_POLICY}"
inspect.__doc__ = f"{inspect.__doc__} {ANY_POLICY}"


def _run(
    prompt: str | None,
    file: Path | None,
    demo: bool,
    model: str,
    max_tokens: int,
    config: Any,
    seed: int,
    bar: bool,
    dtype: str | None,
    threads: int | None,
    backend: str,
) -> Any:
    text, source = o.read_prompt(prompt, file, demo)
    o.set_threads(threads)
    with o.progress_bar(bar) as tell:
        tell("loading", 0.0)
        import torch

        from sieve_attn.evaluation.compare import compare as measure
        from sieve_attn.llm.loading import load

        torch.manual_seed(checks.seed("seed", seed))
        loaded, tokenizer = load(model, dtype=dtype)
        tell("loading", 1.0)
        name = "the embedded model" if model == "embedded" else Path(model).name
        policy = DEFAULT_POLICY if config is None else config
        return measure(
            loaded, tokenizer, text, policy, max_tokens=max_tokens, backend=backend, name=name, source=source, progress=tell
        )


def _write(found: Any, path: Path | None) -> Path | None:
    from sieve_attn.evaluation.report import write_page

    return None if path is None else write_page(found, path)
