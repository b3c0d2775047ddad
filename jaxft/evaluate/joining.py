"""Findings of several runs as one: rows of other models and checks, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jaxft.document import loads
from jaxft.evaluate.cost import COST
from jaxft.evaluate.finding import Finding, from_dict


def merge(findings: Sequence[Finding]) -> list[Finding]:
    """One finding per check, rows of all one after the other.

    Raises:
      ValueError: two say different things of the same model and subject, or units differ.
    """
    merged: dict[str, Finding] = {}
    for finding in findings:
        known = merged.get(finding.check)
        merged[finding.check] = finding if known is None else _both(known, finding)
    return list(merged.values())


def _both(a: Finding, b: Finding) -> Finding:
    wrong = [c for c in a.units if c in b.units and a.units[c] != b.units[c]]
    if wrong:
        raise ValueError(f"two results of {a.check} give {', '.join(wrong)} in different units.")
    rows = list(a.rows)
    known = {(row.model, row.subject) for row in rows}
    for row in b.rows:
        if row in a.rows:
            continue
        if (row.model, row.subject) not in known:
            rows.append(row)
        elif a.check == COST:  # times differ from run to run
            rows.append(replace(row, subject=f"{row.subject} (again)"))
        else:
            raise ValueError(
                f"two results of {a.check} differ about {row.model!r}, {row.subject!r}; give one "
                "of them, or another name to the model of one."
            )
    keys = sorted(k for k in {**a.settings, **b.settings} if _other(a, b, k))
    note = f"The runs differ in their settings: {', '.join(keys)}."
    notes = dict.fromkeys([*a.notes, *b.notes, *([note] if keys else [])])
    return Finding(
        a.check,
        tuple(rows),
        {**a.units, **b.units},
        {**b.settings, **a.settings},
        a.pictures + b.pictures,
        tuple(notes),
    )


def _other(a: Finding, b: Finding, key: str) -> bool:
    """Whether a setting differs, as JSON has it."""
    plain = [replace(f, rows=(), pictures=()).to_dict()["settings"].get(key) for f in (a, b)]
    return bool(plain[0] != plain[1])


def read_findings(path: str | Path) -> list[Finding]:
    """What ``--save`` of a check or a comparison wrote.

    Raises:
      ValueError: the file is no such document.
    """
    try:
        document = loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}).") from error
    is_many = isinstance(document, dict) and isinstance(document.get("findings"), list)
    try:
        return [from_dict(found) for found in (document["findings"] if is_many else [document])]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
