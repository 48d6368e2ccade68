"""The examples run, and the page about the patterns shows the figures that were saved."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def run(name, tmp_path, *arguments):
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / name, "--out", tmp_path, *arguments],
        capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_patterns_train_beside_dense_attention(tmp_path):
    settings = "--steps 12 --length 64 --width 32 --heads 2 --batch 2 --tests 2 --seeds 2 --timed 128"
    told = run("offset_patterns.py", tmp_path, *settings.split(), "--only", "dense", "primes", "BigBird-like")
    results = json.loads((tmp_path / "offset_patterns.json").read_text())
    assert list(results["patterns"]) == ["dense", "primes", "BigBird-like"]
    for row in results["patterns"].values():
        assert [run["seed"] for run in row["runs"]] == [0, 1]
        for made in row["runs"]:
            assert made["curve"][0][0] == 0
            assert made["curve"][-1][0] == 12
            assert made["curve"][-1][1] < made["curve"][0][1] - 0.05
    densities = [row["density"] for row in results["patterns"].values()]
    assert densities[0] == 1.0
    assert densities[2] == pytest.approx(densities[1], rel=0.3)
    assert results["sample"].startswith("def ")
    assert load("offset_patterns").table(results) in told


@pytest.fixture
def called(tmp_path, monkeypatch):
    """The patterns example in this process, by the short command of its own docstring and what is added to it."""
    example = load("offset_patterns")
    line = next(line for line in example.__doc__.splitlines() if "--steps 3" in line)
    threads = torch.get_num_threads()

    def call(*more):
        monkeypatch.setattr(sys, "argv", [*line.split()[1:-1], str(tmp_path), *more])
        example.main()
        return json.loads((tmp_path / "offset_patterns.json").read_text())

    yield call
    torch.set_num_threads(threads)


def test_the_command_that_the_example_names_runs(called):
    results = called("--only", "squares alone", "--positions", "rotary")
    assert results["settings"]["positions"] == "rotary"
    assert len(results["patterns"]["squares alone"]["runs"]) == 1


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--only", "squares"], "no pattern ['squares']; there are 'dense', 'primes'"),
        (["--width", "32"], "a multiple of --heads 3"),
    ],
)
def test_the_example_says_what_it_cannot_do(called, capsys, more, words):
    with pytest.raises(SystemExit):
        called(*more)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("rotary", [False, True])
def test_steps_of_the_example_equal_its_forward_pass(rotary):
    example = load("offset_patterns")
    torch.manual_seed(0)
    text = torch.randint(256, (2, 40))
    for pattern in (None, *list(example.candidates(40).values())[1:3]):
        model = example.ByteModel(16, 2, 2, 40, pattern, rotary)
        with torch.no_grad():
            whole = model(text)[0]
            caches, rows = [block.attention.empty_cache(2) for block in model.blocks], []
            for n in range(40):
                row, caches = model(text[:, n : n + 1], caches, n)
                rows.append(row)
        assert torch.allclose(torch.cat(rows, 1), whole, atol=1e-5)


@pytest.mark.long
def test_tilelli_trains_beside_dense_attention(tmp_path):
    settings = "--steps 12 --width 32 --layers 2 --context 32 --batch 2 --bytes 8 --threads 1"
    told = run("tilelli_characters.py", tmp_path, *settings.split())
    results = json.loads((tmp_path / "tilelli_characters.json").read_text())
    ours, dense = results["parameters"].values()
    assert dense == pytest.approx(ours, rel=0.02)
    for curve in results["curves"].values():
        assert curve[-1][2] < curve[0][2] - 0.1
    assert results["packed"] == pytest.approx(results["curves"]["Tilelli"][-1][2], abs=0.5)
    assert "packed to two bits a weight" in told
    assert results["sample"].startswith("def read(self, ")


def test_the_page_shows_the_saved_figures():
    results = json.loads((ROOT / "docs" / "offset_patterns.json").read_text())
    assert load("offset_patterns").table(results) in (ROOT / "docs" / "offset_patterns.md").read_text()
