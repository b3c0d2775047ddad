"""The table of pairs in docs/strategies.md, from a run of tests/test_laws.py.

pytest tests/test_laws.py --junitxml=REPORT.xml
python benchmarks/laws.py REPORT.xml           prints the table
python benchmarks/laws.py REPORT.xml --write   puts it into docs/strategies.md
"""

from __future__ import annotations

import argparse
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "strategies.md"
BEGIN, END = "<!-- laws: printed by benchmarks/laws.py -->", "<!-- end of laws -->"
PAIR_TESTS = {"test_pair_obeys_the_laws", "test_pair_trains_lawfully"}
SINGLE_TESTS = {"test_recipe_obeys_the_laws", "test_recipe_trains_lawfully"}


def outcomes(report: Path) -> dict[str, set[str]]:
    """``{recipe: names of the tests that passed}``; a failure is an error."""
    found: dict[str, set[str]] = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        match = re.fullmatch(r"(\w+)\[(.+)\]", case.get("name", ""))
        if match is None or match[1] not in PAIR_TESTS | SINGLE_TESTS:
            continue
        if any(child.tag in ("failure", "error", "skipped") for child in case):
            sys.exit(f"error: {case.get('name')} did not pass; nothing to tabulate.")
        found.setdefault(match[2], set()).add(match[1])
    return found


def table(report: Path) -> str:
    """✓ where a pair passed both tests; on the diagonal, the strategy alone."""
    found = outcomes(report)
    pairs = [name.split("+") for name in found if name.count("+") == 1]
    names = list(dict.fromkeys(name for pair in pairs for name in pair))

    def cell(a: str, b: str) -> str:
        if a == b:
            return "✓" if found.get(a) == SINGLE_TESTS else "?"
        passed = found.get(f"{a}+{b}") or found.get(f"{b}+{a}")
        return "✓" if passed == PAIR_TESTS else "?"

    rows = ["| |" + "|".join(names) + "|", "|---" * (len(names) + 1) + "|"]
    rows += [f"|{a}|" + "|".join(cell(a, b) for b in names) + "|" for a in names]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    found = table(args.report)
    if not args.write:
        print(found)
        return
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{found}\n{END}{after}")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
