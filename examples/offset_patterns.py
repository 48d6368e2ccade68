"""Which positions are worth attending to? A byte model on the standard library's text, one attention pattern after the other.

Most patterns keep about the same share of the causal pairs (windows and random blocks are sized to the primes), with the same
parameters, batches and steps, from several seeds; dense attention is beside them. Prints held-out losses along the way, samples
with cached steps, times attention alone, and writes offset_patterns.json and offset_patterns.png (with matplotlib) to --out.

    python examples/offset_patterns.py                                # a quarter of an hour of one core; --seeds 1 is a third
    python examples/offset_patterns.py --steps 3 --length 64 --width 36 --seeds 1 --timed 256 --out /tmp
"""

from __future__ import annotations

import argparse
import bisect
import json
import math
import statistics
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
    """The layer with any pattern in place of its own; None is dense. ``rotary`` turns queries and keys by their positions."""

    def __init__(self, width: int, heads: int, pattern: patterns.Pattern | None, rotary: bool):
        super().__init__(width, (1,), heads, seq_len_max=None)
        self.pattern, self.rotary = pattern, rotary

    def _attend(self, query, key, value, return_attention):
        if self.rotary:
            query, key = turned(query, key.shape[2] - query.shape[2]), turned(key, 0)
        if self.pattern is None:
            causal = query.shape[2] > 1
            return functional.scaled_dot_product_attention(query, key, value, is_causal=causal)
        return offset_attention(query, key, value, self.pattern)


def turned(x: Tensor, first: int) -> Tensor:
    """Rotary positions from ``first`` on: pairs of channels turn by angles that grow with the position."""
    half = x.shape[3] // 2
    position = torch.arange(first, first + x.shape[2], dtype=torch.float32)
    angle = position[:, None] * 10_000.0 ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half : 2 * half]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos(), x[..., 2 * half :]], 3)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, pattern: patterns.Pattern | None, rotary: bool):
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = PatternAttention(width, heads, pattern, rotary)
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

    def __init__(
        self, width: int, layers: int, heads: int, length: int, pattern: patterns.Pattern | None, rotary: bool = False
    ):  # fmt: skip
        super().__init__()
        self.length = length
        self.byte, self.place = nn.Embedding(256, width), None if rotary else nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, pattern, rotary) for _ in range(layers))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, text: Tensor, caches=None, start: int = 0):
        x = self.byte(text)
        if self.place is not None:
            x = x + self.place(torch.arange(start, start + text.shape[1]))
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
    """Patterns of about the density that the primes have; squares and Mian-Chowla as they are, and widened to it; and a window
    of the density that squares have as they are."""
    ends = patterns.Window(WINDOW + 1) | patterns.GlobalTokens(GLOBAL_TOKENS)
    primes = patterns.Primes() | ends
    target = primes.density(length)

    def widened(make, largest, wanted=target):
        """The smallest ``make(n)`` of at least the wanted density, or the one before it if that is nearer."""
        n = bisect.bisect_left(range(largest), wanted, key=lambda n: make(n + 1).density(length)) + 1
        return min((make(max(n - 1, 1)), make(n)), key=lambda p: abs(p.density(length) - wanted))

    def window(n):
        return patterns.Window(n) | patterns.GlobalTokens(GLOBAL_TOKENS)

    def with_window(offsets):
        return widened(lambda n: offsets | window(n), length // 2)

    size, squares = max(4, length // 32), patterns.Squares() | ends
    return {
        "dense": None,
        "primes": primes,
        "squares, window to equal density": with_window(patterns.Squares()),
        "Mian-Chowla, window to equal density": with_window(patterns.MianChowla()),
        "Fibonacci, window to equal density": with_window(patterns.Fibonacci()),
        "window": widened(window, length),
        "dilated": widened(lambda n: patterns.Dilated(n, 4) | ends, length // 4),
        "BigBird-like": widened(lambda n: patterns.RandomBlocks(n, size, window=1, global_blocks=1), 16),
        "squares alone": squares,
        "Mian-Chowla alone": patterns.MianChowla() | ends,
        "window of the squares' density": widened(window, length, squares.density(length)),
    }


def held_out_loss(model: ByteModel, held_out: Tensor, given: argparse.Namespace) -> float:
    """Nats a byte over the same windows of held-out text for every model."""
    source, losses = torch.Generator().manual_seed(1), []
    with torch.no_grad():
        for _ in range(given.tests):
            text, target = batch(held_out, given.batch, given.length, source)
            losses.append(functional.cross_entropy(model(text)[0].flatten(0, 1), target.flatten()).item())
    return statistics.mean(losses)


def train(name: str, pattern, seed: int, given: argparse.Namespace, data: Tensor, held_out: Tensor) -> tuple[dict, ByteModel]:
    """``curve`` holds (step, held-out loss); ``ms`` is the processor time of a training step."""
    torch.manual_seed(seed)
    model = ByteModel(given.width, given.layers, given.heads, given.length, pattern, given.positions == "rotary")
    optimizer = torch.optim.AdamW(model.parameters(), lr=given.lr, weight_decay=0.01)
    source, curve, spent = torch.Generator().manual_seed(seed), [], 0.0
    for step in range(given.steps):
        if step % max(1, given.steps // 6) == 0:
            curve.append((step, held_out_loss(model, held_out, given)))
        clock = time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = given.lr * min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / given.steps))
        text, target = batch(data, given.batch, given.length, source)
        loss = functional.cross_entropy(model(text)[0].flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        spent += time.process_time() - clock
    curve.append((given.steps, held_out_loss(model, held_out, given)))
    ms = 1e3 * spent / given.steps
    print(f"{name:38} seed {seed}  {ms:6.1f} ms a step  " + " ".join(f"{loss:.3f}" for _, loss in curve), flush=True)
    return {"seed": seed, "ms": ms, "curve": curve}, model


def attention_ms(pattern: patterns.Pattern | None, length: int, rounds: int = 5) -> dict[str, float]:
    """Processor time of attention alone, 4 heads of 64: forward without gradients, and its gradients; the least of ``rounds``."""
    source = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, 4, length, 64, generator=source).requires_grad_() for _ in range(3)]

    def attend():
        if pattern is None:
            return functional.scaled_dot_product_attention(*tensors, is_causal=True)
        return offset_attention(*tensors, pattern)

    forward, backward = [], []
    for _ in range(rounds):
        clock = time.process_time()
        with torch.no_grad():
            attend()
        forward.append(time.process_time() - clock)
        output = attend().sum()
        clock = time.process_time()
        torch.autograd.grad(output, tensors)
        backward.append(time.process_time() - clock)
    return {"forward": 1e3 * min(forward), "backward": 1e3 * min(backward)}


def table(results: dict) -> str:
    """Mean and standard deviation over seeds; differences from dense are taken seed by seed."""
    rows, length = results["patterns"], results["settings"]["timed"]
    dense = rows.get("dense", next(iter(rows.values())))
    lines = [
        f"| pattern | density | held-out loss | over dense | ms a step | density at {length:,} | forward | backward |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def last(row: dict) -> list[float]:
        return [run["curve"][-1][1] for run in row["runs"]]

    def spread(values: list[float], sign: str = "") -> str:
        return f"{statistics.mean(values):{sign}.3f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.3f}"

    def times(row: dict, which: str) -> str:
        return f"{dense['timed'][which] / row['timed'][which]:.1f}x"

    for name, row in sorted(rows.items(), key=lambda item: statistics.mean(last(item[1]))):
        over = [a - b for a, b in zip(last(row), last(dense), strict=True)]
        ms = statistics.mean(run["ms"] for run in row["runs"])
        lines.append(
            f"| {name} | {row['density']:.1%} | {spread(last(row))} | {'' if row is dense else spread(over, '+')} | {ms:.0f} "
            f"| {row['timed']['density']:.1%} | {times(row, 'forward')} | {times(row, 'backward')} |"
        )
    return "\n".join(lines)


def draw(results: dict, path: Path) -> bool:
    """Held-out loss along training, and the last one of every seed beside its mean."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), gridspec_kw={"width_ratios": [1.2, 1]})
    last = {n: [run["curve"][-1][1] for run in row["runs"]] for n, row in results["patterns"].items()}
    order = sorted(last, key=lambda n: statistics.mean(last[n]))
    colours = pyplot.get_cmap("tab20")
    for place, name in enumerate(order):
        row = results["patterns"][name]
        steps = [step for step, _ in row["runs"][0]["curve"]]
        mean = [statistics.mean(losses) for losses in zip(*([y for _, y in run["curve"]] for run in row["runs"]), strict=True)]
        left.plot(steps[1:], mean[1:], linewidth=1.2, color=colours(place))
        right.plot(last[name], [place] * len(last[name]), "o", color=colours(place), markersize=4)
        right.plot(statistics.mean(last[name]), place, "|", color="black", markersize=12)
    left.set(xlabel="step (colours as on the right)", ylabel="held-out loss, nats a byte (mean of seeds)")
    names = [f"{name} ({results['patterns'][name]['density']:.0%})" for name in order]
    right.set_yticks(range(len(order)), names, fontsize=7)
    right.invert_yaxis()
    right.set(xlabel="last held-out loss of each seed")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    numbers = {"steps": 1200, "length": 512, "width": 96, "layers": 2, "heads": 3, "batch": 4, "tests": 16, "seeds": 2}
    numbers |= {"first-seed": 0, "timed": 4096, "threads": 1}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{default} by default")
    parser.add_argument("--positions", choices=("learned", "rotary"), default="learned", help="learned by default")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--only", nargs="*", help="names of patterns, as the table has them")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs", help="the folder docs by default")
    given = parser.parse_args()
    unknown = set(given.only or ()) - set(candidates(given.length))
    if unknown:
        parser.error(f"--only: no pattern {sorted(unknown)}; there are {', '.join(map(repr, candidates(given.length)))}")
    if given.width % given.heads:
        parser.error(f"--width {given.width} must be a multiple of --heads {given.heads}")
    torch.set_num_threads(given.threads)
    data, held_out = corpus()
    chosen = {n: p for n, p in candidates(given.length).items() if not given.only or n in given.only}
    given.out.mkdir(parents=True, exist_ok=True)
    settings = {n: getattr(given, n.replace("-", "_")) for n in (*numbers, "positions", "lr")}
    results = {"settings": settings, "patterns": {}}
    long = candidates(given.timed)
    for name, pattern in chosen.items():
        timed = attention_ms(long[name], given.timed)
        timed["density"] = 1.0 if pattern is None else long[name].density(given.timed)
        results["patterns"][name] = {
            "density": 1.0 if pattern is None else pattern.density(given.length),
            "timed": timed,
            "runs": [],
        }
    teller = "primes" if "primes" in chosen else next(iter(chosen))
    for seed in range(given.first_seed, given.first_seed + given.seeds):
        for name, pattern in chosen.items():
            run, model = train(name, pattern, seed, given, data, held_out)
            results["patterns"][name]["runs"].append(run)
            if name == teller:
                results["sample"] = model.sample(b"def ", min(300, given.length - 4))
        (given.out / "offset_patterns.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{table(results)}\n\nSampled with cached steps from the {teller} model:\n\n{results['sample']}")
    draw(results, given.out / "offset_patterns.png")


if __name__ == "__main__":
    main()
