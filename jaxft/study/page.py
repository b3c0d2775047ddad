"""A study on one page."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

import yaml

from jaxft.evaluate.drawing import picture_svg
from jaxft.report.html import Markup, document, facts, folded, join, section, slug, table, tag
from jaxft.study import collect, figures, tables
from jaxft.study.collect import Outcome
from jaxft.study.config import Common
from jaxft.study.tables import Grouped
from jaxft.version import __version__

PAGE, SUMMARY, RESULTS = "report.html", "summary.csv", "results"


def write(study: Common, found: Sequence[Outcome]) -> list[Path]:
    """Table, summary and page into ``results/`` of the study; they replace those of before.

    Raises:
      ImportError: matplotlib is not installed.
    """
    folder = study.output / RESULTS
    groups = tables.grouped(found)
    text = page(study, found, groups)  # before anything is written
    written = collect.write(folder, list(collect.rows(found)))
    written.append(collect.replace(folder / SUMMARY, tables.to_csv(groups)))
    written.append(collect.replace(folder / PAGE, text))
    return written


def page(study: Common, found: Sequence[Outcome], groups: Sequence[Grouped]) -> str:
    """The page; it loads nothing and runs nothing.

    Raises:
      ImportError: matplotlib is not installed.
    """
    title = f"jaxft study {study.output.name}"
    counts: dict[str, int] = {}
    for outcome in found:
        counts[outcome.status] = counts.get(outcome.status, 0) + 1
    told = ", ".join(f"{count} {status}" for status, count in counts.items())
    reasons = [tag("li", reason) for group in groups for reason in group.reasons]
    links = (tag("a", name, href=f"#{slug(name)}") for name in (*study.datasets, "settings"))
    settings = yaml.safe_dump(study.model_dump(mode="json", exclude_unset=True), sort_keys=False)
    return document(
        title,
        tag("h1", title),
        tag("p", f"{len(found)} cells: {told}. Means ± sample standard deviation over seeds."),
        tag("nav", *links),
        *([tag("ul", *reasons, class_="warnings")] if reasons else []),
        join(_dataset(study, name, groups) for name in study.datasets),
        section("settings", folded("the study", tag("pre", settings)), facts(_facts(found))),
    )


def _facts(found: Sequence[Outcome]) -> dict[str, str]:
    environments = [o.result.environment for o in found if o.result and o.result.environment]
    seen: dict[str, list[str]] = {}
    for environment in environments:
        for key, value in environment.items():
            if value not in seen.setdefault(key, []):
                seen[key].append(value)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    made = {"collected": f"{today} by jaxft {__version__}"}
    return made | {key: " | ".join(values) for key, values in seen.items()}


def _dataset(study: Common, name: str, groups: Sequence[Grouped]) -> Markup:
    own = [found for found in groups if found.group.dataset == name]
    bases, targets = list(study.base_test), list(study.datasets[name].test)
    headings, lines = tables.cells_of(own, tables.columns(own, bases))
    drawn = [
        tag("figure", Markup(picture_svg(picture, ids=f"{slug(name)}-{number}")))
        for number, picture in enumerate(figures.pictures(own, targets, bases))
    ]
    return section(name, table(headings, lines, text=1), *drawn)
