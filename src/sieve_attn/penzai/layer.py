"""The layer that takes the place of ``pz.nn.Attention``."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from penzai import pz

from sieve_attn import policies
from sieve_attn.checks import error, positive_int, threshold
from sieve_attn.jax import attention
from sieve_attn.penzai import masks as manifold
from sieve_attn.penzai.named import Layout, pack
from sieve_attn.penzai.reading import AttentionAxes, CausalMask, ExplicitMask, axes_of, read, split_output
from sieve_attn.penzai.visibility import Visibility, see

THRESHOLD, BLOCK_SIZE = 0.15, 64


def static_field(default: Any) -> Any:
    return dataclasses.field(default=default, metadata={"pytree_node": False})


@pz.pytree_dataclass
class GeometricSparseAttention(pz.nn.Layer):
    """Attention over the key blocks that a policy keeps: ``softmax(cap(scale q.k)) v`` over those, nothing else.

    By default AETHER's Euclidean gate: a block of ``block_size`` keys is kept for a tile of as many queries iff
    ``max over the tile of q.mu + ||q|| r > threshold`` (queries come scaled); at ``-inf`` every block is. ``policy`` takes the
    text of any Sieve policy instead, such as ``"adaptive(mass=0.99)"``.

    Attributes:
      input_to_query: Maps the input to queries, scaled already.
      input_to_key: Maps the input to keys.
      input_to_value: Maps the input to values.
      attn_value_to_output: As in ``pz.nn.Attention``: a ``pz.nn.NamedEinsum`` of weights and values, which tells the axes and
        is computed sparsely, and then what maps its result to the output.
      block_size: Keys a block and queries a tile. With ``policy`` it is the policy's.
      threshold: What the largest possible logit of a block must exceed. None with ``policy``.
      policy: The text of a policy, or None for AETHER's gate.
      scale: What logits are multiplied by besides.
      softcap: What tames logits, ``softcap * tanh(logit / softcap)``, or None.
      masks: What hides keys: :class:`CausalMask` and :class:`ExplicitMask`.
      axes: Names of the axes; None reads them from ``attn_value_to_output``.
      max_blocks: Under ``jit``, the most blocks that a tile may keep; see :func:`sieve_attn.jax.attention`.
      per_query: Whether each query keeps only what it chose itself, as training and perplexity want it.
      backend: See :func:`sieve_attn.jax.attention`.
      manifold_mask: Where set, every call leaves what it kept here: see :func:`sieve_attn.penzai.capture_masks`.
    """

    input_to_query: pz.nn.Layer
    input_to_key: pz.nn.Layer
    input_to_value: pz.nn.Layer
    attn_value_to_output: pz.nn.Layer
    block_size: int = static_field(BLOCK_SIZE)
    threshold: float | None = static_field(THRESHOLD)
    policy: str | None = static_field(None)
    scale: float = static_field(1.0)
    softcap: float | None = static_field(None)
    masks: tuple[CausalMask | ExplicitMask, ...] = static_field((CausalMask(),))
    axes: AttentionAxes | None = static_field(None)
    max_blocks: int | None = static_field(None)
    per_query: bool = static_field(False)
    backend: str = static_field("auto")
    manifold_mask: pz.StateVariable | None = None

    def __post_init__(self):
        self.chosen_policy()

    @classmethod
    def from_attention(
        cls,
        attn: pz.nn.Attention,
        *,
        block_size: int | None = None,
        threshold: float | None = None,
        policy: str | policies.Policy | None = None,
        max_blocks: int | None = None,
        per_query: bool = False,
        backend: str = "auto",
    ) -> GeometricSparseAttention:
        """The layer that computes what ``attn`` computes, over the blocks that are kept. Scale, cap, masks and axes are read from
        ``attn``; parameters are shared with it::

            pz.select(model).at_instances_of(pz.nn.Attention).apply(GeometricSparseAttention.from_attention)

        Raises ValueError with the name of the sublayer that it cannot understand, TypeError for another layer.
        """
        if type(attn) is not pz.nn.Attention:
            raise error(
                "attn",
                "must be a pz.nn.Attention",
                type(attn).__name__,
                "select with .at_instances_of(pz.nn.Attention)",
                TypeError,
            )
        if policy is not None and (block_size is not None or threshold is not None):
            given = "threshold" if block_size is None else "block_size"
            raise error("policy", "holds blocks and thresholds itself", f"`{given}` besides", "write it into the policy")
        found = read(attn)
        gate = {"block_size": BLOCK_SIZE if block_size is None else block_size}
        gate |= {"threshold": THRESHOLD if threshold is None else threshold}
        if policy is not None:
            made = policies.parse(policy) if isinstance(policy, str) else policy
            gate = {"policy": getattr(made, "text", made), "block_size": getattr(made, "block_size", None), "threshold": None}
        return cls(
            attn.input_to_query, attn.input_to_key, attn.input_to_value, attn.attn_value_to_output,
            scale=found.scale, softcap=found.softcap, masks=found.masks, axes=found.axes, max_blocks=max_blocks,
            per_query=per_query, backend=backend, **gate,
        )  # fmt: skip

    def chosen_policy(self) -> policies.Policy:
        """What chooses blocks. Raises ValueError for sizes and thresholds that are no static numbers."""
        for name in ("block_size", "threshold", "policy", "max_blocks"):
            if isinstance(getattr(self, name), jax.core.Tracer):
                raise error(
                    name, "must be static: it fixes shapes and the program", getattr(self, name),
                    "pass a Python value, or mark it with static_argnums",
                )  # fmt: skip
        if self.max_blocks is not None:
            positive_int("max_blocks", self.max_blocks, "use None for no limit")
        if self.policy is None:
            return policies.Aether(
                threshold("threshold", self.threshold), positive_int("block_size", self.block_size, "try 48 or 64")
            )
        if not isinstance(self.policy, str):
            raise error("policy", "must be the text of a policy", repr(self.policy), "pass policy.text", TypeError)
        return policies.parse(self.policy)

    def named_axes(self) -> AttentionAxes:
        return axes_of(self.attn_value_to_output) if self.axes is None else self.axes

    def attend(
        self,
        query: pz.nx.NamedArrayBase,
        key: pz.nx.NamedArrayBase,
        value: pz.nx.NamedArrayBase,
        mask: pz.nx.NamedArrayBase | None = None,
    ) -> pz.nx.NamedArray:
        """The weighted values, with the axes of ``query`` and the features of ``value``.

        query, key and value have the named axes that the projections make (see :class:`AttentionAxes`), ``mask`` any of the
        axes of the logits, True where a query may attend. Nothing else hides keys here: the layer's own masks read side inputs,
        and are applied when the layer is called. A query that sees nothing gives zeros. Raises ValueError on axes and sizes.
        """
        layout, q, k, v = pack(self.named_axes(), query, key, value)
        sight = see((), layout, {}, q.shape[2], k.shape[2], mask)
        return self._attend(layout, q, k, v, sight)

    def __call__(self, x: pz.nx.NamedArrayBase, **side_inputs: Any) -> pz.nx.NamedArray:
        """Runs the layer on ``x`` with the side inputs that its sublayers and masks read."""
        if "kv_token_positions" in side_inputs:
            raise error(
                "side input 'kv_token_positions'", "belongs to a model that caches keys", "a layer that does not",
                "convert the model with sieve_attn.penzai.kv_caching instead of KVCachingTransformerLM.from_uncached",
            )  # fmt: skip
        query, key, value = self._project(x, side_inputs)
        layout, q, k, v = pack(self.named_axes(), query, key, value)
        sight = see(self.masks, layout, side_inputs, q.shape[2], k.shape[2])
        return self._finish(self._attend(layout, q, k, v, sight), side_inputs)

    def _project(self, x: Any, side_inputs: dict[Any, Any]) -> tuple[Any, Any, Any]:
        return tuple(layer(x, **side_inputs) for layer in (self.input_to_query, self.input_to_key, self.input_to_value))

    def _finish(self, attended: pz.nx.NamedArray, side_inputs: dict[Any, Any]) -> Any:
        _, rest = split_output(self.attn_value_to_output)
        for layer in rest:
            attended = layer(attended, **side_inputs)
        return attended

    def _attend(self, layout: Layout, q: jax.Array, k: jax.Array, v: jax.Array, sight: Visibility) -> pz.nx.NamedArray:
        policy = self.chosen_policy()
        names = ("scale", "softcap", "max_blocks", "per_query", "backend")
        options = {name: getattr(self, name) for name in names}

        def run(arguments: dict[str, Any]) -> tuple[jax.Array, Any]:
            seen = None if self.manifold_mask is None else manifold.observe(q, k, policy, layout, **options, **arguments)
            return attention(q, k, v, policy, **options, **arguments), seen

        if sight.holds is None:
            output, seen = run(sight.arguments)
        else:
            output, seen = jax.lax.cond(sight.holds, lambda: run(sight.arguments), lambda: run(sight.fallback()))
        if sight.valid is not None:
            output = jnp.where(sight.valid, output, jnp.nan)
        if seen is not None:
            self.manifold_mask.value = seen
        return layout.name_heads(output, layout.axes.sequence, layout.axes.value_projection)

    def treescope_color(self) -> str:
        return "oklch(0.785 0.103 138.5 / 1.0)"
