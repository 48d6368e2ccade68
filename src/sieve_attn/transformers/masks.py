"""What a forward pass may see, without an N x M mask: how many cache slots are filled, padding, window, packed sequences.

Transformers asks a mask function once a forward pass and hands its result to every attention layer. Ours returns a tensor of
one element that carries a :class:`Layout`: a tensor with four axes is passed on untouched by everything in between.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from sieve_attn.checks import error

_CARRIER = "sieve_layout"


@dataclass(frozen=True)
class Layout:
    """The last query sits on key ``seen - 1``; earlier ones before it. Everything else narrows what is causal already."""

    seen: int  # leading keys that hold something: a static cache is longer than what fills it
    window: int | None = None  # keys that many positions away or farther are hidden
    padding: Tensor | None = None  # [batch, seen] bool, True for real tokens; None if all are
    edges: Tensor | None = None  # [sequences + 1] where packed sequences begin and end
    given: Tensor | None = None  # the model's own attention_mask [batch, slots]

    def over(self, seen: int, batch: int) -> Layout:
        """The same for a cache that holds ``seen`` keys: some models count at a layer that keeps none."""
        return replace(self, seen=seen, padding=_padding(self.given, 0, seen, batch))


@torch.compiler.disable
def mask_function(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: Any = "cpu",
    **_: Any,
) -> Tensor:
    """A [1, 1, 1, 1] tensor that carries the :class:`Layout` of this forward pass.

    Raises ValueError for a mask that is neither causal nor causal with a sliding window or packed sequences.
    """
    # a static cache counts in a tensor and in place: read it before the layers move it on
    seen = int(q_offset) + q_length - int(kv_offset)
    pattern = _read_pattern(mask_function)
    carrier = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device)
    padding = _padding(attention_mask, int(kv_offset), seen, batch_size)
    setattr(carrier, _CARRIER, Layout(seen, pattern.get("window"), padding, _edges(pattern.get("packed")), attention_mask))
    return carrier


def carries(argument: Any) -> bool:
    return isinstance(argument, Tensor) and hasattr(argument, _CARRIER)


def read(attention_mask: Tensor | None, kv_len: int, sliding_window: int | None, carried: bool) -> tuple[Layout, dict[str, Any]]:
    """The layout that ``attention_mask`` carries, and the options of ``attention`` that say the rest.

    A mask of the user's own, [batch | 1, q_heads | 1, q_len, kv_len], boolean or additive, is honoured as it is. ``carried``:
    whether the module was given a layout. What a model makes of our one element is no mask and does not know causality, so it is
    refused.
    """
    if carried and not carries(attention_mask):
        raise error(
            "attention_mask",
            "must reach sparse attention as the model made it",
            "what the attention module rewrote" if attention_mask is not None else "None",
            "leave this model dense",
        )
    if attention_mask is None:
        return Layout(kv_len, sliding_window), {"causal": True}
    layout = getattr(attention_mask, _CARRIER, None)
    if layout is not None:
        return layout, {"causal": True}
    return Layout(kv_len), {"causal": False, **_own_mask(attention_mask)}


def _own_mask(mask: Tensor) -> dict[str, Tensor]:
    if mask.ndim != 4:
        raise error(
            "attention_mask",
            "must be [batch, kv_len], or [batch, 1, q_len, kv_len] complete with causality",
            f"shape {tuple(mask.shape)}",
            "pass the padding mask alone",
        )
    if mask.dtype == torch.bool:
        return {"mask": mask}
    if not mask.dtype.is_floating_point:
        raise error(
            "attention_mask", "with four axes must be boolean or additive (floating)", f"dtype {mask.dtype}", "cast it to bool"
        )
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    if not (mask.masked_fill(hidden, 0.0) != 0).any():
        return {"mask": ~hidden}
    return {"bias": mask.masked_fill(hidden, -torch.inf)}


def _padding(attention_mask: Tensor | None, kv_offset: int, seen: int, batch: int) -> Tensor | None:
    if attention_mask is None:
        return None
    real = attention_mask[:, kv_offset : kv_offset + seen].to(torch.bool)
    if real.shape[1] < seen:
        real = torch.nn.functional.pad(real, (0, seen - real.shape[1]))
    return None if bool(real.all()) else real.expand(batch, seen)


def _edges(packed: Tensor | None) -> Tensor | None:
    """``cu_seqlens`` from the sequence number of every token."""
    if packed is None:
        return None
    if packed.shape[0] != 1:
        raise error(
            "position_ids",
            "may pack sequences in a batch of one only",
            f"batch {packed.shape[0]}",
            "pack them along one row, or pass an attention_mask",
        )
    starts = torch.nonzero(packed[0].diff(prepend=packed[0, :1] - 1))[:, 0]
    return torch.cat([starts, starts.new_tensor([packed.shape[1]])])


def _read_pattern(function: Callable) -> dict[str, Any]:
    """What a mask function of transformers says: ``causal``, ``window``, ``packed``.

    They are closures without a description; their parts have names, and an unknown one is refused, never guessed.
    """
    found = _parts(function)
    if "causal" not in found:
        raise error("attention mask", "must be causal", _name(function), "sparsify a decoder-only model")
    return found


def _parts(function: Callable) -> dict[str, Any]:
    name = _name(function)
    if name == "causal_mask_function":
        return {"causal": True}
    inside = inspect.getclosurevars(function).nonlocals if inspect.isfunction(function) else {}
    if name == "and_masks":
        return {k: v for part in inside["mask_functions"] for k, v in _parts(part).items()}
    if name == "sliding_window_overlay":
        return {"window": int(inside["sliding_window"])}
    if name == "packed_sequence_mask_function":
        return {"packed": inside["packed_sequence_mask"]}
    if name == "remap_positions_for_packed_sequence":
        # positions rise by one inside of a sequence, so distances are those of the indices
        return _parts(inside["mask_function"])
    raise error(
        "attention mask",
        "must be causal, perhaps with a sliding window or packed sequences",
        name,
        "leave this model dense, or sparsify its text model alone",
    )


def _name(function: Any) -> str:
    """``and_masks`` for ``and_masks.<locals>.and_mask``."""
    return getattr(function, "__qualname__", type(function).__name__).partition(".")[0]
