"""Train a byte model of TilelliBlocks on the standard library's text, beside dense attention with as many parameters.

    python examples/tilelli_characters.py                     # a few minutes on two cores
    python examples/tilelli_characters.py --steps 20 --width 64 --context 64 --out /tmp    # a look at it

Prints both loss curves, then packs the trained weights to two bits each and samples by cached steps. With --out it writes
tilelli_characters.json there, and tilelli_characters.png if matplotlib is installed.
"""

import argparse
import json
import sysconfig
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from sieve_attn.layers import TilelliBlock, pack_ternary

BYTES = 256


class TilelliModel(nn.Module):
    """Embedding, blocks, norm, head. Nothing tells it positions: convolution and recurrence do."""

    def __init__(self, width: int, layers: int, top_k: int):
        super().__init__()
        self.embedding = nn.Embedding(BYTES, width)
        self.blocks = nn.ModuleList(TilelliBlock(width, top_k=top_k) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, BYTES, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def prefill(self, tokens: Tensor) -> tuple[Tensor, list]:
        """Logits of the last token [batch, 256], and the caches."""
        x, caches = self.embedding(tokens), []
        for block in self.blocks:
            x, cache = block.prefill(x)
            caches.append(cache)
        return self.head(self.norm(x[:, -1])), caches

    def step(self, token: Tensor, caches: list) -> tuple[Tensor, list]:
        x, after = self.embedding(token), []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, cache = block.forward_incremental(x, cache)
            after.append(cache)
        return self.head(self.norm(x[:, 0])), after


class DenseBlock(nn.Module):
    """Causal attention with rotary positions over all keys, then a two-layer network."""

    def __init__(self, width: int, hidden: int, head: int = 32):
        super().__init__()
        self.heads = width // head
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norms[1](x))))


def rotate(x: Tensor) -> Tensor:
    n, half = x.shape[2], x.shape[3] // 2
    angle = torch.arange(n)[:, None] * 1000.0 ** (-torch.arange(half) / half)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


class DenseModel(nn.Module):
    def __init__(self, width: int, layers: int, hidden: int):
        super().__init__()
        self.embedding = nn.Embedding(BYTES, width)
        self.blocks = nn.ModuleList(DenseBlock(width, hidden) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, BYTES, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def dense_of_size(budget: int, layers: int) -> DenseModel:
    """The widest dense model whose hidden layers can be at least as wide as the model, filled up to ``budget`` parameters."""
    best = None
    for width in range(32, 1025, 32):
        attention = 2 * BYTES * width + layers * (4 * width * width + 4 * width) + 2 * width
        hidden = (budget - attention) // (2 * width * layers)
        if hidden >= width or best is None:
            best = (width, max(1, hidden))
    return DenseModel(best[0], layers, best[1])


def standard_library() -> Tensor:
    """Every top-level module's source as bytes, in the order of names."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"\n".join(f.read_bytes() for f in files)), dtype=torch.uint8)


def batch(text: Tensor, count: int, context: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(text) - context - 1, (count, 1), generator=rng)
    tokens = text[starts + torch.arange(context + 1)].long()
    return tokens[:, :-1], tokens[:, 1:]


def loss_of(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """Nats a byte."""
    return functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


@torch.no_grad()
def held_out(model: nn.Module, text: Tensor, context: int) -> float:
    """Nats a byte over fixed windows of text that was not trained on."""
    tokens, targets = batch(text, 48, context, torch.Generator().manual_seed(1))
    return loss_of(model, tokens, targets).item()


def train(name: str, model: nn.Module, text: Tensor, test: Tensor, options: argparse.Namespace) -> list[tuple[int, float, float]]:
    """``(step, seconds of processor time, held-out loss)`` along the way."""
    rng = torch.Generator().manual_seed(options.seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=options.rate, betas=(0.9, 0.95), weight_decay=0.01)
    warm = max(1, options.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda s: min((s + 1) / warm, 1.0) * (1 - s / (options.steps + 1)))
    curve, spent = [], 0.0
    for step in range(options.steps + 1):
        if step % max(1, options.steps // 10) == 0:
            curve.append((step, spent, held_out(model, test, options.context)))
            print(f"{name:<8} step {step:>5}  {curve[-1][1]:6.1f} s  held-out loss {curve[-1][2]:.4f}", flush=True)
        clock = time.process_time()
        optimiser.zero_grad()
        loss_of(model, *batch(text, options.batch, options.context, rng)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        spent += time.process_time() - clock
    return curve


@torch.no_grad()
def sample(model: TilelliModel, prompt: str, count: int, seed: int) -> tuple[str, float]:
    """``prompt`` continued by ``count`` bytes at temperature 0.8, and bytes a second."""
    rng = torch.Generator().manual_seed(seed)
    logits, caches = model.prefill(torch.tensor([list(prompt.encode())]))
    found, clock = [], time.perf_counter()
    for _ in range(count):
        token = torch.multinomial((logits / 0.8).softmax(-1), 1, generator=rng)
        found.append(int(token))
        logits, caches = model.step(token, caches)
    return prompt + bytes(found).decode(errors="replace"), count / (time.perf_counter() - clock)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    numbers = {"steps": 600, "width": 192, "layers": 4, "context": 256, "batch": 8, "top-k": 8, "seed": 0, "bytes": 400}
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, help="torch's choice by default; on a busy machine 1 may be faster")
    parser.add_argument("--out", type=Path, help="folder to write the curves to")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    text = standard_library()
    text, test = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    tilelli = TilelliModel(options.width, options.layers, options.top_k)
    dense = dense_of_size(size(tilelli), max(1, options.layers // 2))
    models = {"Tilelli": tilelli, "dense": dense}
    sizes = {name: size(model) for name, model in models.items()}
    print(f"{len(text):,} bytes to train on; parameters: " + ", ".join(f"{name} {count:,}" for name, count in sizes.items()))
    curves = [train(name, model, text, test, options) for name, model in models.items()]
    print("\n step   Tilelli     dense")
    for (step, _, ours), (_, _, theirs) in zip(*curves, strict=True):
        print(f"{step:>5}  {ours:8.4f}  {theirs:8.4f}")
    print(f"seconds {curves[0][-1][1]:7.1f}  {curves[1][-1][1]:8.1f}\n")

    before = held_out(tilelli, test, options.context)
    pack_ternary(tilelli)
    packed = held_out(tilelli, test, options.context)
    print(f"packed to two bits a weight: held-out loss {packed:.4f}, {before:.4f} before")
    told, speed = sample(tilelli, "def read(self, ", options.bytes, options.seed)
    print(f"{speed:.0f} bytes a second by cached steps:\n\n{told}")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        settings = {n: getattr(options, n) for n in (n.replace("-", "_") for n in numbers)} | {"rate": options.rate}
        results = {
            "settings": settings,
            "parameters": sizes,
            "curves": dict(zip(sizes, curves, strict=True)),
            "packed": packed,
            "sample": told,
        }
        (options.out / "tilelli_characters.json").write_text(json.dumps(results, indent=1) + "\n")
        draw(results, options.out / "tilelli_characters.png")


def draw(results: dict, path: Path) -> None:
    try:
        import matplotlib
    except ModuleNotFoundError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), sharey=True)
    for name, curve in results["curves"].items():
        steps, seconds, losses = zip(*curve, strict=True)
        axes[0].plot(steps[1:], losses[1:], label=f"{name}, {results['parameters'][name]:,} parameters")
        axes[1].plot(seconds[1:], losses[1:])
    axes[0].set(xlabel="step", ylabel="held-out loss, nats a byte")
    axes[1].set(xlabel="seconds of processor time")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
