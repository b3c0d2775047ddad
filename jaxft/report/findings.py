"""Findings as sections of a page: flags first, then pictures, then the table."""

from __future__ import annotations

from collections.abc import Sequence

from jaxft.evaluate.drawing import picture_svg
from jaxft.evaluate.finding import Finding, shown_value
from jaxft.report.html import Markup, document, facts, folded, join, section, slug, table, tag


def finding_section(finding: Finding) -> Markup:
    """One check, as a section with a heading of its own.

    Raises:
      ImportError: matplotlib is not installed.
    """
    shown = [c for c in finding.units if any(r.values.get(c) is not None for r in finding.rows)]
    headings = [
        "model",
        "subject",
        *(
            c.replace("_", " ") + (f", {finding.units[c]}" if finding.units[c] else "")
            for c in shown
        ),
    ]
    rows = [
        [row.model, row.subject, *(shown_value(row.values.get(c)) for c in shown)]
        for row in finding.rows
    ]
    flags = [tag("li", f"{row.model}, {row.subject}: {row.flag}") for row in finding.flags]
    pictures = [
        tag("figure", Markup(picture_svg(picture, ids=f"{slug(finding.check)}-{i}")))
        for i, picture in enumerate(finding.pictures)
    ]
    return section(
        finding.check,
        *([tag("ul", *flags, class_="warnings")] if flags else []),
        *pictures,
        table(headings, rows, text=2),
        *(tag("p", note, class_="note") for note in finding.notes),
        folded("settings", facts(finding.settings)) if finding.settings else "",
    )


def findings_page(title: str, findings: Sequence[Finding]) -> str:
    """A whole page that loads nothing and runs nothing.

    Raises:
      ImportError: matplotlib is not installed.
    """
    links = (tag("a", f.check, href=f"#{slug(f.check)}") for f in findings)
    return document(
        title, tag("h1", title), tag("nav", *links), join(finding_section(f) for f in findings)
    )
