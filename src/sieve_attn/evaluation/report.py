"""One self-contained HTML page about a comparison: no network, no library, light and dark."""

from __future__ import annotations

import base64
import json
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from sieve_attn.evaluation.comparison import Comparison, Errors, Layer, quantiles

PROMPT_TAIL = 700  # characters of the prompt that the page shows
PAIRS = 500  # (true, certified) dots of a layer
CURVE = np.concatenate([np.linspace(0, 0.95, 96), np.linspace(0.951, 1, 50)])  # closer together where the tail is


def write_page(found: Comparison, path: str | Path) -> Path:
    """Write :func:`page` to ``path``. Raises OSError if the file cannot be written."""
    path = Path(path)
    path.write_text(page(found), encoding="utf-8")
    return path


def page(found: Comparison) -> str:
    """The page as one HTML text. Everything that a model or a user wrote is escaped."""
    parts = files("sieve_attn.evaluation")
    source = {name: (parts / f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    return Template(source["html"]).substitute(
        css=source["css"], js=source["js"], title=escape(f"Dense and sparse attention: {found.model} on {found.source}"),
        policy=escape(found.policy), facts=_facts(found), cards=_cards(found), speed=escape(found.speed), notes=_notes(found),
        certificate=escape(_certificate(found)), agreement=_agreement(found), table=_table(found), texts=_texts(found),
        sampled=escape(found.sampled), unit=escape(found.error_unit), data=_json(_data(found)),
    )  # fmt: skip


def _data(found: Comparison) -> dict[str, Any]:
    cells = found.layers[0].maps.shape[1:] if found.layers else (0, 0)
    return {"length": found.prompt_tokens, "head_kind": found.head_kind, "cells": list(cells), "ranks": CURVE.round(4).tolist(),
            "layers": [_layer_data(x) for x in found.layers]}  # fmt: skip


def _layer_data(layer: Layer) -> dict[str, Any]:
    certified, true = layer.errors.certified, layer.errors.dropped
    made = {
        "layer": layer.layer, "density": _short(layer.density), "decode_density": _short(layer.decode_density),
        "head_density": [_short(d) for d in layer.head_density],
        "density_by_position": [_short(d) for d in layer.density_by_position],
        "maps": [base64.b64encode(np.ascontiguousarray(m).tobytes()).decode() for m in layer.maps],
        "certified": quantiles(certified), "true": quantiles(true),
    }  # fmt: skip
    if certified.size:
        shown = np.unique(np.linspace(0, certified.size - 1, PAIRS).astype(int))
        made["pairs"] = [[_short(t), _short(c)] for t, c in zip(true[shown], certified[shown], strict=True)]
        made["certified_curve"] = [_short(v) for v in np.quantile(certified, CURVE)]
        made["true_curve"] = [_short(v) for v in np.quantile(true, CURVE)]
    return made


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def _json(data: Any) -> str:
    # inside <script> a "<" could end the element early
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _facts(found: Comparison) -> str:
    facts = {
        "Model": f"{found.model}, {found.dtype}", "Prompt": f"{found.source}: {found.prompt_tokens:,} tokens",
        "Continuation": f"{found.new_tokens} tokens, greedy", "Certified by": found.bound, **found.environment,
        "Backend": f"{found.backend} ({found.why_backend})",
    }  # fmt: skip
    return "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())


def _cards(found: Comparison) -> str:
    errors, dense, sparse = found.errors, found.dense, found.sparse
    certified, true = quantiles(errors.certified), quantiles(errors.dropped)
    cards = [
        ("Density in the prompt", percent(found.density), f"{percent(found.decode_density)} in decode steps"),
        ("Prefill", seconds(sparse.prefill_seconds), f"dense: {seconds(dense.prefill_seconds)}"),
        ("Decode step, median", seconds(sparse.decode_seconds), f"dense: {seconds(dense.decode_seconds)}"),
        ("Gate", percent(found.gate_overhead), "of attention time goes into choosing"),
        *((f"Same next token, {a.where}", percent(a.share), f"{a.agreed} of {a.positions}; KL {a.kl_mean:.1e} nats on average")
          for a in found.agreement),
    ]  # fmt: skip
    if certified and true:
        cards.append(("Certified dropped mass, median", tiny(certified["p50"]), f"true: {tiny(true['p50'])}"))
        cards.append(("Certified dropped mass, largest", tiny(certified["max"]), f"true: {tiny(true['max'])}"))
    form = '<div class="card"><span>{}</span><b>{}</b><em>{}</em></div>'
    return "".join(form.format(*map(escape, card)) for card in cards)


def _notes(found: Comparison) -> str:
    notes = [f"Turned dense on its own: {reason} ({count:,} times)." for reason, count in found.fallbacks.items()]
    if found.requested_sparsity is not None:
        notes.append(
            f"Requested sparsity {percent(found.requested_sparsity)}, achieved {percent(1 - found.density)} in the "
            f"prompt and {percent(1 - found.decode_density)} in decode steps (forced blocks come on top)."
        )
    return "".join(f'<p class="note">{escape(note)}</p>' for note in notes)


def _certificate(found: Comparison) -> str:
    errors = found.errors
    if not errors.certified.size:
        return f"Nothing was measured: {found.sampled}."
    verdict = (
        "none of them drops more than its certificate says"
        if not errors.violations
        else f"{errors.violations:,} DROP MORE THAN CERTIFIED, which is a bug: please report it"
    )
    return f"Measured on {errors.certified.size:,} (layer, head, query) triples ({found.sampled}): {verdict}."


def _agreement(found: Comparison) -> str:
    rows = "".join(
        f"<tr><td>{escape(a.where)}</td><td>{a.agreed} of {a.positions}</td><td>{percent(a.share)}</td>"
        f"<td>{a.kl_mean:.2e}</td><td>{a.kl_max:.2e}</td></tr>" for a in found.agreement
    )  # fmt: skip
    names = ("Positions", "same most likely token", "share", "mean KL(dense ‖ sparse), nats", "largest KL, nats")
    head = "".join(f"<th>{name}</th>" for name in names)
    return f'<div class="scroll"><table class="plain"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _table(found: Comparison) -> str:
    groups = "".join(
        f'<th class="group" colspan="3">{name}</th>'
        for name in ("certified dropped mass", "true dropped mass", f"output error ({escape(found.error_unit)})")
    )
    head = ("<tr><th rowspan='2'>Layer</th><th rowspan='2'>density,<br>prompt</th><th rowspan='2'>density,<br>decode</th>"
            f"<th rowspan='2'>gate</th>{groups}</tr><tr>{'<th>median</th><th>99 %</th><th>max</th>' * 3}</tr>")  # fmt: skip
    rows = [_row(f"{x.layer}", x.density, x.decode_density, x.gate_overhead, x.errors) for x in found.layers]
    rows.append(_row("all", found.density, found.decode_density, found.gate_overhead, found.errors))
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'


def _row(name: str, density: float, decode: float, gate: float, errors: Errors) -> str:
    cells = [name, percent(density), percent(decode), percent(gate)]
    for values in (errors.certified, errors.dropped, errors.output):
        found = quantiles(values)
        cells += [tiny(found[n]) for n in ("p50", "p99", "max")] if found else ["–"] * 3
    return f"<tr>{''.join(f'<td>{escape(c)}</td>' for c in cells)}</tr>"


def _texts(found: Comparison) -> str:
    tail = ("…" if len(found.prompt) > PROMPT_TAIL else "") + found.prompt[-PROMPT_TAIL:]
    same = common_prefix(found.dense.text, found.sparse.text)
    columns = []
    for name, text in (("Dense", found.dense.text), ("Sparse", found.sparse.text)):
        rest = f"<mark>{escape(text[same:])}</mark>" if text[same:] else ""
        body = f'<span class="prompt">{escape(tail)}</span><strong>{escape(text[:same])}{rest}</strong>'
        columns.append(f'<div><h3>{name}</h3><pre tabindex="0" aria-label="{name} text">{body}</pre></div>')
    return "".join(columns)


def common_prefix(a: str, b: str) -> int:
    """How many leading characters two texts share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def seconds(value: float) -> str:
    return f"{1000 * value:.1f} ms" if value < 1 else f"{value:.1f} s"


def tiny(value: float) -> str:
    return "0" if value == 0 else f"{value:.3f}" if value >= 0.01 else f"{value:.1e}"
