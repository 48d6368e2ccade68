"""The README's example runs as printed."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


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
