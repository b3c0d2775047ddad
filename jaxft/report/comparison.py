"""A comparison as a page: the summary first, a column per model, then every check."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxft.evaluate.drawing import picture_svg
from jaxft.evaluate.finding import shown_value
from jaxft.report.findings import finding_section
from jaxft.report.html import Markup, document, join, section, slug, table, tag

if TYPE_CHECKING:
    from jaxft.evaluate.compare import Comparison, Entry


def comparison_page(title: str, comparison: Comparison) -> str:
    """A whole page that loads nothing and runs nothing.

    Raises:
      ImportError: matplotlib is not installed.
    """
    checks = [finding.check for finding in comparison.findings]
    links = (tag("a", name, href=f"#{slug(name)}") for name in ("summary", *checks))
    return document(
        title,
        tag("h1", title),
        tag("nav", *links),
        _summary(comparison),
        join(finding_section(finding) for finding in comparison.findings),
    )


def _summary(comparison: Comparison) -> Markup:
    """The headlines, the best of each in colour, and the Pareto front."""
    found = comparison.summary
    flags = [tag("li", f"{row.model}: {row.flag}") for row in found.flags]
    figures = [
        tag("figure", Markup(picture_svg(picture, ids=f"summary-{i}")))
        for i, picture in enumerate(found.pictures)
    ]
    headings = ["check", "quantity", "unit", *comparison.models]
    lines = [_line(entry) for entry in comparison.entries]
    return section(
        found.check,
        *([tag("ul", *flags, class_="warnings")] if flags else []),
        table(headings, lines, text=3),
        *figures,
        *(tag("p", note, class_="note") for note in found.notes),
    )


def _line(entry: Entry) -> list[str]:
    link = tag("td", tag("a", entry.check, href=f"#{slug(entry.check)}"), class_="text")
    cells = [
        tag("td", shown_value(value), class_="good" if name in entry.best else None)
        for name, value in entry.values.items()
    ]
    return [link, entry.quantity, entry.unit, *cells]
