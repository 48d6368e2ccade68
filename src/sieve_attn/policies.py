"""A policy is a scorer, a selector and a forced pattern (and perhaps a far field). A preset is just such a line."""

from __future__ import annotations

import ast
import inspect
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from sieve_attn import expression, patterns, scores, selection
from sieve_attn.checks import error, positive_int, settled, share
from sieve_attn.patterns import Pattern, Sinks, Union, Window
from sieve_attn.scores import Bennett, Bound, Box, Euclidean, KeySketch, Scorer
from sieve_attn.selection import Certified as CertifiedSelector
from sieve_attn.selection import Mass, Selector, TargetSparsity, Threshold, TopK
from sieve_attn.types import Statistics


@dataclass(frozen=True)
class Policy:
    """How to choose. Without scorer and selector the pattern alone decides, and without a pattern attention is dense.

    ``block_size`` keys a block under tiles of ``query_tile`` queries; rank and mass selectors look at every
    ``query_stride``-th query of a tile. ``share_group``: the query heads of a KV head choose together. ``dense_above``: a tile
    that would keep more than this share turns dense, and the report says so (``Mass`` and ``Certified`` only). Below
    ``min_seq_length`` keys attention is dense, and the report says so. ``bound`` is what certifies; by default the scorer
    where it is a Bound, else 8-bit keys. ``repr`` is the policy's full text; :func:`parse` reads it back.
    """

    scorer: Scorer | None = None
    selector: Selector | None = None
    keep: Pattern | None = None
    block_size: int = 16
    query_tile: int = 64
    query_stride: int = 1
    share_group: bool = True
    dense_above: float = 1.0
    far_field: bool = False
    min_seq_length: int = 0
    bound: Bound | None = None

    def __post_init__(self):
        for f in fields(self):
            given = getattr(self, f.name)
            if _holds_numpy(given):
                object.__setattr__(self, f.name, _plain(given))
        # operators get a policy as this text, also of one that is made inside of what is compiled
        object.__setattr__(self, "text", _text(self))
        kinds = (("scorer", Scorer), ("selector", Selector), ("keep", Pattern), ("bound", Bound))
        for name, kind in kinds:
            given = getattr(self, name)
            if given is not None and not isinstance(given, kind):
                raise error(
                    name,
                    f"must be a {kind.__name__} or None",
                    repr(given),
                    f"see sieve_attn.{kind.__module__.split('.')[1]}",
                    TypeError,
                )
        if (self.scorer is None) != (self.selector is None):
            raise error(
                "scorer, selector", "must be given together", f"{self.scorer!r}, {self.selector!r}", "a selector needs scores"
            )
        if self.selector is not None and self.selector.needs_brackets and not isinstance(self.scorer, Bound):
            raise error(
                "scorer",
                f"must be a Bound for {type(self.selector).__name__}: heuristics prove nothing",
                repr(self.scorer),
                "use KeySketch(bits=8)",
            )
        positive_int("block_size", self.block_size, "try 16 or 64")
        positive_int("query_tile", self.query_tile, "try 64")
        positive_int("query_stride", self.query_stride, "use 1 to look at every query, 4 for every 4th")
        positive_int("min_seq_length", self.min_seq_length, "use 0 for no minimum", least=0)
        share("dense_above", self.dense_above, "use 1.0 to stay sparse always")
        if self.query_stride > self.query_tile:
            raise error("query_stride", f"must be at most query_tile ({self.query_tile})", self.query_stride, "try 4")
        if self.far_field and self.scorer is None:
            raise error("far_field", "needs a scorer and a selector", self.far_field, "add them, or leave the far field out")

    @property
    def chooses_blocks(self) -> bool:
        return self.selector is not None

    def takes_all(self, kv_len: int) -> bool:
        """Whether so few keys leave nothing to choose: every block is kept, unscored."""
        return self.selector is not None and not self.far_field and self.selector.takes_all(-(-kv_len // self.block_size))

    @cached_property
    def statistics(self) -> Statistics:
        """What the geometry must hold to select."""
        asked = Statistics()
        if self.scorer is not None:
            asked = self.scorer.proof_statistics if self.selector.needs_brackets else self.scorer.statistics
        return asked | FAR_FIELD_STATISTICS if self.far_field else asked

    @cached_property
    def certifier(self) -> Bound:
        """The bound that certifies what this policy drops."""
        if self.bound is not None:
            return self.bound
        return self.scorer.prover if isinstance(self.scorer, Bound) else KeySketch(bits=8)


def _holds_numpy(part: Any) -> bool:
    if isinstance(part, tuple):
        return any(_holds_numpy(p) for p in part)
    if is_dataclass(part):
        return any(_holds_numpy(getattr(part, f.name)) for f in fields(part))
    return isinstance(part, np.generic)


def _plain(part: Any) -> Any:
    """``part`` with Python's numbers in place of NumPy's: its text is read back by :func:`parse`."""
    if isinstance(part, tuple):
        return tuple(_plain(p) for p in part)
    if is_dataclass(part):
        return replace(part, **{f.name: _plain(getattr(part, f.name)) for f in fields(part)})
    return part.item() if isinstance(part, np.generic) else part


def _text(part: Any) -> str:
    """The repr of ``part``, written out since compilers cannot trace that of a dataclass."""
    if isinstance(part, tuple):
        return f"({', '.join(_text(p) for p in part)}{',' if len(part) == 1 else ''})"
    if is_dataclass(part):
        inside = ", ".join(f"{f.name}={_text(getattr(part, f.name))}" for f in fields(part))
        return f"{type(part).__name__}({inside})"
    return repr(settled(part) if isinstance(part, float) else part)


FAR_FIELD_BOUND = Bennett()
FAR_FIELD_STATISTICS = FAR_FIELD_BOUND.statistics | Statistics(value=True)


def Dense() -> Policy:
    """Every key that may be attended to."""
    return Policy()


def Aether(threshold: float = 0.15, block_size: int = 64) -> Policy:
    """AETHER's Euclidean gate: keep a block iff ``max over the tile of scale * (q.mu + ||q|| r) > threshold``.

    No key whose scaled logit exceeds the threshold is dropped. Softmax does not change when logits shift, so that is no
    statement about what the dropped keys weigh; for one use :func:`Certified`. Source: AETHER's xFormers form.
    """
    return Policy(Euclidean(), Threshold(threshold), block_size=block_size, query_tile=block_size)


def EventRadar(
    threshold: float = 0.15,
    block_size: int = 64,
    *,
    use_variance: bool = False,
    use_concentration: bool = False,
    target_sparsity: float | None = None,
    local_window: int = 4,
    sink_blocks: int = 0,
    recency_decay: float = 0.95,
    recency: str = "additive",
    min_seq_length: int = 0,
) -> Policy:
    """AETHER's Event Radar (a heuristic): windows and sinks are in blocks; ``target_sparsity`` replaces the threshold.

    Source: AETHER's TensorRT-LLM form; :func:`sieve_attn.aether.run_aether_sparse` is its gate for one query.
    """
    positive_int("local_window", local_window, "in blocks; use 0 for none", least=0)
    positive_int("sink_blocks", sink_blocks, "use 0 for none", least=0)
    selector = Threshold(threshold) if target_sparsity is None else TargetSparsity(target_sparsity)
    keep = _ends(sink_blocks * block_size, local_window * block_size)
    scorer = scores.EventRadar(use_variance, use_concentration, recency_decay, recency)
    return Policy(scorer, selector, keep, block_size=block_size, query_tile=block_size, min_seq_length=min_seq_length)


def Quest(blocks: int = 64, block_size: int = 16) -> Policy:
    """The ``blocks`` key blocks with the largest channel-wise (min/max) bound. Source: Quest (Tang et al., 2024)."""
    return Policy(Box(), TopK(blocks), block_size=block_size, query_stride=4)


def TopBlocks(k: int = 64, *, bits: int = 4, sinks: int = 16, window: int = 64, query_stride: int = 4) -> Policy:
    """The ``k`` blocks of 16 keys that matter most by a ``bits``-bit copy of the keys, plus sinks and a window (in tokens)."""
    positive_int("k", k, "keep at least one block")
    return Policy(KeySketch(bits, query_bits=8), TopK(k), _ends(sinks, window), query_stride=query_stride)


def Adaptive(
    mass: float = 0.99, *, bits: int = 4, sinks: int = 16, window: int = 64, query_stride: int = 1, dense_above: float = 1.0
) -> Policy:
    """The smallest set of blocks that is estimated to hold ``mass`` of every query's softmax: one knob.

    ``query_stride=4`` looks at every 4th query of a tile (and the last) only: cheaper, and the others are promised nothing.
    """
    return Policy(
        KeySketch(bits, query_bits=8), Mass(mass), _ends(sinks, window), query_stride=query_stride, dense_above=dense_above
    )


def Certified(error: float = 0.02, *, bits: int = 8, sinks: int = 16, window: int = 64, dense_above: float = 1.0) -> Policy:
    """Blocks are kept until at most ``error`` of every query's softmax mass is *proved* to be dropped."""
    return Policy(KeySketch(bits), CertifiedSelector(error), _ends(sinks, window), dense_above=dense_above)


def Windowed(sinks: int = 16, window: int = 1024) -> Policy:
    """The first ``sinks`` tokens and the last ``window`` tokens, exactly those: no scores at all.

    Source: StreamingLLM (Xiao et al., 2023), which keeps positions as they are in the cache here.
    """
    positive_int("window", window, "a query needs at least itself")
    return Policy(keep=_ends(sinks, window))


def _ends(sinks: int, window: int) -> Pattern | None:
    positive_int("sinks", sinks, "use 0 for none", least=0)
    positive_int("window", window, "use 0 for none", least=0)
    ends = ([Sinks(sinks)] if sinks else []) + ([Window(window)] if window else [])
    return None if not ends else ends[0] if len(ends) == 1 else ends[0] | ends[1]


PRESETS = {
    "dense": Dense,
    "aether": Aether,
    "event_radar": EventRadar,
    "quest": Quest,
    "top_blocks": TopBlocks,
    "adaptive": Adaptive,
    "certified": Certified,
    "windowed": Windowed,
}


def parse(text: str) -> Policy:
    """A policy from text: a preset such as ``top_blocks(k=32)`` or the ``repr`` of any policy. Nothing is evaluated."""
    if not isinstance(text, str):
        raise error("policy", "must be text to be read", type(text).__name__, "try 'adaptive(mass=0.99)'", TypeError)
    return _read(text)


@lru_cache(maxsize=256)
def _read(text: str) -> Policy:
    """Operators get the text of a policy at every call: it is read once."""
    try:
        tree = expression.read(text)
    except SyntaxError:
        raise error("policy", "must read like a call", repr(text), "try 'adaptive(mass=0.99)'") from None
    made = _construct(tree, text)
    if not isinstance(made, Policy):
        raise error("policy", "must name a policy", repr(text), f"one of {', '.join(PRESETS)}, with arguments in parentheses")
    return made


def _construct(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        arguments = [_construct(a, text) for a in node.args]
        if any(k.arg is None for k in node.keywords):
            raise error("policy", "may hold plain keywords only", repr(text), "write the arguments out")
        named = {k.arg: _construct(k.value, text) for k in node.keywords}
        return _made(node.func.id, arguments, named, text)
    if isinstance(node, ast.Name):
        constants = {"inf": float("inf"), "nan": float("nan")}
        return constants[node.id] if node.id in constants else _made(node.id, [], {}, text)
    if isinstance(node, ast.Tuple):
        return tuple(_construct(n, text) for n in node.elts)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_construct(node.operand, text)
    if isinstance(node, ast.Constant):
        return node.value
    raise error("policy", "may hold names, calls, numbers and tuples only", repr(text), "try 'adaptive(mass=0.99)'")


def _made(name: str, arguments: list, named: dict[str, Any], text: str) -> Any:
    maker = _maker(name)
    signature = inspect.signature(maker)
    try:
        signature.bind(*arguments, **named)
    except TypeError as why:
        known = ", ".join(signature.parameters) or "nothing"
        raise error("policy", f"must call {name} with what it takes ({known})", repr(text), f"mend: {why}", TypeError) from None
    return maker(*arguments, **named)


def _maker(name: str) -> Any:
    known = {**PRESETS, "Policy": Policy, "Union": Union}
    if name in known:
        return known[name]
    tables = (scores.TABLE, selection.TABLE, patterns.TABLE)
    # what other packages add is looked for last: asking who is installed takes long
    ways = (look for kind in ("own_class", "foreign_class") for look in (getattr(table, kind) for table in tables))
    found = next((cls for cls in (look(name) for look in ways) if cls is not None), None)
    if found is None:
        parts = sorted({"Policy", "Union", *(n for table in tables for n in table.class_names())})
        raise error("policy", f"must be made of known names: {', '.join([*PRESETS, *parts])}", repr(name), "check the spelling")
    return found
