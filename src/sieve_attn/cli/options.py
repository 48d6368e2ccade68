"""What the commands share: flags, the policy and prompt that flags mean, and how errors are told."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from sieve_attn import checks
from sieve_attn.checks import error

Model = Annotated[str, typer.Option("--model", help="'embedded', or a folder with a Hugging Face model. Nothing is downloaded.")]
Prompt = Annotated[str | None, typer.Option("--prompt", help="The text to continue.")]
PromptFile = Annotated[Path | None, typer.Option("--prompt-file", help="A file with the text to continue; '-' reads stdin.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", help="Tokens to generate.")]
PolicyText = Annotated[str | None, typer.Option("--policy", help="A policy: 'top_blocks(k=64)', 'adaptive(mass=0.99)', ...")]
MaxError = Annotated[float | None, typer.Option("--max-error", help="Prove that at most this mass is dropped: certified(E).")]
BlockSize = Annotated[int | None, typer.Option("--block-size", help="AETHER: keys in a block (64).")]
Threshold = Annotated[float | None, typer.Option("--threshold", help="AETHER: keep a block above this score (0.05).")]
LocalWindow = Annotated[int | None, typer.Option("--local-window", help="AETHER: recent blocks that are always kept (8).")]
TargetSparsity = Annotated[float | None, typer.Option("--target-sparsity", help="AETHER: drop this share of the blocks instead.")]
Seed = Annotated[int, typer.Option("--seed", help="The same seed gives the same tokens.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Html = Annotated[Path | None, typer.Option("--html", help="Also write the report page to this file.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16, float16 or float64.")]
Threads = Annotated[int | None, typer.Option("--threads", help="Threads that torch may use.")]
Backend = Annotated[str, typer.Option("--backend", help="auto, reference, native or triton.")]

LEAST_DEMO_BYTES = 16_000


@contextmanager
def user_errors() -> Iterator[None]:
    """What a user can mend is one line on stderr and exit code 2; anything else is a bug and keeps its traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError) as why:
        if not (str(why).startswith("`") or isinstance(why, OSError)):
            raise
        typer.echo(f"sieve: {why}", err=True)
        raise typer.Exit(2) from None


def read_policy(policy: str | None, max_error: float | None, **aether: Any) -> Any:
    """The one policy or configuration that the flags describe; None if none was given."""
    from sieve_attn import policies

    given = {name: value for name, value in aether.items() if value is not None}
    ways = [policy is not None, max_error is not None, bool(given)]
    if sum(ways) > 1:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in aether)
        raise error(
            "policy", f"must be given in one way: --policy, --max-error, or {flags}", "several of them", "leave out all but one"
        )
    if policy is not None:
        return policies.parse(policy)
    if max_error is not None:
        return policies.Certified(max_error)
    if given:
        from sieve_attn.llm import AetherSparseAttentionConfig

        return AetherSparseAttentionConfig(**given)
    return None


def read_prompt(prompt: str | None, file: Path | None, demo: bool | None = None) -> tuple[str, str]:
    """``(text, where it came from)``; ``demo`` is None for a command without that flag."""
    ways = {"--prompt": prompt is not None, "--prompt-file": file is not None} | ({} if demo is None else {"--demo": demo})
    given = [way for way, taken in ways.items() if taken]
    if len(given) != 1:
        rule = f"must be given once, as {' or as '.join(ways)}"
        raise error("prompt", rule, " and ".join(given) or "none", "try --prompt 'import json'")
    if demo:
        return demo_prompt()
    text, source = (prompt, "a prompt") if file is None else (_read(file), "stdin" if str(file) == "-" else file.name)
    if not text:
        raise error("prompt", "must not be empty", repr(text), "pass some text")
    return checks.unicode_text("prompt", text), source


def _read(file: Path) -> str:
    if str(file) == "-" and sys.stdin is None:
        raise error("prompt-file", "'-' must come with an open stdin", "a closed one", "pipe a text in, or name a file", OSError)
    try:
        if str(file) == "-":
            # whatever the locale says: a file is read so too
            sys.stdin.reconfigure(encoding="utf-8", errors="strict")
            return sys.stdin.read()
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as why:
        raise error("prompt-file", "must be a readable UTF-8 text", f"{str(file)!r} ({why})", "check the path", OSError) from None


def demo_prompt() -> tuple[str, str]:
    """At least 16,000 bytes of a standard library file that the embedded model was not trained on, up to a line's end."""
    from sieve_attn.evaluation.tasks import read_source, stdlib_files

    for path in stdlib_files("heldout"):
        text = read_source(path)
        end = text.find("\n", LEAST_DEMO_BYTES) + 1
        if end:
            return text[:end], f"{path.name} (Python's standard library)"
    raise error("demo", f"needs a standard library source file of {LEAST_DEMO_BYTES} bytes", "none", "use --prompt-file")


def check_target(name: str, path: Path | None) -> None:
    """A path that cannot be written is told before the run, not after it."""
    if path is None:
        return
    whole = path.absolute()
    if whole.is_dir() or not whole.parent.is_dir() or not os.access(whole if whole.exists() else whole.parent, os.W_OK):
        raise error(name, "must be a file in a folder that exists and may be written", repr(str(path)), "make the folder first",
                    OSError)  # fmt: skip


def set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(checks.threads(threads, "leave it out for torch's choice"))


@contextmanager
def progress_bar(enabled: bool) -> Iterator[Callable[[str, float], None]]:
    """``tell(stage, share done)`` as a bar on stderr, if that is a terminal."""
    if not (enabled and sys.stderr.isatty()):
        yield lambda stage, done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        known: dict[str, Any] = {}

        def tell(stage: str, done: float) -> None:
            if stage not in known:
                known[stage] = bar.add_task(stage, total=1.0)
            bar.update(known[stage], completed=done)

        yield tell
