"""Synthetic retrieval tasks woven into real Python source.

Every generator takes a seeded :class:`random.Random`, a prompt length in bytes and filler text, and returns
an :class:`Example` whose prompt ends right where the answer must follow. The embedded model was trained on
the same line formats over other filler; see :data:`HELD_OUT` for the files that training never reads.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from string import ascii_lowercase

HELD_OUT = (
    "argparse.py",
    "asyncio/base_events.py",
    "calendar.py",
    "configparser.py",
    "csv.py",
    "difflib.py",
    "email/header.py",
    "fractions.py",
    "ftplib.py",
    "gzip.py",
    "heapq.py",
    "http/client.py",
    "json/decoder.py",
    "logging/handlers.py",
    "plistlib.py",
    "random.py",
    "shutil.py",
    "statistics.py",
    "textwrap.py",
    "tomllib/_parser.py",
)
"""Standard library modules kept out of training, as paths below the library's folder."""

ANSWER_DIGITS = 5
KEY_LETTERS = 4
MIN_LENGTH = 512

_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
_SKIPPED_PREFIXES = ("_sysconfigdata", "encodings/cp", "encodings/iso8859", "encodings/mac_", "config-")


@dataclass(frozen=True)
class Example:
    """One retrieval question: greedy decoding after ``prompt`` should begin with ``answer``."""

    task: str
    prompt: str
    answer: str


Generator = Callable[[Random, int, str], Example]


def stdlib_files(split: str) -> list[Path]:
    """Sorted paths of the running interpreter's standard library for ``"train"`` or ``"heldout"``.

    Tests, generated code tables and build configuration belong to neither split.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    if split == "heldout":
        return [path for name in HELD_OUT if (path := root / name).is_file()]
    if split == "train":
        return [path for path in sorted(root.rglob("*.py")) if _is_training_file(path.relative_to(root))]
    raise ValueError(f"split must be 'train' or 'heldout', got {split!r}; pass one of these two names")


def _is_training_file(relative: Path) -> bool:
    name = relative.as_posix()
    return name not in HELD_OUT and not name.startswith(_SKIPPED_PREFIXES) and _SKIPPED_FOLDERS.isdisjoint(relative.parts)


def read_source(path: Path) -> str:
    """The file's text as ASCII with ``\\n`` line ends; other characters become ``?``."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return text.encode("ascii", errors="replace").decode("ascii")


def filler_text(split: str) -> str:
    """All files of a split, one after the other."""
    return "\n".join(read_source(path) for path in stdlib_files(split))


def random_number(rng: Random) -> str:
    """A five-digit answer without a leading zero."""
    return str(rng.randrange(10 ** (ANSWER_DIGITS - 1), 10**ANSWER_DIGITS))


def random_keys(rng: Random, count: int) -> list[str]:
    """``count`` different four-letter names."""
    keys: dict[str, None] = {}
    while len(keys) < count:
        keys["".join(rng.choices(ascii_lowercase, k=KEY_LETTERS))] = None
    return list(keys)


def passkey_fact(number: str) -> str:
    return f"# The pass key is {number}. Remember it.\n"


def passkey_question() -> str:
    return "# What is the pass key? The pass key is "


def pair_fact(key: str, number: str) -> str:
    return f"# note {key}={number}\n"


def pair_question(key: str) -> str:
    return f"# recall {key}="


def variable_fact(name: str, value: str) -> str:
    """An assignment of a number or of another variable's name."""
    return f"# let {name}={value}\n"


def variable_question(name: str) -> str:
    return f"# value {name}="


def passkey(rng: Random, length: int, filler: str) -> Example:
    """One sentence names a five-digit pass key anywhere in the source; the prompt ends by asking for it."""
    number = random_number(rng)
    prompt = _weave(rng, length, filler, [passkey_fact(number)], passkey_question())
    return Example("passkey", prompt, number)


def key_value(rng: Random, length: int, filler: str, pairs: int = 4) -> Example:
    """``pairs`` different keys get five-digit values anywhere in the source; one of them is asked for."""
    _require_at_least("pairs", pairs, 1)
    keys = random_keys(rng, pairs)
    numbers = [random_number(rng) for _ in keys]
    asked = rng.randrange(pairs)
    facts = [pair_fact(key, number) for key, number in zip(keys, numbers, strict=True)]
    prompt = _weave(rng, length, filler, facts, pair_question(keys[asked]))
    return Example("key_value", prompt, numbers[asked])


def variable_chain(rng: Random, length: int, filler: str, hops: int = 2, chains: int = 2) -> Example:
    """``chains`` chains of ``hops`` assignments; the last variable of one chain is asked for.

    With two hops a chain reads ``a=48213`` and, further on, ``b=a``: the answer to ``b`` takes two look-ups.
    """
    _require_at_least("hops", hops, 1)
    _require_at_least("chains", chains, 1)
    names = random_keys(rng, hops * chains)
    numbers = [random_number(rng) for _ in range(chains)]
    links = []
    for index, number in enumerate(numbers):
        chain = names[index * hops : (index + 1) * hops]
        values = [number, *chain[:-1]]
        links.append([variable_fact(name, value) for name, value in zip(chain, values, strict=True)])
    facts = _interleave(rng, links)
    asked = rng.randrange(chains)
    question = variable_question(names[asked * hops + hops - 1])
    prompt = _weave(rng, length, filler, facts, question)
    return Example("variable_chain", prompt, numbers[asked])


TASKS: dict[str, Generator] = {"passkey": passkey, "key_value": key_value, "variable_chain": variable_chain}
"""Task name to its generator with default difficulty."""


def _interleave(rng: Random, sequences: Sequence[Sequence[str]]) -> list[str]:
    """A random merge that keeps the order inside each sequence."""
    owners = [index for index, sequence in enumerate(sequences) for _ in sequence]
    rng.shuffle(owners)
    iterators = [iter(sequence) for sequence in sequences]
    return [next(iterators[owner]) for owner in owners]


def _weave(rng: Random, length: int, filler: str, facts: Sequence[str], question: str) -> str:
    """Exactly ``length`` bytes: filler with the facts, in order, at random line ends, then the question.

    The filler's first line loses its beginning where needed to meet the length.
    """
    _require_at_least("length", length, MIN_LENGTH)
    if not filler.isascii():
        raise ValueError(f"filler must be ASCII, got {_first_foreign(filler)!r}; pass filler_text(split)")
    room = length - len(question) - sum(map(len, facts))
    if room < length // 4:
        raise ValueError(
            f"length must leave a quarter of the prompt for filler, got {length} for {len(facts)} facts; "
            "ask for a longer prompt or fewer facts"
        )
    end = _random_line_end(rng, filler, room)
    lines = filler[end - room : end].splitlines(keepends=True)
    slots = sorted(rng.randrange(1, len(lines) + 1) for _ in facts)
    for slot, fact in reversed(list(zip(slots, facts, strict=True))):
        lines.insert(slot, fact)
    return "".join(lines) + question


def _random_line_end(rng: Random, filler: str, room: int) -> int:
    """A random position right after a newline with at least ``room`` bytes before it."""
    last = filler.rfind("\n") + 1
    if last < room:
        raise ValueError(
            f"filler must hold at least {room} bytes up to its last line end, got {last}; "
            "pass a longer text or ask for a shorter prompt"
        )
    return filler.find("\n", rng.randint(room - 1, last - 1)) + 1


def _first_foreign(text: str) -> str:
    return next(character for character in text if not character.isascii())


def _require_at_least(name: str, value: int, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} must be an integer, at least {minimum}, got {value!r}; pass such a number")
