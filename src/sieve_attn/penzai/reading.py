"""What a ``pz.nn.Attention`` computes, read from its sublayers; what cannot be read is refused by name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from penzai import pz

from sieve_attn.checks import error

KEEP = "keep pz.nn.Attention there: select the layers to replace with .where(...)"


@dataclass(frozen=True)
class AttentionAxes:
    """Names of the axes that attention works on; every other axis is a batch axis.

    Queries have ``sequence``, ``common_heads``, ``query_heads`` and ``projection``; keys and values ``sequence``,
    ``common_heads`` and ``projection`` or ``value_projection``. Masks call the keys' sequence ``kv_sequence``.
    """

    sequence: str = "seq"
    kv_sequence: str = "kv_seq"
    common_heads: tuple[str, ...] = ()
    query_heads: tuple[str, ...] = ()
    projection: str = "projection"
    value_projection: str = "projection"

    @property
    def heads(self) -> tuple[str, ...]:
        """Query heads, those of a group side by side."""
        return (*self.common_heads, *self.query_heads)


@dataclass(frozen=True)
class CausalMask:
    """``query position >= key position >= 0``, and ``query position - key position < window`` where a window is given."""

    query_positions: str = "token_positions"
    kv_positions: str = "token_positions"
    window: int | None = None


@dataclass(frozen=True)
class ExplicitMask:
    """A boolean array from the side inputs, True where a query may attend."""

    input_name: str


@dataclass(frozen=True)
class Reading:
    """The meaning of ``query_key_to_attn`` and of the weighted sum: static, so that it may enter ``jit`` as it is."""

    axes: AttentionAxes
    scale: float
    softcap: float | None
    masks: tuple[CausalMask | ExplicitMask, ...]


def read(attention: pz.nn.Attention) -> Reading:
    """The reading of a ``pz.nn.Attention``. Raises ValueError that names the first sublayer it cannot understand."""
    scale, softcap, masks = 1.0, None, []
    first, *rest = flatten(attention.query_key_to_attn) or [None]
    if type(first) is not pz.nn.NamedEinsum:
        raise _unknown("query_key_to_attn", first, "must start with the pz.nn.NamedEinsum of queries and keys")
    weighted, _ = split_output(attention.attn_value_to_output)
    axes = _axes(_spec(first), _spec(weighted))
    if not rest or type(rest[-1]) is not pz.nn.Softmax or rest[-1].axes not in (axes.kv_sequence, (axes.kv_sequence,)):
        raise _unknown("query_key_to_attn", rest[-1] if rest else first, f"must end with pz.nn.Softmax({axes.kv_sequence!r})")
    for layer in rest[:-1]:
        if type(layer) is pz.nn.ConstantRescale and softcap is None and not masks:
            scale *= _number("ConstantRescale.by", layer.by)
        elif type(layer) is pz.nn.TanhSoftCap and softcap is None and not masks:
            softcap = _number("TanhSoftCap.soft_cap", layer.soft_cap)
        elif type(layer) is pz.nn.ApplyExplicitAttentionMask:
            masks.append(ExplicitMask(layer.mask_input_name))
        elif type(layer) in (pz.nn.ApplyCausalAttentionMask, pz.nn.ApplyCausalSlidingWindowAttentionMask):
            masks.append(_causal(layer, axes))
        else:
            raise _unknown(
                "query_key_to_attn",
                layer,
                "may hold ConstantRescale, then one TanhSoftCap, then attention masks between its NamedEinsum and its Softmax",
            )
    if not (math.isfinite(scale) and scale > 0):
        raise error("ConstantRescale.by", "must be a positive finite number", scale, KEEP)
    return Reading(axes, scale, softcap, tuple(masks))


def flatten(layer: Any) -> list[Any]:
    """The layers that run one after the other in ``layer``, without those that do nothing."""
    if type(layer) in (pz.nn.Sequential, pz.nn.CheckedSequential):
        return [one for sublayer in layer.sublayers for one in flatten(sublayer)]
    return [] if type(layer) in (pz.nn.Identity, pz.nn.DisabledDropout) else [layer]


def split_output(attn_value_to_output: Any) -> tuple[pz.nn.NamedEinsum, list[Any]]:
    """The weighted sum that ``attn_value_to_output`` starts with, and the layers after it."""
    first, *rest = flatten(attn_value_to_output) or [None]
    if type(first) is not pz.nn.NamedEinsum:
        raise _unknown("attn_value_to_output", first, "must start with the pz.nn.NamedEinsum of attention weights and values")
    return first, rest


def axes_of(attn_value_to_output: Any) -> AttentionAxes:
    """The axes as far as the weighted sum tells them: all of queries' heads count as query heads unless values have them, and
    queries and keys meet on an axis named like that of the values."""
    weighted, _ = split_output(attn_value_to_output)
    attn, value, _ = spec = _spec(weighted)
    shared = [i for i in attn.values() if i in value.values()]
    summed = [i for i in shared if i not in spec[2].values()]
    feature = [name for name, i in value.items() if i not in attn.values()]
    if len(summed) != 1 or len(feature) != 1:
        raise _einsum("attn_value_to_output", weighted)
    name_in_value = {i: name for name, i in value.items()}
    sequence = name_in_value[summed[0]]
    query = {name: i for name, i in attn.items() if i != summed[0]} | {feature[0]: "projection of queries"}
    key = {name: i for name, i in value.items() if name != feature[0]} | {feature[0]: "projection of queries"}
    if sequence not in attn:
        raise _einsum("attn_value_to_output", weighted)
    return _axes((query, key, attn), spec)


def _spec(einsum: pz.nn.NamedEinsum) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """Axis name to summation index of both inputs and of the output."""
    parts = [dict(p) if isinstance(p, dict) else {name: name for name in p} for p in (*einsum.input_axes, einsum.output_axes)]
    if len(parts) != 3:
        raise _einsum("query_key_to_attn, attn_value_to_output", einsum)
    return tuple(parts)


def _axes(logits: tuple, weighted: tuple) -> AttentionAxes:
    """Axis names from the two contractions: ``query key -> logits`` and ``weights value -> output``."""
    query, key, out = ({i: name for name, i in part.items()} for part in logits)
    met = [i for i in query if i in key and i not in out]
    common = [i for i in query if i in key and i in out]
    own = [i for i in query if i not in key and i in out]
    kv = [i for i in key if i not in query and i in out]
    described = f"{_text(logits)} and {_text(weighted)}"
    if len(met) != 1 or len(kv) != 1 or len(common) + len(own) + 1 != len(query) or len(common) + 2 != len(key):
        raise error("query_key_to_attn", "must contract one axis of queries and keys and keep all others", described, KEEP)
    sequence, kv_sequence, projection = key[kv[0]], out[kv[0]], query[met[0]]
    rows = [i for i in own if query[i] == sequence]
    renamed = [query[i] for i in (*common, *own) if query[i] != out[i]] + [
        query[i] for i in (*met, *common) if query[i] != key[i]
    ]
    if len(rows) != 1 or renamed or kv_sequence == sequence:
        raise error(
            "query_key_to_attn", "must name the axes of queries and keys alike, but for the keys' sequence", described, KEEP
        )
    heads = {query[i] for i in common}
    query_heads = tuple(query[i] for i in own if i != rows[0])
    attn, value, result = weighted
    summed, feature = attn.get(kv_sequence), [name for name, i in value.items() if i not in attn.values()]
    index = {name: i for name, i in attn.items() if name != kv_sequence}
    fits = (
        len(feature) == 1
        and set(attn) == {kv_sequence, sequence, *heads, *query_heads}
        and value == {sequence: summed, feature[0]: value[feature[0]]} | {name: index[name] for name in heads}
        and result == index | {feature[0]: value[feature[0]]}
    )
    if not fits:
        raise error("attn_value_to_output", f"must sum values over {kv_sequence!r} and keep the other axes", described, KEEP)
    return AttentionAxes(sequence, kv_sequence, tuple(query[i] for i in common), query_heads, projection, feature[0])


def _causal(layer: Any, axes: AttentionAxes) -> CausalMask:
    if (layer.seq_axis, layer.kv_seq_axis) != (axes.sequence, axes.kv_sequence):
        raise error(
            f"query_key_to_attn: {type(layer).__name__}",
            f"must mask the axes {axes.sequence!r} and {axes.kv_sequence!r}",
            f"{layer.seq_axis!r} and {layer.kv_seq_axis!r}",
            KEEP,
        )
    window = getattr(layer, "sliding_window_size", None)
    if window is not None:
        size = _number("sliding_window_size", window)
        if size != int(size) or size < 1:
            raise error("sliding_window_size", "must be a positive integer", size, KEEP)
        window = int(size)
    return CausalMask(layer.query_positions_input_name, layer.kv_positions_input_name, window)


def _number(name: str, value: Any) -> float:
    if isinstance(value, jax.core.Tracer):
        raise error(name, "must be a concrete number while layers are replaced", value, "replace them outside of jit and vmap")
    value = value.unwrap() if isinstance(value, pz.nx.NamedArrayBase) and not value.named_shape else value
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        raise error(name, "must be a number", type(value).__name__, KEEP) from None
    if array.ndim:
        raise error(name, "must be one number", f"an array of shape {array.shape}", KEEP)
    return float(array)


def _text(spec: tuple) -> str:
    return " -> ".join((", ".join(str(list(part)) for part in spec[:2]), str(list(spec[2]))))


def _einsum(where: str, einsum: pz.nn.NamedEinsum) -> Exception:
    return error(where, "must hold NamedEinsum layers of two inputs with one summed axis", _text(
        tuple(dict.fromkeys(p) for p in (*einsum.input_axes, einsum.output_axes))), KEEP)  # fmt: skip


def _unknown(where: str, layer: Any, rule: str) -> Exception:
    name = "nothing" if layer is None else f"{type(layer).__module__.partition('.')[0]} layer {type(layer).__name__}"
    return error(where, rule, name, KEEP)
