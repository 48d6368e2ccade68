"""The attention function that transformers calls, and what each attention module remembers for it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from sieve_attn import dispatch, pipeline
from sieve_attn.checks import error
from sieve_attn.geometry import Geometry
from sieve_attn.policies import Policy
from sieve_attn.transformers import masks
from sieve_attn.transformers.cache import adopt, fills, why_recomputed
from sieve_attn.transformers.records import Capture
from sieve_attn.transformers.reports import Counters, LayerReport
from sieve_attn.types import Call, Report

NAME = "sieve"  # under which transformers knows both functions
STATE = "_sieve_layer"  # where an attention module keeps its LayerState
DENSE = Policy()

# what models pass along that says nothing about which key weighs what
_ASIDE = frozenset((
    "cache_position", "num_items_in_batch", "output_hidden_states", "output_router_logits", "position_embeddings", "position_ids",
    "return_dict", "use_cache",
))  # fmt: skip


@dataclass
class Setting:
    """What all layers of a model share."""

    policy: Policy
    backend: str
    captures: list[Capture] = field(default_factory=list)


class LayerState:
    """One attention module: its cache layer while a call is under way, and its counters."""

    def __init__(self, layer: int, setting: Setting):
        self.layer = layer
        self.setting = setting
        self.windowed: int | None = None
        self.reset()

    def reset(self) -> None:
        self.counters = Counters()
        self._cache_layer: Any = None
        self._carried = False

    @torch.compiler.disable
    def before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """A forward pre-hook: the attention function is not told of the cache, nor of the mask before the module changed it."""
        given = (*args, *kwargs.values())
        cache = next((a for a in given if isinstance(a, Cache)), None)
        self._carried = any(map(masks.carries, given))
        self._cache_layer = None if cache is None else adopt(cache, self.layer, self.setting.policy)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        sliding_window: int | None,
        options: dict[str, Any],
    ) -> Tensor:
        """[batch, q_heads, q_len, v_dim] by the policy; a layer with a sliding window is dense inside of it."""
        layout, order = masks.read(attention_mask, key.shape[2], sliding_window, self._carried)
        if layout.seen < key.shape[2] and fills(self._cache_layer, key):
            layout = layout.over(key.shape[2], key.shape[0])
        options |= order | {"key_mask": layout.padding, "cu_seqlens": layout.edges, "window": layout.window}
        self.windowed = layout.window or sliding_window
        policy = self.setting.policy if self.windowed is None else DENSE
        phase = "decode" if query.shape[2] == 1 < layout.seen else "prefill"
        clock = perf_counter()
        geometry, source = self._geometry(policy, key, value, layout)
        streaming = perf_counter() - clock
        key, value = key[:, :, : layout.seen], value[:, :, : layout.seen]
        options |= {"geometry": geometry, "backend": self.setting.backend}

        if policy == DENSE and not self.setting.captures:
            # counting what a dense layer keeps would cost more than a look at it is worth
            clock = perf_counter()
            output = pipeline.attention(query, key, value, **options)
            self.counters.add(phase, query, {"attend": perf_counter() - clock}, source, None)
            if not self.counters.backends:
                self.counters.backends.add("{} ({})".format(*_chosen_backend(self.setting.backend, query, value)))
            return output
        output, report = pipeline.attention(query, key, value, policy, return_report=True, **options)
        seconds = {**report.seconds, "geometry": report.seconds.get("geometry", 0.0) + streaming}
        report = replace(report, seconds=seconds, geometry_from=source or report.geometry_from)
        self.counters.add(phase, query, seconds, source, report)
        if self.setting.captures:
            del options["geometry"], options["backend"]
            options["scale"] = options["scale"] or query.shape[3] ** -0.5
            self._capture(phase, report, Call(query.detach(), key.detach(), value.detach(), **options), output.detach())
        return output

    def _geometry(self, policy: Policy, key: Tensor, value: Tensor, layout: masks.Layout) -> tuple[Geometry | None, str | None]:
        """``(geometry, source)``: from the cache layer's stream, or None and why it has to be recomputed."""
        cache_layer, self._cache_layer = self._cache_layer, None
        if not policy.chooses_blocks or layout.seen < policy.min_seq_length:
            return None, None
        if policy.takes_all(layout.seen) and layout.padding is None and layout.edges is None and key.device.type == "cpu":
            return None, None  # nothing will be chosen; the stream catches up when something is
        why = why_recomputed(cache_layer, policy, key)
        if why is not None:
            return None, f"recomputed: {why}"
        return cache_layer.geometry(key, value, layout.padding), "stream"

    def _capture(self, phase: str, report: Report, call: Call, output: Tensor) -> None:
        records = [c.take(self.layer, phase, report, call, output, self.setting.backend) for c in self.setting.captures]
        certified = next((r.certificate for r in records if r.certificate is not None), None)
        if certified is not None:
            self.counters.certify(certified)

    def report(self) -> LayerReport:
        policy = self.setting.policy if self.windowed is None else DENSE
        note = None if self.windowed is None else f"dense inside its sliding window of {self.windowed} keys"
        return self.counters.read(self.layer, repr(policy), note)


def _chosen_backend(backend: str, query: Tensor, value: Tensor) -> tuple[str, str]:
    dtype = str(query.dtype).removeprefix("torch.")
    return dispatch.choose(backend, dispatch.Request("torch", query.device.type, dtype, query.shape[3], value.shape[3]))


@torch.compiler.disable
def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    output_attentions: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: query [batch, q_heads, q_len, dim], key and value [batch, kv_heads, kv_len, dim | v_dim].

    Returns ``(output [batch, q_len, q_heads, v_dim], None)``. Raises ValueError for dropout, for weights that are asked for,
    and for every keyword that is set and whose meaning is not known here.
    """
    state = getattr(module, STATE, None)
    if state is None:
        raise error(
            "attn_implementation",
            f"{NAME!r} must be set by `sparsify`",
            type(module).__name__,
            "call sieve_attn.sparsify(model, policy); a model made from a sparse one's config needs one of its own",
        )
    if dropout:
        raise error("dropout", "must be 0 in a sparse model", dropout, "call model.eval(), or set attention_dropout to 0")
    if output_attentions or getattr(getattr(module, "config", None), "output_attentions", False):
        raise error(
            "output_attentions",
            "must be off: sparse attention never computes the weights",
            True,
            "use `capture`, or desparsify the model first",
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal:
        raise error("is_causal", "must be True", causal, "leave encoders and cross-attention dense")
    for name, given in others.items():
        if given is not None and name not in _ASIDE:
            raise error(
                name, "is not understood by sparse attention", type(given).__name__, "leave it out, or desparsify the model"
            )
    sink = None if s_aux is None else s_aux.reshape(-1)
    options = {"scale": scaling, "softcap": softcap, "sink": sink}
    return state.attend(query, key, value, attention_mask, sliding_window, options).transpose(1, 2).contiguous(), None
