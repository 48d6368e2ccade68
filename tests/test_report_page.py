"""The report page: one file, no network, every layer and head, nothing unescaped."""

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from sieve_attn.evaluation import maps
from sieve_attn.evaluation.comparison import Agreement, Comparison, Errors, Layer, Side, thin
from sieve_attn.evaluation.report import page, write_page
from sieve_attn.types import Blocks, Ranges, Selection

NASTY = "</script><script>alert(1)</script> <b>&amp; \u2028 http://example.org/x.js"
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Reader(HTMLParser):
    """Checks that elements nest, and keeps tags, attributes and text."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.text, self.scripts = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        (self.scripts if self.open and self.open[-1] in ("script", "style") else self.text).append(text)


def layer(index, heads=3, queries=40):
    rng = np.random.default_rng(index)
    true = rng.random(queries) ** 8
    errors = Errors(np.minimum(1, 1.5 * true), true, true * 3)
    share = rng.integers(0, 255, (heads, 20, 20)).astype(np.uint8)
    return Layer(index, 0.25, 0.125, [0.2, 0.25, 0.3], 1.0, 3.0, errors, thin(rng.random(20)), share)


@pytest.fixture
def found():
    side = Side(1.5, [0.1, 0.3, 0.2], f"same start, then {NASTY}", [1, 2, 3])
    return Comparison(
        model=f"model {NASTY}", source=NASTY, policy=f"Policy {NASTY}", backend="reference", why_backend="it runs",
        bound="KeySketch", environment={"machine": "a <machine>", "date": "today"},
        prompt=f"{NASTY} the end", prompt_tokens=320, new_tokens=3, dtype="float32", sampled="prompt positions 0–39",
        dense=side, sparse=replace(side, text="same start, then other"), layers=[layer(0), layer(1), layer(7)], head_kind="head",
        agreement=[Agreement("here", 10, 9, 1e-3, 1e-2)], fallbacks={"reason <x>": 3}, requested_sparsity=0.8,
    )  # fmt: skip


@pytest.fixture
def read(found):
    reader = Reader()
    reader.feed(page(found))
    assert reader.open == []
    return reader


def page_data(reader):
    return json.loads(next(s for s in reader.scripts if s.lstrip().startswith('{"length')))


def test_nothing_is_loaded_from_anywhere(found, read):
    for tag, attributes in read.seen:
        assert tag not in ("link", "img", "iframe", "object", "embed")
        assert not {"src", "href", "srcset", "action"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    own = "".join(read.scripts).replace(json.dumps(NASTY)[1:-1], "")
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttpRequest|import\(", own)
    assert "default-src 'none'" in page(found)


def test_what_users_and_models_wrote_is_escaped(found, read):
    assert sum(tag == "script" for tag, _ in read.seen) == 2
    text = "".join(read.text)
    for written in (found.model, found.source, found.policy, "a <machine>", "reason <x>"):
        assert written in text
    assert NASTY in text.partition("Both texts")[2]


def test_every_layer_and_head_is_there_with_its_map_and_curves(found, read):
    data = page_data(read)
    assert [x["layer"] for x in data["layers"]] == [0, 1, 7]
    for shown, kept in zip(data["layers"], found.layers, strict=True):
        assert len(shown["maps"]) == len(shown["head_density"]) == 3
        for coded, cells in zip(shown["maps"], kept.maps, strict=True):
            assert base64.b64decode(coded) == cells.tobytes()
        assert shown["certified_curve"] == sorted(shown["certified_curve"])
        assert len(shown["certified_curve"]) == len(shown["true_curve"]) == len(data["ranks"])
        assert all(c >= t for t, c in shown["pairs"])
    assert data["cells"] == [20, 20]
    rows = [t for t in read.text if t in ("0", "1", "7", "all")]
    assert rows[-1] == "all"
    assert {"0", "1", "7"} <= set(rows)


def test_headings_labels_and_notes_are_there(read, found):
    text = "".join(read.text)
    for wanted in (
        "Summary",
        "Which keys were kept",
        "Density",
        "Certificate",
        "Per layer",
        "Both texts",
        "How to read this",
        "Requested sparsity 80.0 %",
        found.speed,
        "none of them drops more than its certificate",
        "9 of 10",
    ):
        assert wanted in text, wanted
    tags = [tag for tag, _ in read.seen]
    assert tags.count("h1") == tags.count("main") == 1
    marked = page(found).partition("<mark>")[2].partition("</mark>")[0]
    assert marked.startswith("&lt;/script")


def test_a_broken_certificate_is_shouted_about(found):
    bad = replace(found.layers[0], errors=Errors(np.array([0.1]), np.array([0.2]), np.array([0.0])))
    assert "1 DROP MORE THAN CERTIFIED" in page(replace(found, layers=[bad]))


def test_nothing_measured_reads_well(found):
    empty = Errors(*[np.zeros(0)] * 3)
    bare = replace(found, layers=[replace(x, errors=empty) for x in found.layers], sampled="no query")
    assert "Nothing was measured: no query." in page(bare)
    assert len(page(replace(found, layers=[]))) > 1000


def test_pages_of_large_models_stay_small(found, tmp_path):
    cells = maps.side(48 * 8)
    many = [replace(layer(i), maps=np.full((8, cells, cells), 7, np.uint8), head_density=[0.5] * 8) for i in range(48)]
    assert write_page(replace(found, layers=many), tmp_path / "page.html").stat().st_size < 3_000_000


def test_a_map_shows_the_kept_share_of_every_cell():
    kept = torch.zeros(1, 2, 4, 16, dtype=torch.bool)
    kept[0, 0, :, 0] = True
    kept[0, 1] = True
    blocks = Blocks.from_tiles(kept, q_len=256, kv_len=256, q_block=64, kv_block=16)
    shown = maps.kept_share(Selection((blocks,)), kept, cells=16)
    assert shown.shape == (2, 16, 16)
    assert (shown[0, :, 0] == 254).all()
    assert (shown[0, 1:, 1][:15] == 0).all()
    assert (shown[1][np.tril_indices(16)] == 254).all()
    assert (shown[:, *np.triu_indices(16, 1)] == maps.HIDDEN).all()
    half = maps.kept_share(Selection((Ranges(256, 256, prefix=8),)), kept, cells=16)
    assert half[0, 9, 0] == 127
