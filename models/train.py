"""Trains the embedded byte-level Llama on the CPU and exports it as a Hugging Face folder.

    python models/train.py --minutes 110
    python models/train.py --minutes 110 --resume
    python models/train.py --minutes 30 --init-from src/sieve_attn/llm/embedded

The schedule follows the elapsed share of ``--minutes``: context length grows through PHASES and the learning
rate falls over the last part.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from evaluate import EMBEDDED, bits_per_byte, make_examples, retrieval_accuracy
from llama import Llama, Shape
from mixture import ANSWER_WEIGHT, PLAIN_WEIGHT, make_batch, training_text
from safetensors.torch import load_file, save_file
from torch import Tensor

from sieve_attn.evaluation import tasks

WARM_UP_STEPS = 150
DECAY_FROM = 0.72
FINAL_RATE = 0.04
TOKENS_PER_STEP = 8192
LOG_EVERY = 20


@dataclass(frozen=True)
class Phase:
    """Until ``end`` of the run: contexts drawn with these weights, and the share of sequences with facts."""

    end: float
    contexts: dict[int, float]
    woven_share: float


PHASES = (
    Phase(0.10, {512: 1.0}, 0.55),
    Phase(0.28, {1024: 0.85, 512: 0.15}, 0.5),
    Phase(0.82, {2048: 0.6, 1024: 0.2, 4096: 0.2}, 0.5),
    Phase(0.90, {2048: 0.5, 4096: 0.1, 8192: 0.32, 16384: 0.08}, 0.5),
    Phase(1.01, {2048: 0.3, 8192: 0.45, 16384: 0.25}, 0.6),
)


@dataclass
class Progress:
    """What a resumed run continues from, besides weights and optimizer states."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


def make_optimizers(model: Llama, muon_rate: float, adam_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed_tokens" not in name]
    others = [p for name, p in named if p.ndim == 1 or "embed_tokens" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=muon_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=adam_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_rate"] = group["lr"]
    return optimizers


def rate_factor(step: int, elapsed: float) -> float:
    """Warm-up by steps, then constant, then linear decay over the last share of the run."""
    decay = min(1.0, (1.0 - elapsed) / (1.0 - DECAY_FROM))
    return min(1.0, (step + 1) / WARM_UP_STEPS) * max(FINAL_RATE, decay)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Runs ``write(temporary path)`` and renames the result to ``path``: readers never see half a file."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    temporary.chmod(0o644)
    os.replace(temporary, path)


def export(model: Llama, folder: Path) -> None:
    """Writes a folder for ``AutoModelForCausalLM`` and ``AutoTokenizer``, weights in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = model.shape
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.feed_forward,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "dtype": "bfloat16",
    }
    generation = {"do_sample": False, "eos_token_id": 1, "pad_token_id": 0}
    tokenizer = {
        "tokenizer_class": "ByT5Tokenizer",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "extra_ids": 125,
        "model_max_length": shape.max_positions,
        "clean_up_tokenization_spaces": False,
    }
    contents = {"config": config, "generation_config": generation, "tokenizer_config": tokenizer}
    for name, content in contents.items():
        text = json.dumps(content, indent=2) + "\n"
        replace_file(folder / f"{name}.json", lambda path, text=text: path.write_text(text, encoding="utf-8"))
    weights = {name: tensor.bfloat16().contiguous() for name, tensor in model.state_dict().items()}
    metadata = {"format": "pt"}
    replace_file(folder / "model.safetensors", lambda path: save_file(weights, path, metadata=metadata))


def load_exported(model: Llama, folder: Path) -> None:
    model.load_state_dict({name: t.float() for name, t in load_file(folder / "model.safetensors").items()})


def save_checkpoint(folder: Path, model: Llama, optimizers: list[torch.optim.Optimizer], progress: Progress, rng: Random) -> None:
    state = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "progress": vars(progress),
        "rng": rng.getstate(),
    }
    replace_file(folder / "latest.pt", lambda path: torch.save(state, path))


def load_checkpoint(folder: Path, model: Llama, optimizers: list[torch.optim.Optimizer], rng: Random) -> Progress:
    state = torch.load(folder / "latest.pt", weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        peaks = [group["peak_rate"] for group in optimizer.param_groups]
        optimizer.load_state_dict(saved)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["peak_rate"] = peak
    version, numbers, gauss = state["rng"]
    rng.setstate((version, tuple(numbers), gauss))
    return Progress(**state["progress"])


def quick_evaluation(model: Llama, text: str) -> str:
    """A small held-out measurement for the log."""
    parts = [f"bpb@1024 {bits_per_byte(model, text, 1024, 48):.3f}"]
    for length in (1024, 2048):
        for task in tasks.TASKS:
            accuracy = retrieval_accuracy(model, make_examples(task, length, text, 32, seed=1))
            parts.append(f"{task}@{length} {accuracy:.0%}")
    return "evaluation: " + ", ".join(parts)


class Averages:
    """Mean losses on plain text and on answers since the last report."""

    def __init__(self) -> None:
        self.sums = torch.zeros(2)
        self.counts = torch.zeros(2)

    def add(self, losses: Tensor, weights: Tensor) -> None:
        for index, weight in enumerate((PLAIN_WEIGHT, ANSWER_WEIGHT)):
            chosen = weights.flatten() == weight
            self.sums[index] += losses[chosen].sum()
            self.counts[index] += chosen.sum()

    def report(self) -> str:
        plain, answers = (self.sums / self.counts.clamp(min=1)).tolist()
        self.__init__()
        return f"plain {plain / math.log(2):.3f} bits, answers {answers:.3f} nats"


def train(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    rng = Random(arguments.seed)
    model = Llama(Shape())
    optimizers = make_optimizers(model, arguments.muon_rate, arguments.adam_rate)
    folder: Path = arguments.checkpoints
    folder.mkdir(parents=True, exist_ok=True)
    progress = Progress()
    if arguments.resume:
        progress = load_checkpoint(folder, model, optimizers, rng)
    elif arguments.init_from:
        load_exported(model, arguments.init_from)
    text, held_out = training_text(), tasks.filler_text("heldout")
    loss_of = torch.compile(model.loss, dynamic=False)
    budget = arguments.minutes * 60
    origin = time.monotonic() - progress.seconds
    saved = evaluated = exported = progress.seconds
    reported, tokens_reported = progress.seconds, progress.tokens
    averages = Averages()

    with open(folder / "train.log", "a", encoding="utf-8") as log_file:

        def log(message: str) -> None:
            print(message, file=log_file, flush=True)

        parameters = sum(parameter.numel() for parameter in model.parameters())
        log(f"start: {parameters} parameters, {len(text)} bytes, {vars(arguments)}")
        while progress.seconds < budget:
            elapsed = progress.seconds / budget
            phase = next(phase for phase in PHASES if elapsed < phase.end)
            context = rng.choices(list(phase.contexts), list(phase.contexts.values()))[0]
            batch = make_batch(rng, text, max(1, TOKENS_PER_STEP // context), context, phase.woven_share)
            weights = torch.from_numpy(batch.weights)
            loss, losses = loss_of(torch.from_numpy(batch.ids), torch.from_numpy(batch.targets), weights)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            factor = rate_factor(progress.step, elapsed)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak_rate"] * factor
                optimizer.step()
                optimizer.zero_grad()
            averages.add(losses, weights)
            progress.step += 1
            progress.tokens += batch.ids.size
            progress.seconds = time.monotonic() - origin

            if progress.step % LOG_EVERY == 0:
                speed = (progress.tokens - tokens_reported) / (progress.seconds - reported)
                reported, tokens_reported = progress.seconds, progress.tokens
                log(
                    f"step {progress.step}, {progress.seconds / 60:.1f} min, "
                    f"{progress.tokens / 1e6:.2f} M tokens, {averages.report()}, "
                    f"rate x{factor:.2f}, {speed:.0f} tokens/s"
                )
            if progress.seconds - saved > 300:
                save_checkpoint(folder, model, optimizers, progress, rng)
                saved = progress.seconds
            if progress.seconds - evaluated > 60 * arguments.evaluate_every:
                log(quick_evaluation(model, held_out))
                evaluated = progress.seconds
            if progress.seconds - exported > 60 * arguments.export_every:
                export(model, arguments.output)
                exported = progress.seconds
        save_checkpoint(folder, model, optimizers, progress, rng)
        export(model, arguments.output)
        log(quick_evaluation(model, held_out))
        log(f"done: {progress.step} steps, {progress.tokens} tokens, {progress.seconds / 60:.1f} min")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=110, help="whole run, resumed parts included")
    parser.add_argument("--resume", action="store_true", help="continue from the latest checkpoint")
    parser.add_argument("--init-from", type=Path, help="start from the weights of this exported folder")
    parser.add_argument("--output", type=Path, default=EMBEDDED, help="folder of the export")
    parser.add_argument("--checkpoints", type=Path, default=Path(__file__).parent / "checkpoints")
    parser.add_argument("--export-every", type=float, default=20, help="minutes between exports")
    parser.add_argument("--evaluate-every", type=float, default=10, help="minutes between small evaluations")
    parser.add_argument("--muon-rate", type=float, default=4e-3)
    parser.add_argument("--adam-rate", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
