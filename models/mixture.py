"""Training sequences: real source, plain or with retrieval facts and many questions woven in."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np

from sieve_attn.evaluation import tasks

BYTE_OFFSET = 3
EOS_ID = 1
END_OF_FILE = "\x04"
PLAIN_WEIGHT = 1.0
ANSWER_WEIGHT = 3.0

Piece = tuple[str, float]
"""Text and the loss weight of its bytes; random keys and numbers that no context predicts weigh nothing."""

Event = tuple[float, list[Piece]]
"""A relative position in the sequence and what appears there."""


@dataclass(frozen=True)
class Batch:
    """Input ids, next ids and the loss weights of the next ids, each (batch, context)."""

    ids: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


def encode(text: str) -> np.ndarray:
    """ByT5 ids of ASCII text; the end-of-file character becomes the end-of-sequence id."""
    codes = np.frombuffer(text.encode("ascii"), dtype=np.uint8).astype(np.int64)
    return np.where(codes == ord(END_OF_FILE), EOS_ID, codes + BYTE_OFFSET)


def training_text() -> str:
    """Every training file, separated by the end-of-file character."""
    return END_OF_FILE.join(tasks.read_source(path) for path in tasks.stdlib_files("train"))


def make_batch(rng: Random, text: str, sequences: int, context: int, woven_share: float) -> Batch:
    """Random sequences of ``context`` bytes, of which ``woven_share`` carry facts and questions."""
    size = context + 1
    ids = np.empty((sequences, size), dtype=np.int64)
    weights = np.empty((sequences, size), dtype=np.float32)
    for index in range(sequences):
        woven = rng.random() < woven_share
        row = _woven(rng, text, size) if woven else [(_window(rng, text, size), PLAIN_WEIGHT)]
        ids[index] = encode("".join(piece for piece, _ in row))[:size]
        weights[index] = np.repeat([weight for _, weight in row], [len(piece) for piece, _ in row])[:size]
    return Batch(ids[:, :-1], ids[:, 1:], weights[:, 1:])


def _window(rng: Random, text: str, size: int) -> str:
    start = rng.randrange(len(text) - size)
    return text[start : start + size]


def _woven(rng: Random, text: str, size: int) -> list[Piece]:
    """A window of source whose line ends carry facts and later questions about them, in task formats.

    Their share of the bytes is log-uniform: some sequences are dense, some hide a few facts in much source.
    """
    budget = int(size * 10 ** rng.uniform(-2.0, -0.2))
    families = [family for family in (_passkeys, _pairs, _chains) if rng.random() < 0.55] or [_pairs]
    events = [event for family in families for event in family(rng, budget // len(families))]
    events.sort(key=lambda event: event[0])
    room = size - sum(len(piece) for _, pieces in events for piece, _ in pieces)
    lines = _window(rng, text, max(room, 0)).splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines[-1] = lines[-1][:-1] + "\n"
    row: list[Piece] = []
    done = 0
    for position, pieces in events:
        upto = round(position * len(lines))
        row += [(line, PLAIN_WEIGHT) for line in lines[done:upto]]
        row += pieces
        done = upto
    return row + [(line, PLAIN_WEIGHT) for line in lines[done:]]


def _later(rng: Random, position: float) -> float:
    """A position after ``position``: anywhere in the rest, or close by in every third case."""
    return position + (1 - position) * rng.random() ** rng.choice((1, 1, 3))


def _answered(question: str, number: str, ending: str) -> list[Piece]:
    return [(question, 0.0), (number, ANSWER_WEIGHT), (ending, PLAIN_WEIGHT)]


def _passkeys(rng: Random, budget: int) -> list[Event]:
    """One pass key, asked up to three times."""
    number = tasks.random_number(rng)
    position = rng.random()
    events: list[Event] = [(position, [(tasks.passkey_fact(number), 0.0)])]
    for _ in range(min(3, 1 + budget // 100)):
        events.append((_later(rng, position), _answered(tasks.passkey_question(), number, ".\n")))
    return events


def _pairs(rng: Random, budget: int) -> list[Event]:
    """As many keys as the budget allows, each asked up to twice."""
    events: list[Event] = []
    for key in tasks.random_keys(rng, min(100, max(1, budget // 42))):
        number = tasks.random_number(rng)
        position = rng.random()
        events.append((position, [(tasks.pair_fact(key, number), 0.0)]))
        for _ in range(rng.choice((0, 1, 1, 2))):
            events.append((_later(rng, position), _answered(tasks.pair_question(key), number, "\n")))
    return events


def _chains(rng: Random, budget: int) -> list[Event]:
    """Chains of one to three assignments, each variable asked up to twice after its own assignment."""
    count = min(50, max(1, budget // 95))
    names = iter(tasks.random_keys(rng, 3 * count))
    events: list[Event] = []
    for _ in range(count):
        value = number = tasks.random_number(rng)
        position = rng.random()
        for _ in range(rng.choice((1, 2, 2, 3))):
            name = next(names)
            events.append((position, [(tasks.variable_fact(name, value), 0.0)]))
            for _ in range(rng.choice((0, 1, 1, 2))):
                events.append((_later(rng, position), _answered(tasks.variable_question(name), number, "\n")))
            value = name
            position = _later(rng, position)
    return events
