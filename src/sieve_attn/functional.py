"""Published functional forms, thin over the pipeline."""

from __future__ import annotations

from importlib import import_module
from time import perf_counter
from typing import Any

from sieve_attn import arrays, checks, dispatch, pipeline
from sieve_attn.attend import top_k as stage
from sieve_attn.attend.paged import paged_attention
from sieve_attn.pipeline import attend, attention
from sieve_attn.policies import Policy
from sieve_attn.types import Call, Report, Selection, Tokens

__all__ = ["attend", "attention", "offset_attention", "paged_attention", "top_k_attention"]  # noqa: F822

Array = Any


def top_k_attention(
    query: Array,
    key: Array,
    value: Array,
    top_k: int,
    *,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    mask: Array | None = None,
    key_mask: Array | None = None,
    cu_seqlens: Array | None = None,
    sink: Array | None = None,
    window: int | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    return_report: bool = False,
) -> Any:
    """Exact top-k attention: ``out_i = sum_{j in T_i} softmax_{T_i}(cap(s_ij)) v_j``, ``s_ij = scale * q_i.k_j``.

    ``T_i`` holds the ``top_k`` visible keys with the largest ``s_ij``, compared before any cap; the earlier key wins a tie. A
    query that sees fewer keeps them all, one that sees none gives zeros. query [batch, q_heads, q_len, dim]; key, value [batch,
    kv_heads, kv_len, dim | v_dim]; every query head chooses for itself; the other arguments are those of
    :func:`~sieve_attn.attention`. Logits are compared as the backend computes them: fp32 sums for fp16, bf16 and fp32 inputs.

    Nothing of size q_len x kv_len exists: the kernels need memory for the chosen keys and one packed copy of the keys.
    They skip blocks of keys whose upper bound, rounded outward, is below what a query already holds; results do not depend on
    that. Gradients treat the chosen keys as constants; the others get exactly zero.

    Returns the output, then ``lse`` [batch, q_heads, q_len] with ``return_lse`` and a :class:`~sieve_attn.types.Report` with
    ``return_report``: ``report.computed`` counts the logits that were computed of ``report.visible``, both [batch, q_heads, 1],
    and ``report.selection`` holds the choice as ``Tokens``. Raises ValueError (or TypeError) before any work.

    Equals, without ties::

        s = scale * query @ key.transpose(-2, -1)                      # [batch, heads, q_len, kv_len], -inf where hidden
        kept = torch.full_like(s, -torch.inf).scatter(-1, s.topk(top_k).indices, 0.0)
        output = (s + kept).softmax(-1) @ value
    """
    top_k = checks.positive_int("top_k", top_k, "try 8")
    query, key, value = pipeline._front_end(query, key, value)
    call = pipeline._call(
        query, key, value, causal=causal, scale=scale, softcap=softcap, mask=mask, key_mask=key_mask, bias=None,
        cu_seqlens=cu_seqlens, sink=sink, window=window, dropout=0.0,
    )  # fmt: skip
    most = min(top_k, call.kv_len)
    if pipeline._traced():
        # the operator chooses its backend when it runs
        if return_report:
            raise checks.error("return_report", "cannot be used inside torch.compile", "True", "ask for it outside of it")
        output, lse, *_ = _run(call, most, backend)
        return (output, lse) if return_lse else output
    name, why = dispatch.choose(backend, pipeline._request(call, Policy(), Selection((Tokens(call.query, call.kv_len),))))
    clock = perf_counter()
    output, lse, index, counts = _run(call, most, name)
    seconds = {"attend": perf_counter() - clock}
    results = [output]
    if return_lse:
        results.append(lse)
    if return_report:
        results.append(_report(call, top_k, name, why, output, lse, index, counts, seconds))
    return results[0] if len(results) == 1 else tuple(results)


def _run(call: Call, top_k: int, backend: str) -> tuple[Array, Array, Array, Array]:
    if arrays.namespace(call.query).name == "torch":
        from sieve_attn.attend import top_k_op, torch_op

        torch_op.refuse_tangents(call.query, call.key, call.value, call.sink)
        torch_op.refuse_transforms(call.query, call.key, call.value, call.sink, argument="query, key, value, sink")
        return top_k_op.attend(call, top_k, backend)
    return stage.attend(call, top_k, backend)


def _report(
    call: Call, top_k: int, backend: str, why: str, output: Array, lse: Array, index: Array, counts: Array, seconds: dict
) -> Report:
    xp = arrays.namespace(call.query)
    selection = Selection((Tokens(index, call.kv_len),))
    return Report(
        policy=f"top_k_attention(top_k={top_k})", backend=backend, why_backend=why, bound=repr(Policy().certifier),
        kept=xp.total(xp.total(index >= 0, -1, xp.int64), -1)[..., None], visible=counts[..., :1], computed=counts[..., 1:],
        seconds=seconds, selection=selection,
        certify=lambda: pipeline.certificate(call, selection, Policy(), output, lse, backend=backend),
    )  # fmt: skip


def __getattr__(name: str) -> Any:
    # over PyTorch, which the others do not need
    if name == "offset_attention":
        return import_module("sieve_attn.offset_attention").offset_attention
    raise AttributeError(f"module 'sieve_attn.functional' has no attribute {name!r}; it offers {', '.join(__all__)}")
