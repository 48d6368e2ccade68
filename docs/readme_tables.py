"""The tables of measured figures in README.md, written from the records of `sieve bench` in docs/benchmarks/.

    python docs/readme_tables.py           # rewrite them
    python docs/readme_tables.py --check   # say whether they are what the records hold; exit 1 if not

Nothing in a table between `<!-- measured: NAME -->` and `<!-- end -->` is typed by hand.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
README = DOCS.parent / "README.md"
RECORDS = {
    "Zen 3": ["zen3/run.json", "zen3/index_ternary.json"],
    "Zen 4": ["zen4/run.json", "zen4/index_ternary.json"],
    "Xeon": sorted(f"xeon/{p.name}" for p in (DOCS / "benchmarks/xeon").glob("*.json")),
}
DENSITIES = ("1", "0.21", "0.065")
SHORT = {"float32": "fp32", "bfloat16": "bf16"}

Row = dict[str, Any]


def read() -> dict[str, list[Row]]:
    """The rows of one thread, by machine; of a group that was measured again, those of the last record."""
    found = {}
    for machine, names in RECORDS.items():
        groups: dict[str, list[Row]] = {}
        for name in names:
            rows = json.loads((DOCS / "benchmarks" / name).read_text())["rows"]
            groups |= {group: [row for row in rows if row["group"] == group] for group in {row["group"] for row in rows}}
        found[machine] = [row for rows in groups.values() for row in rows if row["threads"] == 1]
    return found


def one(rows: list[Row], **wanted: Any) -> Row:
    """The only row with these fields."""
    (row,) = [row for row in rows if all(row[field] == value for field, value in wanted.items())]
    return row


def rounded(x: float, places: int, goal: float | None) -> str:
    """``x`` to so many places, more where rounding would carry it to or past a goal."""
    while goal is not None and ((round(x, places) >= goal) != (x >= goal) or (round(x, places) <= goal) != (x <= goal)):
        places += 1
    return f"{x:.{places}f}"


def figure(x: float, goal: float | None = None) -> str:
    """A ratio, two to three digits."""
    return rounded(x, 2 if x < 2 else 1 if x < 20 else 0, goal)


def goal_of(row: Row, field: str) -> float | None:
    return next((target["bound"] for target in row["targets"] if target["field"] == field), None)


def table(head: list[str], lines: Iterator[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *lines]).replace("|  |", "| |")


def attend(machines: dict[str, list[Row]]) -> str:
    """Given blocks: over SDPA, and over compiled FlexAttention where it has such a pass."""
    head = [""] + [f"{machine}: density 1" if d == "1" else d.lstrip("0") for machine in machines for d in DENSITIES]

    def lines() -> Iterator[list[str]]:
        for group, dtype in (("prefill", "float32"), ("prefill", "bfloat16"), ("backward", "float32")):
            for dim in (64, 128):
                for block in (64, 16):
                    what = "backward, " if group == "backward" else ""
                    cells = [f"{what}{SHORT[dtype]} D = {dim}, blocks of {block}"]
                    for machine, rows in machines.items():
                        for density in DENSITIES:
                            wanted = {
                                "group": group,
                                "case": f"random blocks {density}",
                                "dtype": dtype,
                                "D": dim,
                                "block": block,
                            }
                            goal = goal_of(one(machines["Zen 3"], **wanted), "ratio_sdpa")
                            row = one(rows, **wanted)
                            flex = row["ratio_flex"]
                            text = figure(row["ratio_sdpa"], goal) + (f" / {rounded(flex, 1, 2.0)}" if flex else "")
                            cells.append(text + (f" ({goal:g})" if machine == "Xeon" else ""))
                    yield cells

    return table(head, lines())


def decode(machines: dict[str, list[Row]]) -> str:
    """One step, scan and choice included, over SDPA."""
    wide = [machine for machine in machines if machine != "Xeon"]
    head = [
        "",
        *(cell for machine in wide for cell in (f"{machine}: SDPA ms", "ours ms", "times faster")),
        "Xeon: times faster (goal)",
    ]

    def lines() -> Iterator[list[str]]:
        for row in (row for row in machines["Zen 3"] if row["group"] == "decode"):
            cells, goal = [row["case"]], goal_of(row, "ratio_sdpa")
            for machine in wide:
                mine = one(machines[machine], group="decode", case=row["case"])
                ours = mine["sparse_ms"]
                cells += [
                    f"{mine['dense_ms']:.0f}",
                    f"{ours:.1f}" if ours < 10 else f"{ours:.0f}",
                    figure(mine["ratio_sdpa"], goal),
                ]
            there = figure(one(machines["Xeon"], group="decode", case=row["case"])["ratio_sdpa"], goal)
            yield [*cells, there + (f" ({goal:g})" if goal else "")]

    return table(head, lines())


def each(machines: dict[str, list[Row]], cases: list[tuple[str, dict[str, Any], Callable[[Row], str], str]]) -> str:
    """A line a case, a column a machine, and the goal."""
    return table(
        ["", *machines, "goal"],
        ([name, *(show(one(rows, **wanted)) for rows in machines.values()), goal] for name, wanted, show, goal in cases),
    )


def gate(machines: dict[str, list[Row]]) -> str:
    """What choosing costs, and whole calls with it."""
    cases: list[tuple[str, dict[str, Any], Callable[[Row], str], str]] = []
    gates = {"centroids": "centroids, blocks of 64", "4-bit sketch": "4-bit sketch, every 4th query, blocks of 16"}
    for name, what in gates.items():
        for dtype in ("bfloat16", "float32"):
            wanted = {"group": "gate", "case": f"share: {name}", "dtype": dtype, "N": 8192}
            goal = goal_of(one(machines["Zen 3"], **wanted), "gate_percent")
            title = f"gate by {what}, share of dense {SHORT[dtype]} SDPA at 8,192"
            cases.append((title, wanted, lambda row, goal=goal: f"{rounded(row['gate_percent'], 1, goal)} %", f"{goal:g} %"))

    def over(goal: float, field: str = "ratio_sdpa", what: str = "SDPA") -> Callable[[Row], str]:
        return lambda row: f"{figure(row[field], goal)}x {what}"

    for name in ("centroids", "4-bit sketch"):
        for dtype in ("bfloat16", "float32"):
            wanted = {"group": "gate", "case": f"break-even: {name}", "dtype": dtype, "N": 1024}
            cases.append((f"whole call at 1,024 tokens, {name}, {SHORT[dtype]}", wanted, over(1.0), "1x"))
    cases.append(("4K uniform, bf16", {"group": "gate", "case": "4K uniform"}, over(1.0), "1x"))
    cases.append(("32K clustered, bf16", {"group": "gate", "case": "32K clustered"}, over(4.0), "4x"))
    cases.append(
        (
            "exact top-k attention, k = 8, L = 4,096, D = 32",
            {"group": "topk", "N": 4096},
            over(6.0, "ratio", "the naive form"),
            "6x",
        )
    )
    return each(machines, cases)


def layers(machines: dict[str, list[Row]]) -> str:
    """Number-theoretic patterns over SDPA, packed weights over `functional.linear`."""
    titles = {"primes": "primes (density .124)", "squares": "squares (.011)", "mian-chowla": "Mian-Chowla (.0075)"}

    def lines() -> Iterator[list[str]]:
        for pattern, title in titles.items():
            for dtype in SHORT:
                found = [one(rows, group="index", case=f"{pattern}, auto", dtype=dtype) for rows in machines.values()]
                goal = goal_of(found[0], "ratio_sdpa")
                yield [
                    f"{title}, {SHORT[dtype]}",
                    *(figure(row["ratio_sdpa"], goal) + "x" for row in found),
                    f"{goal:g}x" if goal else "",
                ]
        for dtype in SHORT:
            cells = []
            for rows in machines.values():
                # the ratio of these rows is the forward pass over the backward pass
                times = [1 / one(rows, group="index", case=f"{pattern}, backward", dtype=dtype)["ratio"] for pattern in titles]
                cells.append(", ".join(rounded(x, 1, 3.0) for x in times))
            yield [f"backward over forward, {SHORT[dtype]}: primes, squares, Mian-Chowla", *cells, "at most 3"]
        for dtype in SHORT:
            found = [one(rows, group="ternary", case="packed product x 1", dtype=dtype) for rows in machines.values()]
            goal = goal_of(found[0], "ratio")
            yield [
                f"packed ternary 4,096 x 4,096 matrix-vector, {SHORT[dtype]}",
                *(figure(row["ratio"], goal) + "x" for row in found),
                f"{goal:g}x",
            ]
        found = (one(rows, group="ternary", case="cached step") for rows in machines.values())
        what = "`SparseCausalAttention` step at 65,536 cached tokens, over a cache by concatenation"
        yield [what, *(figure(row["ratio"], 10.0) + "x" for row in found), "10x"]

    return table(["", *machines, "goal"], lines())


TABLES = {"attend": attend, "decode": decode, "gate": gate, "layers": layers}


def written(text: str) -> str:
    """``text`` with every measured table as the records have it."""
    machines = read()
    return re.sub(
        r"(<!-- measured: (\w+) -->\n).*?(\n<!-- end -->)",
        lambda found: found[1] + TABLES[found[2]](machines) + found[3],
        text,
        flags=re.DOTALL,
    )


def main() -> int:
    before = README.read_text()
    after = written(before)
    if "--check" in sys.argv[1:]:
        if before == after:
            return 0
        print("README.md does not hold what docs/benchmarks/ does: run python docs/readme_tables.py")
        return 1
    README.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
