"""The manifold mask: what is captured, what is shown, and that nothing is paid when nobody looks."""

import json
import re
from dataclasses import field
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import treescope
from penzai import pz
from penzai_models import build, jitted, plain, quick_compilation, sparse, tokens  # noqa: F401

import sieve_attn
from sieve_attn import policies
from sieve_attn.penzai import GeometricSparseAttention, capture_masks, captured_masks, show_masks
from sieve_attn.penzai.masks import visible_keys

ROOT = Path(__file__).parent.parent


def test_states_and_densities_are_those_of_the_report():
    model, x = (
        sparse(build("llama"), policy="Policy(Euclidean(), Threshold(30.0), block_size=4, query_tile=8)"),
        tokens(50, batch=2),
    )
    (mask,) = show_masks(model, x).masks.values()
    layer = pz.select(model).at_instances_of(GeometricSparseAttention).get_sequence()[0]
    held = {}

    def keep(name):
        return lambda sublayer: pz.nn.Sequential([sublayer, Tap(name, held)])

    tapped = pz.select(model).at_instances_of(GeometricSparseAttention).apply(
        lambda layer: layer.select().at(lambda one: one.input_to_query).apply(keep("query")).select()
        .at(lambda one: one.input_to_key).apply(keep("key"))
    )  # fmt: skip
    tapped(x)
    names = ("batch", "head_groups", "query_heads", "seq", "projection")
    query = torch.tensor(np.asarray(held["query"].unwrap(*names)).reshape(2, 4, 50, 8))
    key = torch.tensor(np.asarray(held["key"].unwrap("batch", "head_groups", "seq", "projection")))
    options = {"causal": True, "scale": 1.0, "return_report": True}
    _, report = sieve_attn.attention(query, key, key, policies.parse(layer.policy), **options)
    kept = report.selection.parts[0].to_tiles().numpy()
    ends = ("batch", "head_groups", "q_block", "kv_block")
    np.testing.assert_array_equal(np.asarray(mask.kept.unwrap(*ends)), kept)
    density = np.asarray(mask.density().unwrap("batch", "head_groups"))
    np.testing.assert_allclose(density, report.kept.sum(-1) / report.visible.sum(-1), rtol=1e-6)
    states = np.asarray(mask.states().unwrap(*ends))
    assert set(np.unique(states)) == {0, 1, 2}
    np.testing.assert_array_equal(states == 2, kept)
    np.testing.assert_array_equal(states[0, 0] == 0, np.arange(13)[None, :] * 4 >= (np.arange(7)[:, None] + 1) * 8)


@pz.pytree_dataclass
class Tap(pz.nn.Layer):
    """Keeps what passes through."""

    name: str = field(metadata={"pytree_node": False})
    held: dict = field(metadata={"pytree_node": False})

    def __call__(self, x, **_):
        self.held[self.name] = x
        return x


def test_visible_keys_of_a_brute_force():
    rng = np.random.default_rng(0)
    policy = policies.Policy(block_size=4, query_tile=8)
    key_mask, mask = rng.random((2, 27)) < 0.7, rng.random((1, 3, 21, 27)) < 0.6
    row, key = np.arange(21)[:, None] + 6, np.arange(27)[None, :]
    seen = (key <= row) & (key > row - 9) & key_mask[:, None, None] & mask
    wanted = np.zeros((2, 3, 4, 7), int)
    for query in range(21):
        for block in range(7):
            # the first query lies 6 places into its tile
            tile, count = (query + 6) // 8, seen[:, :, query, 4 * block : 4 * block + 4].sum(-1)
            wanted[:, :, tile, block] = np.maximum(wanted[:, :, tile, block], count)
    got = visible_keys(
        21, 27, policy, None, causal=True, window=9, key_mask=jax.numpy.asarray(key_mask), mask=jax.numpy.asarray(mask)
    )
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.long
def test_policies_of_positions_are_shown_too():
    (mask,) = show_masks(sparse(build("gpt_neox"), policy="windowed(4, 16)"), tokens(200)).masks.values()
    kept = np.asarray(mask.kept.unwrap("heads", "q_block", "kv_block"))[0]
    assert kept[3, 0]
    assert not kept[3, 1:10].any()
    assert kept[3, 11:].all()


def test_the_page_and_the_view_of_the_model(tmp_path):
    model, x = sparse(build("llama_stacked"), policy="top_blocks(k=1, sinks=0, window=0)"), tokens(80)
    figure = show_masks(model, x, tmp_path / "masks.html")
    page = (tmp_path / "masks.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert page.count("<script") == figure._repr_html_().count("<script")
    (path,) = figure.masks
    assert repr(figure).startswith(f"{path}: ")
    assert "visible blocks kept, density 0." in repr(figure)
    watched = capture_masks(model)
    jitted(watched, x)
    (mask,) = captured_masks(watched).values()
    assert mask.kept.named_shape["blocks"] == 1
    assert "ManifoldMask(" in treescope.render_to_text(mask)
    text = treescope.render_to_text(figure.figure)
    for word in ("density by head: ", "not visible", "pruned", "kept"):
        assert word in text


def test_nothing_is_captured_unless_asked():
    model, x = sparse(build("llama"), policy="top_blocks(k=1)"), tokens(70)
    before = plain(model(x))
    watched = capture_masks(model)
    assert captured_masks(watched) == {}
    np.testing.assert_array_equal(plain(watched(x)), before)
    assert len(captured_masks(watched)) == 1
    assert captured_masks(model) == {}
    assert pz.select(model).at_instances_of(pz.StateVariable).count() == 0


NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def code_cells(path):
    notebook = json.loads(path.read_text())
    assert notebook["nbformat"] == 4
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_hold_the_outputs_of_their_cells_in_order(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    shown = [output for cell in cells for output in cell["outputs"]]
    assert any("text/html" in output.get("data", {}) for output in shown)
    assert not any(output["output_type"] == "error" for output in shown)


@pytest.mark.long
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_run_and_print_what_they_hold(path, capsys):
    space = {}
    for number, cell in enumerate(code_cells(path), 1):
        exec(compile("".join(cell["source"]), f"{path.name}:{number}", "exec"), space)
        held = "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")
        printed = capsys.readouterr().out
        # rounding differs from machine to machine
        assert re.sub(r"[\d.e-]+", "", printed) == re.sub(r"[\d.e-]+", "", held)
