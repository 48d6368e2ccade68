"""What a pattern is: a set of keys that follows from positions alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import reduce
from operator import or_
from typing import Any

import numpy as np

from sieve_attn.patterns.reach import Reach
from sieve_attn.types import Selection

Array = Any

_CHUNK = 1 << 24  # entries of rows x keys that counting holds at a time
_EXACT = (int, float, str, bool, type(None))  # types that `repr` writes in full: arrays are abbreviated


class Pattern:
    """Keys chosen by position. ``a | b`` keeps what either keeps."""

    def keeps(self, position: Array, key: Array) -> Array:
        """Whether the query at ``position`` keeps the key at index ``key``; arrays that broadcast."""
        raise TypeError(f"{type(self).__name__} must define `keeps`")

    def selection(self, q_len: int, kv_len: int, *, causal: bool = True) -> Selection:
        """The pattern as a selection of single keys; queries are the last ``q_len`` of ``kv_len`` positions."""
        raise TypeError(f"{type(self).__name__} must define `selection`")

    def reach(self, limit: int) -> Reach | None:
        """The pattern as first tokens and offsets of at most ``limit``; None where anything else decides what is kept."""
        return None

    def to_dense(self, q_len: int, kv_len: int | None = None) -> np.ndarray:
        """[q_len, kv_len] bool: what each query keeps of the keys up to its own position. For tests and pictures."""
        kv_len = q_len if kv_len is None else kv_len
        return np.concatenate([kept for kept, _ in self._rows(q_len, kv_len)]) if q_len else np.zeros((0, kv_len), bool)

    def density(self, q_len: int, kv_len: int | None = None) -> float:
        """Kept over visible (query, key) pairs under causality; 1.0 when nothing is visible. Holds no array of q_len x kv_len."""
        kv_len = q_len if kv_len is None else kv_len
        reach = self.reach(max(kv_len - 1, 0))
        if reach is not None:
            return reach.density(q_len, kv_len)
        counts = [(int(kept.sum()), int(seen.sum())) for kept, seen in self._rows(q_len, kv_len)]
        visible = sum(seen for _, seen in counts)
        return sum(kept for kept, _ in counts) / visible if visible else 1.0

    def plot(self, length: int = 128, *, ax: Any = None) -> Any:
        """Draws ``to_dense(length)`` on matplotlib axes (new ones by default) and returns them."""
        try:
            from matplotlib import pyplot
        except ModuleNotFoundError as missing:
            remedy = "install it with `pip install 'sieve-attn[viz]'`"
            raise ModuleNotFoundError(
                f"`plot` needs {missing.name}, which is not installed; {remedy}", name=missing.name
            ) from None
        ax = pyplot.subplots()[1] if ax is None else ax
        ax.imshow(self.to_dense(length), cmap="Greys", interpolation="nearest")
        ax.set_xlabel("key")
        ax.set_ylabel("query")
        ax.set_title(f"{self!r}\n{self.density(length):.1%} of the causal pairs", fontsize=9)
        return ax

    def _rows(self, q_len: int, kv_len: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """``(kept, visible)`` of runs of queries."""
        key = np.arange(kv_len)[None, :]
        step = max(1, _CHUNK // max(kv_len, 1))
        for start in range(0, q_len, step):
            position = np.arange(start, min(q_len, start + step))[:, None] + (kv_len - q_len)
            seen = key <= position
            yield np.broadcast_to(self.keeps(position, key), seen.shape) & seen, seen

    def __or__(self, other: Pattern) -> Pattern:
        return Union((*members(self), *members(other)))


def members(pattern: Pattern) -> tuple[Pattern, ...]:
    return pattern.patterns if isinstance(pattern, Union) else (pattern,)


def written(pattern: Pattern) -> str:
    """A text that no two patterns share while both are held, in words that the compiler can follow: what they are told apart by.

    It is the ``repr`` of a dataclass of plain values. Others keep things that no text shows, as subclasses do of a dataclass
    whose fields they inherit: they go by identity. Classes of other people's are told apart by more than a name, which two of
    them may share and a notebook defines again and again.
    """
    kind = type(pattern)
    if kind is Union:
        parts = [written(part) for part in pattern.patterns]
        return parts[0] if len(parts) == 1 else f"Union(({', '.join(parts)}))"
    name = kind.__name__ if kind.__module__.startswith("sieve_attn.") else f"{kind.__name__}@{id(kind)}"
    if "__dataclass_fields__" in kind.__dict__:
        names = [f.name for f in fields(pattern)]
        # what a dataclass takes and keeps nowhere, or elsewhere, is a field that `fields` does not count
        if len(names) == len(kind.__dataclass_fields__) and all(_exact(getattr(pattern, n)) for n in names):
            return f"{name}({', '.join(f'{n}={getattr(pattern, n)!r}' for n in names)})"
    return f"{name}#{id(pattern)}"


def _exact(value: Any) -> bool:
    return type(value) in _EXACT or (type(value) is tuple and all(type(v) in _EXACT for v in value))


class Known:
    """A pattern as the key of a cache: what its class calls equal may keep other keys, and not every class can be hashed."""

    __slots__ = ("pattern", "text")

    def __init__(self, pattern: Pattern):
        self.pattern, self.text = pattern, written(pattern)

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Known) and self.text == other.text


@dataclass(frozen=True)
class Union(Pattern):
    """What any of several patterns keeps."""

    patterns: tuple[Pattern, ...]

    def keeps(self, position: Array, key: Array) -> Array:
        kept = self.patterns[0].keeps(position, key)
        for pattern in self.patterns[1:]:
            kept = kept | pattern.keeps(position, key)
        return kept

    def reach(self, limit: int) -> Reach | None:
        found = [pattern.reach(limit) for pattern in self.patterns]
        return None if any(one is None for one in found) else reduce(or_, found)

    def selection(self, q_len: int, kv_len: int, *, causal: bool = True) -> Selection:
        chosen = self.patterns[0].selection(q_len, kv_len, causal=causal)
        for pattern in self.patterns[1:]:
            chosen = chosen | pattern.selection(q_len, kv_len, causal=causal)
        return chosen
