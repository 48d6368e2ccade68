"""The README's example runs as printed, and its measured tables hold what was recorded."""

import re
import runpy
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
TABLES = runpy.run_path(str(README.parent / "docs/readme_tables.py"))


def test_the_ten_line_example_runs(capsys):
    code = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    exec(compile(code, "README.md", "exec"), {})
    said = capsys.readouterr().out
    dropped = float(re.search(r"at most ([0-9.]+)", said)[1])
    assert dropped <= 0.1


def test_every_preset_of_the_readme_exists():
    from sieve_attn import policies

    table = re.findall(r"^\| `(\w+)\(", README.read_text(), flags=re.MULTILINE)
    assert {name.lower().replace("_", "") for name in table} == {name.replace("_", "") for name in policies.PRESETS}


def test_measured_tables_are_what_the_records_hold():
    text = README.read_text()
    assert set(re.findall(r"<!-- measured: (\w+) -->", text)) == set(TABLES["TABLES"])
    assert TABLES["written"](text) == text
    # a figure that was typed in does not stay
    typed = re.sub(r"(\| dense \| )\d", r"\g<1>7000", text)
    assert typed != text
    assert TABLES["written"](typed) == text


@pytest.mark.parametrize(
    ("x", "goal", "shown"),
    [
        (3.48, 3.5, "3.48"),
        (3.51, 3.5, "3.51"),
        (5.996, 6.0, "5.996"),
        (1.234, None, "1.23"),
        (19.96, 20, "19.96"),
        (35.2, 12, "35"),
    ],
)
def test_no_figure_is_rounded_across_its_goal(x, goal, shown):
    assert TABLES["figure"](x, goal) == shown


def test_no_share_is_rounded_across_its_goal():
    assert [TABLES["rounded"](x, 1, 6.0) for x in (6.04, 5.96, 5.94)] == ["6.04", "5.96", "5.9"]
