"""Which positions are worth attending to? A byte model on the standard library's text, one attention pattern after the other.

Every pattern keeps about the same share of the causal pairs (windows and random blocks are sized to the primes), with the same
parameters, batches and steps; dense attention is beside them. Prints losses on held-out text and times, samples with cached
steps, and writes docs/offset_patterns.md and docs/offset_patterns.png (with matplotlib).

    python examples/offset_patterns.py                                # a few minutes on two cores
    python examples/offset_patterns.py --steps 3 --length 64 --width 32 --out /tmp
"""

from __future__ import annotations

import argparse
import math
import platform
import sysconfig
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from sieve_attn import patterns
from sieve_attn.functional import offset_attention
from sieve_attn.layers import SparseIndexAttention

WINDOW, GLOBAL_TOKENS = 3, 2


class PatternAttention(SparseIndexAttention):
    """The layer with any pattern in place of its own; None is dense."""

    def __init__(self, width: int, heads: int, pattern: patterns.Pattern | None):
        super().__init__(width, (1,), heads, seq_len_max=None)
        self.pattern = pattern

    def _attend(self, query, key, value, return_attention):
        if self.pattern is None:
            causal = query.shape[2] > 1
            return functional.scaled_dot_product_attention(query, key, value, is_causal=causal)
        return offset_attention(query, key, value, self.pattern)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, pattern: patterns.Pattern | None):
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = PatternAttention(width, heads, pattern)
        self.inner = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, cache=None):
        if cache is None:
            x = x + self.attention(self.first(x))
        else:
            y, cache = self.attention.step(self.first(x), cache)
            x = x + y
        return x + self.inner(self.second(x)), cache


class ByteModel(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, width: int, layers: int, heads: int, length: int, pattern: patterns.Pattern | None):
        super().__init__()
        self.length = length
        self.byte, self.place = nn.Embedding(256, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, pattern) for _ in range(layers))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, text: Tensor, caches=None, start: int = 0):
        x = self.byte(text) + self.place(torch.arange(start, start + text.shape[1]))
        made = []
        for number, block in enumerate(self.blocks):
            x, cache = block(x, None if caches is None else caches[number])
            made.append(cache)
        return self.out(self.norm(x)), made

    @torch.no_grad()
    def sample(self, prompt: bytes, count: int, seed: int = 0) -> str:
        source = torch.Generator().manual_seed(seed)
        caches = [block.attention.empty_cache(1) for block in self.blocks]
        text = torch.tensor([list(prompt)])
        logits, caches = self(text, caches)
        for at in range(len(prompt), min(self.length, len(prompt) + count)):
            last = torch.multinomial(torch.softmax(logits[:, -1] / 0.8, -1), 1, generator=source)
            text = torch.cat([text, last], 1)
            logits, caches = self(last, caches, at)
        return bytes(text[0].tolist()).decode("utf-8", "replace")


def corpus() -> tuple[Tensor, Tensor]:
    """The standard library's modules, the last tenth held out."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = b"\n".join(path.read_bytes() for path in files)
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    cut = len(data) * 9 // 10
    return data[:cut], data[cut:]


def batch(data: Tensor, size: int, length: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    start = torch.randint(len(data) - length - 1, (size,), generator=source)
    rows = torch.stack([data[s : s + length + 1] for s in start]).long()
    return rows[:, :-1], rows[:, 1:]


def candidates(length: int) -> dict[str, patterns.Pattern | None]:
    """Patterns of about the density that the primes have; squares and Mian-Chowla as they are, and widened to it."""
    ends = patterns.Window(WINDOW + 1) | patterns.GlobalTokens(GLOBAL_TOKENS)
    primes = patterns.Primes() | ends
    target = primes.density(length)

    def nearest(make, sizes):
        return min((make(n) for n in sizes), key=lambda p: abs(p.density(length) - target))

    def with_window(offsets):
        sizes = range(1, length // 2, max(1, length // 128))
        return nearest(lambda n: offsets | patterns.Window(n) | patterns.GlobalTokens(GLOBAL_TOKENS), sizes)

    size = max(4, length // 32)
    return {
        "dense": None,
        "primes": primes,
        "squares, window to equal density": with_window(patterns.Squares()),
        "Mian-Chowla, window to equal density": with_window(patterns.MianChowla()),
        "Fibonacci, window to equal density": with_window(patterns.Fibonacci()),
        "window": nearest(lambda n: patterns.Window(n) | patterns.GlobalTokens(GLOBAL_TOKENS), range(1, length)),
        "dilated": nearest(lambda n: patterns.Dilated(n, 4) | ends, range(1, length // 4)),
        "BigBird-like": nearest(lambda n: patterns.RandomBlocks(n, size, window=1, global_blocks=1), range(0, 16)),
        "squares alone": patterns.Squares() | ends,
        "Mian-Chowla alone": patterns.MianChowla() | ends,
    }


def train(name: str, pattern, given: argparse.Namespace, data: Tensor, held_out: Tensor) -> dict:
    torch.manual_seed(given.seed)
    model = ByteModel(given.width, given.layers, given.heads, given.length, pattern)
    optimizer = torch.optim.AdamW(model.parameters(), lr=given.lr, weight_decay=0.01)
    source, curve, clock = torch.Generator().manual_seed(given.seed), [], time.perf_counter()
    for step in range(given.steps):
        for group in optimizer.param_groups:
            group["lr"] = given.lr * min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / given.steps))
        text, target = batch(data, given.batch, given.length, source)
        loss = functional.cross_entropy(model(text)[0].flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        curve.append(loss.item())
    seconds = time.perf_counter() - clock
    source, losses = torch.Generator().manual_seed(1), []
    with torch.no_grad():
        for _ in range(given.tests):
            text, target = batch(held_out, given.batch, given.length, source)
            losses.append(functional.cross_entropy(model(text)[0].flatten(0, 1), target.flatten()).item())
    density = 1.0 if pattern is None else pattern.density(given.length)
    loss = sum(losses) / len(losses)
    print(f"{name:38} density {density:6.1%}  loss {loss:.3f} nats/byte  {1e3 * seconds / given.steps:7.1f} ms/step", flush=True)
    return {"name": name, "density": density, "loss": loss, "ms": 1e3 * seconds / given.steps, "curve": curve, "model": model}


def write(rows: list[dict], given: argparse.Namespace, sample: str) -> None:
    lines = ["# Position patterns at equal density", ""]
    lines += [
        f"A byte model of {given.layers} layers (width {given.width}, {given.heads} heads, {given.length} bytes of context), "
        f"trained for {given.steps} steps of {given.batch} sequences on the Python {platform.python_version()} standard library; "
        "losses are those of held-out modules, in nats a byte, lower is better. Same seed, batches and parameters in every row. "
        "Made by `python examples/offset_patterns.py`.",
        "",
        "| pattern | density | held-out loss | over dense | ms a step |",
        "|---|---|---|---|---|",
    ]
    dense = next((row["loss"] for row in rows if row["name"] == "dense"), rows[0]["loss"])
    for row in sorted(rows, key=lambda r: r["loss"]):
        lines.append(
            f"| {row['name']} | {row['density']:.1%} | {row['loss']:.3f} | {row['loss'] - dense:+.3f} | {row['ms']:.1f} |"
        )
    lines += ["", "Time is that of a whole training step; at this length it says little about attention alone.", ""]
    lines += ["Sampled with cached steps from the primes model:", "", "```", sample, "```", ""]
    given.out.mkdir(parents=True, exist_ok=True)
    if draw(rows, given.out / "offset_patterns.png"):
        lines += ["![Training loss](offset_patterns.png)", ""]
    (given.out / "offset_patterns.md").write_text("\n".join(lines))


def draw(rows: list[dict], path: Path) -> bool:
    try:
        import matplotlib
    except ModuleNotFoundError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ax = pyplot.subplots(figsize=(7, 4.5))
    for row in rows:
        wide = max(1, len(row["curve"]) // 50)
        smooth = [sum(row["curve"][i : i + wide]) / wide for i in range(0, len(row["curve"]) - wide + 1, wide)]
        ax.plot([wide * i for i in range(len(smooth))], smooth, label=f"{row['name']} ({row['density']:.0%})", linewidth=1)
    ax.set(xlabel="step", ylabel="training loss, nats a byte")
    ax.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    numbers = {"steps": 300, "length": 512, "width": 128, "layers": 3, "heads": 4, "batch": 8, "tests": 16, "seed": 0}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--only", nargs="*", help="names of patterns")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs")
    given = parser.parse_args()
    data, held_out = corpus()
    chosen = {n: p for n, p in candidates(given.length).items() if not given.only or n in given.only}
    rows = [train(name, pattern, given, data, held_out) for name, pattern in chosen.items()]
    teller = next((row for row in rows if row["name"] == "primes"), rows[0])
    sample = teller["model"].sample(b"def ", min(200, given.length - 4))
    print(sample)
    write(rows, given, sample)


if __name__ == "__main__":
    main()
