"""The page: one file without scripts that needs nothing else to be read."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxft.bundle import refuse_existing
from jaxft.report import sections
from jaxft.report.contents import Report
from jaxft.report.html import Markup, document, facts, section, slug, tag
from jaxft.report.sections import Tables
from jaxft.version import __version__

RUN = "jaxft-run"
"""Name of the meta element that tells runs apart."""


def write(path: str | Path, report: Report) -> Path:
    """Write a report as one HTML file.

    Args:
      path: of the file. An existing file is replaced if it is a report of the same ``run``.
      report: the contents.

    Returns:
      The path.

    Raises:
      FileExistsError: ``path`` exists and is anything else.
    """
    path = Path(path)
    if not (report.run and path.is_file() and _run_of(path) == report.run):
        refuse_existing(path)
    scratch = path.with_name(f".{path.name}.part")
    scratch.write_text(render(report), encoding="utf-8")
    scratch.replace(path)
    return path


def render(report: Report) -> str:
    """The HTML of a report."""
    tables = sections.tables(report)
    contents = {title: make(report, tables) for title, make in sections.SECTIONS.items()}
    present = {title: content for title, content in contents.items() if content}
    numbers = as_json(report, tables)
    encoded = base64.b64encode(numbers.encode()).decode()
    return document(
        report.title,
        tag("h1", report.title),
        facts(report.summary) if report.summary else "",
        sections.warnings(report.warnings),
        tag("nav", *(tag("a", title, href=f"#{slug(title)}") for title in present)),
        *(section(title, content) for title, content in present.items()),
        tag(
            "footer",
            tag(
                "a",
                "numbers as JSON",
                href=f"data:application/json;base64,{encoded}",
                download="report.json",
            ),
            f" · made by jaxft {__version__}",
        ),
        # no text may end the element; in JSON, < stands only inside strings
        Markup(
            '<script type="application/json" id="numbers">'
            + numbers.replace("<", r"\u003c")
            + "</script>"
        ),
        **{"generator": f"jaxft {__version__}", RUN: report.run},
    )


def as_json(report: Report, tables: Tables) -> str:
    """The numbers of a report; what is not finite is null."""
    return json.dumps(
        _finite(
            {
                "title": report.title,
                "run": report.run,
                "summary": report.summary,
                "warnings": report.warnings,
                "tests": {
                    test.name: {"before": before.to_dict(), "after": after.to_dict()}
                    for test, (before, after) in zip(report.tests, tables, strict=True)
                },
                "best_epoch": report.best_epoch,
                "history": report.history,
                "e0s": report.e0s,
                "e0s_used": report.e0s_used,
                "works": [work.key for work in report.works],
                "environment": report.environment,
                "timings": report.timings,
            }
        ),
        allow_nan=False,
    )


def _finite(value: Any) -> Any:
    """The same for JSON: no NaN, and text for what JSON does not know."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _run_of(path: Path) -> str | None:
    """The run that a file is the report of."""
    head = path.read_text("utf-8", errors="replace").partition("<body")[0]
    after = head.partition(f'<meta name="{RUN}" content="')[2]
    return html.unescape(after.partition('"')[0]) or None
