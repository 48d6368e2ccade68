"""The rules of the house: what importing does, which names are public, which way arrows point, how long files are."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import sieve_attn
from sieve_attn import patterns, scores, selection

SOURCE = Path(sieve_attn.__file__).parent
FILES = sorted(p for p in SOURCE.rglob("*.py"))
NAMES = {
    "AetherAttention", "AetherSparseAttentionConfig", "LLM", "MianChowlaSelfAttention", "PrimeSelfAttention",
    "SparseCausalAttention", "SquareSelfAttention", "TernaryLinear", "aether_attention", "attend", "attention", "sparsify",
}  # fmt: skip
MODULES = {
    "aether",
    "certify",
    "evaluation",
    "flax",
    "functional",
    "geometry",
    "jax",
    "layers",
    "llm",
    "patterns",
    "penzai",
    "policies",
    "scores",
    "selection",
    "testing",
    "torch",
    "transformers",
    "types",
}
FRAMEWORKS = {
    "torch",
    "jax",
    "transformers",
    "penzai",
    "flax",
    "triton",
    "safetensors",
    "typer",
    "rich",
    "hypothesis",
    "pytest",
    "matplotlib",
}
# who may import a framework; everything else works on any array
MAY_IMPORT = (
    "torch.py",
    "triton.py",
    "attend/triton",
    "jax",
    "geometry/triton",
    "selection/triton",
    "attn_bias.py",
    "transformers",
    "layers",
    "llm",
    "arrays/torch_ops.py",
    "arrays/jax_ops.py",
    "penzai",
    "flax",
    "attend/torch_op.py",
    "attend/top_k_op.py",
    "attend/offset_op.py",
    "patterns/base.py",  # matplotlib, when a picture is asked for
    "offset_attention.py",
    "cli",
    "evaluation",
    "testing",
    "bench",
)
# a lower floor never imports a higher one
FLOORS = [
    {"_native", "arrays", "bounds", "checks", "expression", "native", "registry", "triton"},
    {"types"},
    {"geometry"},
    {"scores", "patterns"},
    {"selection", "attend", "certify", "dispatch", "policies"},
    {"pipeline", "aether", "functional", "offset_attention"},
    {"attn_bias", "torch", "jax", "penzai", "flax", "layers", "transformers", "llm", "testing"},
    {"evaluation", "bench", "cli"},
]
FLOOR = {name: level for level, names in enumerate(FLOORS) for name in names}


def python(program):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_importing_the_package_imports_no_framework():
    watched = sorted(FRAMEWORKS | {"numpy", "jaxtyping"})
    assert python(f"import sieve_attn, sys; print(*(m for m in {watched} if m in sys.modules))") == []


def test_policies_need_no_framework():
    watched = sorted(FRAMEWORKS)
    program = "from sieve_attn import policies; import sys; policies.parse('top_blocks(k=3)');"
    program += f"print(*(m for m in {watched} if m in sys.modules))"
    assert python(program) == []


def test_attention_on_numpy_needs_no_torch():
    program = (
        "import numpy as np, sieve_attn, sys; from sieve_attn import policies as p; x = np.ones((1, 2, 70, 8), np.float32);"
        "sieve_attn.attention(x, x, x, p.Certified(0.1), causal=True, return_report=True)[1].certificate;"
        "print('torch' in sys.modules)"
    )
    assert python(program) == ["False"]


def test_the_public_names_are_frozen():
    assert set(sieve_attn.__all__) == NAMES | MODULES
    assert set(dir(sieve_attn)) == set(sieve_attn.__all__)
    for name in NAMES:
        assert callable(getattr(sieve_attn, name)), name
    for name in MODULES:
        assert inspect.ismodule(getattr(sieve_attn, name)), name
    with pytest.raises(AttributeError, match=r"no attribute 'atend'; it offers .*attend"):
        sieve_attn.atend  # noqa: B018


def test_attend_is_the_function_whatever_was_imported_before():
    program = "import sieve_attn.attend.reference, sieve_attn; from sieve_attn import attend;"
    program += "print(callable(attend), callable(sieve_attn.attend))"
    assert python(program) == ["True", "True"]


def test_the_stub_names_what_the_package_offers():
    stub = SOURCE / "__init__.pyi"
    tree = ast.parse(stub.read_text())
    named = {a.asname or a.name for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names}
    assert named == set(sieve_attn.__all__)


DOORS = [
    sieve_attn.attention, sieve_attn.attend, sieve_attn.aether_attention, sieve_attn.AetherAttention,
    *(getattr(sieve_attn.aether, n) for n in ("compute_block_geometry", "precompute_metadata", "run_aether_sparse")),
]  # fmt: skip


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_a_door_says_what_it_takes_gives_and_refuses(door):
    told = inspect.getdoc(door)
    for what in ("``", "[batch", "Raises", "Source:"):
        assert what in told, what
    assert "::" in told or "is dense attention" in told, "no dense equivalent"


@pytest.mark.parametrize(
    ("folder", "table", "kinds"),
    [
        ("scores", scores.TABLE, ("Scorer", "Heuristic", "Bound", "BlockBound")),
        ("selection", selection.TABLE, ("Selector", "RowSelector", "RankSelector")),
        ("patterns", patterns.TABLE, ("Pattern", "Union", "OffsetSet")),
    ],
)
def test_tables_and_folders_agree(folder, table, kinds):
    package = {"scores": scores.Scorer, "selection": selection.Selector, "patterns": patterns.Pattern}[folder]
    found = {}
    for path in (SOURCE / folder).glob("*.py"):
        module = sys.modules.get(f"sieve_attn.{folder}.{path.stem}") or __import__(
            f"sieve_attn.{folder}.{path.stem}", fromlist=["_"]
        )
        for name, cls in vars(module).items():
            if inspect.isclass(cls) and issubclass(cls, package) and cls.__module__ == module.__name__ and name not in kinds:
                found[name] = f"{cls.__module__}:{name}"
    assert sorted(found.values()) == sorted(table.own.values())
    for name in table:
        words = "".join(part.title() for part in name.split("_"))
        assert table[name].__name__.lower() == words.lower(), name
        assert table[name].__doc__, name


def imports(path):
    """``(modules of the package, other top-level packages)`` that a file imports anywhere."""
    own, foreign = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{a.name}" for a in node.names] if node.module == "sieve_attn" else [node.module]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        for name in names:
            if name.startswith("sieve_attn.__"):
                continue
            if name.startswith("sieve_attn."):
                own.add(name.split(".")[1])
            else:
                foreign.add(name.split(".")[0])
    return own, foreign


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_arrows_point_one_way(path):
    place = path.relative_to(SOURCE)
    mine = place.parts[0].removesuffix(".py")
    if mine == "__init__":
        return
    own, foreign = imports(path)
    assert mine in FLOOR, f"{mine} has no floor in this test"
    if place.as_posix() not in ("attend/torch_op.py", "pipeline.py", "aether.py"):  # the two doors to the PyTorch operators
        above = {name for name in own if FLOOR[name] > FLOOR[mine]}
        assert not above, f"{place} imports {sorted(above)} from above"
    if not place.as_posix().startswith(MAY_IMPORT):
        assert not foreign & FRAMEWORKS, f"{place} imports {sorted(foreign & FRAMEWORKS)}"
    if mine != "testing":
        assert not foreign & {"hypothesis", "pytest"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_files_stay_short_and_say_what_they_are(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 500
    assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring"


USE_OF_THE_DOCUMENTED_SCORER = """
import numpy as np, sieve_attn
from sieve_attn import policies, scores
policy = policies.parse("Policy(Peak(), TopK(2))")
assert policies.parse(policy.text) == policy
assert isinstance(policy.scorer, scores.TABLE["peak"]) and "peak" in scores.TABLE
x = np.random.default_rng(0).normal(size=(1, 2, 150, 8))
out, report = sieve_attn.attention(x, x, x, policy, causal=True, return_report=True)
assert 0 < report.density < 1, report.density
try:
    policies.parse("Policy(Peek(), TopK(2))")
except ValueError as refused:
    print("Peak" in str(refused))
"""


def test_another_packages_scorer_works_as_the_documentation_says(tmp_path):
    page = (SOURCE.parent.parent / "docs" / "architecture.md").read_text()
    imports = (
        "from dataclasses import dataclass\nfrom typing import Any as Array\n"
        "from sieve_attn.scores import Heuristic\n"
        "from sieve_attn.scores.base import centre_logits, per_query_head, query_norm\n"
        "from sieve_attn.types import Geometry, Rows, Statistics\n"
    )
    (tmp_path / "mine.py").write_text(imports + page.partition("```python\n")[2].partition("```")[0])
    folder = tmp_path / "mine-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[sieve_attn.scores]\npeak = mine:Peak\n")
    assert python(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{USE_OF_THE_DOCUMENTED_SCORER}") == ["True"]


def test_a_missing_framework_is_named_with_its_remedy():
    program = (
        "import sys; sys.modules['torch'] = None; import sieve_attn\n"
        "try: sieve_attn.LLM\n"
        "except ModuleNotFoundError as e: print(e)\n"
        "from sieve_attn.cli import main; sys.argv = ['sieve', 'generate', '--prompt', 'hi']; main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "`sieve_attn.LLM` needs torch, which is not installed; install it with `pip install 'sieve-attn[hf]'`" in done.stdout
    assert "this command needs torch" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 2
