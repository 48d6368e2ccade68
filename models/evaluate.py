"""Held-out bits per byte and retrieval accuracy of an exported model with dense attention.

python models/evaluate.py                      # the embedded model, all lengths
python models/evaluate.py --lengths 1024 2048 --examples 50 --json result.json
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from mixture import encode
from torch import Tensor

from sieve_attn.evaluation import tasks

EMBEDDED = Path(__file__).resolve().parents[1] / "src" / "sieve_attn" / "llm" / "embedded"
CONTEXTS = (1024, 2048, 8192)
LENGTHS = (1024, 2048, 4096, 8192, 16384)
TOKENS_AT_ONCE = 16384

Logits = Callable[[Tensor], Tensor]
"""Token ids (batch, length) to logits (batch, length, vocabulary)."""


@torch.inference_mode()
def bits_per_byte(logits: Logits, text: str, context: int, windows: int) -> float:
    """Mean over ``windows`` windows of ``context`` bytes, spread over ``text``, without each first byte."""
    starts = [index * (len(text) - context) // max(1, windows - 1) for index in range(windows)]
    rows = torch.stack([torch.from_numpy(encode(text[start : start + context])) for start in starts])
    nats = 0.0
    for ids in rows.split(max(1, TOKENS_AT_ONCE // context)):
        predictions = logits(ids)[:, :-1].float().flatten(0, 1)
        nats += F.cross_entropy(predictions, ids[:, 1:].flatten(), reduction="sum").item()
    return nats / (windows * (context - 1)) / math.log(2)


@torch.inference_mode()
def retrieval_accuracy(logits: Logits, examples: list[tasks.Example]) -> float:
    """Share of examples, all of one length, whose whole answer greedy decoding reproduces.

    Greedy decoding writes the answer exactly if each answer byte is the most likely one after the prompt and
    the answer's earlier bytes, so one pass over prompt and answer decides it.
    """
    rows = torch.stack([torch.from_numpy(encode(example.prompt + example.answer)) for example in examples])
    digits = len(examples[0].answer)
    correct = 0
    for ids in rows.split(max(1, TOKENS_AT_ONCE // rows.shape[1])):
        guesses = logits(ids)[:, -digits - 1 : -1].argmax(-1)
        correct += int((guesses == ids[:, -digits:]).all(-1).sum())
    return correct / len(examples)


def make_examples(task: str, length: int, filler: str, count: int, seed: int) -> list[tasks.Example]:
    """``count`` examples; the same arguments give the same examples."""
    rng = Random(f"{task}-{length}-{seed}")
    return [tasks.TASKS[task](rng, length, filler) for _ in range(count)]


def hugging_face_logits(folder: Path) -> Logits:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    return lambda ids: model(ids, use_cache=False).logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=EMBEDDED, help="Hugging Face folder, default embedded")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="prompt lengths in bytes")
    parser.add_argument("--contexts", type=int, nargs="*", default=CONTEXTS, help="windows for bits per byte")
    parser.add_argument("--tasks", nargs="+", default=list(tasks.TASKS), choices=list(tasks.TASKS))
    parser.add_argument("--examples", type=int, default=100, help="examples per task and length")
    parser.add_argument("--text-bytes", type=int, default=262_144, help="held-out bytes per density figure")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()

    logits = hugging_face_logits(arguments.model)
    text = tasks.filler_text("heldout")
    result: dict[str, object] = {"examples": arguments.examples, "seed": arguments.seed}
    density: dict[int, float] = {}
    result["bits_per_byte"] = density
    for context in arguments.contexts:
        density[context] = bits_per_byte(logits, text, context, max(1, arguments.text_bytes // context))
        print(f"bits per byte at {context:>6}: {density[context]:.3f}", flush=True)

    accuracy: dict[str, dict[int, float]] = {}
    result["accuracy"] = accuracy
    print(f"{'task':<16}" + "".join(f"{length:>8}" for length in arguments.lengths))
    for task in arguments.tasks:
        print(f"{task:<16}", end="", flush=True)
        accuracy[task] = {}
        for length in arguments.lengths:
            examples = make_examples(task, length, text, arguments.examples, arguments.seed)
            accuracy[task][length] = retrieval_accuracy(logits, examples)
            print(f"{accuracy[task][length]:>8.1%}", end="", flush=True)
        print()
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
