"""Making a model sparse and dense again, and asking it what it did."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from sieve_attn import dispatch, policies
from sieve_attn.checks import error
from sieve_attn.policies import Policy
from sieve_attn.transformers.attention import NAME, STATE, LayerState, Setting, attention_function
from sieve_attn.transformers.masks import mask_function
from sieve_attn.transformers.records import Capture, Record
from sieve_attn.transformers.reports import ModelReport

_INSTALLED = "_sieve"  # where a sparse model keeps its Installation


@dataclass
class Installation:
    """What was changed in a model, so that it can be changed back."""

    setting: Setting
    layers: list[LayerState]
    modules: list[nn.Module]
    hooks: list[Any]
    implementations: list[tuple[Any, Any]]  # (config, its attention implementation)
    disable_compile: Any


def sparsify(model: PreTrainedModel, config_or_policy: Any, *, backend: str = "auto") -> PreTrainedModel:
    """Give a Hugging Face causal language model the attention of a policy, in place, and return it.

    ``config_or_policy``: a :class:`~sieve_attn.policies.Policy`, its text such as ``"top_blocks(k=32)"``, or an object with
    ``to_policy()`` such as ``AetherSparseAttentionConfig``. Prefill (whole or in chunks), decoding, beam search, left padding
    and grouped heads work as before; caches that start empty keep streaming geometry; layers with a sliding window stay dense
    inside of it. Blocks and sinks count from a row's first slot, padding included, so a left-padded row may keep other blocks
    than it would alone (never a padded one). A model that is sparse already changes its policy and starts its counters anew.
    ``generate`` does not compile a sparse model: what is selected depends on the data. ``model.config`` becomes a copy, for
    models made from one configuration share it.

    Raises TypeError for other models and policies, ValueError for models without the attention interface of transformers.
    """
    policy = _policy(config_or_policy)
    dispatch.known(backend)
    modules = _attention_modules(model)
    desparsify(model)
    _own_configs(model)
    setting = Setting(policy, backend)
    layers = [LayerState(int(module.layer_idx), setting) for module in modules]
    hooks = []
    for module, layer in zip(modules, layers, strict=True):
        setattr(module, STATE, layer)
        hooks.append(module.register_forward_pre_hook(layer.before_forward, with_kwargs=True))

    AttentionInterface.register(NAME, attention_function)
    AttentionMaskInterface.register(NAME, mask_function)
    before = [(config, config._attn_implementation) for config in _configs(model)]
    generation = getattr(model, "generation_config", None)
    compiles = getattr(generation, "disable_compile", None)
    setattr(model, _INSTALLED, Installation(setting, layers, modules, hooks, before, compiles))
    model.set_attn_implementation(NAME)
    if generation is not None:
        generation.disable_compile = True
    return model


def desparsify(model: PreTrainedModel) -> PreTrainedModel:
    """Undo :func:`sparsify` and return the model, which computes what it computed before, bit for bit; no-op if it is dense."""
    installed = getattr(model, _INSTALLED, None)
    if installed is None:
        return model
    for hook in installed.hooks:
        hook.remove()
    for module in installed.modules:
        delattr(module, STATE)
    for config, implementation in installed.implementations:
        config._attn_implementation = implementation
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.disable_compile = installed.disable_compile
    delattr(model, _INSTALLED)
    return model


def report(model: PreTrainedModel, *, reset: bool = False) -> ModelReport:
    """What a sparse model did since :func:`sparsify`, layer by layer; with ``reset`` the counters start anew afterwards.

    Certified dropped mass is there for what ran inside of :func:`capture`. Raises ValueError for a dense model.
    """
    installed = _installed(model)
    made = ModelReport(repr(installed.setting.policy), tuple(layer.report() for layer in installed.layers))
    if reset:
        for layer in installed.layers:
            layer.reset()
    return made


@contextmanager
def capture(
    model: PreTrainedModel, *, certificates: bool = True, truth: bool = False, keep_selection: bool = True
) -> Iterator[list[Record]]:
    """A list that fills with one :class:`Record` for every attention call while the context is open.

    ``certificates`` bounds what each query dropped; ``truth`` also computes it exactly, with the distance to dense attention's
    output; ``keep_selection`` keeps ``record.report.selection``. All of it costs more than the attention itself. Raises
    ValueError for a dense model.
    """
    captures = _installed(model).setting.captures
    opened = Capture(certificates, truth, keep_selection)
    captures.append(opened)
    try:
        yield opened.records
    finally:
        captures.remove(opened)


def _installed(model: Any) -> Installation:
    installed = getattr(model, _INSTALLED, None)
    if installed is None:
        raise error("model", "must have been made sparse", type(model).__name__, "call sieve_attn.sparsify(model, policy) first")
    return installed


def _policy(given: Any) -> Policy:
    if isinstance(given, str):
        return policies.parse(given)
    made = given.to_policy() if callable(getattr(given, "to_policy", None)) else given
    if not isinstance(made, Policy):
        raise error(
            "config_or_policy",
            "must be a Policy, its text, or have `to_policy()`",
            type(given).__name__,
            "try policies.Adaptive(mass=0.99) or 'top_blocks(k=32)'",
            TypeError,
        )
    return made


def _attention_modules(model: Any) -> list[nn.Module]:
    """The modules that call the attention interface; raises where there is none."""
    if not isinstance(model, PreTrainedModel):
        raise error(
            "model",
            "must be a transformers PreTrainedModel",
            type(model).__name__,
            "load it with transformers.AutoModelForCausalLM, or pass the model inside of a wrapper",
            TypeError,
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise error("model", "must be decoder-only", type(model).__name__, "use a causal language model")
    if not model._supports_attention_backend or not model._can_set_attn_implementation():
        raise error(
            "model",
            "must compute attention through the attention interface of transformers",
            type(model).__name__,
            "use a model whose class sets _supports_attention_backend",
        )
    found = [m for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int) and _attends(m)]
    if not found:
        raise error("model", "must have attention modules with a `layer_idx`", type(model).__name__, "use a decoder-only model")
    if not any(getattr(module, "is_causal", True) for module in found):
        raise error("model", "must have causal attention", type(model).__name__, "leave encoders dense")
    return found


def _attends(module: nn.Module) -> bool:
    """Whether it calls the attention interface: linear attention has the name, and a cache that must not grow before its time."""
    kind = type(module)
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    calls = hasattr(module, "is_causal") or "ALL_ATTENTION_FUNCTIONS" in getattr(code, "co_names", ())
    return "Attention" in kind.__name__ and calls


def _own_configs(model: PreTrainedModel) -> None:
    """Copies in place of the model's configurations, wherever its modules keep them: other models may share the originals."""
    copies: dict[int, Any] = {}
    for config in _configs(model):
        if config._attn_implementation == NAME:
            raise error(
                "model",
                "must not have the configuration of a sparse model",
                type(model).__name__,
                "make it from a copy whose `_attn_implementation` is 'sdpa' or 'eager'",
            )
        deepcopy(config, copies)
    for module in model.modules():
        for name, held in list(vars(module).items()):
            if isinstance(held, PreTrainedConfig) and id(held) in copies:
                setattr(module, name, copies[id(held)])


def _configs(model: PreTrainedModel) -> list[Any]:
    """The configurations of a model and its parts, outermost first: setting one sets those inside of it."""
    found = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    for config in list(found.values()):
        for name in config.sub_configs:
            inner = getattr(config, name, None)
            if inner is not None:
                found.setdefault(id(inner), inner)
    return list(found.values())
