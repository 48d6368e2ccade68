"""Manifold masks as pictures: in Treescope's view of a model, in a notebook, in an HTML file."""

from __future__ import annotations

import dataclasses
import html
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import treescope
from penzai import pz
from treescope import figures, rendering_parts

from sieve_attn.checks import error
from sieve_attn.penzai.layer import GeometricSparseAttention
from sieve_attn.penzai.masks import HIDDEN, KEPT, PRUNED, ManifoldMask

NAMES = {HIDDEN: "not visible", PRUNED: "pruned", KEPT: "kept"}
COLOURS = {HIDDEN: (238, 238, 238), PRUNED: (244, 177, 131), KEPT: (31, 90, 160)}
ENDS = ("q_block", "kv_block")
LISTED = 64  # so many heads have their density written out; more are a picture


def capture_masks(model: Any) -> Any:
    """``model`` with a variable in each of its :class:`GeometricSparseAttention` layers that holds the layer's last choice.

    Parameters are shared with ``model``, which goes on without. Every call then chooses a second time to be looked at. The
    variables are ordinary Penzai state: jit such a model with ``pz.variable_jit``, show it with Treescope, read
    ``layer.manifold_mask.value``. Raises ValueError if ``model`` has no such layer.
    """
    layers = pz.select(model).at_instances_of(GeometricSparseAttention)
    if layers.count() == 0:
        raise error(
            "model", "must hold GeometricSparseAttention layers", type(model).__name__,
            "put them in with .apply(GeometricSparseAttention.from_attention)",
        )  # fmt: skip
    made = {}
    for number, (path, layer) in enumerate(layers.selected_by_path.items()):
        stacked = dict.fromkeys(pz.nn.layerstack_axes_from_keypath(path), pz.nn.LayerStackVarBehavior.PER_LAYER)
        variable = pz.StateVariable(
            None, label=f"manifold_mask_{number}", metadata={"layerstack_axes": stacked} if stacked else {}
        )
        made[path] = dataclasses.replace(layer, manifold_mask=variable)
    return layers.set_by_path(made)


def captured_masks(model: Any) -> dict[str, ManifoldMask]:
    """What the layers of a model from :func:`capture_masks` kept in their last call, by the path of the layer."""
    layers = pz.select(model).at_instances_of(GeometricSparseAttention).selected_by_path
    held = {jax.tree_util.keystr(path): layer.manifold_mask for path, layer in layers.items()}
    return {path: held.value for path, held in held.items() if held is not None and held.value is not None}


@dataclass(frozen=True)
class MaskFigure:
    """The masks of a model, one below the other. A notebook shows it; ``save`` writes a page that needs nothing else."""

    masks: dict[str, ManifoldMask]

    @property
    def figure(self) -> Any:
        parts = []
        for path, mask in self.masks.items():
            parts += [figures.bolded(path.removeprefix(".") or "layer"), figures.indented(figure_of(mask))]
        return figures.inline(*(part for one in parts for part in (one, "\n")))

    def _repr_html_(self) -> str:
        return self.figure._repr_html_()

    def __repr__(self) -> str:
        return "\n".join(f"{path}: {summary(mask)}" for path, mask in self.masks.items())

    def to_html(self, title: str = "Manifold masks") -> str:
        """A whole page."""
        head = f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title></head>'
        return f'{head}<body style="font-family: monospace; white-space: pre">{self._repr_html_()}</body></html>'

    def save(self, path: str | Path) -> Path:
        path = Path(path)
        path.write_text(self.to_html(), encoding="utf-8")
        return path


def show_masks(model: Any, tokens: Any, path: str | Path | None = None, **side_inputs: Any) -> MaskFigure:
    """Runs ``model`` on ``tokens`` and shows which blocks each of its layers kept: rows are query tiles, columns key blocks,
    sliders heads (and batch). Hidden, pruned and kept pairs have colours of their own; each head's density stands above.

    ``model`` itself is left alone. With ``path`` the page is written there as well. Raises ValueError if ``model`` has no
    :class:`GeometricSparseAttention` layer or holds a cache, which running it would fill.
    """
    if pz.select(model).at_instances_of(pz.StateVariable).count():
        raise error(
            "model", "must hold no state, which running it would change", type(model).__name__,
            "show the model before its conversion, or run capture_masks(model) and look at MaskFigure(captured_masks(...))",
        )  # fmt: skip
    watched = capture_masks(model)
    watched(tokens, **side_inputs)
    figure = MaskFigure(captured_masks(watched))
    if path is not None:
        figure.save(path)
    return figure


def figure_of(mask: ManifoldMask) -> Any:
    """Density of every head, and the blocks."""
    states = mask.states()
    sliders = [name for name in states.named_shape if name not in ENDS]
    cells = max(states.named_shape[name] for name in ENDS)
    picture = treescope.render_array(
        _on_host(states),
        rows=["q_block"],
        columns=["kv_block"],
        sliders=sliders,
        continuous=False,
        colormap=[COLOURS[n] for n in sorted(COLOURS)],
        value_item_labels=NAMES,
        pixels_per_cell=int(np.clip(600 // cells, 2, 15)),
    )
    legend = figures.inline(
        *(part for n, name in NAMES.items() for part in (figures.with_color("■ ", f"rgb{COLOURS[n]}"), f"{name}   "))
    )
    return figures.inline(summary(mask), "\n", _densities(mask), "\n", legend, "\n", picture)


def summary(mask: ManifoldMask) -> str:
    keys, kept = (_on_host(x).unwrap(*mask.keys.named_shape) for x in (mask.keys, mask.kept))
    seen = keys > 0
    share = (keys * kept).sum() / max(keys.sum(), 1)
    return f"{int((kept & seen).sum())} of {int(seen.sum())} visible blocks kept, density {share:.3f}"


def tree_node(mask: ManifoldMask, path: str | None) -> Any:
    """Treescope's node for a mask: the summary, and inside it the picture. None for a mask that holds no arrays yet."""
    if not all(isinstance(x, pz.nx.NamedArrayBase) and _is_array(x) for x in (mask.kept, mask.keys)):
        return None
    return rendering_parts.build_custom_foldable_tree_node(
        label=rendering_parts.text(f"ManifoldMask({summary(mask)})"),
        contents=rendering_parts.fold_condition(
            expanded=rendering_parts.indented_children([figures.treescope_part_from_display_object(figure_of(mask))])
        ),
        path=path,
    )


def _densities(mask: ManifoldMask) -> Any:
    density = _on_host(mask.density())
    names = list(density.named_shape)
    values = density.unwrap(*names)
    if values.size > LISTED:
        return figures.inline("density by head: ", treescope.render_array(density, continuous=True, vmin=0, vmax=1))
    index = itertools.product(*(range(n) for n in values.shape))
    each = []
    for at in index:
        head = ", ".join(f"{name} {i}" for name, i in zip(names, at, strict=True)) or "all"
        each.append(f"{head}: {values[at]:.3f}")
    return "density by head: " + "; ".join(each)


def _is_array(x: pz.nx.NamedArrayBase) -> bool:
    plain = x.unwrap(*x.named_shape)
    return hasattr(plain, "dtype") and not isinstance(plain, (jax.core.Tracer, jax.ShapeDtypeStruct))


def _on_host(x: pz.nx.NamedArrayBase) -> pz.nx.NamedArray:
    names = tuple(x.named_shape)
    return pz.nx.wrap(np.asarray(x.unwrap(*names)), *names)
